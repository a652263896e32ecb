import anndata as ad
import numpy as np
import pandas as pd
import pytest

from cell2text.annotation.describe_query import _add_types
from cell2text.annotation.fetch_examples import fetch_examples
from cell2text.confidence.added_types import AddedTypes, distances_from, mean_of_each, whiten
from cell2text.confidence.calibrate import save_reference
from cell2text.confidence.calibration import ProgrammeCalibration, SlotCalibration
from cell2text.confidence.decisions import Confidence
from cell2text.confidence.novelty import Reference
from cell2text.contracts import EMBEDDINGS, EXAMPLES, PREDICTIONS, TERMS
from cell2text.errors import InputError
from cell2text.files import write_json
from tests_terms import small_table

LABELS = ["A", "B", "C"]  # no training cell is a C
ABOVE = {"A": ["L"], "B": ["L"], "N": ["T", "L"], "M": ["T", "L"]}
CENTRES = {"A": (0, 0, 0), "B": (10, 0, 0), "N": (4, 4, 0), "M": (0, 10, 0)}


def cells_of(kind, number, seed):
    return np.random.default_rng(seed).normal(CENTRES[kind], 1, size=(number, 3)).astype(np.float32)


def reference():
    vectors = np.concatenate([cells_of("A", 400, 0), cells_of("B", 400, 1), np.full((3, 3), 1e6, np.float32)])
    return Reference.of(vectors, np.repeat([0, 1, -1], [400, 400, 3]))  # cells without a type do not count


def fit(*kinds, shots=5, least=0.8, shift=0.0):
    examples = np.concatenate([cells_of(kind, shots, 7 + place) for place, kind in enumerate(kinds)])
    types = pd.Series(np.repeat(kinds, shots), index=range(9, 9 + len(examples)))
    return AddedTypes.fit(reference(), LABELS, examples + np.float32(shift), types, ABOVE, least)


def table_of(guesses):
    table = pd.DataFrame({"cell_type_id": guesses, "cell_type_reported_id": guesses})
    table = table.reindex(columns=list(PREDICTIONS.columns)).assign(tissue_id="T", novelty=1.5)
    return table.assign(cell_type_confidence=0.9, cell_type_reported_confidence=0.9).astype(object)


def test_distances_by_hand():
    # of (1, 1) from (1, 0) and (0, 3); 2 / 2 and 2 / 4 are expected of the errors of their means
    found = distances_from(np.array([[1.0, 1]]), np.array([[1, 0], [0.0, 3]]), np.array([2, 4]))
    assert found.tolist() == [[1 - 1, 1 + 4 - 0.5]]


def test_means_and_whitening():
    means, sizes = mean_of_each(np.array([[1.0, 2], [3, 4], [5, 5]]), np.array([0, 0, 2]), 3)
    assert means[[0, 2]].tolist() == [[2, 3], [5, 5]] and np.isnan(means[1]).all() and sizes.tolist() == [2, 0, 1]
    mixed = np.random.default_rng(0).normal(size=(50_000, 3)) @ [[3, 0, 0], [1, 0.1, 0], [0, 0, 0]]
    whitened = mixed @ whiten(mixed)
    values = np.linalg.eigvalsh(np.cov(whitened.T))
    assert values[1:] == pytest.approx([1, 1], abs=0.02) and values[0] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("shift", [0, 30])
def test_cells_get_the_added_type_and_others_keep_theirs(shift):
    """Also where the study is far from the training cells, in all directions by more than its types are apart."""
    added = fit("N", "A", "B", least=0.999, shift=shift)
    cells = np.concatenate([cells_of("N", 300, 21), cells_of("A", 400, 22), cells_of("B", 200, 23)]) + shift
    table = added.apply(table_of(["A"] * 700 + ["B"] * 200), cells)
    assert (table["cell_type_id"][:300] == "N").mean() > 0.9
    assert (table["cell_type_id"][300:] == "N").mean() < 0.05
    taken, reported = table["cell_type_id"] == "N", table["cell_type_reported_id"] == "N"
    assert not (reported & ~taken).any() and reported.sum() < taken.sum()
    assert reported[:300].sum() / reported.sum() > 0.97
    assert table.loc[taken & ~reported, "cell_type_reported_id"].isna().all()  # not determined, neither old nor new
    confidences = table[["cell_type_confidence", "cell_type_reported_confidence"]]
    assert confidences[taken].isna().all(axis=None) and (confidences[~taken] == 0.9).all(axis=None)
    assert (table["tissue_id"] == "T").all() and (table["novelty"] == 1.5).all()


