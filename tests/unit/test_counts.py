"""Raw counts are found or recovered, and cells and genes are named correctly."""

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from cell2text.cells import matrices
from cell2text.cells.counts import recover_counts
from cell2text.cells.fetch_dataset import fetch_dataset
from cell2text.cells.h5ad import read_blocks, read_genes
from cell2text.cells.studies import BUNDLED, Study
from cell2text.errors import InputError

COUNTS = np.array([[0, 3, 1, 0], [2, 0, 0, 7], [1, 1, 1, 1]], dtype=np.float32)
GENES = ["CD3D", "MS4A1", "LYZ", "MT-CO1"]


def write_study(path, matrix=COUNTS, obs=None, var=None, **parts):
    cells = ad.AnnData(
        matrix,
        obs=pd.DataFrame(obs or {}, index=[f"cell{i}" for i in range(matrix.shape[0])]),
        var=pd.DataFrame(var or {}, index=GENES[: matrix.shape[1]]),
    )
    if "layers" in parts:
        cells.layers["counts"] = parts["layers"]
    if "raw" in parts:
        cells.raw = ad.AnnData(parts["raw"], obs=cells.obs, var=cells.var)
    cells.write_h5ad(path)
    return {"dataset": "study", "source": str(path)}


def fetch(row, tmp_path):
    fetch_dataset(row, tmp_path / "out.h5ad")
    return ad.read_h5ad(tmp_path / "out.h5ad")


def test_recovered_counts_of_the_bundled_cells_reproduce_the_published_logs(tmp_path):
    cells = fetch({"dataset": "pbmc68k", "source": BUNDLED}, tmp_path)
    published = sc.datasets.pbmc68k_reduced()
    assert cells.shape == (700, 765)
    assert cells.obs_names[0] == f"pbmc68k|{published.obs_names[0]}"
    logs = cells.X.toarray() * 1e4 / published.obs["n_counts"].to_numpy()[:, None]
    # the published log1p values have three decimals
    assert np.abs(np.log1p(logs) - published.raw.X.toarray()).max() < 0.0006
    assert (cells.X.data >= 1).all() and (cells.X.data == np.rint(cells.X.data)).all()


@pytest.mark.parametrize(
    "parts",
    [
        {"matrix": sparse.csr_matrix(COUNTS)},
        {"matrix": sparse.csc_matrix(COUNTS)},
        {"matrix": COUNTS},
        {"matrix": COUNTS.astype(np.int64)},
        {"matrix": np.log1p(COUNTS), "raw": COUNTS},
        {"matrix": COUNTS / 2 - 1, "raw": sparse.csc_matrix(COUNTS)},
        {"matrix": np.log1p(COUNTS), "layers": COUNTS},
        {"matrix": np.log1p(COUNTS), "raw": np.log1p(COUNTS), "layers": sparse.csc_matrix(COUNTS)},
    ],
    ids=["csr", "csc", "dense", "int64", "raw", "raw and scaled X", "layer", "layer and logs in raw"],
)
def test_counts_are_found_in_every_place_and_format(tmp_path, parts):
    cells = fetch(write_study(tmp_path / "in.h5ad", **parts), tmp_path)
    assert isinstance(cells.X, sparse.csr_matrix) and cells.X.dtype == np.float32
    assert (cells.X.toarray() == COUNTS).all()
    assert not cells.layers and cells.raw is None
    assert list(cells.obs_names) == ["study|cell0", "study|cell1", "study|cell2"]


def test_counts_in_raw_come_with_the_genes_of_raw(tmp_path):
    full = ad.AnnData(COUNTS, var=pd.DataFrame(index=GENES))
    subset = full[:, [2, 0]].copy()
    subset.raw = full
    subset.X = np.log1p(subset.X)
    subset.write_h5ad(tmp_path / "in.h5ad")
    cells = fetch({"dataset": "study", "source": str(tmp_path / "in.h5ad")}, tmp_path)
    assert list(cells.var_names) == GENES
    assert (cells.X.toarray() == COUNTS).all()


def test_dense_counts_are_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(matrices, "VALUES_AT_ONCE", 8)
    cells = fetch(write_study(tmp_path / "in.h5ad", matrix=COUNTS), tmp_path)
    assert (cells.X.toarray() == COUNTS).all()


def recovered(logs, totals=None):
    """Return the counts recovered from a matrix of log1p values, cells by genes."""
    genes, cells = pd.DataFrame(index=range(logs.shape[1])), pd.DataFrame(index=range(logs.shape[0]))
    obs = cells if totals is None else cells.assign(n_counts=totals)
    study = Study("file", obs, list(obs), {"X": (matrices.DenseMatrix(logs.astype(np.float32), "file"), genes)})
    return sparse.vstack(list(recover_counts(study, "X", None))).toarray()


@given(
    counts=hnp.arrays(np.int64, (4, 3), elements=st.integers(0, 60)),
    unmeasured=hnp.arrays(np.int64, 4, elements=st.integers(1, 3000)),
)
def test_counts_are_recovered_from_logs_rounded_to_three_decimals(counts, unmeasured):
    total = counts.sum(axis=1) + unmeasured + 200
    assert (recovered(np.log1p(counts * 1e4 / total[:, None]).round(3), total) == counts).all()


@given(
    counts=hnp.arrays(np.int64, (3, 24), elements=st.integers(1, 20_000)),
    scale=hnp.arrays(np.float64, 3, elements=st.floats(0.01, 1000)),
)
def test_counts_are_recovered_without_totals_for_any_scaling(counts, scale):
    counts[:, 7] = 1
    assert (recovered(np.log1p(counts * scale[:, None])) == counts).all()


