"""Every user error is reported in one line that names the location and the fix, and leaves no file."""

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

from cell2text.cells.fetch_dataset import fetch_dataset
from cell2text.cells.filter_cells import filter_cells
from cell2text.contracts import CELLS, PATHWAY_SCORES, SAMPLED_CELLS
from cell2text.corpus.score_pathways import score_pathways
from cell2text.corpus.split_donors import split_donors
from cell2text.corpus.write_descriptions import write_descriptions
from cell2text.errors import InputError
from cell2text.settings import QcSettings

COUNTS = np.array([[0, 3, 1], [2, 0, 7]], dtype=np.float32)
TOTAL = np.array([1000, 2000])
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
LABELS = "author_label\tcell_type_ontology_term_id\nB\tCL:0000236\n"


def with_value(value):
    matrix = COUNTS.copy()
    matrix[1, 2] = value
    return matrix


def write_study(path, matrix=COUNTS, cells=("c1", "c2"), genes=("CD3D", "MS4A1", "LYZ"), **obs):
    var = pd.DataFrame(index=list(genes))
    ad.AnnData(matrix, obs=pd.DataFrame(obs, index=list(cells)), var=var).write_h5ad(path)


# Content of in.h5ad, columns of the sheet, and the expected parts of the message.
STUDIES = {
    "negative": ({"matrix": with_value(-2)}, {}, ["in.h5ad", "X: negative value -2", "cell c2, gene LYZ"]),
    "not a number": ({"matrix": with_value(np.nan)}, {}, ["in.h5ad", "X: missing value", "cell c2, gene LYZ"]),
    "infinite": ({"matrix": with_value(np.inf)}, {}, ["in.h5ad", "X: infinite", "cell c2, gene LYZ"]),
    "logs without totals": (
        {"matrix": np.log1p(COUNTS)},
        {},
        ["X: not a whole number: 1.38629 in cell c1, gene MS4A1", "2 of 2 cells have too few genes", "Put raw counts"],
    ),
    "logs with wrong totals": (
        {"matrix": np.log1p(COUNTS * 1e4 / TOTAL[:, None]), "n_counts": [1000.0, 1700.0]},
        {},
        ["in.h5ad", "X: ", "n_counts", "gives 1.700 in cell c2, gene CD3D", "Put raw counts"],
    ),
    "logs with totals far too small": (
        {"matrix": np.log1p(COUNTS * 1e4 / TOTAL[:, None]), "n_counts": [10.0, 10.0]},
        {},
        ["in.h5ad", "X: ", "n_counts", "gives 0.030 in cell c1, gene MS4A1", "Put raw counts"],
    ),
    "no matrix": ({"matrix": None}, {}, ["in.h5ad", "no matrix in the usual places", "Put raw counts"]),
    "a duplicate cell": ({"cells": ("c1", "c1")}, {}, ["in.h5ad: obs", "cell c1 occurs twice", "unique name"]),
    "an unknown id": (
        {"disease_ontology_term_id": ["MONDO:9999999"] * 2},
        {},
        ["in.h5ad: disease_ontology_term_id", "MONDO:9999999 is not a term", "Use a MONDO id that is not deprecated"],
    ),
    "a name instead of an id": (
        {"tissue_ontology_term_id": ["blood"] * 2},
        {},
        ["in.h5ad: tissue_ontology_term_id", "blood is not a term of UBERON", "Use a UBERON id that is not deprecated"],
    ),
    "a deprecated id without replacement": (
        {"cell_type_ontology_term_id": ["CL:0000002"] * 2},
        {},
        ["in.h5ad: cell_type_ontology_term_id", "CL:0000002 is deprecated", "Use a CL id that is not deprecated"],
    ),
    "no such label column": (
        {"cluster": ["B", "B"]},
        {"label_column": "celltype"},
        ["in.h5ad: obs", "no column celltype", "Set label_column to one of cluster"],
    ),
    "labels missing from the table": (
        {"cluster": ["T, naive", "NK"]},
        {"label_column": "cluster", "label_table": LABELS},
        ["labels.tsv", "no line for the labels NK, T, naive of study", "Add a line"],
    ),
    "labels without a table": (
        {"cluster": ["B", "B"]},
        {"label_column": "cluster"},
        ["in.h5ad: cluster (no label_table given)", "B is not a term of CL", "Use a CL id that is not deprecated"],
    ),
    "a table without a label column": (
        {"cluster": ["B", "B"]},
        {"label_table": LABELS},
        ["datasets sheet: label_table of study", "no label_column", "Name the column"],
    ),
    "a table with other columns": (
        {"cluster": ["B", "B"]},
        {"label_column": "cluster", "label_table": "label\tid\nB\tCL:0000236\n"},
        [
            "labels.tsv",
            "required columns missing (found: label, id)",
            "Give the columns author_label and cell_type_ontology_term_id",
        ],
    ),
    "a label twice in the table": (
        {"cluster": ["B", "B"]},
        {"label_column": "cluster", "label_table": LABELS + "B\tCL:0000624\n"},
        ["labels.tsv", "label B occurs twice", "Keep one line per label"],
    ),
    "a wrong id in the table": (
        {"cluster": ["B", "B"]},
        {"label_column": "cluster", "label_table": LABELS + "T\tCL:1\n"},
        [
            "labels.tsv line 3: cell_type_ontology_term_id",
            "CL:1 is not a term of CL",
            "Use a CL id that is not deprecated",
        ],
    ),
}


