"""Cell by gene matrices in the storage formats of files, read in blocks of whole cells.

Three formats here, dense, compressed by cell (CSR) and compressed by gene (CSC); coordinate lists are in
``matrix_market``. Arrays may be in memory, in HDF5 or in Zarr; all are sliced in the same way. Whatever the size of the
study, a block holds at most about ``VALUES_AT_ONCE`` stored values, or one cell.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy import sparse

from cell2text.cells.formats import explain_failure
from cell2text.errors import InputError
from cell2text.files import writing

VALUES_AT_ONCE = 4_000_000
MOST_PER_CELL = 4_000_000  # or one for each gene
FIRST_VALUES = 40_000  # enough to distinguish log1p values from counts
Entries = tuple[np.ndarray, np.ndarray, np.ndarray]  # cells, genes and values of some entries


class Matrix(Protocol):
    """A cell by gene matrix in any format."""

    shape: tuple[int, int]

    def first_values(self) -> np.ndarray:
        """Return the first stored values, enough to distinguish log1p values from counts."""

    def blocks(self, scratch: Path) -> Iterator[sparse.csr_matrix]:
        """Yield all cells in order: CSR, sorted indices, duplicate entries summed as float64.

        Parameters
        ----------
        scratch
            Temporary folder, for formats that need one; created if necessary and removed afterwards.

        Raises
        ------
        InputError
            If the file is damaged.
        """


@dataclass(frozen=True)
class DenseMatrix:
    """A dense array of values, cells by genes."""

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
        """Yield blocks of whole chunks of the file, if a chunk fits in a block."""
        rows = max(1, VALUES_AT_ONCE // max(self.shape[1], 1))
        chunks = getattr(self.values, "chunks", None)
        rows = rows // chunks[0] * chunks[0] or rows if chunks else rows
        for start in range(0, self.shape[0], rows):
            yield sparse.csr_matrix(_native_slice(self.values, start, start + rows, self.where))


@dataclass(frozen=True)
class CellMatrix:
    """Compressed by cell (CSR): ``indptr`` has one entry per cell, ``indices`` are genes."""

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
            if last - first > max(MOST_PER_CELL, self.shape[1]):
                problem = f"{last - first} values in a cell, but there are {self.shape[1]} genes"
                raise InputError(f"{self.where}: indptr", problem, _REWRITE)
            genes = _native_slice(self.indices, first, last, self.where)
            check_range(genes, self.shape[1], "gene", self.where)
            values = _native_slice(self.data, first, last, self.where).astype(float)  # a sum may need a wider type
            parts = (values, genes.astype(np.int32, copy=False), ends[start : stop + 1] - first)
            block = sparse.csr_matrix(parts, shape=(stop - start, self.shape[1]))
            negative = (values < 0).any()  # a sum could hide it
            block.sum_duplicates()
            _check_repeated(block, len(values), negative, self.where)
            yield block


@dataclass(frozen=True)
class GeneMatrix:
    """Compressed by gene (CSC): ``indptr`` has one entry per gene, ``indices`` are cells."""

    data: Any
    indices: Any
    indptr: Any
    shape: tuple[int, int]
    where: str

    def first_values(self) -> np.ndarray:
        """Return the first stored values."""
        return _slice(self.data, 0, FIRST_VALUES, self.where)

    def blocks(self, scratch: Path) -> Iterator[sparse.csr_matrix]:
        """Sort the entries by cell on disk, then yield the cells."""
        return sort_by_cell(self._entries(), int(self.data.shape[0]), self.shape, scratch, self.where)

    def _entries(self) -> Iterator[Entries]:
        ends = _read_ends(self, self.shape[1])
        for first in range(0, int(ends[-1]), VALUES_AT_ONCE):
            last = min(first + VALUES_AT_ONCE, int(ends[-1]))
            cells = _native_slice(self.indices, first, last, self.where)
            check_range(cells, self.shape[0], "cell", self.where)
            genes = np.repeat(np.arange(self.shape[1]), np.diff(ends.clip(first, last)))
            yield cells, genes, _native_slice(self.data, first, last, self.where)


_REWRITE = "Download or write the file again"


def row_runs(ends: np.ndarray, rows: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield start and stop of runs of rows with at most ``VALUES_AT_ONCE`` values and ``rows`` rows, or one row.

    Parameters
    ----------
    ends
        ``indptr`` of a CSR matrix.
    rows
        Maximum number of rows per run; None for no limit.
    """
    start, last = 0, len(ends) - 1
    while start < last:
        stop = int(np.searchsorted(ends, ends[start] + VALUES_AT_ONCE, side="right")) - 1
        stop = min(max(stop, start + 1), last, start + (rows or last))
        yield start, stop
        start = stop


