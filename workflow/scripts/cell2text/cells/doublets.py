"""Doublet scores per sample, by Scrublet in bounded memory."""

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse
from threadpoolctl import threadpool_limits

from cell2text.cells.h5ad import read_blocks
from cell2text.cells.qc import MIN_SAMPLE_CELLS
from cell2text.files import writing
from cell2text.progress import Progress

log = logging.getLogger("cell2text.qc")

CELLS_PER_RUN = 1_000  # Scrublet's memory grows with the number of cells


def score_doublets(
    cells_file: str | Path, good: np.ndarray, samples: pd.Categorical, genes: int, seed: int, scratch: Path
) -> np.ndarray:
    """Return the doublet score of each good cell, computed among the good cells of its sample.

    This is Scrublet (Wolock et al., Cell Systems 2019) as in scanpy's ``pp.scrublet``, except for two settings:
    genes are scaled but not centred, so that matrices stay sparse, and neighbours are exact. A sample of more than
    1,000 cells is split at random into parts of equal size with at most 1,000 cells. A sample of fewer than 50 cells,
    or with too few variable genes, gets NaN.

    Parameters
    ----------
    cells_file
        Raw counts.
    good
        Which cells of the file to score; the others get NaN.
    samples
        Sample of each cell of the file.
    genes
        Number of genes of the file.
    seed
        Seed of the random parts and of the simulated doublets.
    scratch
        Folder in which the cells are sorted, 6 bytes per stored count; removed at the end.

    Returns
    -------
    array of float32, shape (cells,)

    Raises
    ------
    InputError
        If the disk of ``scratch`` is full or not writable.
    """
    scores = np.full(len(good), np.nan, dtype=np.float32)
    parts = np.full(len(good), -1, dtype=np.int32)
    parts[good] = cut_samples(samples.codes[good], np.random.default_rng(seed))
    scored = parts >= 0
    by_part = np.flatnonzero(scored)[np.argsort(parts[scored], kind="stable")]
    sizes = np.bincount(parts[scored])
    firsts = np.cumsum(sizes) - sizes
    progress = Progress(len(by_part), "cells scored")
    shutil.rmtree(scratch, ignore_errors=True)  # a killed run may have left one
    try:
        blocks = (counts for _, counts in read_blocks(cells_file, scored))
        lengths = np.zeros(len(good), dtype=np.int32)
        with writing(scratch):
            scratch.mkdir(parents=True)
            lengths[scored] = _sort_into_files(blocks, parts[scored], scratch)
        for part, (first, size) in enumerate(zip(firsts, sizes, strict=True)):
            cells = by_part[first : first + size]
            scores[cells] = _score_part(_read_part(scratch / str(part), lengths[cells], genes), seed)
            (scratch / str(part)).unlink()
            progress.advance(len(cells))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return scores


def cut_samples(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Assign each cell to a part: its whole sample, or a random part of equal size of a large sample.

    Parameters
    ----------
    samples
        Number of each cell's sample.
    rng
        Random generator.

    Returns
    -------
    array of int, shape (cells,)
        Part of each cell, from 0; -1 in a sample with too few cells.
    """
    cells = np.bincount(samples)
    pieces = np.where(cells < MIN_SAMPLE_CELLS, 0, -(-cells // CELLS_PER_RUN))
    order = np.lexsort((rng.permutation(len(samples)), samples))
    rank = np.empty(len(samples), dtype=np.int64)  # of a cell within its sample, in random order
    rank[order] = np.arange(len(samples)) - (np.cumsum(cells) - cells)[samples[order]]
    parts = (np.cumsum(pieces) - pieces)[samples] + rank % np.maximum(pieces, 1)[samples]
    return np.where(pieces[samples] > 0, parts, -1)


def _sort_into_files(blocks: Iterable[sparse.csr_matrix], parts: np.ndarray, folder: Path) -> np.ndarray:
    """Write the counts of each part to its own file; return the number of stored counts of each cell."""
    lengths, start = np.empty(len(parts), dtype=np.int32), 0
    for counts in blocks:
        counts.eliminate_zeros()
        stop = start + counts.shape[0]
        lengths[start:stop] = np.diff(counts.indptr)
        part = parts[start:stop]
        start = stop
        order = np.argsort(part, kind="stable")
        counts = counts[order]
        entries = np.empty(counts.nnz, dtype=_entry_type(counts.shape[1]))
        entries["gene"], entries["count"] = counts.indices, counts.data
        numbers, firsts = np.unique(part[order], return_index=True)
        for number, chunk in zip(numbers, np.split(entries, counts.indptr[firsts[1:]]), strict=True):
            with (folder / str(number)).open("ab") as file:
                file.write(chunk.view(np.uint8))  # tofile hides the reason if it fails
    return lengths


def _entry_type(genes: int) -> np.dtype:
    return np.dtype([("gene", np.min_scalar_type(genes)), ("count", np.float32)])


def _read_part(path: Path, lengths: np.ndarray, genes: int) -> sparse.csr_matrix:
    entries = np.fromfile(path, dtype=_entry_type(genes))
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return sparse.csr_matrix((entries["count"], entries["gene"], ends), shape=(len(lengths), genes))


def _score_part(counts: sparse.csr_matrix, seed: int) -> np.ndarray:
    cells = ad.AnnData(counts)
    try:
        # one thread: a different order of summation could change the neighbours
        with threadpool_limits(1):
            sc.pp.scrublet(
                cells,
                mean_center=False,
                use_approx_neighbors=False,
                threshold=0.0,  # only the scores are used, and finding a threshold requires scikit-image
                verbose=False,
                random_state=seed,
            )
    except ValueError as error:
        log.info("%d cells get no doublet score: %s", cells.n_obs, error)
        return np.full(cells.n_obs, np.nan)
    return cells.obs["doublet_score"].to_numpy()
