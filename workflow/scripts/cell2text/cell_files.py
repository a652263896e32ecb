"""The h5ad files of counts that the stages hand on: written and read a block of cells at a time."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from cell2text.contracts import whole_file

CELLS_AT_ONCE = 4096
VALUES_A_CHUNK = 1 << 17  # of the file; what h5py chooses for a growing file is far too small to be fast


def write_cells(
    path: str | Path, blocks: Iterable[sparse.csr_matrix], obs: pd.DataFrame, var: pd.DataFrame, uns: dict[str, Any]
) -> None:
    """Write an h5ad whole, its counts as they come.

    Parameters
    ----------
    path
        Where to write.
    blocks
        Counts of the cells, in the order of ``obs``, over the genes of ``var``; float32. Only one is held.
    obs, var, uns
        As in AnnData.

    Raises
    ------
    ValueError
        If the blocks do not hold one row for each cell and one column for each gene.
    """
    with whole_file(path) as unfinished, h5py.File(unfinished, "w") as file:
        for key, value in {"encoding-type": "anndata", "encoding-version": "0.1.0"}.items():
            file.attrs[key] = value
        empty = sparse.csr_matrix((0, len(var)), dtype=np.float32)
        # 64-bit row ends from the start: anndata cannot widen them once two thousand million values are in
        empty.indptr = empty.indptr.astype(np.int64)
        compression = {"compression": "gzip", "compression_opts": 1, "shuffle": True, "chunks": (VALUES_A_CHUNK,)}
        ad.io.write_elem(file, "X", empty, dataset_kwargs=compression)
        counts = ad.io.sparse_dataset(file["X"])
        for block in blocks:
            counts.append(block)
        if counts.shape != (len(obs), len(var)):
            raise ValueError(f"{path}: {counts.shape} counts for {len(obs)} cells and {len(var)} genes")
        for name, part in {"obs": obs, "var": var, "uns": uns}.items():
            ad.io.write_elem(file, name, part)
        for name in ("layers", "obsm", "obsp", "varm", "varp"):
            ad.io.write_elem(file, name, {})


def read_blocks(
    path: str | Path, cell_ids: pd.Series, at_once: int = CELLS_AT_ONCE
) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
    """Yield the counts of some cells, a block at a time, in the file's order.

    Parameters
    ----------
    path
        An h5ad that ``write_cells`` wrote; only a block of it is held at once.
    cell_ids
        The cells to yield.
    at_once
        Rows of the file to read at once.

    Yields
    ------
    tuple of array and csr_matrix
        The ids of a block's cells, and their counts over all genes of the file.
    """
    cells = ad.read_h5ad(path, backed="r")
    try:
        wanted = cells.obs_names.isin(cell_ids)
        for start in range(0, cells.n_obs, at_once):
            rows = wanted[start : start + at_once]
            if rows.any():
                block = sparse.csr_matrix(cells.X[start : start + at_once])
                yield cells.obs_names[start : start + at_once][rows].to_numpy(dtype=object), block[rows]
    finally:
        cells.file.close()


def read_genes(path: str | Path) -> pd.DataFrame:
    """Return the table of genes of an h5ad: ``symbol``, indexed by gene id."""
    cells = ad.read_h5ad(path, backed="r")
    try:
        return cells.var[["symbol"]].astype(str)
    finally:
        cells.file.close()
