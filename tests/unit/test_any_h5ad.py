"""Any input file either works or fails with a one-line message that names the location and the fix."""

import errno
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from annotated_copy import annotate_copy, stored
from cell2text.cells import h5ad, matrices
from cell2text.cells.fetch_dataset import fetch_dataset
from cell2text.errors import InputError
from cell2text.job import run_job

GENES = [f"ENSG{i:011d}" for i in range(1, 31)]
SYMBOLS = ["MT-CO1", "CD3D", "LYZ", *(f"GENE{i}" for i in range(27))]
B_CELL, T_CELL = "CL:0000236", "CL:0000084"


def draw_counts():
    """Four cells, at least 20 of 30 genes expressed; only the first gene has a count of one, in every cell."""
    counts = (np.random.default_rng(0).poisson(2, (4, 30)) + 2) * (np.arange(30) % 4 > 0)
    counts[:, 0] = 1
    return counts.astype(np.float32)


COUNTS = draw_counts()
TOTALS = COUNTS.sum(axis=1)
LOGS = np.log1p(COUNTS * 1e4 / TOTALS[:, None])


def study(matrix=COUNTS, genes=GENES, var=None, cells=("c1", "c2", "c3", "c4"), layers=None, raw=None, **obs):
    """Return a study as AnnData."""
    rows = matrix.shape[0]
    labels = {"cell_type_ontology_term_id": [B_CELL, T_CELL] * 2} if rows == 4 else {}
    made = ad.AnnData(
        matrix,
        obs=pd.DataFrame(labels | obs, index=list(cells)[:rows]),
        var=pd.DataFrame({"feature_name": SYMBOLS[: len(genes)]} if var is None else var, index=list(genes)),
        layers=layers,
    )
    if raw is not None:
        made.raw = ad.AnnData(raw, var=made.var)
    return made


def saved(**parts):
    """Return a function that writes a study."""
    return lambda path: study(**parts).write_h5ad(path)


def changed(change, **parts):
    """Return a function that writes a study and then changes the file."""

    def write(path):
        study(**parts).write_h5ad(path)
        with h5py.File(path, "r+") as file:
            change(file)

    return write


def replace(file, name, values, **attributes):
    kept = dict(file[name].attrs)
    del file[name]
    file[name] = values
    file[name].attrs.update(kept | attributes)


def put(dataset, place, value):
    dataset[place] = value


def with_value(row, column, value):
    matrix = COUNTS.copy()
    matrix[row, column] = value
    return matrix


def shuffle_within_rows(file):
    group = file["X"]
    ends = group["indptr"][:]
    indices, data = group["indices"][:], group["data"][:]
    for first, last in zip(ends[:-1], ends[1:], strict=True):
        indices[first:last], data[first:last] = indices[first:last][::-1].copy(), data[first:last][::-1].copy()
    group["indices"][:], group["data"][:] = indices, data


def split_first_value(file):
    """Store the first value of the last cell as two entries of the same gene with the same sum."""
    group = file["X"]
    first = group["indptr"][-2]
    indices, data = group["indices"][:], group["data"][:]
    data = np.insert(data, first, 1)
    data[first + 1] -= 1
    replace(group, "data", data)
    replace(group, "indices", np.insert(indices, first, indices[first]))
    group["indptr"][-1] += 1


def widen(file):
    for name in ("indices", "indptr"):
        replace(file["X"], name, file["X"][name][:].astype(np.int64))


def strings_to_bytes(file):
    index = file["obs"].attrs["_index"]
    replace(file["obs"], index, np.array([b"c1", b"c2", b"c3", b"c4"]), **{"encoding-type": "array"})
    labels = file["obs/cell_type_ontology_term_id"]
    replace(labels, "categories", np.array([T_CELL.encode(), B_CELL.encode()]), **{"encoding-type": "array"})


def hide_negative(file):
    """Store the first value of the last cell as two entries, of which one is negative."""
    split_first_value(file)
    data = file["X/data"]
    first = file["X/indptr"][-2]
    data[first], data[first + 1] = -1, data[first + 1] + 2


def truncate(path):
    study(matrix=sparse.csr_matrix(COUNTS)).write_h5ad(path)
    path.write_bytes(path.read_bytes()[:-500])


def link_to_itself(path):
    path.symlink_to(path)


