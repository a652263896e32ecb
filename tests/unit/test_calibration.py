import json

import numpy as np
import pytest
from scipy.special import expit, log_softmax, logit

from cell2text.confidence.back_off import TermsAbove, choose_threshold
from cell2text.confidence.calibration import (
    FEWEST_FOR_ISOTONIC,
    ProgrammeCalibration,
    SlotCalibration,
    Steps,
    calibrate_programmes,
    calibrate_slot,
    fit_none,
    fit_steps,
)

CANDIDATES = list("abcde")


def draw(cells, seed=0, sharpness=1.0, unseen=0.0, signal=2.0):
    """Log-probabilities that are calibrated at a sharpness of 1, of five types and of others, and the true types."""
    rng = np.random.default_rng(seed)
    given = log_softmax(signal * rng.normal(size=(cells, 5)), axis=1)
    true = (np.exp(given).cumsum(axis=1) > rng.random((cells, 1))).argmax(axis=1)
    names = np.array(CANDIDATES, dtype=object)[true]
    names[rng.random(cells) < unseen] = "z"
    return log_softmax(sharpness * given, axis=1), names


def calibration_error(probabilities, names):
    best, top = probabilities.argmax(axis=1), probabilities.max(axis=1)
    right = np.array(CANDIDATES, dtype=object)[best] == names
    bins = np.minimum((top * 10).astype(int), 9)
    return sum(abs((top - right)[bins == one].sum()) for one in range(10)) / len(top)


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 3.0])
def test_the_temperature_is_recovered(sharpness):
    fitted = calibrate_slot(draw(900, sharpness=sharpness)[0], CANDIDATES, draw(900)[1])
    assert fitted.weights[0] == pytest.approx(1 / sharpness, rel=0.15)
    assert (fitted.weights[1], fitted.none, fitted.steps, fitted.cells) == (0, 0, None, 900)
    new, names = draw(5000, seed=1, sharpness=sharpness)
    assert calibration_error(fitted.probabilities(new), names) < 0.03
    if sharpness == 3:
        assert calibration_error(np.exp(new), names) > 0.1


def test_the_fit_is_the_best_by_likelihood():
    given, names = draw(300, sharpness=2)
    codes = np.array([CANDIDATES.index(name) for name in names])
    weight = calibrate_slot(given, CANDIDATES, names).weights[0]

    def loss(one):
        return (one - 1) ** 2 / 2 - log_softmax(one * given, axis=1)[np.arange(300), codes].sum()

    assert loss(weight) <= min(loss(weight + step) for step in (-0.01, 0.01))


def test_cells_of_types_without_training_cells_lower_every_confidence():
    given, names = draw(800, unseen=0.3)
    fitted = calibrate_slot(given, CANDIDATES, names)
    assert fitted.none == np.mean(names == "z")
    assert fitted.weights[0] == pytest.approx(1, abs=0.15)  # they have no part in the likelihood
    probabilities = fitted.probabilities(given)
    assert probabilities.sum(axis=1) == pytest.approx(1 - fitted.none)
    new, others = draw(5000, seed=1, unseen=0.3)
    assert calibration_error(fitted.probabilities(new), others) < 0.04
    assert calibration_error(np.exp(new), others) > 0.15


def test_the_projector_helps_where_it_knows_more():
    strong, names = draw(600, signal=3)
    weak = log_softmax(np.random.default_rng(5).normal(size=(600, 5)), axis=1)
    fitted = calibrate_slot(weak, CANDIDATES, names, strong)
    assert fitted.weights[1] == pytest.approx(1, abs=0.2) and fitted.weights[0] < 0.3
    assert calibrate_slot(strong, CANDIDATES, names, weak).weights == pytest.approx((1, 0), abs=0.15)
    with pytest.raises(ValueError, match="projector"):
        fitted.probabilities(weak)
    # a projector that contradicts the truth gets no negative weight
    assert calibrate_slot(weak, CANDIDATES, names, -strong).weights[1] == 0


