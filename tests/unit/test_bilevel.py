"""The baseline of two classifiers that teach each other: values by hand, planted groups, no look at other labels."""

import numpy as np
import pytest
import scipy.sparse
import torch

from cell2text.contracts import DESCRIPTIONS, PREDICTIONS
from cell2text.embedding.vectors import Embeddings
from cell2text.evaluation.baselines import bilevel
from cell2text.evaluation.baselines.bilevel import Cells, GeneClassifier, average_twice, predict_bilevel, targets
from described_cells import B_CELL, NK_CELL, write_corpus, write_embeddings


def test_averages_over_two_steps_by_hand():
    """Cells 0 and 1 are joined, 2 is alone: of the two, each step takes the mean."""
    graph = scipy.sparse.csr_array(np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, 0]]))
    assert average_twice(graph).toarray() == pytest.approx(np.array([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]))
    # a path of three with itself: degrees 2, 3, 2; one step from the end stays with 1/2 and moves with 1 / sqrt(6)
    path = scipy.sparse.csr_array(np.array([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]]))
    assert average_twice(path).toarray()[0] == pytest.approx([1 / 4 + 1 / 6, (1 / 2 + 1 / 3) / 6**0.5, 1 / 6])


def test_training_cells_are_taught_their_types_and_others_those_of_the_other_classifier():
    codes, weights = targets(np.array([[0.9, 0.1], [0.3, 0.7], [0.0, 0.0]]), np.array([1, -1, -1]))
    assert codes.tolist() == [1, 1, 0] and weights.tolist() == [1, 0.7, 0]


def test_places_without_a_gene_are_not_attended_to():
    class Genes:
        def __getitem__(self, rows):
            return torch.arange(24.0).reshape(2, 3, 4)[rows], torch.tensor([2, 3])[rows]

    cells = Cells.of(Genes(), np.array([[1.0, 2], [3, 4]], np.float32), np.array([True, True]))
    vectors, pooled, is_gene = cells.take(np.array([0, 1]))
    assert is_gene.tolist() == [[True, True, False], [True, True, True]]
    assert vectors.square().mean() == pytest.approx(1) and pooled.mean(dim=0).tolist() == pytest.approx([0, 0])
    model = GeneClassifier(4, 2, 2).eval()
    changed = vectors.clone()
    changed[0, 2], changed[1, 2] = 7, 7
    before, after = model.embed(vectors, pooled, is_gene), model.embed(changed, pooled, is_gene)
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Files of a study with two groups of cells that overlap."""
    monkeypatch.setattr(bilevel, "STEPS", 40)
    rng = np.random.default_rng(0)
    types = np.repeat([B_CELL, NK_CELL], 150)
    splits = np.tile(["train", "validation", "test", "test", "test"], 60)
    table, _ = write_corpus(tmp_path, types, splits, [["P1", "P2"], ["P3"]] * 150)
    vectors = rng.normal(size=(300, 4)) + np.where(types == B_CELL, 0, 2)[:, None]
    write_embeddings(tmp_path / "embeddings.safetensors", table["cell_id"], vectors)
    return tmp_path, table.set_index("cell_id")


def predict(folder, descriptions="descriptions.parquet"):
    out = folder / "bilevel.parquet", folder / "control.parquet"
    embeddings = Embeddings([str(folder / "embeddings.safetensors")])
    predict_bilevel(folder / descriptions, folder / "terms.parquet", embeddings, *out, neighbours=15, seed=1)
    return [path.read_bytes() for path in out], [PREDICTIONS.read(path).set_index("cell_id") for path in out]


def test_planted_groups_are_found_and_a_random_graph_is_worse(groups):
    folder, table = groups
    _, found = predict(folder)
    right = [(one["cell_type_id"] == table.loc[one.index, "cell_type_id"]).mean() for one in found]
    assert right[0] > 0.95 and right[0] > right[1] + 0.02
    assert found[0]["cell_type_confidence"].between(0.5, 1).all() and set(found[0]["split"]) == {"validation", "test"}
    assert found[0]["text"].str.contains("cell").all()


def test_only_labels_of_training_cells_are_read(groups):
    folder, _ = groups
    expected, _ = predict(folder)
    changed = DESCRIPTIONS.read(folder / "descriptions.parquet")
    others = changed["split"] != "train"
    changed.loc[others, "cell_type_id"] = changed.loc[others, "cell_type_id"].to_numpy()[::-1]
    DESCRIPTIONS.write(changed, folder / "reversed.parquet")
    assert predict(folder, "reversed.parquet")[0] == expected


@pytest.mark.parametrize("types", [[B_CELL] * 20, [None] * 20])
def test_with_a_single_type_or_none_nothing_is_trained(tmp_path, types):
    table, _ = write_corpus(tmp_path, types, ["train", "test"] * 10, [["P1"]] * 20)
    write_embeddings(
        tmp_path / "embeddings.safetensors", table["cell_id"], np.random.default_rng(0).normal(size=(20, 3))
    )
    _, found = predict(tmp_path)
    for one in found:
        assert set(one["cell_type_id"]) == set(types)