def sums(dtype, kind=sparse.csr_matrix):
    """Store the counts of cell c1 and the first gene as entries of the same place, each the largest of its type."""
    largest = {np.float16: 2047}.get(dtype) or np.iinfo(dtype).max
    entries = -(-SUMS[0, 0] // largest).astype(int)

    def change(file):
        group = file["X"]
        data, indices, ends = (group[name][:] for name in ("data", "indices", "indptr"))
        rest = SUMS[0, 0] - largest * (entries - 1)
        replace(group, "data", np.concatenate([np.full(entries - 1, largest), [rest], data[1:]]).astype(dtype))
        replace(group, "indices", np.concatenate([np.zeros(entries - 1, indices.dtype), indices]))
        replace(group, "indptr", ends + np.where(np.arange(len(ends)) > 0, entries - 1, 0).astype(ends.dtype))

    return changed(change, matrix=kind(COUNTS.astype(np.float32 if dtype is np.float16 else dtype)))


SUMS = with_value(0, 0, 100_000)
CSR = {"matrix": sparse.csr_matrix(COUNTS)}
SEVERAL = {"layers": {"spliced": COUNTS, "ambient": LOGS}, "matrix": COUNTS - 3}

# A function that writes the file, columns of the sheet, and the expected counts.
WORKS = {
    "csr": (saved(**CSR), {}, COUNTS),
    "csc on disk": (saved(matrix=sparse.csc_matrix(COUNTS)), {}, COUNTS),
    "dense int64": (saved(matrix=COUNTS.astype(np.int64)), {}, COUNTS),
    "uint8, sums beyond 255": (sums(np.uint8), {}, SUMS),
    "int8, sums beyond 127": (sums(np.int8), {}, SUMS),
    "int16, by gene": (sums(np.int16, sparse.csc_matrix), {}, SUMS),
    "uint16, by gene": (sums(np.uint16, sparse.csc_matrix), {}, SUMS),
    "float16, sums beyond 2048": (sums(np.float16), {}, SUMS),
    "dense uint8": (saved(matrix=COUNTS.astype(np.uint8)), {}, COUNTS),
    "float16": (saved(matrix=COUNTS.astype(np.float16)), {}, COUNTS),
    "big-endian": (saved(matrix=COUNTS.astype(">f4")), {}, COUNTS),
    "float64 with noise": (saved(matrix=COUNTS.astype(np.float64) * (1 + 1e-7)), {}, COUNTS),
    "64-bit indices": (changed(widen, **CSR), {}, COUNTS),
    "unsorted indices": (changed(shuffle_within_rows, **CSR), {}, COUNTS),
    "unsorted int32": (changed(shuffle_within_rows, matrix=sparse.csr_matrix(COUNTS.astype(np.int32))), {}, COUNTS),
    "duplicate entries are summed": (changed(split_first_value, matrix=sparse.csr_matrix(with_value(3, 0, 5))), {},
                                     with_value(3, 0, 5)),
    "explicit zeros": (saved(matrix=sparse.csr_matrix((COUNTS.ravel(), np.tile(range(30), 4), np.arange(5) * 30))),
                       {}, COUNTS),
    "a cell without counts": (saved(matrix=COUNTS * [[1], [0], [1], [1]]), {}, COUNTS * [[1], [0], [1], [1]]),
    "a gene without counts": (saved(matrix=with_value(slice(None), 7, 0)), {}, with_value(slice(None), 7, 0)),
    "one cell": (saved(matrix=COUNTS[:1]), {}, COUNTS[:1]),
    "scaled X and counts in raw": (saved(matrix=(COUNTS - 3) / 2, raw=COUNTS), {}, COUNTS),
    "logs in raw and counts in a layer": (saved(matrix=LOGS, raw=LOGS, layers={"counts": COUNTS}), {}, COUNTS),
    "a named layer": (saved(**SEVERAL), {"matrix": "spliced"}, COUNTS),
    "logs in a named layer": (saved(**SEVERAL), {"matrix": "ambient"}, COUNTS),
    "X by name": (saved(matrix=COUNTS, raw=COUNTS * 2), {"matrix": "X"}, COUNTS),
    "logs without totals": (saved(matrix=LOGS), {}, COUNTS),
    "logs of counts per million": (saved(matrix=np.log1p(COUNTS * 1e6 / TOTALS[:, None])), {}, COUNTS),
    "logs of unscaled counts": (saved(matrix=np.log1p(COUNTS)), {}, COUNTS),
    "logs in csc": (saved(matrix=sparse.csc_matrix(LOGS)), {}, COUNTS),
    "rounded logs with totals": (saved(matrix=LOGS.round(3), n_counts=TOTALS), {}, COUNTS),
    "wrong totals are ignored if the logs prove the counts": (saved(matrix=LOGS, n_counts=TOTALS + 17), {}, COUNTS),
    "unused categories": (
        saved(cell_type_ontology_term_id=pd.Categorical([B_CELL, T_CELL] * 2, [T_CELL, "not a term", B_CELL])),
        {}, COUNTS),
    "strings as bytes": (changed(strings_to_bytes), {}, COUNTS),
    "a deprecated id": (saved(tissue_ontology_term_id=["UBERON:0003377"] * 4), {}, COUNTS),
    "two diseases": (saved(disease_ontology_term_id=["MONDO:0100096 || MONDO:0005148"] * 4), {}, COUNTS),
    "cultured cells": (saved(tissue_ontology_term_id=[B_CELL] * 4), {}, COUNTS),
    "numeric donors": (saved(donor_id=[1.0, 2.0, np.nan, 2.0]), {}, COUNTS),
    "ids with versions": (saved(genes=[f"{gene}.{i}" for i, gene in enumerate(GENES)]), {}, COUNTS),
    "no layers, no obsm": (changed(lambda file: [file.pop(name) for name in ("layers", "obsm", "uns")]), {}, COUNTS),
}  # fmt: skip

# A function that writes the file, columns of the sheet, and the expected parts of the message.
FAILS = {
    "scaled data only": (saved(matrix=(COUNTS - 3) / 2), {}, ["X: negative value", "Put raw counts"]),
    "scaled csc": (saved(matrix=sparse.csc_matrix(COUNTS - 2.5)), {}, ["X: negative value", "Put raw counts"]),
    "NaN": (saved(matrix=with_value(2, 9, np.nan)), {}, [f"X: missing value (NaN) in cell c3, gene {GENES[9]}"]),
    "all zero": (saved(matrix=np.zeros((4, 30), np.float32)), {}, ["X: no value above zero"]),
    "too large a count": (saved(matrix=with_value(0, 0, 2.0**25)), {}, ["X: too large for a count: 3.35544e+07"]),
    "proportions": (saved(matrix=COUNTS / 1e6), {}, ["X: not a whole number", "Put raw counts"]),
    "normalised, not logs": (saved(matrix=COUNTS * 1e4 / TOTALS[:, None]), {},
                             ["X: not a whole number", "interpreted as"]),
    "rounded logs without totals": (saved(matrix=LOGS.round(2)), {},
                                    ["interpreted as log1p of scaled counts", "it gives"]),
    "logs of a count too large to prove": (saved(matrix=np.log1p(with_value(1, 9, 2e6))), {},
                                           ["interpreted as", "it gives 2000"]),
    "logs of cells with few genes": (saved(matrix=LOGS * (np.arange(30) < 9)), {}, ["4 of 4 cells have too few genes"]),
    "booleans": (saved(matrix=COUNTS > 0), {}, ["X: values of type bool", "Put raw counts"]),
    "layers not named in the sheet": (saved(**SEVERAL), {}, ['not checked: layers["ambient"], layers["spliced"]',
                                                             "the column `matrix`"]),
    "an unknown layer": (saved(**SEVERAL), {"matrix": "umi"}, ["in.h5ad: umi", "no such matrix", "one of layers"]),
    "no matrix": (changed(lambda file: file.pop("X")), {}, ["no matrix in the usual places"]),
    "no cells": (saved(matrix=COUNTS[:0], cells=()), {}, ["in.h5ad: obs", "no cells"]),
    "duplicate cells": (saved(cells=("c1", "c2", "c2", "c4")), {}, ["in.h5ad: obs", "cell c2 occurs twice"]),
    "numbers as gene names": (saved(genes=[str(i) for i in range(30)], var={}), {},
                              ["in.h5ad: var", "gene names are numbers"]),
    "mouse ids": (saved(genes=[gene.replace("ENSG", "ENSMUSG") for gene in GENES]), {},
                  ["in.h5ad: var", "genes are from other species (ENSMUSG00000000001, ", "set `species` to mouse"]),
    "mouse symbols": (saved(genes=[f"Cd{i}a" for i in range(30)], var={}), {}, ["in.h5ad: var", "mouse or rat"]),
    "mouse as organism": (saved(organism_ontology_term_id=["NCBITaxon:10090"] * 4), {},
                          ["in.h5ad: organism_ontology_term_id", "cells of mice", "Set `species` to mouse"]),
    "a deprecated id without replacement": (saved(tissue_ontology_term_id=["UBERON:0000919"] * 4), {},
                                            ["tissue_ontology_term_id", "UBERON:0000919 is deprecated"]),
    "numeric labels": (saved(cell_type_ontology_term_id=[1, 2, 3, 4]), {},
                       ["in.h5ad: cell_type_ontology_term_id", "1 is not a term of CL"]),
    "a two-dimensional column": (changed(lambda file: replace(file["obs"], "donor_id", np.ones((4, 2))), donor_id=1),
                                 {}, ["in.h5ad: obs: donor_id", "one value per row"]),
    "a column that is too short": (changed(lambda file: replace(file["obs"], "donor_id", [1]), donor_id=1), {},
                                   ["in.h5ad: obs: donor_id", "one value per row"]),
    "a column with an unknown encoding": (
        changed(lambda file: file["obs/donor_id"].attrs.update({"encoding-type": "riddle"}), donor_id=1), {},
        ["in.h5ad: obs: donor_id", "cannot be read", "or drop it"]),
    "a missing label column": (saved(), {"label_column": "leiden"},
                               ["in.h5ad: obs", "no column leiden", "cell_type_ontology_term_id"]),
    "no cell names": (changed(lambda file: file["obs"].pop(file["obs"].attrs["_index"])), {},
                      ["in.h5ad: obs", "no row names"]),
    "a gene index out of range": (changed(lambda file: put(file["X/indices"], 0, 99), **CSR), {},
                                  ["in.h5ad: X: indices", "gene index 99, but there are 30 genes"]),
    "a negative value hidden in a sum": (changed(hide_negative, **CSR), {}, ["in.h5ad: X: negative values in entries"]),
    "more values in a cell than genes": (
        changed(lambda file: [replace(file["X"], name, np.ones(4_000_001, np.int32)) for name in ("data", "indices")]
                + [put(file["X/indptr"], slice(None), [0, 0, 0, 0, 4_000_001])], **CSR),
        {}, ["in.h5ad: X: indptr", "4000001 values in a cell, but there are 30 genes"]),
    "an inconsistent indptr": (changed(lambda file: put(file["X/indptr"], 4, 7), **CSR), {},
                               ["in.h5ad: X: indptr", "inconsistent with"]),
    "fewer columns than genes": (changed(lambda file: replace(file, "X", COUNTS[:, :29])), {},
                                 ["in.h5ad: X", "(4, 29) values for 4 cells and 30 genes"]),
    "a truncated file": (truncate, {}, ["in.h5ad: cut off: ", " bytes", "fetch it again"]),
    "a link to itself": (link_to_itself, {}, ["in.h5ad", "a link that leads back to itself", "the column `source`"]),
    "an empty folder": (Path.mkdir, {}, ["in.h5ad", "expected one file matrix.mtx, found none", "10x folder"]),
}  # fmt: skip


def names(folder):
    return [path.name for path in folder.iterdir()]


@pytest.fixture(params=[4_000_000, 40], ids=["one block", "many blocks"])
def block_size(request, monkeypatch):
    monkeypatch.setattr(matrices, "VALUES_AT_ONCE", request.param)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", WORKS)
def test_an_unusual_study_works(tmp_path, block_size, case):
    write, row, expected = WORKS[case]
    write(tmp_path / "in.h5ad")
    fetch_dataset({"dataset": "s", "source": str(tmp_path / "in.h5ad")} | row, tmp_path / "out/s.h5ad")
    cells = ad.read_h5ad(tmp_path / "out/s.h5ad")
    assert isinstance(cells.X, sparse.csr_matrix) and cells.X.dtype == np.float32
    assert cells.X.has_canonical_format and (cells.X.data > 0).all()
    assert np.array_equal(cells.X.toarray(), expected)
    assert list(cells.var_names) == GENES and list(cells.var["symbol"]) == SYMBOLS
    assert cells.uns["counts_kept"] == 1
    assert names(tmp_path / "out") == ["s.h5ad"]
    if cells.n_obs == 4:
        assert list(cells.obs["cell_type"]) == ["B cell", "T cell"] * 2


# Files whose labels cannot be used for training: annotation needs none.
LABELS = ("duplicate cells", "numeric labels", "a deprecated id without replacement")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", [*WORKS, *LABELS])
def test_an_unusual_study_is_annotated_cell_by_cell_and_otherwise_unchanged(tmp_path, case):
    write, row, *_ = (WORKS | FAILS)[case]
    write(tmp_path / "in.h5ad")
    before = (tmp_path / "in.h5ad").read_bytes()
    counts, _ = annotate_copy(tmp_path / "in.h5ad", tmp_path, **row)
    assert (tmp_path / "in.h5ad").read_bytes() == before
    assert np.array_equal(counts.X.toarray(), WORKS[case][2] if case in WORKS else COUNTS)
    kept, written = stored(tmp_path / "in.h5ad"), stored(tmp_path / "annotated.h5ad")
    assert {name: written[name] for name in kept} == kept


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", FAILS)
def test_a_malformed_study_is_reported_in_one_line(tmp_path, case):
    write, row, expected = FAILS[case]
    write(tmp_path / "in.h5ad")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError) as error:
        fetch_dataset({"dataset": "s", "source": str(tmp_path / "in.h5ad")} | row, tmp_path / "out/s.h5ad")
    message = str(error.value)
    assert "\n" not in message
    for part in ["in.h5ad", *expected]:
        assert part in message
    assert not names(tmp_path / "out")