def check(error, out, parts):
    """Check that an error's message is one line with all parts, and that no file was written."""
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert not list(out.iterdir())


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("case", STUDIES)
def test_an_invalid_study(tmp_path, out, case):
    parts, row, expected = STUDIES[case]
    write_study(tmp_path / "in.h5ad", **parts)
    row = {"dataset": "study", "source": str(tmp_path / "in.h5ad")} | row
    if "label_table" in row:
        (tmp_path / "labels.tsv").write_text(row["label_table"])
        row["label_table"] = str(tmp_path / "labels.tsv")
    with pytest.raises(InputError) as error:
        fetch_dataset(row, out / "study.h5ad")
    check(error, out, expected)


def truncate(path):
    write_study(path)
    path.write_bytes(path.read_bytes()[:3000])


def other_hdf5(path):
    with h5py.File(path, "w") as file:
        file["table"] = np.arange(3)


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda path: None, ["in.h5ad", "no such file", "Correct the column `source`"]),
        (
            lambda path: path.write_text("cell,gene\n"),
            ["in.h5ad", "a table of text", "write_h5ad"],
        ),
        (truncate, ["in.h5ad: cut off: 3000 of ", " bytes", "fetch it again"]),
        (other_hdf5, ["in.h5ad", "not a complete h5ad file: contains table", "Give an h5ad file"]),
    ],
    ids=["missing", "text", "truncated", "another HDF5"],
)
def test_a_file_that_is_not_h5ad(tmp_path, out, write, expected):
    write(tmp_path / "in.h5ad")
    with pytest.raises(InputError) as error:
        fetch_dataset({"dataset": "study", "source": str(tmp_path / "in.h5ad")}, out / "study.h5ad")
    check(error, out, expected)


@pytest.mark.parametrize("source", ["scanpy://pbmc3k", "https://example.org/cells.h5ad"])
def test_an_unsupported_kind_of_source(out, source):
    with pytest.raises(InputError) as error:
        fetch_dataset({"dataset": "study", "source": source}, out / "study.h5ad")
    check(error, out, [f"source: {source}", "unsupported kind", "Give an h5ad file, an AnnData Zarr folder"])


@pytest.mark.parametrize(
    ("label", "min_genes", "expected"),
    [
        ("CL:0000236", 50, ["study: qc", "all 2 cells", "too few genes: 2", "Relax the limits"]),
        ("unknown", 1, ["study: qc", "no cell type label: 2", "Provide labels through label_column"]),
    ],
)
def test_all_cells_are_excluded(tmp_path, out, label, min_genes, expected):
    write_study(tmp_path / "in.h5ad", cell_type_ontology_term_id=[label] * 2)
    fetch_dataset({"dataset": "study", "source": str(tmp_path / "in.h5ad")}, tmp_path / "raw.h5ad")
    files = [out / name for name in ("kept.h5ad", "qc.parquet", "qc.json", "qc.svg")]
    own_limits = {"min_genes": min_genes, "min_counts": 1, "max_mitochondrial_percent": 100}
    limits = QcSettings(**own_limits, mads=None, score_doublets=False, max_doublet_score=None)
    with pytest.raises(InputError) as error:
        filter_cells(tmp_path / "raw.h5ad", *files, limits=limits, own_limits=own_limits)
    check(error, out, expected)


def write_table(contract, path, **columns):
    table = pd.DataFrame(columns)
    for column in contract.columns:
        table[column] = table.get(column)
    contract.write(table[list(contract.columns)], path)
    return path


