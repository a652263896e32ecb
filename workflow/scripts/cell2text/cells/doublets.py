"""Doublet scores of a sample's cells, by Scrublet in bounded memory."""

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
from cell2text.cells.qc import CELLS_OF_A_SAMPLE
from cell2text.progress import Progress

log = logging.getLogger("cell2text.qc")

CELLS_A_RUN = 1_000  # of Scrublet, whose memory grows with them


def score_doublets(
    cells_file: str | Path, good: np.ndarray, samples: pd.Categorical, genes: int, seed: int, scratch: Path
) -> np.ndarray:
    """Return the doublet score of each good cell among the good cells of its sample.

    This is Scrublet (Wolock et al., Cell Systems 2019) as in scanpy's ``pp.scrublet``, but for two settings:
    genes are scaled and not centred, so that matrices stay sparse, and neighbours are exact. A sample of more
    than 1,000 cells is cut at random into equal parts of at most so many. A sample of fewer than 50, or one in
    which too few genes vary, gets NaN.

    Parameters
    ----------
    cells_file
        Raw counts.
    good
        Which cells of the file to score; the others get NaN.
    samples
        Sample of each cell of the file.
    genes
        Genes of the file.
    seed
        Seed of the parts and of the simulated doublets.
    scratch
        Folder to sort the cells in, at 6 bytes a stored count; removed in the end.

    Returns
    -------
    array of float32, shape (cells,)
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
    scratch.mkdir(parents=True)
    try:
        blocks = (counts for _, counts in read_blocks(cells_file, scored))
        lengths = np.zeros(len(good), dtype=np.int32)
        lengths[scored] = _sort_into_files(blocks, parts[scored], scratch)
        for part, (first, size) in enumerate(zip(firsts, sizes, strict=True)):
            cells = by_part[first : first + size]
            scores[cells] = _score_part(_read_part(scratch / str(part), lengths[cells], genes), seed)
            (scratch / str(part)).unlink()
            progress.advance(len(cells))
    finally:
        shutil.rmtree(scratch)
    return scores


def cut_samples(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the number of each cell's part: its sample, or an equal random piece of a large one.

    Parameters
    ----------
    samples
        Number of each cell's sample.
    rng
        Source of chance.

    Returns
    -------
    array of int, shape (cells,)
        Parts count from 0; -1 in a sample of too few cells.
    """
    cells = np.bincount(samples)
    pieces = np.where(cells < CELLS_OF_A_SAMPLE, 0, -(-cells // CELLS_A_RUN))
    order = np.lexsort((rng.permutation(len(samples)), samples))
    place = np.empty(len(samples), dtype=np.int64)  # of a cell among those of its sample, in random order
    place[order] = np.arange(len(samples)) - (np.cumsum(cells) - cells)[samples[order]]
    parts = (np.cumsum(pieces) - pieces)[samples] + place % np.maximum(pieces, 1)[samples]
    return np.where(pieces[samples] > 0, parts, -1)


def _sort_into_files(blocks: Iterable[sparse.csr_matrix], parts: np.ndarray, folder: Path) -> np.ndarray:
    """Write the counts of each part's cells to a file of its own; return how many counts each cell has."""
    lengths, start = np.empty(len(parts), dtype=np.int32), 0
    for counts in blocks:
        counts.eliminate_zeros()
        stop = start + counts.shape[0]
        lengths[start:stop] = np.diff(counts.indptr)
        part = parts[start:stop]
        start = stop
        order = np.argsort(part, kind="stable")
        counts = counts[order]
        held = np.empty(counts.nnz, dtype=_entry(counts.shape[1]))
        held["gene"], held["count"] = counts.indices, counts.data
        numbers, firsts = np.unique(part[order], return_index=True)
        for number, some in zip(numbers, np.split(held, counts.indptr[firsts[1:]]), strict=True):
            with (folder / str(number)).open("ab") as file:
                some.tofile(file)
    return lengths


def _entry(genes: int) -> np.dtype:
    return np.dtype([("gene", np.min_scalar_type(genes)), ("count", np.float32)])


def _read_part(path: Path, lengths: np.ndarray, genes: int) -> sparse.csr_matrix:
    held = np.fromfile(path, dtype=_entry(genes))
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return sparse.csr_matrix((held["count"], held["gene"], ends), shape=(len(lengths), genes))


def _score_part(counts: sparse.csr_matrix, seed: int) -> np.ndarray:
    cells = ad.AnnData(counts)
    try:
        # one thread, for sums in another order may change a neighbour
        with threadpool_limits(1):
            sc.pp.scrublet(
                cells,
                mean_center=False,
                use_approx_neighbors=False,
                threshold=0.0,  # only its scores are used, and to find a threshold it needs scikit-image
                verbose=False,
                random_state=seed,
            )
    except ValueError as error:
        log.info("%d cells get no doublet score: %s", cells.n_obs, error)
        return np.full(cells.n_obs, np.nan)
    return cells.obs["doublet_score"].to_numpy()
