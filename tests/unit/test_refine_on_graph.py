"""Predictions refined on a graph of cells: solutions by hand, planted groups, and no look at labels of test cells."""

import json

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from cell2text.confidence.graph import join_neighbours, shuffle_cells
from cell2text.contracts import DESCRIPTIONS, PREDICTIONS
from cell2text.errors import InputError
from cell2text.evaluation.refine_on_graph import choose_weight, initial_probabilities, propagate, refine_on_graph
from cell2text.grammar import parse
from described_cells import B_CELL, BLOOD, LUNG, NK_CELL, write_corpus, write_embeddings

T_CELL = "CL:0000084"
CELLS = 200  # of each of two types


def path_of_three():
    return scipy.sparse.csr_array(np.array([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]]))


def test_a_path_of_three_cells_solved_by_hand():
    """With weight 1 and all cells free: I + L = [[2, -1, 0], [-1, 3, -1], [0, -1, 2]], whose determinant is 8."""
    start = np.array([[1.0], [0], [0]])
    refined = propagate(start, np.zeros(3, dtype=bool), path_of_three(), 1)
    assert refined[:, 0] == pytest.approx([5 / 8, 2 / 8, 1 / 8])


def test_known_cells_keep_their_labels_and_pull_their_neighbours():
    """The middle cell, with weight 2: (1 + 2 + 2) p = 0.5 + 2 x 1 + 2 x 0."""
    start = np.array([[1, 0], [0.5, 0.5], [0, 1]])
    refined = propagate(start, np.array([True, False, False]), path_of_three(), 2)
    assert (refined[0] == start[0]).all()
    assert refined.sum(axis=1) == pytest.approx(np.ones(3))
    # (1 + 2 + 2) p1 - 2 p2 = 0.5 + 2 and (1 + 2) p2 - 2 p1 = 0
    assert refined[1:, 0] == pytest.approx([7.5 / 11, 5 / 11])
    both = propagate(start, np.array([True, False, True]), path_of_three(), 2)
    assert both[:, 0] == pytest.approx([1, 2.5 / 5, 0])


def test_weight_zero_and_isolated_cells_keep_their_probabilities_exactly():
    rng = np.random.default_rng(0)
    start = rng.dirichlet(np.ones(4), size=30)
    vectors = rng.normal(size=(30, 3))
    studies = np.array(["a"] * 29 + ["b"])  # the only cell of its study has no neighbour
    graph = join_neighbours(vectors, studies, 5)
    known = np.arange(30) < 10
    assert np.array_equal(propagate(start, known, graph, 0), start)
    refined = propagate(start, known, graph, 3)
    assert np.array_equal(refined[29], start[29]) and np.array_equal(refined[known], start[known])
    assert not np.isclose(refined[10:29], start[10:29]).all(axis=1).any()


def test_mutual_neighbours_by_hand():
    """On a line at 0, 1, 2 and 10 with one neighbour: 0 and 1 choose each other, 2 and 10 are chosen by nobody."""
    vectors, study = np.array([[0.0], [1], [2.5], [10]]), np.array(["a"] * 4)
    mutual = join_neighbours(vectors, study, 1).toarray()
    expected = np.zeros((4, 4))
    expected[0, 1] = expected[1, 0] = np.exp(-1)
    assert mutual == pytest.approx(expected)
    symmetric = join_neighbours(vectors, study, 1, mutual=False).toarray()
    # scales: distances to the neighbour, 1.5 of the third cell and 7.5 of the fourth
    expected[1, 2] = expected[2, 1] = np.exp(-(1.5**2) / (1 * 1.5))
    expected[2, 3] = expected[3, 2] = np.exp(-(7.5**2) / (1.5 * 7.5))
    assert symmetric == pytest.approx(expected)


def test_cells_of_different_studies_are_never_joined_and_identical_cells_are():
    studies = np.array(["a", "b"] * 20)
    graph = join_neighbours(np.zeros((40, 2)), studies, 4, mutual=False)
    rows, columns = graph.nonzero()
    assert len(rows) and (studies[rows] == studies[columns]).all() and (graph.data == 1).all()
    assert (graph.diagonal() == 0).all()


