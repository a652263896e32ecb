"""Marker genes of clusters: genes with more counts in a cluster than in all other cells."""

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse

from cell2text.progress import Progress

# Welch's t-test, with the variance of the other cells divided by the size of the cluster instead of their own number.
# So the genes of a small cluster need clear differences. It reads sparse counts as they are; wilcoxon would sort every
# gene over all cells, zeros included.
METHOD = "t-test_overestim_var"
SIGNIFICANT = 0.05  # p-value, adjusted by Benjamini and Hochberg
SCALE = 1e4
MARKERS = 10
_CLUSTERS_AT_ONCE = 16  # all genes of so many clusters are in memory as a table


def find_markers(counts: ad.AnnData, codes: np.ndarray, most: int = MARKERS) -> dict[int, tuple[str, ...]]:
    """Return the symbols of each cluster's marker genes, highest t-statistic first.

    A marker has a positive log fold change and an adjusted p-value below ``SIGNIFICANT``. Ties are resolved by the
    order of the genes. A gene without a symbol is named by its id; a symbol of several genes appears once.

    The time is proportional to cells x clusters: on a Xeon at 2.8 GHz, 20 clusters of 20,000 cells with 1,500 genes
    each take 8 s. A copy of the counts is in memory, and one of those outside a cluster.

    Parameters
    ----------
    counts
        Raw counts, CSR (cells, genes), with ``symbol`` in ``var``. They are not changed.
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
    numbers, sizes = np.unique(codes, return_counts=True)
    testable = numbers[(sizes >= 2) & (len(codes) - sizes >= 2)]
    if not len(testable):
        return {}
    symbols = _symbols(counts.var)
    names = pd.RangeIndex(counts.n_vars).astype(str)  # numbers of genes, which are unique whatever their names are
    cells = pd.DataFrame({"cluster": pd.Categorical(codes.astype(str))}, pd.RangeIndex(len(codes)).astype(str))
    normalised = ad.AnnData(_log_normalise(counts.X), obs=cells, var=pd.DataFrame(index=names))
    progress, found = Progress(len(testable), "clusters"), {}
    for start in range(0, len(testable), _CLUSTERS_AT_ONCE):
        some = testable[start : start + _CLUSTERS_AT_ONCE]
        with np.errstate(divide="ignore", invalid="ignore"):  # genes without variance
            sc.tl.rank_genes_groups(normalised, "cluster", groups=[*map(str, some)], method=METHOD, use_raw=False)
        for number in some.tolist():
            ranked = sc.get.rank_genes_groups_df(normalised, group=str(number))
            found[number] = _choose(ranked, symbols, most)
        progress.advance(len(some))
    return found


def _log_normalise(counts: sparse.spmatrix | np.ndarray) -> sparse.csr_matrix:
    """Return log1p of counts per 10,000, float32 CSR, as a copy; a cell without counts keeps its zeros."""
    counts = sparse.csr_matrix(counts)
    totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    factors = np.divide(SCALE, totals, out=np.zeros_like(totals), where=totals > 0)
    scaled = sparse.csr_matrix(sparse.diags(factors.astype(np.float32)) @ counts, dtype=np.float32)
    np.log1p(scaled.data, out=scaled.data)
    return scaled


def _symbols(var: pd.DataFrame) -> np.ndarray:
    """Return the name of each gene: its symbol, or its id if it has none."""
    symbols = var["symbol"].astype(object)
    return symbols.where(symbols.notna() & (symbols != ""), var.index).astype(str).to_numpy(dtype=object)


def _choose(ranked: pd.DataFrame, symbols: np.ndarray, most: int) -> tuple[str, ...]:
    """Return the symbols of the best genes of a cluster, from scanpy's table of all genes."""
    ranked = ranked[(ranked["logfoldchanges"] > 0) & (ranked["pvals_adj"] < SIGNIFICANT)]
    ranked = ranked.assign(gene=ranked["names"].astype(int))
    ranked = ranked.sort_values(["scores", "gene"], ascending=[False, True])
    return tuple(dict.fromkeys(symbols[ranked["gene"]]))[:most]
