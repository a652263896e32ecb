import json
from dataclasses import asdict

import numpy as np
import pytest

from cell2text.confidence.back_off import NOTHING, TermsAbove, Threshold, choose_threshold

# cell > leukocyte > {T cell > {CD4, CD8}, monocyte}; a NKT cell is a T cell and a NK cell
ANCESTORS = {
    "cell": [],
    "leukocyte": ["cell"],
    "monocyte": ["leukocyte", "cell"],
    "NK": ["leukocyte", "cell"],
    "T": ["leukocyte", "cell"],
    "CD4": ["T", "leukocyte", "cell"],
    "CD8": ["T", "leukocyte", "cell"],
    "NKT": ["NK", "T", "leukocyte", "cell"],
    "neuron": ["cell"],
}
CANDIDATES = ["CD4", "CD8", "NKT", "monocyte", "neuron"]
TERMS = TermsAbove(CANDIDATES, ANCESTORS)


def report(probabilities, threshold, terms=TERMS):
    ids, found = terms.report(np.array(probabilities), threshold)
    return list(zip(ids, found.astype(float).round(6).tolist(), strict=True))


def test_the_terms_are_those_above_some_but_not_all_candidates():
    assert TERMS.terms.tolist() == ["CD4", "CD8", "NKT", "NK", "T", "monocyte", "leukocyte", "neuron"]
    assert TERMS.below[TERMS.terms.tolist().index("T")].tolist() == [1, 1, 1, 0, 0]
    assert TERMS.below[TERMS.terms.tolist().index("leukocyte")].tolist() == [1, 1, 1, 1, 0]


def test_the_most_specific_term_that_reaches_the_threshold_is_reported():
    cell = [0.5, 0.3, 0.0, 0.1, 0.1]
    assert report([cell] * 5, 0.5) == [("CD4", 0.5)] * 5
    assert report([cell], 0.8) == [("T", 0.8)]
    assert report([cell], 0.81) == [("leukocyte", 0.9)]
    ids, found = TERMS.report(np.array([cell, [0.2, 0.2, 0.2, 0.1, 0.3]]), 0.95)
    assert ids.tolist() == [None, None] and np.isnan(found).all() and found.dtype == np.float32
    # the T cell is not above the most probable candidate and is reported nevertheless
    assert report([[0.25, 0.25, 0.1, 0.35, 0.05]], 0.6) == [("T", 0.6)]


def test_a_cell_of_no_candidate_type_is_still_below_general_terms():
    terms = TermsAbove(CANDIDATES, ANCESTORS)
    cell = [0.6, 0.15, 0.0, 0.0, 0.0]  # the rest is the probability of another type, such as regulatory T cell
    assert report([cell], 0.6, terms) == [("CD4", 0.6)]
    assert report([cell], 0.61, terms) == [("T", 1)]
    # a candidate is a general term only if others are below it
    assert report([[0.3, 0.45]], 0.4, TermsAbove(["monocyte", "T"], ANCESTORS)) == [("T", 0.45)]
    assert report([[0.3, 0.45]], 0.4, TermsAbove(["CD4", "T"], ANCESTORS)) == [("T", 1)]
    # each cell has a probability of its own that it is of another type
    assert report([cell, [0.6, 0.4, 0, 0, 0]], 0.61, terms) == [("T", 1), ("T", 1)]
    assert report([[0.3, 0.15, 0, 0.05, 0], [0.6, 0.3, 0, 0.1, 0]], 0.85, terms) == [("T", 0.9), ("T", 0.9)]
    assert report([cell], 0.61, TermsAbove(CANDIDATES, ANCESTORS, complete=False)) == [("T", 0.75)]
    ids, found = TermsAbove(["CD4", "neuron"], ANCESTORS).report(np.zeros((1, 2)), 0.5)
    assert ids.tolist() == [None] and np.isnan(found).all()


def test_ties_are_resolved_by_probability_and_then_by_id():
    assert report([[0.1, 0, 0.6, 0.1, 0.2]], 0.65) == [("T", 0.7)]  # NK and T both have a chain of two
    terms = TermsAbove(["NKT", "monocyte"], ANCESTORS)
    assert terms.terms.tolist() == ["NKT", "NK", "T", "monocyte"]
    terms.below[0] = 0
    assert report([[0.9, 0.1]], 0.8, terms) == [("NK", 0.9)]


def test_a_term_is_more_specific_than_its_ancestor_even_on_a_short_way_to_the_root():
    """By the shortest path, x is one step from the root and its ancestor c is three."""
    ancestors = {"r": [], "a": ["r"], "b": ["a", "r"], "c": ["b", "a", "r"], "x": ["c", "b", "a", "r"], "y": ["r"]}
    assert TermsAbove(["x", "y"], ancestors).terms[0] == "x"