def test_every_stored_value_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(matrices, "VALUES_AT_ONCE", 2)
    invalid = COUNTS.copy()
    invalid[2, 3] = 1.5
    with pytest.raises(InputError, match=r"not a whole number: 1\.5 in cell cell2, gene MT-CO1"):
        fetch(write_study(tmp_path / "in.h5ad", matrix=sparse.csr_matrix(invalid)), tmp_path)


def test_columns_follow_the_cellxgene_schema_and_names_come_from_ids(tmp_path):
    row = write_study(
        tmp_path / "in.h5ad",
        obs={
            "cell_type_ontology_term_id": ["CL:0000236", "CL:0000624", "unknown"],
            "cell_type": ["wrong", "wrong", "wrong"],
            "donor_id": ["d1", "d1", "d2"],
            "sex_ontology_term_id": ["PATO:0000383", "unknown", None],
            "louvain": ["0", "1", "2"],
        },
    )
    row |= {"tissue": "UBERON:0000178", "disease": "PATO:0000461", "sex": "PATO:0000384"}
    cells = fetch(row, tmp_path)
    assert list(cells.obs) == [
        "dataset_id",
        "donor_id",
        "assay_ontology_term_id",
        "cell_type_ontology_term_id",
        "cell_type",
        "tissue_ontology_term_id",
        "tissue",
        "disease_ontology_term_id",
        "disease",
        "sex_ontology_term_id",
        "sex",
        "development_stage_ontology_term_id",
        "development_stage",
    ]
    assert list(cells.obs["cell_type"]) == ["B cell", "CD4-positive, alpha-beta T cell", "unknown"]
    assert set(cells.obs["tissue"]) == {"blood"} and set(cells.obs["disease"]) == {"normal"}
    # values of the file are kept; the sheet fills the rest
    assert list(cells.obs["sex"]) == ["female", "male", "male"]
    assert set(cells.obs["development_stage_ontology_term_id"]) == {"unknown"}
    assert set(cells.obs["assay_ontology_term_id"]) == {"unknown"}
    assert list(cells.obs["donor_id"]) == ["d1", "d1", "d2"]


def test_a_dataset_without_donors_is_used_as_donor_and_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        cells = fetch(write_study(tmp_path / "in.h5ad"), tmp_path)
    assert set(cells.obs["donor_id"]) == {"study"}
    assert "no donor given" in caplog.text


def test_authors_labels_are_mapped_by_the_table(tmp_path):
    table = tmp_path / "labels.tsv"
    table.write_text("author_label\tcell_type_ontology_term_id\tnote\nT, CD4+\tCL:0000624\tx\ndoublet\tunknown\t\n")
    row = write_study(
        tmp_path / "in.h5ad",
        obs={"annotation": ["T, CD4+", "doublet", None], "cell_type_ontology_term_id": ["CL:0000236"] * 3},
    )
    cells = fetch(row | {"label_column": "annotation", "label_table": str(table)}, tmp_path)
    assert list(cells.obs["cell_type_ontology_term_id"]) == ["CL:0000624", "unknown", "unknown"]


@pytest.mark.parametrize(
    ("index", "var", "ids", "symbols"),
    [
        (["CD3D", "LYZ"], {}, ["CD3D", "LYZ"], ["CD3D", "LYZ"]),
        (
            ["CD3D", "LYZ"],
            {"gene_ids": ["ENSG00000167286", "ENSG00000090382"]},
            ["ENSG00000167286", "ENSG00000090382"],
            ["CD3D", "LYZ"],
        ),
        (
            ["ENSG00000167286.10", "ENSG00000090382.7"],
            {"feature_name": ["CD3D", None]},
            ["ENSG00000167286", "ENSG00000090382"],
            ["CD3D", "ENSG00000090382"],
        ),
        (
            ["CD3D", "tdTomato"],
            {"ensembl_id": ["ENSG00000167286", ""]},
            ["ENSG00000167286", "tdTomato"],
            ["CD3D", "tdTomato"],
        ),
    ],
    ids=["symbols only", "ids in a column", "ids with version", "a gene without id"],
)
def test_genes_are_indexed_by_ensembl_id_if_they_have_one(tmp_path, index, var, ids, symbols):
    cells = ad.AnnData(COUNTS[:, :2], var=pd.DataFrame(var, index=index))
    cells.write_h5ad(tmp_path / "in.h5ad")
    fetch_dataset({"dataset": "study", "source": str(tmp_path / "in.h5ad")}, tmp_path / "out.h5ad")
    genes = read_genes(tmp_path / "out.h5ad")
    assert list(genes.index) == ids
    assert list(genes["symbol"]) == symbols


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_blocks_hold_the_selected_cells_in_the_order_of_the_file(tmp_path, at_once):
    fetch_dataset(write_study(tmp_path / "in.h5ad"), tmp_path / "out.h5ad")
    selected = np.arange(len(COUNTS)) % 3 != 1
    blocks = list(read_blocks(tmp_path / "out.h5ad", selected, at_once))
    assert np.concatenate([ids for ids, _ in blocks]).tolist() == ["study|cell0", "study|cell2"]
    assert (sparse.vstack([block for _, block in blocks]).toarray() == COUNTS[[0, 2]]).all()


def test_the_same_study_gives_the_same_bytes(tmp_path):
    row = write_study(tmp_path / "in.h5ad")
    fetch_dataset(row, tmp_path / "a.h5ad")
    fetch_dataset(row, tmp_path / "b.h5ad")
    assert (tmp_path / "a.h5ad").read_bytes() == (tmp_path / "b.h5ad").read_bytes()
