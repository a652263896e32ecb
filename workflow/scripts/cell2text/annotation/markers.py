"""Marker genes of clusters: genes with more counts in a cluster than in all other cells."""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
from scipy import sparse, stats

from cell2text.embedding.rank_genes import scale_counts
from cell2text.progress import Progress

SIGNIFICANT = 0.05  # p-value, adjusted by Benjamini and Hochberg
MARKERS = 10
_CLUSTERS_AT_ONCE = 1000  # of which the sums of all genes are in memory


def find_markers(
    read: Callable[[], Iterable[sparse.csr_matrix]], genes: pd.DataFrame, codes: np.ndarray, most: int = MARKERS
) -> dict[int, tuple[str, ...]]:
    """Return the symbols of each cluster's marker genes, highest t-statistic first.

    Welch's t-test compares the log-normalised counts of a cluster with those of all other cells, whose number is taken
    to be that of the cluster, so that the genes of a small cluster need clear differences (``t-test_overestim_var`` of
    scanpy's ``rank_genes_groups``). A marker has a higher mean and an adjusted p-value below ``SIGNIFICANT``. Ties are
    resolved by the order of the genes. A gene without a symbol is named by its id; a symbol of several genes appears
    once.

    The counts are read block by block, once for up to 1,000 clusters, and only sums are kept.

    Parameters
    ----------
    read
        Returns the raw counts block by block, CSR (cells of the block, genes).
    genes
        ``symbol`` of each gene, indexed by gene id.
    codes
        Number of the cluster of each cell, int (cells,).
    most
        Maximum number of markers per cluster.

    Returns
    -------
    dict
        Number of the cluster -> symbols. Clusters with fewer than two cells inside or outside are missing, because the
        test needs variances.
    """
    numbers, places, sizes = np.unique(codes, return_inverse=True, return_counts=True)
    testable = np.flatnonzero((sizes >= 2) & (len(codes) - sizes >= 2))
    symbols, found = _symbols(genes), {}
    for start in range(0, len(testable), _CLUSTERS_AT_ONCE):
        some = testable[start : start + _CLUSTERS_AT_ONCE]
        sums, squares = _sum_blocks(read(), pd.Index(some).get_indexer(places), len(some), len(genes))
        for row, place in enumerate(some):
            inside = _moments(sums[row], squares[row], sizes[place])
            outside = _moments(sums[-1] - sums[row], squares[-1] - squares[row], len(codes) - sizes[place])
            found[int(numbers[place])] = _choose(inside, outside, sizes[place], symbols, most)
    return found


def _sum_blocks(
    blocks: Iterable[sparse.csr_matrix], rows: np.ndarray, clusters: int, genes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of log-normalised counts and of their squares, float64 (clusters + 1, genes); of all cells last.

    Parameters
    ----------
    blocks
        Raw counts of all cells.
    rows
        Number of the cluster of each cell, -1 for others.
    clusters, genes
        Numbers of clusters and genes.
    """
    sums, squares = np.zeros((2, clusters + 1, genes))
    progress, start = Progress(len(rows), "cells"), 0
    for block in blocks:
        values, of_cells = _log_normalise(block), rows[start : start + block.shape[0]]
        inside = np.flatnonzero(of_cells >= 0)
        entries = np.ones(len(inside)), (of_cells[inside], inside)
        members = sparse.csr_matrix(entries, shape=(clusters, len(of_cells)))
        for total, part in ((sums, values), (squares, values.power(2))):
            total[:-1] += (members @ part).toarray()
            total[-1] += np.asarray(part.sum(axis=0)).ravel()
        start += len(of_cells)
        progress.advance(len(of_cells))
    return sums, squares


def _log_normalise(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return log1p of counts per 10,000, float64 CSR, as a copy."""
    return sparse.csr_matrix((np.log1p(scale_counts(counts)), counts.indices, counts.indptr), counts.shape)


def _moments(sums: np.ndarray, squares: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and unbiased standard deviation of each gene."""
    mean = sums / cells
    return mean, np.sqrt(np.maximum(squares - cells * mean**2, 0) / (cells - 1))


def _choose(
    inside: tuple[np.ndarray, np.ndarray],
    outside: tuple[np.ndarray, np.ndarray],
    cells: int,
    symbols: np.ndarray,
    most: int,
) -> tuple[str, ...]:
    """Return the symbols of the best genes of a cluster, from the moments of each gene inside and outside."""
    with np.errstate(divide="ignore", invalid="ignore"):  # genes without variance
        test = stats.ttest_ind_from_stats(*inside, cells, *outside, cells, equal_var=False)
    significant = stats.false_discovery_control(np.nan_to_num(test.pvalue, nan=1)) < SIGNIFICANT
    chosen = np.flatnonzero(significant & (inside[0] > outside[0]))
    chosen = chosen[np.argsort(-test.statistic[chosen], kind="stable")]
    return tuple(dict.fromkeys(symbols[chosen]))[:most]


def _symbols(var: pd.DataFrame) -> np.ndarray:
    """Return the name of each gene: its symbol, or its id if it has none."""
    symbols = var["symbol"].astype(object)
    return symbols.where(symbols.notna() & (symbols != ""), var.index).astype(str).to_numpy(dtype=object)
