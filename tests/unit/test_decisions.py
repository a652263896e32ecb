"""What is said of a cell: ranked gene programmes, guesses, reported terms, and the calibration behind them."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.special import log_softmax

from cell2text.confidence import calibrate as calibrating
from cell2text.confidence import decisions, novelty
from cell2text.confidence.back_off import NOTHING, Threshold
from cell2text.confidence.calibration import ProgrammeCalibration, SlotCalibration, Steps
from cell2text.confidence.decisions import Confidence, rank_programmes, read_ancestors
from cell2text.contracts import PREDICTIONS
from cell2text.errors import InputError
from cell2text.weights import read_weights
from scored_cells import LABELS, ROWS, draw, run_calibrate, write_run

ANCESTORS = {"cell_type": {row[1]: row[4] for row in ROWS if row[0] == "cell_type"}, "tissue": {}}


def log(probabilities):
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities, dtype=np.float32))


# The language model names A, then C, then B. The second and third cell differ from the first in the projector alone.
STEPS = [[0.5, 0.3, 0.15, 0.05], [0, 0.2, 0.7, 0.1], [0, 0.9, 0, 0.1]]
PROJECTOR = [
    # B: 0.3 * 0.6; then A and C by the first step: 0.5 * 0.1 before 0.15 * 0.1 and 0.05 * 0.2
    ([0.1, 0.6, 0.1, 0.2], [1, 0, 2]),
    # A; C by the second step: 0.7 * 0.1 before 0.2 * 0.1 and 0.1 * 0.2 (B by the first: 0.3 * 0.1); B by the third
    ([0.6, 0.1, 0.1, 0.2], [0, 2, 1]),
    # A; D: 0.1 * 0.36 before 0.7 * 0.02; then C by the second step, which the third excludes: 0.7 before 0.2
    ([0.6, 0.02, 0.02, 0.36], [0, 3, 2]),
]


def test_the_order_of_programmes_by_hand():
    scores = {"pathway": log([STEPS] * 3), "projector_pathway": log([given for given, _ in PROJECTOR])}
    kept = {name: tensor.copy() for name, tensor in scores.items()}
    numbers, _ = rank_programmes(scores, SlotCalibration(weights=(1.0, 1.0)))
    assert numbers.tolist() == [expected for _, expected in PROJECTOR]
    assert all((scores[name] == kept[name]).all() for name in scores)
    alone, _ = rank_programmes(scores, SlotCalibration())
    assert alone.tolist() == [[0, 2, 1]] * 3  # the language model agrees with itself


def test_the_probability_of_a_programme_is_that_of_being_first_or_second():
    scores = {"pathway": log([STEPS[:2]]), "projector_pathway": log([[0.25] * 4])}
    numbers, found = rank_programmes(scores, SlotCalibration())
    assert numbers.tolist() == [[0, 2]]
    a, b, c, d = STEPS[0]
    first = a + b * a / (1 - b) + c * a / (1 - c) + d * a / (1 - d)
    second = c + a * c / (1 - a) + b * c / (1 - b) + d * c / (1 - d)
    assert found[0] == pytest.approx([first, second], abs=1e-6)
    single = scores | {"pathway": scores["pathway"][:, :1]}
    assert rank_programmes(single, SlotCalibration())[1][0] == pytest.approx([a])  # the only one of a text is first
    certain = {"pathway": log([[[1, 6e-13, 4e-13], [0, 0.6, 0.4]]]), "projector_pathway": log([[1 / 3] * 3])}
    assert rank_programmes(certain, SlotCalibration())[1][0] == pytest.approx([1, 0.6], abs=1e-5)
    none = rank_programmes(certain, SlotCalibration(none=1.0))[1]
    assert np.isfinite(none).all() and (none == 0).all()


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.05, 0.0), (0.7, 1.3), (20.0, 20.0)])
@pytest.mark.parametrize("candidates", [3, 4, 30])
def test_no_programme_is_named_twice(weights, candidates):
    random = np.random.default_rng(0)
    steps = random.normal(0, 3, (200, 3, candidates))
    for place in (1, 2):
        for earlier in range(place):
            steps[np.arange(200), place, steps[:, earlier].argmax(axis=1)] = -np.inf
    scores = {"pathway": log_softmax(steps, axis=2), "projector_pathway": random.normal(0, 3, (200, candidates))}
    numbers, found = rank_programmes(scores, SlotCalibration(weights=weights, none=0.1))
    assert all(len(set(row)) == 3 for row in numbers.tolist())
    assert ((found >= 0) & (found <= 1)).all()


STEPS_OF_SLOT = Steps((0.2, 0.9), (0.3, 0.7))
CONFIDENCE = Confidence(
    {"cell_type": SlotCalibration(9, (0.5, 0.25), 0.1, STEPS_OF_SLOT), "tissue": SlotCalibration()},
    {"cell_type": Threshold(0.8, 0.8, 9, guaranteed=True), "tissue": Threshold(NOTHING, 0.8, 0, guaranteed=False)},
    SlotCalibration(9, (1.5, 0.0)),
    ProgrammeCalibration(18, 0.9, -0.1, STEPS_OF_SLOT),
    1.25,
)


@pytest.mark.parametrize("limit", [1.25, None])
def test_confidence_is_read_as_it_was_written(tmp_path, limit):
    written = replace(CONFIDENCE, limit=limit)
    written.save(tmp_path / "calibration.json")
    assert Confidence.load(tmp_path / "calibration.json") == written


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: saved.pop("ranking"),
        lambda saved: saved["slots"]["cell_type"].update(surplus=1),
        lambda saved: saved["thresholds"]["tissue"].pop("value"),
        lambda saved: saved["slots"].update(tissue=None),
    ],
)
def test_damage_to_a_calibration_is_one_line(tmp_path, damage):
    path = tmp_path / "calibration.json"
    CONFIDENCE.save(path)
    saved = json.loads(path.read_text())
    damage(saved)
    for text in (json.dumps(saved), "{", "[]"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"^[^\n]*calibration\.json: [^\n]* Delete it and run the workflow again"):
            Confidence.load(path)


def test_guesses_reported_terms_and_ancestors_by_hand(monkeypatch):
    cell_types = [[0.9, 0.05, 0.03, 0.02], [0.5, 0.4, 0.06, 0.04], [0.1, 0.3, 0.2, 0.4], [0.02, 0.03, 0.15, 0.8]]
    scores = {
        "cell_type": log(cell_types),
        "projector_cell_type": np.full((4, 4), -1.4, np.float32),
        "tissue": np.zeros((4, 1), np.float32),
        "projector_tissue": np.zeros((4, 1), np.float32),
        "pathway": log([[[0.6, 0.4], [0, 1]], [[0.2, 0.8], [1, 0]]] * 2),
        "projector_pathway": log([[0.5, 0.5]] * 4),
    }
    certain = replace(CONFIDENCE.thresholds["tissue"], value=0.5)
    plain = Confidence(
        {"cell_type": SlotCalibration(), "tissue": SlotCalibration(none=0.25)},
        CONFIDENCE.thresholds | {"tissue": certain},
        SlotCalibration(),
        ProgrammeCalibration(),
        None,
    )
    labels = LABELS | {"pathway": ["P1", "P0"]}
    table = plain.describe(scores, labels, ANCESTORS)
    assert list(table) == list(PREDICTIONS.columns)
    assert table["cell_type_id"].to_list() == ["BM", "BM", "T8", "T8"]
    assert table["cell_type_confidence"].to_list() == pytest.approx([0.9, 0.5, 0.4, 0.8])
    # all candidates are lymphocytes, which is not worth reporting
    assert table["cell_type_reported_id"].to_list() == ["BM", "B", None, "T8"]
    assert table["cell_type_reported_confidence"].to_list()[:2] == pytest.approx([0.9, 0.9])
    assert table["cell_type_reported_confidence"][2] is None
    assert table["tissue_id"].to_list() == table["tissue_reported_id"].to_list() == ["UBERON:0000178"] * 4
    assert table["tissue_confidence"].to_list() == [0.75] * 4
    assert table["pathway_ids"].to_list() == [["P1", "P0"], ["P0", "P1"]] * 2
    assert np.allclose(table["pathway_confidences"].to_list(), 1, atol=1e-5)  # both of two are always named
    assert all(value is None for value in table["sex_id"]) and all(value is None for value in table["novel"])
    rows = json.loads(json.dumps(table.to_dict("records"), allow_nan=False))
    assert rows[2]["cell_type_reported_id"] is None and rows[2]["disease_confidence"] is None
    never = replace(plain, thresholds=CONFIDENCE.thresholds).describe(scores, labels, ANCESTORS)
    assert all(value is None for value in never["tissue_reported_id"])
    monkeypatch.setattr(decisions, "CELLS_AT_ONCE", 3)
    assert plain.describe(scores, labels, ANCESTORS).equals(table)
    nothing = plain.describe({name: tensor[:0] for name, tensor in scores.items()}, labels, ANCESTORS)
    assert len(nothing) == 0 and list(nothing) == list(table)


def test_cells_without_programmes_name_none():
    scores = {"cell_type": log([[0.9, 0.1]]), "projector_cell_type": log([[0.9, 0.1]])}
    table = CONFIDENCE.describe(scores, {"cell_type": ["BM", "BN"]}, ANCESTORS)
    assert table["pathway_ids"].to_list() == [[]] and table["pathway_confidences"].to_list() == [None]


def test_shares_of_the_training_cells_by_hand():
    cells = pd.DataFrame({"cell_type_id": pd.Categorical(["a", "b", "a", None, "a", "c"], categories=list("cab"))})
    labels = {"cell_type": ["b", "a", "c", "never trained on"], "pathway": ["P"]}
    shares = calibrating._find_shares(cells, labels)
    assert list(shares) == ["cell_type"]
    assert shares["cell_type"].tolist() == pytest.approx([1 / 6, 3 / 6, 1 / 6, 1 / 6])  # at least one cell each


def calibration_error(confidence, right):
    bins = np.minimum((confidence * 15).astype(int), 14)
    return sum(abs((confidence - right)[bins == number].sum()) for number in range(15)) / len(right)


def test_calibration_recovers_the_temperature_and_fits_new_cells(tmp_path):
    outputs = run_calibrate(write_run(tmp_path, *draw(3000, 1)))
    fitted = Confidence.load(outputs[0])
    assert fitted.slots["cell_type"].weights == pytest.approx((0.5, 0), abs=0.05)
    assert fitted.slots["cell_type"].cells == 3000 and fitted.slots["cell_type"].none == 0
    assert fitted.slots["tissue"].probabilities(np.zeros((2, 1)), np.zeros((2, 1))).tolist() == [[1], [1]]
    assert fitted.ranking.weights == pytest.approx((1, 0), abs=0.1) and fitted.programmes.programmes == 6000
    assert fitted.thresholds["cell_type"].guaranteed and 0.5 <= fitted.thresholds["cell_type"].value < 0.8
    assert read_ancestors(tmp_path / "terms.parquet")["cell_type"]["BM"].tolist() == ["B", "L"]
    scores, true, named = draw(10_000, 2)
    table = fitted.describe(scores, LABELS, ANCESTORS)
    right = (table["cell_type_id"] == true).to_numpy()
    assert calibration_error(table["cell_type_confidence"].to_numpy(float), right) < 0.02
    raw = np.exp(scores["cell_type"].max(axis=1))
    assert calibration_error(raw, right) > 0.1
    # the confidence of the first programme and of the second one are right, each by itself
    confidence = np.array(table["pathway_confidences"].to_list())
    among = np.array([[one in pair for one in given] for given, pair in zip(table["pathway_ids"], named, strict=True)])
    for place in range(2):
        assert calibration_error(confidence[:, place], among[:, place]) < 0.03
    reference = novelty.Reference(**read_weights(outputs[1], "", "numpy"))
    assert reference.vectors.shape == (50, 4) and (reference.novelty(np.zeros((1, 4))) < fitted.limit).all()
    assert (reference.novelty(np.full((1, 4), 30.0)) > fitted.limit).all()


def test_reported_terms_are_right_as_often_as_requested(tmp_path):
    scores, true, _ = draw(20_000, 0)
    precision, coverage = [], []
    for seed in range(1, 6):
        fitted = Confidence.load(run_calibrate(write_run(tmp_path, *draw(1000, seed)), confidence=0.9)[0])
        table = fitted.describe(scores, LABELS, ANCESTORS)
        reported = table["cell_type_reported_id"].to_numpy()
        right = [term in (one, *ANCESTORS["cell_type"][one]) for term, one in zip(reported, true, strict=True)]
        kept = reported != None  # noqa: E711 - an array
        precision.append(np.mean(np.array(right)[kept]))
        coverage.append(kept.mean())
    assert np.mean(precision) == pytest.approx(0.9, abs=0.015) and np.mean(coverage) > 0.4  # on average over draws
    assert set(reported[kept]) == {"BM", "BN", "T4", "T8", "B", "T"}


def test_calibration_reads_few_of_many_cells(tmp_path, monkeypatch):
    scores, true, named = draw(60, 3)
    monkeypatch.setattr(calibrating, "MOST_CELLS", 25)
    monkeypatch.setattr(novelty, "MOST_CELLS", 20)
    outputs = run_calibrate(write_run(tmp_path, scores, true, named))
    fitted = Confidence.load(outputs[0])
    assert fitted.slots["cell_type"].cells == 20 and fitted.programmes.programmes == 40  # every third of 60
    assert len(novelty.Reference(**read_weights(outputs[1], "", "numpy")).vectors) == 20


def test_slots_without_validation_labels_and_types_without_training_cells(tmp_path):
    scores, true, named = draw(40, 4)
    true[:10], true[10:15] = None, "L"
    fitted = Confidence.load(run_calibrate(write_run(tmp_path, scores, true, [[]] * 40))[0])
    assert fitted.slots["cell_type"].cells == 30 and fitted.slots["cell_type"].none == pytest.approx(5 / 30)
    assert fitted.ranking == SlotCalibration() and fitted.thresholds["tissue"].cells == 40
    unlabelled = Confidence.load(run_calibrate(write_run(tmp_path, scores, [None] * 40, named))[0])
    assert unlabelled.slots["cell_type"] == SlotCalibration()
    assert unlabelled.thresholds["cell_type"] == Threshold(0.8, 0.8, 0, guaranteed=False)
    table = unlabelled.describe(scores, LABELS, ANCESTORS)
    assert table["cell_type_reported_id"].notna().any()


def test_without_validation_cells_no_cell_is_judged_novel(tmp_path):
    scores, true, named = draw(0, 5)
    for by in ("model", "projector", "cascade"):
        assert (
            Confidence.load(run_calibrate(write_run(tmp_path, scores, true, named), by=by, agreement=0.9)[0]).limit
            is None
        )
    fitted = Confidence.load(run_calibrate(tmp_path)[0])
    assert fitted.limit is None and fitted.programmes == ProgrammeCalibration()
    assert fitted.slots == {"cell_type": SlotCalibration(), "tissue": SlotCalibration()}


@pytest.mark.parametrize("training", [0, 1])
def test_fewer_than_two_training_cells_are_one_line(tmp_path, training):
    write_run(tmp_path, *draw(3, 6), training=training)
    with pytest.raises(InputError, match=rf"descriptions\.parquet: {training} training cells, .* Add training cells"):
        run_calibrate(tmp_path)


def test_a_model_without_programmes(tmp_path):
    scores, true, _ = draw(30, 7)
    labels = {slot: LABELS[slot] for slot in ("cell_type", "tissue")}
    scores = {name: tensor for name, tensor in scores.items() if "pathway" not in name}
    fitted = Confidence.load(run_calibrate(write_run(tmp_path, scores, true, [[]] * 30, labels=labels))[0])
    assert fitted.ranking == SlotCalibration() and fitted.programmes == ProgrammeCalibration()
    assert fitted.describe(scores, labels, ANCESTORS)["pathway_ids"].to_list() == [[]] * 30