SHARES = np.array([0.6, 0.3, 0.08, 0.015, 0.005])


@pytest.mark.parametrize(("too_much", "weight"), [(0.6, -0.6), (0.0, 0.0), (-0.6, 0.0), (1.5, -1.0)])
def test_what_common_names_gained_too_much_is_taken_back(too_much, weight):
    given, names = draw(2000)
    overrated = log_softmax(given + too_much * np.log(SHARES), axis=1)
    fitted = calibrate_slot(overrated, CANDIDATES, names, shares=SHARES)
    assert fitted.share_weight == pytest.approx(weight, abs=0.06)
    if too_much == 0.6:
        assert fitted.probabilities(overrated) == pytest.approx(np.exp(given), abs=0.03)
        without = calibrate_slot(overrated, CANDIDATES, names)
        equal = calibrate_slot(overrated, CANDIDATES, names, shares=np.full(5, 0.2))
        assert equal.weights == pytest.approx(without.weights) and without.share_weight == 0
        assert calibration_error(fitted.probabilities(overrated), names) < 0.03


def test_the_gain_of_a_name_by_hand():
    fitted = SlotCalibration(9, share_weight=-0.5, log_shares=(np.log(0.64), np.log(0.04)))
    assert fitted.gains == pytest.approx([-np.log(0.8), -np.log(0.2)])
    # 0.8 / 0.8 to 0.2 / 0.2
    assert fitted.probabilities(np.log([[0.8, 0.2]])) == pytest.approx(np.array([[0.5, 0.5]]))


@pytest.mark.parametrize("right", [True, False])
def test_few_cells_change_little(right):
    given = log_softmax(np.array([[5.0, 0, 0, 0, 0]] * 3), axis=1)
    fitted = calibrate_slot(given, CANDIDATES, ["a" if right else "b"] * 3)
    assert (0.9 < fitted.weights[0] < 1.5) if right else (0.05 <= fitted.weights[0] < 0.9)
    assert np.isfinite(fitted.probabilities(given)).all()


@pytest.mark.parametrize("truth", [[None] * 4, ["z"] * 4, ["a", None, "z", "b"]])
def test_cells_without_a_label_or_candidate_give_finite_probabilities(truth):
    given = draw(4)[0]
    fitted = calibrate_slot(given, CANDIDATES, truth)
    assert fitted.cells == sum(one is not None for one in truth)
    if truth[0] != "a":
        assert fitted.weights == (1, 0)
    assert np.isfinite(fitted.probabilities(given)).all()


def test_candidates_that_were_not_scored_and_confident_mistakes_stay_finite():
    given = np.array([[0.0, -np.inf, -1e9, -np.inf, -np.inf]] * 10)
    for truth in (["a"] * 10, ["b"] * 10):
        found = calibrate_slot(given, CANDIDATES, truth, given)
        assert np.isfinite(found.probabilities(given, given)).all() and np.isfinite(found.weights).all()
    with pytest.raises(ValueError, match="below infinity"):
        calibrate_slot(given * np.nan, CANDIDATES, ["a"] * 10)


@pytest.mark.parametrize("candidates", [[], ["a"]])
def test_a_slot_with_at_most_one_candidate(candidates):
    given = np.zeros((6, len(candidates)))
    fitted = calibrate_slot(given, candidates, ["a"] * 3 + ["z"] * 3)
    assert fitted.probabilities(given).tolist() == [[0.5]] * 6 if candidates else [[]] * 6


def bent(cells, seed):
    """Probabilities with an error that no temperature corrects: never right more often than in 60% of the cells."""
    given, names = draw(cells, seed=seed, signal=4)
    rng = np.random.default_rng(seed + 100)
    wrong = (np.exp(given).max(axis=1) > 0.7) & (rng.random(cells) < 0.4)
    names[wrong] = np.array(CANDIDATES, dtype=object)[np.argsort(given, axis=1)[wrong, 0]]
    return given, names