@pytest.mark.parametrize(
    ("candidates", "reported"),
    [
        (["CD4"], ["CD4"]),  # a single candidate, and none of its ancestors
        (["cell"], ["cell"]),
        (["CD4", "T"], ["CD4", "T"]),  # a candidate may lie above all others
        (["CD4", "cell"], ["CD4", "T", "leukocyte"]),  # unless it is the root
        (["female", "male"], ["female", "male"]),
        ([], []),
    ],
)
def test_a_term_above_all_candidates_says_nothing(candidates, reported):
    assert sorted(TermsAbove(candidates, ANCESTORS).terms) == sorted(reported)


def test_a_slot_without_candidates_is_not_determined():
    assert report(np.zeros((2, 0)), 0.5, TermsAbove([], ANCESTORS))[0][0] is None


def test_the_threshold_by_hand():
    """CD4 is reported with 0.9 (right) twenty times, 0.7 (wrong, so is T) once and 0.6 (right) once.

    At a confidence of 0.9: 1 wrong of 22 gives 2/23 <= 0.1.
    """
    cells = [[p, 0, 0, 0, 1 - p] for p in [0.9] * 20 + [0.7, 0.6]]
    truth = ["CD4"] * 20 + ["neuron", "CD4"]
    assert choose_threshold(TERMS, np.array(cells), truth, 0.9) == Threshold(0.5, 0.9, 22, True)
    # 2/23 > 0.08: only the twenty cells at 0.9 remain, 1/21 <= 0.08
    found = choose_threshold(TERMS, np.array(cells), truth, 0.92)
    assert 0.7 < found.value <= 0.900001 and found.guaranteed
    ids, _ = TERMS.report(np.array(cells), found.value)
    assert ids.tolist() == ["CD4"] * 20 + [None, None]
    assert choose_threshold(TERMS, np.array(cells), truth, 0.955).value == NOTHING  # 1/21 > 0.045
    assert choose_threshold(TERMS, np.array(cells), ["monocyte"] * 22, 0.9).value == NOTHING


def test_a_threshold_lets_the_ancestor_be_reported_where_the_term_is_wrong():
    cells = np.array([[0.6, 0.4, 0, 0, 0]] * 50)
    found = choose_threshold(TERMS, cells, ["CD4", "CD8"] * 25, 0.8)
    assert found.value > 0.6
    assert report(cells[:1], found.value) == [("T", 1.0)]


def test_a_true_term_that_is_no_candidate_may_have_a_right_ancestor():
    ancestors = ANCESTORS | {"Treg": ["CD4", "T", "leukocyte", "cell"]}
    terms = TermsAbove(CANDIDATES, ancestors)
    assert terms.terms[terms.right_terms(["Treg"])[0]].tolist() == ["CD4", "T", "leukocyte"]
    assert not terms.right_terms(["unheard of"]).any()
    cells = np.array([[1.0, 0, 0, 0, 0]] * 20)
    assert choose_threshold(terms, cells, ["Treg"] * 20, 0.8).value == 0.5
    assert choose_threshold(terms, cells, ["T"] * 20, 0.8).value == NOTHING  # CD4 is more than is known


def test_few_validation_cells_give_no_guarantee():
    cells = np.array([[1.0, 0, 0, 0, 0]] * 9)
    for known, guaranteed in ((0, False), (3, False), (4, True), (9, True)):
        truth = ["CD4"] * known + [None] * (9 - known)
        found = choose_threshold(TERMS, cells, truth, 0.8)
        assert (found.cells, found.guaranteed) == (known, guaranteed)
        assert found.value == (0.5 if guaranteed else 0.8)
    assert choose_threshold(TERMS, cells, [None] * 9, 0.8).note == "no guarantee: 0 validation cells"
    assert found.note == "9 validation cells"
    assert Threshold.from_dict(json.loads(json.dumps(asdict(found)))) == found


def test_the_threshold_of_new_studies_by_hand():
    """Of nine studies, three are wrong in all cells at 0.9, and each of them has a single cell among 10."""
    cells = np.array([[p, 0, 0, 0, 1 - p] for p in [0.95] * 60 + [0.9] * 3])
    truth = ["CD4"] * 60 + ["neuron"] * 3
    studies = [f"s{cell % 6}" for cell in range(60)] + ["a", "b", "c"]
    # as cells, (3 + 1) / 64; as studies, (3 + 1) / 10 and (0 + 1) / 10
    assert choose_threshold(TERMS, cells, truth, 0.8).value == 0.5
    found = choose_threshold(TERMS, cells, truth, 0.8, studies)
    assert 0.9 < found.value <= 0.95 and found.guaranteed and found.studies == 9
    assert found.note == "9 held-out studies" and choose_threshold(TERMS, cells, truth, 0.6, studies).value == 0.5
    # unlabelled cells count for no study; with fewer than four studies there is no guarantee at 0.8
    few = choose_threshold(TERMS, cells, [*truth[:60], *[None] * 3], 0.8, ["a", "b", "c"] * 20 + ["d"] * 3)
    assert (few.value, few.guaranteed, few.studies, few.cells) == (0.8, False, 3, 60)
    assert few.note == "no guarantee: 3 held-out studies"


