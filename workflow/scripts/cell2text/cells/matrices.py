"""Matrices of cells by genes as files hold them, read as blocks of whole cells.

Four forms: dense, by cell (CSR), by gene (CSC) and as a list of entries (Matrix Market). The arrays may lie in
memory, in HDF5 or in Zarr: all are sliced alike. A block holds about ``VALUES_AT_ONCE`` stored values at most, or
one cell, whatever the size of the study.
"""

import gzip
import itertools
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from scipy import sparse

from cell2text.errors import InputError

VALUES_AT_ONCE = 4_000_000
FIRST_VALUES = 40_000  # tell logs from counts
Entries = tuple[np.ndarray, np.ndarray, np.ndarray]  # the cells, genes and values of some entries


class Matrix(Protocol):
    """Cells by genes, in any form."""

    shape: tuple[int, int]

    def first_values(self) -> np.ndarray:
        """Return the values that come first in the file, enough to tell logs from counts."""

    def blocks(self, scratch: Path) -> Iterator[sparse.csr_matrix]:
        """Yield all cells in order: CSR, values of the stored type, indices sorted, repeated entries summed.

        Parameters
        ----------
        scratch
            Folder to work in, where the form needs one; it need not exist and is not there afterwards.

        Raises
        ------
        InputError
            If the file is damaged.
        """