def test_isotonic_regression_is_used_where_it_helps():
    given, names = bent(3000, 0)
    fitted = calibrate_slot(given, CANDIDATES, names)
    assert fitted.steps is not None
    new, others = bent(5000, 1)
    probabilities = fitted.probabilities(new)
    without = SlotCalibration(3000, fitted.weights, fitted.none).probabilities(new)
    assert calibration_error(probabilities, others) < 0.03 < calibration_error(without, others)
    assert (probabilities.argmax(axis=1) == without.argmax(axis=1)).all()
    assert (probabilities >= 0).all() and (probabilities.sum(axis=1) <= 1 + 1e-9).all()
    assert calibrate_slot(given[:999], CANDIDATES, names[:999]).steps is None


def test_isotonic_regression_is_not_used_where_it_does_not_help():
    rng = np.random.default_rng(0)
    assert FEWEST_FOR_ISOTONIC == 1000
    used = 0
    for _ in range(20):
        probabilities = rng.random(1000)
        used += fit_steps(probabilities, rng.random(1000) < probabilities) is not None
    assert used <= 3


def test_the_greatest_probability_stays_the_greatest():
    low = SlotCalibration(9, steps=Steps((0.0, 1.0), (0.01, 0.02)))
    given = [[0.6, 0.3, 0.1, 1e-99, 1e-99], [0.96, 0.01, 0.01, 0.01, 0.01], [1, 1e-99, 1e-99, 1e-99, 1e-99]]
    found = low.probabilities(np.log(given))
    assert (found.argmax(axis=1) == 0).all() and np.isfinite(found).all()
    assert found[0] == pytest.approx([3 / 7, 3 / 7, 1 / 7, 0, 0], abs=1e-5)
    assert found.sum(axis=1)[:2] == pytest.approx([1, 1])


def test_programmes_get_the_probability_of_being_a_true_one():
    rng = np.random.default_rng(0)
    true = rng.uniform(0.02, 0.98, size=(400, 2))
    right = rng.random((400, 2)) < true
    fitted = calibrate_programmes(expit(3 * logit(true) + 1), right)
    assert (fitted.slope, fitted.intercept) == (pytest.approx(1 / 3, abs=0.06), pytest.approx(-1 / 3, abs=0.2))
    assert fitted.confidences(expit(3 * logit(true) + 1)) == pytest.approx(true, abs=0.08)
    assert np.isfinite(fitted.confidences(np.array([0.0, 1.0]))).all()
    for few in (np.ones((2, 1), dtype=bool), np.zeros((2, 1), dtype=bool)):
        assert abs(calibrate_programmes(np.full((2, 1), 0.7), few).intercept) < 1.5
    nothing = calibrate_programmes(np.empty((0, 2)), np.empty((0, 2)))
    assert nothing == ProgrammeCalibration() and nothing.confidences(np.array([0.3])) == pytest.approx([0.3])
    assert np.isnan(nothing.confidences(np.array([np.nan]))).all()


def test_calibrations_survive_json():
    given, names = bent(2000, 0)
    slot = calibrate_slot(given, CANDIDATES, names, given)
    assert slot.steps is not None
    assert SlotCalibration.from_dict(json.loads(json.dumps(slot.to_dict(), allow_nan=False))) == slot
    old = {name: value for name, value in slot.to_dict().items() if name not in ("share_weight", "log_shares")}
    assert (SlotCalibration.from_dict(old).probabilities(given, given) == slot.probabilities(given, given)).all()
    rare = SlotCalibration(9, share_weight=-0.5, log_shares=(-1.0, -2.0))
    assert SlotCalibration.from_dict(json.loads(json.dumps(rare.to_dict()))) == rare
    rng = np.random.default_rng(0)
    programmes = calibrate_programmes(rng.random(2000), rng.random(2000) < 0.3)
    assert ProgrammeCalibration.from_dict(json.loads(json.dumps(programmes.to_dict(), allow_nan=False))) == programmes


