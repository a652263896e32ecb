"""The h5ad files of counts that the stages hand on: written and read a block of cells at a time."""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
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
from cell2text.files import whole_file

CELLS_AT_ONCE = 4096
IDS_AT_ONCE = 1 << 14
MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
VALUES_A_CHUNK = 1 << 17  # of the file; what h5py chooses for a growing file is far too small to be fast


def give_memory_back() -> None:
    """Let a block's memory go back to the system when it is freed, where the C library is glibc.

    glibc keeps what it has once given out, in pieces between which the next block may find no room, so that a
    process would grow with each block it reads.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 20)


give_memory_back()


def write_cells(
    path: str | Path,
    blocks: Iterable[sparse.csr_matrix],
    ids: Iterable[np.ndarray],
    obs: pd.DataFrame,
    var: pd.DataFrame,
    uns: dict[str, Any],
) -> None:
    """Write an h5ad whole, its counts as they come.

    Parameters
    ----------
    path
        Where to write.
    blocks
        Counts of the cells, in the order of ``obs``, over the genes of ``var``; float32. Only one is held.
    ids
        Ids of the cells, some at a time; the index of ``obs`` is not looked at.
    obs, var, uns
        As in AnnData. They are written after the blocks, which may still add to ``uns``.

    Raises
    ------
    ValueError
        If the blocks do not hold one row for each cell and one column for each gene, or the ids are not as many.
    """
    with whole_file(path) as unfinished, h5py.File(unfinished, "w") as file:
        for key, value in {"encoding-type": "anndata", "encoding-version": "0.1.0"}.items():
            file.attrs[key] = value
        empty = sparse.csr_matrix((0, len(var)), dtype=np.float32)
        # 64-bit row ends from the start: anndata cannot widen them once two thousand million values are in
        empty.indptr = empty.indptr.astype(np.int64)
        # Bytes a value, and million values a second written and read (tnbc_wu): none 8.0, 106, 190; lzf 2.2, 27, 37;
        # gzip 1 1.7, 15, 40; gzip 4 1.5, 10, 43. Each study lies on disk three times, so size counts.
        compression = {"compression": "gzip", "compression_opts": 1, "shuffle": True, "chunks": (VALUES_A_CHUNK,)}
        ad.io.write_elem(file, "X", empty, dataset_kwargs=compression)
        counts = ad.io.sparse_dataset(file["X"])
        for block in blocks:
            _check_space(path, block.data.nbytes + block.indices.nbytes)
            counts.append(block)
        if counts.shape != (len(obs), len(var)):
            raise ValueError(f"{path}: {counts.shape} counts for {len(obs)} cells and {len(var)} genes")
        if len(file["X/data"]) <= np.iinfo(np.int32).max:
            # as wide as the genes' indices: scipy refuses some work on a matrix that mixes widths
            ends = file["X/indptr"][:].astype(np.int32)
            del file["X/indptr"]
            file["X"].create_dataset("indptr", data=ends, compression="gzip")
        _check_space(path, obs.memory_usage(deep=True).sum())
        for name, part in {"obs": obs.reset_index(drop=True), "var": var, "uns": uns}.items():
            ad.io.write_elem(file, name, part)
        _write_ids(file["obs"], ids, len(obs))
        for name in ("layers", "obsm", "obsp", "varm", "varp"):
            ad.io.write_elem(file, name, {})


def _write_ids(obs: h5py.Group, ids: Iterable[np.ndarray], cells: int) -> None:
    """Put the cells' ids in the place of the row numbers that AnnData wrote."""
    marks = dict(obs[obs.attrs["_index"]].attrs) | {"encoding-type": "string-array"}
    del obs[obs.attrs["_index"]]
    obs.attrs["_index"] = "cell_id"
    written = obs.create_dataset("cell_id", (cells,), h5py.string_dtype())
    written.attrs.update(marks)
    start = 0
    for some in ids:
        written[start : start + len(some)] = np.asarray(some, dtype=object)
        start += len(some)
    if start != cells:
        raise ValueError(f"{start} ids for {cells} cells")


def _check_space(path: str | Path, needed: int) -> None:
    # a disk that is full in the middle of a write makes HDF5 crash
    if shutil.disk_usage(Path(path).parent).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_blocks(
    path: str | Path, rows: np.ndarray, at_once: int = CELLS_AT_ONCE
) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
    """Yield the counts of some cells, a block at a time, in the file's order.

    Parameters
    ----------
    path
        An h5ad that ``write_cells`` wrote; only a block of its counts and ids is held at once.
    rows
        Which cells of the file to yield, bool.
    at_once
        Most rows of the file to read at once; fewer where they hold more than ``VALUES_AT_ONCE`` values.

    Yields
    ------
    tuple of array and csr_matrix
        The ids of a block's cells, and their counts over all genes of the file.
    """
    with h5py.File(path, "r") as file:
        counts, names = file["X"], file["obs"][file["obs"].attrs["_index"]].asstr()
        ends, genes = counts["indptr"][:], int(counts.attrs["shape"][1])
        for start, stop in row_runs(ends, at_once):
            wanted = rows[start:stop]
            if not wanted.any():
                continue
            first, last = ends[start], ends[stop]
            parts = counts["data"][first:last], counts["indices"][first:last], ends[start : stop + 1] - first
            block = sparse.csr_matrix(parts, shape=(stop - start, genes))
            yield names[start:stop][wanted], block if wanted.all() else block[wanted]


def find_cells(path: str | Path, corpus_file: str | Path, split: str | None = None) -> np.ndarray:
    """Return which cells of an h5ad are in the corpus, or in one split of it: bool, for each row of the file.

    Ids are compared by 64-bit hashes, see ``contracts.among``.
    """
    hashes = [np.empty(0, dtype=np.uint64)]
    for cells in CELLS.read_parts(corpus_file, ["cell_id", "split"]):
        wanted = cells["cell_id"] if split is None else cells.loc[cells["split"] == split, "cell_id"]
        hashes.append(hash_ids(wanted))
    corpus = np.concatenate(hashes)
    corpus.sort()
    found = [np.zeros(0, dtype=bool)]
    found += [among(ids, corpus) for ids in id_parts(path)]
    return np.concatenate(found)


def id_parts(path: str | Path) -> Iterator[np.ndarray]:
    """Yield the ids of the cells of an h5ad, in order, some at a time: Python's strings take 90 bytes each."""
    with h5py.File(path, "r") as file:
        names = file["obs"][file["obs"].attrs["_index"]].asstr()
        for start in range(0, len(names), IDS_AT_ONCE):
            yield names[start : start + IDS_AT_ONCE]


def kept_ids(path: str | Path, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the ids of some cells of an h5ad, in order, some at a time; ``rows`` is a bool for each of its cells."""
    start = 0
    for ids in id_parts(path):
        yield ids[rows[start : start + len(ids)]]
        start += len(ids)


def read_obs(path: str | Path, columns: Iterable[str] | None = None) -> pd.DataFrame:
    """Return columns of ``obs`` of an h5ad, all by default, without the cells' ids."""
    with h5py.File(path, "r") as file:
        obs = file["obs"]
        wanted = obs.attrs["column-order"] if columns is None else columns
        return pd.DataFrame({name: ad.io.read_elem(obs[name]) for name in wanted})


def read_genes(path: str | Path) -> pd.DataFrame:
    """Return the table of genes of an h5ad: ``symbol``, indexed by gene id."""
    with h5py.File(path, "r") as file:
        return ad.io.read_elem(file["var"])[["symbol"]].astype(str)