def test_a_cell_far_from_all_examples_keeps_its_own():
    far = np.array([[4, 40, 0]], np.float32)  # nearer to N than to A, but like neither
    assert fit("N", "A").apply(table_of(["A"]), far)["cell_type_id"].tolist() == ["A"]


def test_what_is_reported_is_probable_among_all_examples():
    at_n, between = np.array([[4, 4, 0]], np.float32), np.array([[2, 7, 0]], np.float32)
    ids, reported = fit("N", "M", "A").find(np.concatenate([at_n, between]))
    assert ids.tolist()[0] == "N" and ids[1] in "NM"
    assert reported.tolist() == ["N", "T"]  # between N and M, but no A
    assert fit("N", "M").find(between)[1].tolist() == [None]  # T is above all examples, and so says nothing


def test_a_cell_nearest_to_a_known_type_keeps_what_the_model_says():
    table = fit("N", "A", "B").apply(table_of(["B"]), np.zeros((1, 3), np.float32))
    assert table["cell_type_id"].tolist() == ["B"] and table["cell_type_confidence"].tolist() == [0.9]


def test_the_limit_is_that_of_training_cells_outside_of_their_mean():
    added = fit("N", "A")
    placed = cells_of("A", 5000, 99) @ added.whitening
    means, sizes = mean_of_each(reference().vectors[:400].astype(float), np.zeros(400, int), 1)
    inside = distances_from(placed, means @ added.whitening, sizes)
    assert (inside <= added.limit).mean() == pytest.approx(0.99, abs=0.01)
    assert 1 <= added.temperature < 1.5  # normal cells are as far apart as they should be


def test_a_single_known_type_is_enough_and_none_is_not():
    one, examples = Reference.of(cells_of("A", 30, 0), np.zeros(30)), np.concatenate([cells_of("N", 5, 7)] * 2)
    types = pd.Series(["N", "M"] * 5)
    assert AddedTypes.fit(one, ["A"], examples, types, ABOVE, 0.8).temperature == 1
    with pytest.raises(ValueError, match="no cell type has two training cells"):
        AddedTypes.fit(Reference.of(cells_of("A", 30, 0)), ["A"], examples, types, ABOVE, 0.8)
    assert len(fit("N", "A").apply(table_of([]), np.empty((0, 3), np.float32))) == 0


def test_a_model_without_cell_types_takes_no_others(tmp_path):
    write_json({"labels": {"tissue": ["UBERON:0000178"]}}, tmp_path / "cell2text.json")
    save_reference(Reference.of(cells_of("A", 30, 0)), str(tmp_path / "reference.safetensors"))
    Confidence({}, {}, SlotCalibration(), ProgrammeCalibration(), None).save(tmp_path / "confidence.json")
    TERMS.write(small_table(), tmp_path / "terms.parquet")
    ids = [f"mine|{row}" for row in range(6)]
    EXAMPLES.write(pd.DataFrame({"cell_id": ids, "cell_type_id": ["N", "M"] * 3}), tmp_path / "examples.parquet")
    tensors = {"gene_vectors": np.zeros((6, 0, 3), np.float16), "lengths": np.ones(6, np.int32)}
    EMBEDDINGS.write(tensors | {"pooled": cells_of("N", 6, 7)}, ids, tmp_path / "embeddings.safetensors")
    with pytest.raises(
        InputError, match=r"no cell type has two training cells, so this model takes no others\. Do not"
    ):
        add_types(tmp_path)


def add_types(folder):
    return _add_types(folder, str(folder / "examples.parquet"), [str(folder / "embeddings.safetensors")])