@pytest.mark.parametrize(
    ("column", "given", "expected"),
    [
        ("cell_type", "CL:0000003", "CL:0000000"),
        ("tissue", "UBERON:0003377", "UBERON:0001021"),  # via UBERON:0002003, which is deprecated as well
        ("tissue", "UBERON:0000178 (organoid)", "UBERON:0000178"),
        ("disease", "MONDO:0100096 || MONDO:0005148", "MONDO:0100096"),
        ("tissue", B_CELL, "unknown"),
    ],
)
def test_ids_are_replaced_with_a_warning(tmp_path, caplog, column, given, expected):
    saved(**{f"{column}_ontology_term_id": [given] * 4})(tmp_path / "in.h5ad")
    with caplog.at_level(logging.WARNING):
        fetch_dataset({"dataset": "s", "source": str(tmp_path / "in.h5ad")}, tmp_path / "s.h5ad")
    found = set(ad.read_h5ad(tmp_path / "s.h5ad").obs[f"{column}_ontology_term_id"])
    assert found == {expected}
    assert f"in.h5ad: {column}_ontology_term_id: {given} is" in caplog.text


def job(row, path):
    return SimpleNamespace(log=[], rule="fetch_dataset", params={"row": row}, output=SimpleNamespace(cells=path))


def fail_with(monkeypatch, number):
    def refuse(*given, **more):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(h5ad.ad.io, "write_elem", refuse)


