"""Cells ranked per second, compared with plain loops over cells, and whether the tokens are identical.

    python tests/benchmarks/rank_genes.py [--cells N] [--rounds N] [--threads N] [h5ad ...]

The loops process each cell with a few numpy calls on its counts: scale, divide by the medians, sort, truncate. One
loop indexes the matrix as usual, ``counts[cell]``; the other is faster and slices the arrays of the matrix. All
methods run in turn on the same cells, and the median over rounds is reported. Without files, the studies next to the
project are used, or else the blood cells that come with scanpy.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc
from scipy import sparse

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "workflow/scripts"))
from cell2text.embedding.measure_genes import median_of_each  # noqa: E402
from cell2text.embedding.rank_genes import rank_counts, scale_counts  # noqa: E402

LONGEST = 4096  # maximum number of tokens per cell in Geneformer V2


def rank_cell(count, genes, token, median):
    """Rank the genes of one cell."""
    count, tokens = count.astype(float), token[genes]
    scaled = count / count.sum() * 1e4
    known = tokens >= 0
    scaled, tokens = scaled[known], tokens[known]
    order = np.lexsort((tokens, -(scaled / median[tokens])))[:LONGEST]
    return tokens[order], np.log1p(scaled[order]).astype(np.float32)


def rank_by_loop(counts, token, median):
    """Rank the cells one by one."""
    rows = (counts[cell] for cell in range(counts.shape[0]))
    return [rank_cell(row.data, row.indices, token, median) for row in rows]


def rank_by_slices(counts, token, median):
    """Rank the cells one by one, as directly as numpy allows."""
    runs = (slice(start, end) for start, end in zip(counts.indptr[:-1], counts.indptr[1:], strict=True))
    return [rank_cell(counts.data[run], counts.indices[run], token, median) for run in runs]


def read_counts(path):
    """Return the counts of an h5ad, or of the blood cells that come with scanpy."""
    if path:
        return sparse.csr_matrix(ad.read_h5ad(path).X, dtype=np.float32)
    blood = sc.datasets.pbmc68k_reduced()
    logs, total = blood.raw.X.tocsr(), blood.obs["n_counts"].to_numpy()
    logs.data = np.rint(np.expm1(logs.data) * np.repeat(total, np.diff(logs.indptr)) / 1e4).astype(np.float32)
    return logs


def seconds(rank, *arguments):
    """Return the run time of a call and its result."""
    start = time.perf_counter()
    result = rank(*arguments)
    return time.perf_counter() - start, result


def main():
    """Compare the methods and print one line per file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--cells", type=int, default=4096, help="cells per file, drawn with replacement")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    studies = sorted((ROOT.parent / "shared/data/studies").glob("*.h5ad"))
    total = np.zeros(3)
    for path in options.files or studies or [None]:
        whole = read_counts(path)
        values = [(whole.indices, scale_counts(whole).astype(np.float32))]
        typical = median_of_each(lambda values=values: values, whole.shape[1])
        token = np.where(typical > 0, np.cumsum(typical > 0) - 1, -1).astype(np.int32)
        median = typical[typical > 0]
        counts = whole[np.random.default_rng(0).integers(whole.shape[0], size=options.cells)]
        rank_counts(counts[:2], token, median)  # compile
        times = []
        for _ in range(options.rounds):
            runs = [seconds(rank, counts, token, median) for rank in (rank_by_loop, rank_by_slices)]
            runs.append(seconds(rank_counts, counts, token, median, options.threads))
            times.append([duration for duration, _ in runs])
        (_, ranked), (_, again), (_, (tokens, expression, ends)) = runs
        same, difference = True, 0.0
        for one, other, start, end in zip(ranked, again, [0, *ends[:-1]], ends, strict=True):
            found = tokens[start:end][:LONGEST]
            same &= np.array_equal(one[0], found) and np.array_equal(other[0], found)
            difference = max(difference, np.abs(one[1] / expression[start:end][:LONGEST] - 1).max())
        loop, slices, blocks = typical_time = np.median(times, axis=0)
        total += typical_time
        print(
            f"{path.stem if path else 'pbmc68k'}: {counts.nnz / options.cells:.0f} genes per cell; cells/s: "
            f"loop {options.cells / loop:,.0f}, loop over slices {options.cells / slices:,.0f}, "
            f"rank_counts {options.cells / blocks:,.0f} ({loop / blocks:.1f} and {slices / blocks:.1f} times as fast); "
            f"tokens identical: {same}, relative difference of expression up to {difference:.1e}",
            flush=True,
        )
    print(
        f"all files: {total[0] / total[2]:.1f} and {total[1] / total[2]:.1f} times as fast, {options.threads} threads"
    )


if __name__ == "__main__":
    main()