def test_an_example_without_a_gene_of_the_model_does_not_count(tmp_path):
    write_json({"labels": {"cell_type": ["A"]}}, tmp_path / "cell2text.json")
    save_reference(Reference.of(cells_of("A", 30, 0), np.zeros(30, int)), str(tmp_path / "reference.safetensors"))
    Confidence({}, {}, SlotCalibration(), ProgrammeCalibration(), None).save(tmp_path / "confidence.json")
    TERMS.write(small_table(), tmp_path / "terms.parquet")
    ids = [f"mine|{row}" for row in range(8)]
    types = ["CL:0000236", "CL:0000623"] * 4
    EXAMPLES.write(pd.DataFrame({"cell_id": ids, "cell_type_id": types}), tmp_path / "examples.parquet")
    lengths, vectors = np.array([1, 1, 1, 1, 1, 1, 0, 1], np.int32), cells_of("N", 8, 7)
    tensors = {"gene_vectors": np.zeros((8, 0, 3), np.float16), "lengths": lengths}
    EMBEDDINGS.write(tensors | {"pooled": vectors}, ids, tmp_path / "embeddings.safetensors")
    added = add_types(tmp_path)
    assert added.sizes.tolist() == [3, 4]
    assert np.allclose(added.means[0], vectors[[0, 2, 4]].mean(axis=0) @ added.whitening, atol=1e-5)
    lengths[4] = 0
    EMBEDDINGS.write(tensors | {"pooled": vectors}, ids, tmp_path / "embeddings.safetensors")
    with pytest.raises(InputError, match=r"fewer than 3 labelled cells of CL:0000236 have a gene of the model\. Label"):
        add_types(tmp_path)


def write_study(path, labels, column="cell_type_ontology_term_id"):
    genes = pd.DataFrame({"feature_name": ["LYZ", "RPS27"]}, index=["ENSG00000090382", "ENSG00000177954"])
    counts = np.arange(1, 2 * len(labels) + 1, dtype=np.float32).reshape(-1, 2)
    ad.AnnData(counts, pd.DataFrame({column: labels}, index=[f"c{i}" for i in range(len(labels))]), genes).write_h5ad(
        path
    )
    return {"dataset": "mine_examples", "source": str(path)}


def test_labelled_cells_are_read_with_their_types(tmp_path):
    labels = ["unknown", "CL:0000236", None, "CL:0000236", "CL:0000236", "", *["CL:0000623"] * 3]
    row = write_study(tmp_path / "mine.h5ad", labels)
    fetch_examples(row, tmp_path / "counts.h5ad", tmp_path / "examples.parquet", None, 0.5)
    found = EXAMPLES.read(tmp_path / "examples.parquet")
    assert found["cell_id"].tolist() == [f"mine_examples|{row}" for row in (1, 3, 4, 6, 7, 8)]
    assert found["cell_type_id"].tolist() == ["CL:0000236"] * 3 + ["CL:0000623"] * 3
    assert len(ad.read_h5ad(tmp_path / "counts.h5ad")) == 9


@pytest.mark.parametrize(
    ("labels", "column", "problem"),
    [
        (["CL:0000236"] * 3, "label", "no column cell_type_ontology_term_id. Add it, with ids such as CL:0000236"),
        (["unknown", None, "na"], None, "no cell has a label. Label a few cells of each type to add"),
        (["B cell"] * 3, None, "B cell is not a term of CL. Use a CL id that is not deprecated"),
        (
            ["CL:0000236"] * 3,
            None,
            "all labelled cells are of one type, CL:0000236. Label cells of the types that it may",
        ),
        (["CL:0000236", "CL:0000236", ""], None, "2 labelled cells of CL:0000236 are too few. Label 3 or more"),
    ],
)
def test_labels_that_cannot_be_used_are_one_line(tmp_path, labels, column, problem):
    row = write_study(tmp_path / "mine.h5ad", labels, column or "cell_type_ontology_term_id")
    with pytest.raises(InputError, match=rf"^[^\n]*mine\.h5ad: obs[^\n]*{problem}"):
        fetch_examples(row, tmp_path / "counts.h5ad", tmp_path / "examples.parquet", None, 0.5)
    assert not (tmp_path / "counts.h5ad").exists() and not (tmp_path / "examples.parquet").exists()