@pytest.mark.parametrize(
    ("split", "cell_types", "donors", "expected"),
    [
        ("donors", "AAAA", "1111", ["config: split", "1 donor in the corpus (d1)", "Set `split: cells`"]),
        ("studies", "AAAA", "1234", ["config: split", "1 study in the corpus (s)", "Set `split: cells`"]),
        (
            "donors",
            "ABCD",
            "1234",
            ["config: split", "4 of 4 donors must be in training", "merge rare labels"],
        ),
        (
            "cells",
            "AA",
            "11",
            ["config: split_shares", "no cell is left for", "Raise the share or add cells"],
        ),
    ],
    ids=["one donor", "one study", "types confounded with donors", "an empty split"],
)
def test_cells_that_cannot_be_split(tmp_path, out, split, cell_types, donors, expected):
    cells = write_table(
        SAMPLED_CELLS,
        tmp_path / "sampled.parquet",
        cell_id=[f"c{i}" for i in range(len(cell_types))],
        counts_hash=[f"h{i}" for i in range(len(cell_types))],
        dataset_id="s",
        donor=[f"d{donor}" for donor in donors],
        cell_type_id=list(cell_types),
        cell_type=[f"name of {letter}" for letter in cell_types],
    )
    with pytest.raises(InputError) as error:
        split_donors(cells, split, SHARES, 0, out / "cells.parquet", out / "audit.json")
    check(error, out, expected)


@pytest.mark.parametrize(
    ("gmt", "expected"),
    [
        ("", ["sets.gmt", "no gene set in it", "Name a GMT file"]),
        ("A\tname\n", ["sets.gmt line 1", "no gene in the set", "tabs between"]),
        ("A\t\tCD3D\n\nA\t\tLYZ\n", ["sets.gmt line 3", "the set A is there twice", "Keep one"]),
        (
            "A\t\tCd3d\tMs4a1\n",
            ["sets.gmt", "no set has 1 genes that raw measures", "symbols of human genes"],
        ),
    ],
    ids=["empty", "no genes", "a set twice", "mouse genes"],
)
def test_gene_sets_that_cannot_be_scored(tmp_path, out, gmt, expected):
    write_study(tmp_path / "in.h5ad")
    fetch_dataset({"dataset": "study", "source": str(tmp_path / "in.h5ad")}, tmp_path / "raw.h5ad")
    corpus = write_table(CELLS, tmp_path / "corpus.parquet", cell_id=["study|c1"], split="train")
    (tmp_path / "sets.gmt").write_text(gmt)
    with pytest.raises(InputError) as error:
        score_pathways(tmp_path / "raw.h5ad", corpus, tmp_path / "sets.gmt", 1, out / "scores.parquet")
    check(error, out, expected)


@pytest.mark.parametrize(
    ("table", "min_active_share", "expected"),
    [
        ("id\ttext\n", 0, ["sets.tsv", "columns id, text", "Give the columns id, name, description"]),
        (
            "id\tname\tdescription\nA\tsame\t\nB\tsame\t\n",
            0,
            ["sets.tsv", "two gene sets are named same", "Give each its own name"],
        ),
        (
            "id\tname\tdescription\nA\tone; then two\t\n",
            0,
            ["sets.tsv: name", "'one; then two'", "Reword it"],
        ),
        (
            "id\tname\tdescription\nA\tone. Definitions. Two\t\n",
            0,
            ["sets.tsv: name", "'one. Definitions. Two'", "Reword it"],
        ),
        (
            "id\tname\tdescription\n",
            1,
            ["config: pathways: min_active_share", "no gene set is active in more than 100", "Lower it"],
        ),
    ],
    ids=["other columns", "duplicate names", "a separator in a name", "an explanation in a name", "no set kept"],
)
def test_gene_sets_that_cannot_be_described(tmp_path, out, table, min_active_share, expected):
    corpus = write_table(CELLS, tmp_path / "corpus.parquet", cell_id=["c1", "c2"], split="train")
    scores = pd.DataFrame({"cell_id": ["c1", "c2"], "A": [0.1, 0.4], "B": [0.4, 0.1]})
    PATHWAY_SCORES.write(scores, tmp_path / "scores.parquet")
    (tmp_path / "sets.tsv").write_text(table)
    files = [out / name for name in ("descriptions.parquet", "terms.parquet", "pathways.json")]
    with pytest.raises(InputError) as error:
        write_descriptions(corpus, [tmp_path / "scores.parquet"], tmp_path / "sets.tsv", min_active_share, 2, *files)
    check(error, out, expected)