@pytest.mark.parametrize("cells", [60, 1500])
def test_calibration_and_threshold_may_share_their_validation_cells(cells):
    ancestors = {"a": ["x"], "b": ["x"], "c": ["y"], "d": ["y"], "e": ["x", "y"]}
    terms, wrong, reported = TermsAbove(CANDIDATES, ancestors), [], []
    for seed in range(100 if cells < 100 else 25):
        given, names = draw(cells, seed=seed, sharpness=3, unseen=0.1)
        fitted = calibrate_slot(given, CANDIDATES, names)
        threshold = choose_threshold(terms, fitted.probabilities(given), names, 0.8)
        new, others = draw(500, seed=1000 + seed, sharpness=3, unseen=0.1)
        ids, _ = terms.report(fitted.probabilities(new), threshold.value)
        known = [(one, true) for one, true in zip(ids, others, strict=True) if one]
        wrong.append(sum(one != true and one not in ancestors.get(true, []) for one, true in known) / len(known or [1]))
        reported.append(len(known) / len(ids))
    assert np.mean(wrong) <= 0.2 + 2 * np.std(wrong) / np.sqrt(len(wrong))
    assert np.mean(reported) > 0.3


def studies_with_novelty(slope, seed=0):
    """Return novelty of cells of five studies, whether their types are no candidates, and the studies.

    The logit of the latter is -1 + slope x log novelty.
    """
    random = np.random.default_rng(seed)
    novelty = random.lognormal(0.5, 0.7, 1500)
    none = random.random(1500) < expit(-1 + slope * np.log(novelty))
    return novelty, none, np.repeat(list("abcde"), 300)


def test_the_probability_of_no_candidate_follows_novelty():
    intercept, slope = fit_none(*studies_with_novelty(2.0))
    assert (intercept, slope) == (pytest.approx(-1, abs=0.2), pytest.approx(2, abs=0.3))
    novelty, none, studies = studies_with_novelty(2.0)
    # each study counts the same, however many cells it has
    many = np.concatenate([np.arange(1500), np.tile(np.flatnonzero(studies == "a"), 9)])
    assert fit_none(novelty[many], none[many], studies[many]) == pytest.approx((intercept, slope), abs=0.05)


def test_novelty_that_tells_nothing_changes_little():
    novelty, none, studies = studies_with_novelty(0.0)
    assert fit_none(novelty, none, studies)[1] < 0.1
    # all cells of two studies are of other types, but not because of their novelty
    assert fit_none(novelty, np.isin(studies, ["a", "c"]), studies)[1] < 0.2
    # a novel cell is not of a known type for being novel
    assert fit_none(*studies_with_novelty(-1.0))[1] == 0
    assert fit_none(novelty, np.ones(1500, dtype=bool), studies) is None
    assert fit_none(novelty, np.zeros(1500, dtype=bool), studies) is None


def test_novelty_by_hand():
    """Without candidates in half of the cells of novelty 1, in 1 of 1 + 1/e at novelty e; NaN is the overall share."""
    calibration = SlotCalibration(10, (0.0, 1.0), none=0.2, none_by_novelty=(0.0, 1.0))
    equal = np.log(np.full((3, 4), 0.25))
    found = calibration.probabilities(equal, equal, np.array([1.0, np.e, np.nan]))
    assert found[:, 0] == pytest.approx([0.5 / 4, (1 - 1 / (1 + 1 / np.e)) / 4, 0.8 / 4])
    assert calibration.probabilities(equal, equal)[:, 0] == pytest.approx([0.2] * 3)
    saved = json.loads(json.dumps(calibration.to_dict()))
    assert SlotCalibration.from_dict(saved) == calibration
    del saved["none_by_novelty"]
    assert SlotCalibration.from_dict(saved).none_by_novelty is None