def test_shuffled_cells_have_the_degrees_of_the_graph_within_each_study():
    rng = np.random.default_rng(0)
    studies = np.repeat(["a", "b"], [60, 40])
    graph = join_neighbours(rng.normal(size=(100, 3)), studies, 8)
    shuffled = shuffle_cells(graph, studies, 1)
    assert abs(graph - shuffled).sum() > 10 and (shuffled != shuffled.T).nnz == 0
    for study in ("a", "b"):
        own = studies == study
        assert shuffled[own][:, ~own].nnz == 0
        degrees = [np.sort(np.diff(one[own].indptr)).tolist() for one in (graph, shuffled)]
        assert degrees[0] == degrees[1]


def test_initial_probabilities_split_the_rest_by_training_shares():
    training = pd.Series([*["A"] * 2, "B", *["C"] * 5, None, None, None], dtype=object)
    ids = pd.Series([None] * 8 + ["A", "B", None], dtype=object)
    confidences = pd.Series([np.nan] * 8 + [0.4, 0.1, np.nan])
    labels, start = initial_probabilities(ids, confidences, training)
    assert labels.tolist() == ["A", "B", "C"]
    assert start[[0, 2, 7]].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert start[8] == pytest.approx([0.4, 0.1, 0.99 * 0.4])  # the rest of 0.6 as 1 : 5, but less than 0.4
    assert start[9].argmax() == 1  # the predicted label stays the most probable
    assert start[10] == pytest.approx([2 / 8, 1 / 8, 5 / 8])


def two_groups(seed=0, flipped=0.2):
    """Return labels and predictions of two groups of cells, one fifth wrong, and the graph of the groups."""
    rng = np.random.default_rng(seed)
    true = np.repeat([0, 1], CELLS)
    predicted = np.where(rng.random(2 * CELLS) < flipped, 1 - true, true)
    clique = scipy.sparse.block_diag([np.ones((CELLS, CELLS)) - np.eye(CELLS)] * 2, format="csr")
    return true, predicted, scipy.sparse.csr_array(clique)


def test_two_cliques_with_a_fifth_of_the_labels_flipped_are_recovered():
    true, predicted, cliques = two_groups()
    start = np.where(predicted[:, None] == [0, 1], 0.9, 0.1)
    nobody = np.zeros(len(true), dtype=bool)
    assert (predicted == true).mean() < 0.85
    assert (propagate(start, nobody, cliques, 1).argmax(axis=1) == true).mean() > 0.95
    shuffled = shuffle_cells(cliques, np.array(["a"] * len(true)), 0)
    control = (propagate(start, nobody, shuffled, 0.003).argmax(axis=1) == true).mean()
    assert control == pytest.approx((predicted == true).mean(), abs=0.03)


def test_the_weight_is_the_best_on_validation_cells_and_the_smallest_of_equals():
    true, predicted, cliques = two_groups()
    labels = np.array(["A", "B"], dtype=object)
    start, nobody = np.where(predicted[:, None] == [0, 1], 0.9, 0.1), np.zeros(len(true), dtype=bool)
    validation = pd.Series(labels[true], dtype=object).where(np.arange(len(true)) % 2 == 0, None)
    weight = choose_weight(start, nobody, cliques, labels, validation)
    assert (propagate(start, nobody, cliques, weight).argmax(axis=1) == true).mean() > 0.95
    agreed = pd.Series(labels[predicted], dtype=object)
    assert choose_weight(start, nobody, cliques, labels, agreed) == 0
    assert choose_weight(start, nobody, cliques, labels, agreed.where(agreed.isna(), None)) == 0


@pytest.fixture
def groups(tmp_path):
    """Files of a study with three groups of cells, and predictions of which a fifth is wrong."""
    rng = np.random.default_rng(0)
    types = np.repeat([B_CELL, NK_CELL, T_CELL], 100)
    splits = np.tile(["train", "validation", "test", "test", "test"], 60)
    table, names = write_corpus(tmp_path, types, splits, [["P1", "P2"], ["P3"]] * 150, tissue=[BLOOD, LUNG] * 150)
    centres = {B_CELL: 0, NK_CELL: 10, T_CELL: 20}
    vectors = rng.normal(size=(300, 4)) + np.array([centres[one] for one in types])[:, None]
    write_embeddings(tmp_path / "embeddings.safetensors", table["cell_id"], vectors)
    predicted = table[table["split"] != "train"].reset_index(drop=True).reindex(columns=list(PREDICTIONS.columns))
    wrong = rng.random(len(predicted)) < 0.2
    predicted.loc[wrong, "cell_type_id"] = B_CELL
    predicted["cell_type_confidence"], predicted["tissue_confidence"] = 0.8, 0.9
    predicted["pathway_confidences"] = [[0.5] * len(sets) for sets in predicted["pathway_ids"]]
    PREDICTIONS.write(predicted, tmp_path / "method.parquet")
    return tmp_path, table.set_index("cell_id"), names