def full_disk(monkeypatch, out):
    fail_with(monkeypatch, errno.ENOSPC)
    return out / "s.h5ad", "Free some space on that disk"


def read_only_disk(monkeypatch, out):
    fail_with(monkeypatch, errno.EROFS)
    return out / "s.h5ad", "Read-only file system. Run in a folder that can be written"


def file_instead_of_folder(monkeypatch, out):
    shutil.rmtree(out)
    out.write_text("")
    return out / "s.h5ad", "cannot be written"


@pytest.mark.parametrize("failure", [full_disk, read_only_disk, file_instead_of_folder])
def test_an_output_that_cannot_be_written_is_reported_in_one_line(tmp_path, monkeypatch, capsys, failure):
    saved(**CSR)(tmp_path / "in.h5ad")
    out = tmp_path / "out"
    out.mkdir()
    path, expected = failure(monkeypatch, out)
    row = {"dataset": "s", "source": str(tmp_path / "in.h5ad")}
    with pytest.raises(SystemExit) as stopped:
        run_job(lambda snakemake: fetch_dataset(snakemake.params["row"], snakemake.output.cells), job(row, path))
    logging.getLogger().handlers.clear()
    assert stopped.value.code == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"{path}: cannot be written: " in message and expected in message
    assert out.is_file() or not names(out)


def test_leftovers_of_a_killed_job_are_overwritten(tmp_path):
    saved(matrix=sparse.csc_matrix(COUNTS))(tmp_path / "in.h5ad")
    out = tmp_path / "out"
    (out / ".s.h5ad.entries").mkdir(parents=True)
    (out / ".s.h5ad.entries/0").write_bytes(bytes(120))
    (out / ".s.h5ad.unfinished").write_bytes(bytes(99))
    fetch_dataset({"dataset": "s", "source": str(tmp_path / "in.h5ad")}, out / "s.h5ad")
    assert names(out) == ["s.h5ad"]
    assert np.array_equal(ad.read_h5ad(out / "s.h5ad").X.toarray(), COUNTS)