def test_at_most_the_requested_share_of_the_cells_of_a_new_study_gets_a_wrong_term():
    """Studies differ in how often the most probable term is right, whatever its probability."""
    rng = np.random.default_rng(0)
    wrong = {"cells": [], "studies": []}
    for _ in range(300):
        accuracy = np.append(rng.beta(3, 1, size=7), rng.beta(3, 1))
        share = rng.uniform(0.5, 1, size=(8, 40))
        right = rng.random((8, 40)) < accuracy[:, None]
        cells = np.stack([share, *[0 * share] * 3, 1 - share], axis=-1)
        truth = np.where(right, "CD4", "neuron")
        old, studies = slice(0, 7), np.repeat(np.arange(7), 40).astype(str)
        for name, given in (("cells", None), ("studies", studies)):
            threshold = choose_threshold(TERMS, cells[old].reshape(-1, 5), truth[old].ravel(), 0.8, given)
            ids, _ = TERMS.report(cells[7], threshold.value)
            wrong[name].append(
                np.mean([one is not None and one != true for one, true in zip(ids, truth[7], strict=True)])
            )
    assert np.mean(wrong["studies"]) <= 0.2 and np.mean(wrong["studies"]) < np.mean(wrong["cells"])


def test_confidences_in_reported_terms_of_new_studies_are_the_share_of_right_ones():
    rng = np.random.default_rng(0)
    share = rng.uniform(0.5, 1, size=3000)
    cells = np.stack([share, *[0 * share] * 3, 1 - share], axis=-1)
    right = rng.random(3000) < 1.6 * share - 0.6  # less often than the probability says
    truth = np.where(right, "CD4", "neuron")
    studies = np.arange(3000) % 10
    found = choose_threshold(TERMS, cells, truth, 0.7, studies)
    grid = np.linspace(0.7, 1, 31)
    assert np.abs(found.confidences(grid) - (1.6 * grid - 0.6)).mean() < 0.04  # it is 0.09 without the map
    assert np.isnan(found.confidences(np.array([np.nan])))
    assert Threshold.from_dict(json.loads(json.dumps(asdict(found)))) == found
    few = choose_threshold(TERMS, cells[:500], truth[:500], 0.7, studies[:500])  # too few for a map
    assert few.steps is None and few.confidences(share).tolist() == share.tolist()


def test_the_terms_reported_at_each_threshold_are_those_of_the_intervals():
    rng = np.random.default_rng(0)
    cells = rng.dirichlet(np.full(5, 0.5), size=200)
    truth = rng.choice([*CANDIDATES, "T", "NK"], size=200)
    rows, low, high, right = TERMS.intervals(cells, truth)
    for threshold in (0.05, 0.3, 0.5, 0.77, 0.9, 0.999):
        ids, _ = TERMS.report(cells, threshold)
        inside = (low < round(threshold * 1e6)) & (high >= round(threshold * 1e6))
        assert sorted(rows[inside]) == np.flatnonzero([one is not None for one in ids]).tolist()
        expected = [one == true or one in ANCESTORS[true] for one, true in zip(ids, truth, strict=True) if one]
        assert right[inside][np.argsort(rows[inside])].tolist() == expected


def simulate(rng, cells, noise, sharpness):
    """Cells of five types and of T cells without a candidate; sharpness 1 is close to calibrated."""
    types = np.arange(5)
    group = np.array([0, 0, 0, 1, 2])
    true = rng.integers(5, size=cells)
    logits = rng.normal(size=(cells, 5)) + 2 / noise * ((true[:, None] == types) + (group[true][:, None] == group))
    probabilities = np.exp(sharpness * logits)
    names = np.array(CANDIDATES, dtype=object)[true]
    names[(true < 2) & (rng.random(cells) < 0.1)] = "T"
    return probabilities / probabilities.sum(axis=1, keepdims=True), names


@pytest.mark.parametrize(("noise", "sharpness"), [(1, 1), (3, 1), (3, 4), (2, 0.3)])
@pytest.mark.parametrize("validation_cells", [15, 60, 400])
def test_at_most_the_allowed_share_is_wrong_on_average(noise, sharpness, validation_cells):
    rng, alpha = np.random.default_rng(1), 0.2
    row = {term: place for place, term in enumerate(TERMS.terms)}
    among_reported, among_all = [], []
    for _ in range(150):
        threshold = choose_threshold(TERMS, *simulate(rng, validation_cells, noise, sharpness), 1 - alpha).value
        cells, truth = simulate(rng, 300, noise, sharpness)
        ids, _ = TERMS.report(cells, threshold)
        reported = np.array([one is not None for one in ids])
        wrong = ~TERMS.right_terms(truth)[np.flatnonzero(reported), [row[one] for one in ids[reported]]]
        among_reported.append(wrong.sum() / max(reported.sum(), 1))
        among_all.append(wrong.sum() / len(cells))
    error = np.std(among_reported) / np.sqrt(len(among_reported))
    assert np.mean(among_reported) <= alpha + 2 * error
    assert np.mean(among_all) <= alpha
    if validation_cells == 400 and sharpness == 1:
        assert np.mean(among_all) > 0  # it reports something