@dataclass(frozen=True)
class DenseMatrix:
    """A table of values, cells by genes."""

    values: Any
    where: str

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        return tuple(self.values.shape)

    def first_values(self) -> np.ndarray:
        """Return the values of the first cells."""
        rows = max(1, FIRST_VALUES // max(self.shape[1], 1))
        return _slice(self.values, 0, rows, self.where).ravel()

    def blocks(self, scratch: Path) -> Iterator[sparse.csr_matrix]:
        """Yield blocks that hold whole chunks of the file, where they fit."""
        rows = max(1, VALUES_AT_ONCE // max(self.shape[1], 1))
        chunks = getattr(self.values, "chunks", None)
        rows = rows // chunks[0] * chunks[0] or rows if chunks else rows
        for start in range(0, self.shape[0], rows):
            yield sparse.csr_matrix(_numbers(self.values, start, start + rows, self.where))


@dataclass(frozen=True)
class CellMatrix:
    """Compressed by cell (CSR): ``indptr`` has an end for each cell, ``indices`` are genes."""

    data: Any
    indices: Any
    indptr: Any
    shape: tuple[int, int]
    where: str

    def first_values(self) -> np.ndarray:
        """Return the first stored values."""
        return _slice(self.data, 0, FIRST_VALUES, self.where)

    def blocks(self, scratch: Path) -> Iterator[sparse.csr_matrix]:
        """Yield runs of cells."""
        ends = _read_ends(self, self.shape[0])
        for start, stop in row_runs(ends):
            first, last = ends[start], ends[stop]
            genes = _numbers(self.indices, first, last, self.where)
            _check_range(genes, self.shape[1], "gene", self.where)
            values = _numbers(self.data, first, last, self.where)
            parts = (values, genes.astype(np.int32, copy=False), ends[start : stop + 1] - first)
            block = sparse.csr_matrix(parts, shape=(stop - start, self.shape[1]))
            block.sum_duplicates()
            yield block


@dataclass(frozen=True)
class GeneMatrix:
    """Compressed by gene (CSC): ``indptr`` has an end for each gene, ``indices`` are cells."""

    data: Any
    indices: Any
    indptr: Any
    shape: tuple[int, int]
    where: str

    def first_values(self) -> np.ndarray:
        """Return the first stored values."""
        return _slice(self.data, 0, FIRST_VALUES, self.where)

    def blocks(self, scratch: Path) -> Iterator[sparse.csr_matrix]:
        """Yield the cells once the entries have been sorted by cell on disk."""
        return sort_by_cell(self._entries(), int(self.data.shape[0]), self.shape, scratch)

    def _entries(self) -> Iterator[Entries]:
        ends = _read_ends(self, self.shape[1])
        for first in range(0, int(ends[-1]), VALUES_AT_ONCE):
            last = min(first + VALUES_AT_ONCE, int(ends[-1]))
            cells = _numbers(self.indices, first, last, self.where)
            _check_range(cells, self.shape[0], "cell", self.where)
            genes = np.repeat(np.arange(self.shape[1]), np.diff(ends.clip(first, last)))
            yield cells, genes, _numbers(self.data, first, last, self.where)


@dataclass(frozen=True)
class EntryList:
    """A Matrix Market file as 10x writes it: a line an entry, genes by cells, both counted from one.

    Format: https://math.nist.gov/MatrixMarket/formats.html
    """

    path: Path
    shape: tuple[int, int]
    entries: int
    lines_before: int

    @classmethod
    def open(cls, path: Path) -> "EntryList":
        """Read the header of a file, which may be gzipped.

        Raises
        ------
        InputError
            If the file is no Matrix Market file of real or whole numbers.
        """
        with _open_text(path) as file:
            header, lines_before = file.readline().lower().split(), 2
            if header[:3] != ["%%matrixmarket", "matrix", "coordinate"] or header[3:] not in (
                ["integer", "general"],
                ["real", "general"],
            ):
                raise InputError(path, "no Matrix Market file of counts", "Give the folder as Cell Ranger writes it")
            for line in file:
                if not line.startswith("%"):
                    genes, cells, entries = (int(number) for number in line.split())
                    return cls(path, (cells, genes), entries, lines_before)
                lines_before += 1
        raise InputError(path, "no line with the numbers of genes and cells", "Fetch or write the file again")

    def first_values(self) -> np.ndarray:
        """Return the values of the first lines."""
        _, _, values = next(self._read(FIRST_VALUES), (None, None, np.empty(0)))
        return values

    def blocks(self, scratch: Path) -> Iterator[sparse.csr_matrix]:
        """Yield the cells once the entries have been sorted by cell on disk."""
        return sort_by_cell(self._read(VALUES_AT_ONCE), self.entries, self.shape, scratch)

    def _read(self, lines: int) -> Iterator[Entries]:
        read = 0
        with _open_text(self.path) as file:
            next(itertools.islice(file, self.lines_before - 1, None))
            kinds = {"gene": np.int64, "cell": np.int64, "value": np.float64}
            form = {"sep": r"\s+", "header": None, "names": list(kinds), "dtype": kinds, "index_col": False}
            for table in pd.read_csv(file, chunksize=lines, **form) if self.entries else ():
                genes, cells = (table[column].to_numpy() - 1 for column in ("gene", "cell"))
                _check_range(genes, self.shape[1], "gene", self.path)
                _check_range(cells, self.shape[0], "cell", self.path)
                read += len(table)
                yield cells, genes, table["value"].to_numpy()
        if read != self.entries:
            raise InputError(self.path, f"{read} entries where its header says {self.entries}", _AGAIN)


_AGAIN = "Fetch or write the file again"


def row_runs(ends: np.ndarray, rows: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield first and end row of runs that hold at most ``VALUES_AT_ONCE`` values and ``rows`` rows, or one row.

    Parameters
    ----------
    ends
        ``indptr`` of a CSR matrix.
    rows
        Most rows of a run; None for any number.
    """
    start, last = 0, len(ends) - 1
    while start < last:
        stop = int(np.searchsorted(ends, ends[start] + VALUES_AT_ONCE, side="right")) - 1
        stop = min(max(stop, start + 1), last, start + (rows or last))
        yield start, stop
        start = stop


def sort_by_cell(
    entries: Iterator[Entries], amount: int, shape: tuple[int, int], scratch: Path
) -> Iterator[sparse.csr_matrix]:
    """Turn entries in any order into blocks of whole cells, in bounded memory.

    Each entry is written to the file of its run of cells, and each file is then read by itself. All runs have the
    same number of cells, so many that a run holds a quarter of ``VALUES_AT_ONCE`` values on average. The files
    take 8 bytes an entry on disk and the size of the value.

    Parameters
    ----------
    entries
        Cells, genes and values, some at a time. Entries of the same cell and gene are summed.
    amount
        Number of entries, or about that.
    shape
        Cells and genes.
    scratch
        Folder for the files; removed when all is read.
    """
    cells_a_run = max(1, shape[0] // max(1, 4 * amount // VALUES_AT_ONCE))
    try:
        shutil.rmtree(scratch, ignore_errors=True)  # a killed run may have left one
        scratch.mkdir(parents=True)
        kind = None
        for cells, genes, values in entries:
            kind = kind or np.dtype([("cell", np.int32), ("gene", np.int32), ("value", values.dtype)])
            _write_runs(scratch, cells // cells_a_run, cells, genes, values, kind)
        for start in range(0, shape[0], cells_a_run):
            path = scratch / str(start // cells_a_run)
            held = np.fromfile(path, dtype=kind) if path.exists() else np.empty(0, dtype=kind or _NO_ENTRY)
            rows = (held["value"], (held["cell"] - start, held["gene"]))
            yield sparse.csr_matrix(rows, shape=(min(cells_a_run, shape[0] - start), shape[1]))
            path.unlink(missing_ok=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


_NO_ENTRY = np.dtype([("cell", np.int32), ("gene", np.int32), ("value", np.float32)])


def _write_runs(scratch, runs, cells, genes, values, kind) -> None:
    order = np.argsort(runs, kind="stable")
    held = np.empty(len(order), dtype=kind)
    held["cell"], held["gene"], held["value"] = cells[order], genes[order], values[order]
    numbers, starts = np.unique(runs[order], return_index=True)
    for number, part in zip(numbers, np.split(held, starts[1:]), strict=True):
        with (scratch / str(number)).open("ab") as file:
            part.tofile(file)


@contextmanager
def _open_text(path: Path):
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        try:
            yield file
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise InputError(path, f"damaged ({error})", _AGAIN) from error


def _numbers(array: Any, start: int, stop: int, where: str | Path) -> np.ndarray:
    """Return a slice in a type that scipy takes, in memory of its own."""
    part = _slice(array, start, stop, where)
    kind = np.dtype(np.float32) if part.dtype == np.float16 else part.dtype.newbyteorder("=")
    return part.astype(kind, copy=isinstance(array, np.ndarray))


def _slice(array: Any, start: int, stop: int, where: str | Path) -> np.ndarray:
    try:
        return np.asarray(array[int(start) : int(stop)])
    except Exception as error:  # h5py and zarr raise many kinds
        raise InputError(where, f"damaged ({type(error).__name__} while reading values)", _AGAIN) from error


def _read_ends(matrix: CellMatrix | GeneMatrix, number: int) -> np.ndarray:
    """Return ``indptr`` in 64 bits, checked against the lengths of the other arrays."""
    ends = _slice(matrix.indptr, 0, number + 2, matrix.where).astype(np.int64)
    stored = matrix.data.shape[0]
    if len(ends) != number + 1 or ends[0] != 0 or (np.diff(ends) < 0).any() or ends[-1] != stored:
        raise InputError(f"{matrix.where}: indptr", f"does not part its {stored} values among {number}", _AGAIN)
    if matrix.indices.shape[0] != stored:
        raise InputError(f"{matrix.where}: indices", f"{matrix.indices.shape[0]} for {stored} values", _AGAIN)
    return ends


def _check_range(numbers: np.ndarray, end: int, what: str, where: str | Path) -> None:
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= end):
        wrong = numbers[(numbers < 0) | (numbers >= end)][0]
        raise InputError(f"{where}: indices", f"{what} number {wrong} where there are {end}", _AGAIN)
