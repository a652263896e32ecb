"""The h5ad files of counts that stages pass on, written and read one block of cells at a time."""

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from cell2text.cells.matrices import row_runs
from cell2text.contracts import CELLS
from cell2text.contracts.table import among, hash_ids
from cell2text.files import reading, whole_file

CELLS_AT_ONCE = 4096
IDS_AT_ONCE = 1 << 14
CHUNK_VALUES = 1 << 17  # per HDF5 chunk; the size that h5py picks for a growing file is far too small to be fast


def write_cells(
    path: str | Path,
    blocks: Iterable[sparse.csr_matrix],
    ids: Iterable[np.ndarray],
    obs: pd.DataFrame,
    var: pd.DataFrame,
    uns: dict[str, Any],
) -> None:
    """Write a whole h5ad file, block by block.

    Parameters
    ----------
    path
        Where to write.
    blocks
        Counts of the cells, in the order of ``obs``, over the genes of ``var``; float32. Only one is in memory.
    ids
        Ids of the cells, in batches; the index of ``obs`` is ignored.
    obs, var, uns
        As in AnnData. They are written after the blocks, which may still add to ``uns``.

    Raises
    ------
    ValueError
        If the blocks do not hold one row per cell and one column per gene, or there is not one id per cell.
    """
    with whole_file(path) as unfinished, _Disk(unfinished, "w+") as disk, h5py.File(disk, "w") as file:
        for key, value in {"encoding-type": "anndata", "encoding-version": "0.1.0"}.items():
            file.attrs[key] = value
        empty = sparse.csr_matrix((0, len(var)), dtype=np.float32)
        # 64-bit indptr from the start: anndata cannot widen it once two billion values are written
        empty.indptr = empty.indptr.astype(np.int64)
        # Bytes per value, and million values per second written and read (tnbc_wu): none 8.0, 106, 190;
        # lzf 2.2, 27, 37; gzip 1 1.7, 15, 40; gzip 4 1.5, 10, 43. Each study is on disk three times, so size matters.
        compression = {"compression": "gzip", "compression_opts": 1, "shuffle": True, "chunks": (CHUNK_VALUES,)}
        ad.io.write_elem(file, "X", empty, dataset_kwargs=compression)
        counts = ad.io.sparse_dataset(file["X"])
        for block in blocks:
            counts.append(block)
            if disk.failed:
                raise disk.failed
        if counts.shape != (len(obs), len(var)):
            raise ValueError(f"{path}: {counts.shape} counts for {len(obs)} cells and {len(var)} genes")
        if len(file["X/data"]) <= np.iinfo(np.int32).max:
            # the same width as the indices: scipy rejects some operations on a matrix that mixes widths
            ends = file["X/indptr"][:].astype(np.int32)
            del file["X/indptr"]
            file["X"].create_dataset("indptr", data=ends, compression="gzip")
        for name, part in {"obs": obs.reset_index(drop=True), "var": var, "uns": uns}.items():
            ad.io.write_elem(file, name, part)
        _write_ids(file["obs"], ids, len(obs))
        for name in ("layers", "obsm", "obsp", "varm", "varp"):
            ad.io.write_elem(file, name, {})


class _Disk(io.FileIO):
    """A file that hides failed writes from HDF5, which crashes on them, and raises the first one at the end."""

    failed: OSError | None = None

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self.failed:
            raise self.failed

    def write(self, content: bytes | memoryview) -> int:
        rest = memoryview(content).cast("B")
        length = len(rest)
        try:
            while len(rest):  # a disk that is almost full takes a part
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.failed = self.failed or error
        return length

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.failed = self.failed or error
            return size or 0


def _write_ids(obs: h5py.Group, ids: Iterable[np.ndarray], cells: int) -> None:
    """Replace the row numbers that AnnData wrote as index by the ids of the cells."""
    attributes = dict(obs[obs.attrs["_index"]].attrs) | {"encoding-type": "string-array"}
    del obs[obs.attrs["_index"]]
    obs.attrs["_index"] = "cell_id"
    written = obs.create_dataset("cell_id", (cells,), h5py.string_dtype())
    written.attrs.update(attributes)
    start = 0
    for batch in ids:
        written[start : start + len(batch)] = np.asarray(batch, dtype=object)
        start += len(batch)
    if start != cells:
        raise ValueError(f"{start} ids for {cells} cells")


