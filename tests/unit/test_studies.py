"""The same study in every supported format gives the same cells."""

import gzip
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import io, sparse

from annotated_copy import annotate_copy
from cell2text.cells import matrices
from cell2text.cells.fetch_dataset import fetch_dataset
from cell2text.cells.studies import BUNDLED
from cell2text.errors import InputError

COUNTS = np.random.default_rng(1).poisson(0.7, (9, 5)).astype(np.float32)
IDS = [f"ENSG{i:011d}" for i in range(1, 6)]
SYMBOLS = ["CD3D", "LYZ", "MT-CO1", "NKX2-1", "C1orf112"]
BARCODES = [f"AAAC{i}-1" for i in range(9)]
KINDS = ["Gene Expression"] * 5
OLD = Path(sc.__file__).parent / "datasets/10x_pbmc68k_reduced.h5ad"


def write_10x_hdf5(path, counts=COUNTS, ids=IDS, symbols=SYMBOLS, kinds=KINDS, group="matrix"):
    """As written by Cell Ranger: genes by cells, compressed by cell; version 2 has one group per genome."""
    by_cell = sparse.csr_matrix(counts.astype(np.int32))
    features = {"id": ids, "name": symbols, "feature_type": kinds, "genome": ["GRCh38"] * len(ids)}
    with h5py.File(path, "a") as file:
        for name in ("data", "indices", "indptr"):
            file[f"{group}/{name}"] = getattr(by_cell, name)
        file[f"{group}/shape"] = np.array(counts.shape[::-1], dtype=np.int32)
        file[f"{group}/barcodes"] = np.array(BARCODES, dtype="S")
        if group == "matrix":
            for name, values in features.items():
                file[f"{group}/features/{name}"] = np.array(values, dtype="S")
        else:
            file[f"{group}/genes"], file[f"{group}/gene_names"] = np.array(ids, "S"), np.array(symbols, "S")