def refine(folder, predictions=("method.parquet",), descriptions="descriptions.parquet"):
    out = folder / "method_graph.parquet", folder / "method_random_graph.parquet"
    files = [folder / name for name in predictions]
    corpus = folder / descriptions, folder / "terms.parquet"
    refine_on_graph(*corpus, [folder / "embeddings.safetensors"], files, *out, neighbours=15, seed=1)
    return [path.read_bytes() for path in out], [PREDICTIONS.read(path).set_index("cell_id") for path in out]


def accuracy(predicted, table):
    test = predicted[predicted["split"] == "test"]
    return (test["cell_type_id"] == table.loc[test.index, "cell_type_id"]).mean()


def test_files_are_refined_and_the_control_gains_nothing(groups):
    folder, table, names = groups
    before = PREDICTIONS.read(folder / "method.parquet").set_index("cell_id")
    _, (refined, control) = refine(folder)
    assert accuracy(before, table) < 0.9 and accuracy(refined, table) > 0.95
    assert accuracy(control, table) < accuracy(before, table) + 0.03
    for predicted in (refined, control):
        assert predicted["split"].to_dict() == before["split"].to_dict()
        assert predicted["pathway_ids"].map(list).to_dict() == before["pathway_ids"].map(list).to_dict()
        assert predicted["cell_type_confidence"].between(0.3, 1).all()
        assert predicted["sex_id"].isna().all() and predicted["sex_confidence"].isna().all()
        for row in predicted.sample(20, random_state=0).itertuples():
            read = parse(row.text, names)
            assert (read.status, row.status) == ("parsed", "parsed")
            assert (read.slots.cell_type, read.slots.tissue) == (row.cell_type_id, row.tissue_id)


def test_labels_of_test_cells_do_not_matter_and_those_of_validation_cells_choose_the_weight_alone(groups):
    folder, table, _ = groups
    expected, _ = refine(folder)
    changed, rng = DESCRIPTIONS.read(folder / "descriptions.parquet"), np.random.default_rng(0)
    test = changed.index[changed["split"] == "test"]
    changed.loc[test, ["cell_type_id", "tissue_id"]] = changed.loc[
        rng.permutation(test), ["cell_type_id", "tissue_id"]
    ].to_numpy()
    DESCRIPTIONS.write(changed, folder / "permuted.parquet")
    assert refine(folder, descriptions="permuted.parquet")[0] == expected
    changed.loc[changed["split"] == "train", "cell_type_id"] = T_CELL
    DESCRIPTIONS.write(changed, folder / "permuted.parquet")
    assert refine(folder, descriptions="permuted.parquet")[0] != expected


def test_generations_in_several_files_are_refined_like_a_table(groups):
    folder, _, _ = groups
    expected, _ = refine(folder)
    rows = PREDICTIONS.read(folder / "method.parquet")
    for name, part in (("0.jsonl", rows[100:]), ("1.jsonl", rows[:0]), ("2.jsonl", rows[:100])):
        lines = part.astype(object).where(part.notna(), None).map(lambda v: v.tolist() if hasattr(v, "tolist") else v)
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines.to_dict("records")))
    assert refine(folder, ("0.jsonl", "1.jsonl", "2.jsonl"))[0] == expected


def test_without_validation_cells_the_predictions_stay(groups):
    folder, _, _ = groups
    changed = DESCRIPTIONS.read(folder / "descriptions.parquet")
    changed.loc[changed["split"] == "validation", ["cell_type_id", "tissue_id"]] = None
    DESCRIPTIONS.write(changed, folder / "unlabelled.parquet")
    before = PREDICTIONS.read(folder / "method.parquet").set_index("cell_id")
    for predicted in refine(folder, descriptions="unlabelled.parquet")[1]:
        columns = ["cell_type_id", "cell_type_confidence", "tissue_id", "tissue_confidence"]
        pd.testing.assert_frame_equal(predicted[columns], before[columns])


def test_a_cell_without_a_prediction_is_reported(groups):
    folder, _, _ = groups
    PREDICTIONS.write(PREDICTIONS.read(folder / "method.parquet")[1:], folder / "few.parquet")
    with pytest.raises(InputError, match=r"few\.parquet: cells with a description are missing \(1, such as study\|1\)"):
        refine(folder, ("few.parquet",))
    assert not (folder / "method_graph.parquet").exists()