def sort_by_cell(
    entries: Iterator[Entries], amount: int, shape: tuple[int, int], scratch: Path, where: str | Path
) -> Iterator[sparse.csr_matrix]:
    """Turn entries in any order into blocks of whole cells, in bounded memory.

    Each entry is written to the file of its run of cells; the files are then read one by one. All runs have the same
    number of cells, chosen so that a run holds a quarter of ``VALUES_AT_ONCE`` values on average. On disk an entry
    takes 8 bytes plus the size of its value.

    Parameters
    ----------
    entries
        Cells, genes and values, in batches. Entries of the same cell and gene are summed.
    amount
        Approximate number of entries.
    shape
        Cells and genes.
    scratch
        Folder for the files; removed at the end.
    where
        The matrix, for messages.
    """
    cells_per_run = max(1, shape[0] // max(1, 4 * amount // VALUES_AT_ONCE))
    try:
        shutil.rmtree(scratch, ignore_errors=True)  # a killed run may have left one
        with writing(scratch):
            scratch.mkdir(parents=True)
        entry_type = None
        for cells, genes, values in entries:
            entry_type = entry_type or np.dtype([("cell", np.int32), ("gene", np.int32), ("value", values.dtype)])
            _write_runs(scratch, cells // cells_per_run, cells, genes, values, entry_type)
        for start in range(0, shape[0], cells_per_run):
            path = scratch / str(start // cells_per_run)
            stored = np.fromfile(path, dtype=entry_type) if path.exists() else np.empty(0, entry_type or _EMPTY_TYPE)
            rows = (stored["value"].astype(float), (stored["cell"] - start, stored["gene"]))
            block = sparse.csr_matrix(rows, shape=(min(cells_per_run, shape[0] - start), shape[1]))
            _check_repeated(block, len(stored), (stored["value"] < 0).any(), where)
            yield block
            path.unlink(missing_ok=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


_EMPTY_TYPE = np.dtype([("cell", np.int32), ("gene", np.int32), ("value", np.float32)])


def _write_runs(scratch, runs, cells, genes, values, entry_type) -> None:
    order = np.argsort(runs, kind="stable")
    entries = np.empty(len(order), dtype=entry_type)
    entries["cell"], entries["gene"], entries["value"] = cells[order], genes[order], values[order]
    numbers, starts = np.unique(runs[order], return_index=True)
    for number, part in zip(numbers, np.split(entries, starts[1:]), strict=True):
        with writing(scratch), (scratch / str(number)).open("ab") as file:
            file.write(part.view(np.uint8))  # tofile hides the reason if it fails


def _check_repeated(block: sparse.csr_matrix, entries: int, negative: bool, where: str | Path) -> None:
    if negative and block.nnz < entries:
        raise InputError(where, "negative values in entries of the same cell and gene", "Give whole counts")


def _native_slice(array: Any, start: int, stop: int, where: str | Path) -> np.ndarray:
    """Return a copy of a slice, in a data type that scipy supports."""
    part = _slice(array, start, stop, where)
    dtype = np.dtype(np.float32) if part.dtype == np.float16 else part.dtype.newbyteorder("=")
    return part.astype(dtype, copy=isinstance(array, np.ndarray))


def _slice(array: Any, start: int, stop: int, where: str | Path) -> np.ndarray:
    try:
        return np.asarray(array[int(start) : int(stop)])
    except Exception as error:  # h5py and zarr raise many types
        raise explain_failure(error, where, "matrix, or damaged") from error


def _read_ends(matrix: CellMatrix | GeneMatrix, number: int) -> np.ndarray:
    """Return ``indptr`` as int64, checked against the lengths of the other arrays."""
    ends = _slice(matrix.indptr, 0, number + 2, matrix.where).astype(np.int64)
    stored = matrix.data.shape[0]
    if len(ends) != number + 1 or ends[0] != 0 or (np.diff(ends) < 0).any() or ends[-1] != stored:
        raise InputError(
            f"{matrix.where}: indptr", f"inconsistent with {stored} values in {number} rows or columns", _REWRITE
        )
    if matrix.indices.shape[0] != stored:
        raise InputError(f"{matrix.where}: indices", f"{matrix.indices.shape[0]} for {stored} values", _REWRITE)
    return ends


def check_range(numbers: np.ndarray, end: int, what: str, where: str | Path) -> None:
    """Check that numbers of cells or genes lie between zero and ``end``.

    Raises
    ------
    InputError
        If one does not.
    """
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= end):
        invalid = numbers[(numbers < 0) | (numbers >= end)][0]
        raise InputError(f"{where}: indices", f"{what} index {invalid}, but there are {end} {what}s", _REWRITE)