def write_10x_folder(path, gzipped=True, prefix="", features=("ids", "symbols", "kinds"), order="F", counts=COUNTS):
    path.mkdir()
    matrix = sparse.coo_matrix(counts.T.astype(int))
    if order == "shuffled":
        shuffled = np.random.default_rng(0).permutation(matrix.nnz)
        matrix = sparse.coo_matrix((matrix.data[shuffled], (matrix.row[shuffled], matrix.col[shuffled])), matrix.shape)
    io.mmwrite(path / "new.mtx", matrix, field="integer", symmetry="general")
    columns = {"ids": IDS, "symbols": SYMBOLS, "kinds": KINDS}
    lines = ["\t".join(row) for row in zip(*(columns[name] for name in features), strict=True)]
    texts = {
        "matrix.mtx": (path / "new.mtx").read_text(),
        "barcodes.tsv": "".join(f"{barcode}\n" for barcode in BARCODES),
        "features.tsv" if gzipped else "genes.tsv": "".join(f"{line}\n" for line in lines),
    }
    (path / "new.mtx").unlink()
    for name, text in texts.items():
        if gzipped:
            (path / f"{prefix}{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (path / f"{prefix}{name}").write_text(text)


def write_zarr(path, matrix=COUNTS):
    cells = ad.AnnData(matrix, pd.DataFrame(index=BARCODES), pd.DataFrame({"feature_name": SYMBOLS}, index=IDS))
    cells.write_zarr(path)


SOURCES = {
    "10x HDF5": write_10x_hdf5,
    "10x HDF5 of version 2": lambda path: write_10x_hdf5(path, group="GRCh38"),
    "10x HDF5 with antibodies": lambda path: write_10x_hdf5(
        path,
        np.hstack([COUNTS, 100 * COUNTS[:, :2]]),
        [*IDS, "CD3", "CD19"],
        [*SYMBOLS, "CD3_TotalSeqB", "CD19_TotalSeqB"],
        [*KINDS, "Antibody Capture", "Antibody Capture"],
    ),
    "10x folder": write_10x_folder,
    "10x folder, not gzipped, no feature types": lambda path: write_10x_folder(
        path, gzipped=False, features=("ids", "symbols")
    ),
    "10x folder with a prefix": lambda path: write_10x_folder(path, prefix="GSM1_sample_"),
    "10x folder, entries in any order": lambda path: write_10x_folder(path, order="shuffled"),
    "zarr, csr": lambda path: write_zarr(path, sparse.csr_matrix(COUNTS)),
    "zarr, csc": lambda path: write_zarr(path, sparse.csc_matrix(COUNTS)),
    "zarr, dense": write_zarr,
}


def fetch(source, out, **row):
    fetch_dataset({"dataset": "s", "source": str(source)} | row, out)
    return ad.read_h5ad(out)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("at_once", [4_000_000, 5])
@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source(tmp_path, monkeypatch, kind, at_once):
    monkeypatch.setattr(matrices, "VALUES_AT_ONCE", at_once)
    SOURCES[kind](tmp_path / "source")
    cells = fetch(tmp_path / "source", tmp_path / "out.h5ad")
    assert np.array_equal(cells.X.toarray(), COUNTS)
    assert list(cells.obs_names) == [f"s|{barcode}" for barcode in BARCODES]
    assert list(cells.var_names) == IDS and list(cells.var["symbol"]) == SYMBOLS
    assert cells.uns["counts_kept"] == 1  # antibodies do not count as lost


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_is_annotated_cell_by_cell(tmp_path, kind):
    SOURCES[kind](tmp_path / "source")
    _, obs = annotate_copy(tmp_path / "source", tmp_path)
    assert list(obs.index) == BARCODES
    annotated = ad.read_h5ad(tmp_path / "annotated.h5ad")
    assert np.array_equal(annotated[:, : len(IDS)].to_df(), COUNTS)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("source", [OLD, BUNDLED])
def test_a_study_in_memory_is_annotated_cell_by_cell(tmp_path, source):
    counts, obs = annotate_copy(source, tmp_path)
    assert counts.n_obs == len(obs) == 700 and "bulk_labels" in obs
    assert "X_umap" in ad.read_h5ad(tmp_path / "annotated.h5ad").obsm


def cut_lines(path):
    write_10x_folder(path, gzipped=False)
    lines = (path / "matrix.mtx").read_text().splitlines()
    (path / "matrix.mtx").write_text("\n".join(lines[:-4]))


def cut_bytes(path):
    write_10x_folder(path)
    whole = (path / "matrix.mtx.gz").read_bytes()
    (path / "matrix.mtx.gz").write_bytes(whole[: len(whole) // 2])


def edit(path, name, change):
    write_10x_folder(path, gzipped=False)
    (path / name).write_text(change((path / name).read_text()))


def two_genomes(path):
    write_10x_hdf5(path, group="GRCh38")
    write_10x_hdf5(path, group="mm10")


def break_zarr(path):
    write_zarr(path)
    (path / "zarr.json" if (path / "zarr.json").exists() else path / ".zgroup").write_text("{")


def break_zarr_values(path):
    write_zarr(path)
    for entry in (path / "X").rglob("*"):
        if entry.is_file() and entry.suffix != ".json" and not entry.name.startswith(".z"):
            entry.write_bytes(entry.read_bytes()[:9])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (cut_lines, ["matrix.mtx: ", "entries, but the header says", "write the file again"]),
        (cut_bytes, ["matrix.mtx.gz: damaged", "write the file again"]),
        (
            lambda path: edit(path, "matrix.mtx", lambda text: text + "1 2 x\n"),
            ["matrix.mtx line", "'1 2 x' is not the number of a gene"],
        ),
        (
            lambda path: edit(path, "matrix.mtx", lambda text: text.replace("integer", "pattern")),
            ["line 1: positions without counts (pattern)"],
        ),
        (
            lambda path: edit(path, "matrix.mtx", lambda text: text + "77 1 1\n"),
            ["gene index 76, but there are 5 genes"],
        ),
        (lambda path: edit(path, "barcodes.tsv", lambda text: text[:-9]), ["(9, 5) values for 8 cells and 5 genes"]),
        (
            lambda path: (write_10x_folder(path), (path / "barcodes.tsv.gz").unlink()),
            ["expected one file barcodes.tsv, found none"],
        ),
        (two_genomes, ["several genomes: GRCh38, mm10", "human genes only"]),
        (break_zarr, ["not a complete Zarr folder", "write the file again"]),
        (break_zarr_values, ["source: X: not a complete matrix, or damaged"]),
    ],
    ids=[
        "missing lines",
        "missing bytes",
        "not a number",
        "pattern",
        "gene out of range",
        "too few barcodes",
        "no barcodes",
        "two genomes",
        "zarr metadata",
        "zarr values",
    ],
)
def test_a_damaged_source_is_reported_in_one_line(tmp_path, write, expected):
    write(tmp_path / "source")
    with pytest.raises(InputError) as error:
        fetch(tmp_path / "source", tmp_path / "out/s.h5ad")
    assert "\n" not in str(error.value)
    for part in ["source", *expected]:
        assert part in str(error.value)
    assert not list(tmp_path.glob("out/*")) and not list(tmp_path.glob("out/.*"))


def test_a_file_from_before_anndata_07_is_read(tmp_path):
    with h5py.File(OLD) as file:
        assert isinstance(file["obs"], h5py.Dataset)
    old, bundled = fetch(OLD, tmp_path / "old.h5ad"), fetch(BUNDLED, tmp_path / "new.h5ad")
    assert (old.X != bundled.X).nnz == 0
    assert list(old.var_names) == list(bundled.var_names)


def test_categories_in_the_format_of_anndata_07(tmp_path):
    cells = ad.AnnData(COUNTS, pd.DataFrame(index=BARCODES), pd.DataFrame(index=SYMBOLS))
    cells.obs["donor_id"] = list("ababababa")
    cells.write_h5ad(tmp_path / "in.h5ad")
    with h5py.File(tmp_path / "in.h5ad", "r+") as file:
        obs = file["obs"]
        codes, names = obs["donor_id/codes"][:], obs["donor_id/categories"][:]
        del obs["donor_id"]
        obs["__categories/donor_id"], obs["donor_id"] = names, codes
        obs["donor_id"].attrs["categories"] = obs["__categories/donor_id"].ref
    assert list(fetch(tmp_path / "in.h5ad", tmp_path / "out.h5ad").obs["donor_id"]) == list("ababababa")


def test_a_file_from_cellxgene_needs_no_configuration(tmp_path):
    """Counts are in raw, which has more genes than X; only var has gene names."""
    labels = {
        "cell_type": "CL:0000236", "tissue": "UBERON:0000178", "disease": "MONDO:0100096", "sex": "PATO:0000384",
        "development_stage": "HsapDv:0000123", "assay": "EFO:0009922", "self_reported_ethnicity": "unknown",
        "organism": "NCBITaxon:9606",
    }  # fmt: skip
    obs = pd.DataFrame({f"{slot}_ontology_term_id": [term] * 9 for slot, term in labels.items()}, index=BARCODES)
    obs = obs.assign(donor_id=list("aaabbbccc"), is_primary_data=False, observation_joinid=range(9)).astype("category")
    kept = [0, 1, 2, 4]
    cells = ad.AnnData(np.log1p(COUNTS), obs, pd.DataFrame({"feature_name": SYMBOLS}, index=IDS))
    cells.var["feature_is_filtered"] = False
    cells.raw = ad.AnnData(COUNTS, var=pd.DataFrame(index=IDS))
    cells = cells[:, kept].copy()
    cells.uns["organism_ontology_term_id"] = "NCBITaxon:9606"
    cells.write_h5ad(tmp_path / "in.h5ad")
    written = fetch(tmp_path / "in.h5ad", tmp_path / "out.h5ad")
    assert np.array_equal(written.X.toarray(), COUNTS)
    assert list(written.var_names) == IDS
    assert [written.var["symbol"].iloc[i] for i in kept] == [SYMBOLS[i] for i in kept]
    assert list(written.obs["donor_id"]) == list("aaabbbccc")
    first = written.obs.iloc[0]
    for slot, name in {"cell_type": "B cell", "tissue": "blood", "disease": "COVID-19", "sex": "male"}.items():
        assert (first[f"{slot}_ontology_term_id"], first[slot]) == (labels[slot], name)
    assert first["assay_ontology_term_id"] == "EFO:0009922"
    assert first["development_stage_ontology_term_id"] == "HsapDv:0000123"


@pytest.mark.parametrize("separator", ["\t", ","])
def test_a_cell_table_replaces_columns_of_obs(tmp_path, separator):
    write_10x_folder(tmp_path / "source")
    lines = ["barcode,label,donor_id", *(f"{barcode},B,d{i}" for i, barcode in enumerate(BARCODES[:7]))]
    (tmp_path / "cells.csv").write_text("\n".join(lines).replace(",", separator))
    (tmp_path / "labels.tsv").write_text("author_label\tcell_type_ontology_term_id\nB\tCL:0000236\n")
    tables = {"cell_table": str(tmp_path / "cells.csv"), "label_table": str(tmp_path / "labels.tsv")}
    cells = fetch(tmp_path / "source", tmp_path / "out.h5ad", label_column="label", **tables)
    assert list(cells.obs["cell_type"]) == ["B cell"] * 7 + ["unknown"] * 2
    assert list(cells.obs["donor_id"]) == [*(f"d{i}" for i in range(7)), "s", "s"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("barcode,label\nother-1,B\n", "none of its cells (other-1) is in the file (AAAC0-1, AAAC1-1)"),
        ("barcode,label\nAAAC0-1,B\nAAAC0-1,B\n", "cell AAAC0-1 occurs twice"),
        (None, "no such file"),
    ],
)
def test_an_invalid_cell_table(tmp_path, text, expected):
    write_10x_folder(tmp_path / "source")
    if text:
        (tmp_path / "cells.csv").write_text(text)
    with pytest.raises(InputError) as error:
        fetch(tmp_path / "source", tmp_path / "out.h5ad", cell_table=str(tmp_path / "cells.csv"))
    assert "cells.csv: " in str(error.value) and expected in str(error.value)