@contextmanager
def open_cells(path: str | Path) -> Iterator[h5py.File]:
    """Open an h5ad file of :func:`write_cells` for reading.

    Raises
    ------
    InputError
        If there is no such file, or what the block reads is damaged.
    """
    with reading(path), h5py.File(path, "r") as file:
        yield file


def read_blocks(
    path: str | Path, rows: np.ndarray, at_once: int = CELLS_AT_ONCE
) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
    """Yield the counts of selected cells, one block at a time, in the order of the file.

    Parameters
    ----------
    path
        An h5ad file from ``write_cells``; only one block of its counts and ids is in memory at a time.
    rows
        Which cells of the file to yield; bool, shape (cells of the file,).
    at_once
        Maximum number of rows to read at once; fewer if they hold more than ``VALUES_AT_ONCE`` values.

    Yields
    ------
    tuple of array and csr_matrix
        Ids of the cells of a block, and their counts over all genes of the file.
    """
    with open_cells(path) as file:
        counts, names = file["X"], file["obs"][file["obs"].attrs["_index"]].asstr()
        ends, genes = counts["indptr"][:], int(counts.attrs["shape"][1])
        for start, stop in row_runs(ends, at_once):
            selected = rows[start:stop]
            if not selected.any():
                continue
            first, last = ends[start], ends[stop]
            parts = counts["data"][first:last], counts["indices"][first:last], ends[start : stop + 1] - first
            block = sparse.csr_matrix(parts, shape=(stop - start, genes))
            yield names[start:stop][selected], block if selected.all() else block[selected]


def find_cells(path: str | Path, corpus_file: str | Path, split: str | None = None) -> np.ndarray:
    """Return which cells of an h5ad file are in the corpus, or in one split of it: bool, one per row of the file.

    Ids are compared by 64-bit hashes, see ``contracts.table.among``.
    """
    hashes = [np.empty(0, dtype=np.uint64)]
    for cells in CELLS.read_parts(corpus_file, ["cell_id", "split"]):
        selected = cells["cell_id"] if split is None else cells.loc[cells["split"] == split, "cell_id"]
        hashes.append(hash_ids(selected))
    corpus = np.concatenate(hashes)
    corpus.sort()
    found = [np.zeros(0, dtype=bool)]
    found += [among(ids, corpus) for ids in id_parts(path)]
    return np.concatenate(found)


def all_cells(path: str | Path) -> np.ndarray:
    """Return a true value for each cell of an h5ad file, bool (cells,)."""
    with open_cells(path) as file:
        return np.ones(file["X"].attrs["shape"][0], dtype=bool)


def id_parts(path: str | Path) -> Iterator[np.ndarray]:
    """Yield the ids of the cells of an h5ad file, in order, in batches: a Python string takes 90 bytes per id."""
    with open_cells(path) as file:
        names = file["obs"][file["obs"].attrs["_index"]].asstr()
        for start in range(0, len(names), IDS_AT_ONCE):
            yield names[start : start + IDS_AT_ONCE]


def kept_ids(path: str | Path, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the ids of selected cells of an h5ad file, in order, in batches; ``rows`` is one bool per cell."""
    start = 0
    for ids in id_parts(path):
        yield ids[rows[start : start + len(ids)]]
        start += len(ids)


def read_obs(path: str | Path, columns: Iterable[str] | None = None) -> pd.DataFrame:
    """Return columns of ``obs`` of an h5ad file, all by default, without the ids of the cells."""
    with open_cells(path) as file:
        obs = file["obs"]
        selected = obs.attrs["column-order"] if columns is None else columns
        return pd.DataFrame({name: ad.io.read_elem(obs[name]) for name in selected})


def has_column(path: str | Path, column: str) -> bool:
    """Return whether ``obs`` of an h5ad file has a column."""
    with open_cells(path) as file:
        return column in file["obs"]


def read_genes(path: str | Path) -> pd.DataFrame:
    """Return the gene table of an h5ad file: ``symbol``, indexed by gene id."""
    with open_cells(path) as file:
        return ad.io.read_elem(file["var"])[["symbol"]].astype(str)
