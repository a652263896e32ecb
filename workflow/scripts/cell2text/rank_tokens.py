"""Cells as ranked genes, after Geneformer (Theodoris et al., Nature 2023).

A gene's count per 10,000 is divided by the gene's typical expression, so that genes that set a cell apart
stand before those that every cell has.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from cell2text.cell_files import read_blocks, read_genes
from cell2text.contracts import CELLS, GENES, TOKENS, whole_file
from cell2text.progress import Progress

log = logging.getLogger("cell2text.rank_tokens")

SCALE = 1e4


def measure_genes(corpus_file: str | Path, cell_files: Iterable[str | Path], path: str | Path) -> None:
    """Write each gene's token and its non-zero median of counts per 10,000 over the training cells.

    Genes of all datasets are counted in by id; one without a count in training is left out. Tokens count
    from 0 in the order of ids.

    Parameters
    ----------
    corpus_file
        The corpus (``contracts.CELLS``).
    cell_files
        Filtered counts of each dataset.
    path
        Where to write the table (``contracts.GENES``), as TSV.
    """
    cell_files = list(cell_files)
    named = [read_genes(file) for file in cell_files]
    genes = pd.concat(named)
    genes = genes[~genes.index.duplicated()].sort_index()
    if len({table.index.str.startswith("ENSG").any() for table in named}) > 1:
        log.warning("Some datasets name genes by Ensembl id, others by symbol: these are not matched")
    corpus = CELLS.read(corpus_file, ["cell_id", "split"])
    training = corpus["cell_id"][corpus["split"] == "train"]
    progress = Progress(len(training), "cells")
    keys = []
    for file, table in zip(cell_files, named, strict=True):
        position = genes.index.get_indexer(table.index)
        for ids, counts in read_blocks(file, training):
            keys.append(_pack(position[counts.indices], scale_counts(counts)))
            progress.advance(len(ids))
    median = _median_of_each(np.concatenate(keys), len(genes))
    seen = genes.assign(median=median)[median > 0].reset_index(names="gene_id")
    log.info("%d of %d genes are seen in training", len(seen), len(genes))
    with whole_file(path) as unfinished:
        seen.assign(token=np.arange(len(seen)))[list(GENES)].to_csv(unfinished, sep="\t", index=False)


def scale_counts(counts: sparse.csr_matrix) -> np.ndarray:
    """Return each stored count as counts per 10,000 of its cell (float64), in stored order."""
    total = np.asarray(counts.sum(axis=1, dtype=float)).ravel()
    return counts.data * SCALE / np.repeat(total, np.diff(counts.indptr))


def _pack(genes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return gene and value in one integer that sorts by gene, then value.

    The bits of positive floats sort as the floats do, so one array can be sorted where it stands, at eight
    bytes a count.
    """
    return (genes.astype(np.uint64) << np.uint64(32)) | values.astype(np.float32).view(np.uint32)


def _median_of_each(keys: np.ndarray, genes: int) -> np.ndarray:
    """Return the median of the values packed under each gene; 0 for a gene without any."""
    keys.sort()
    number = np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=genes)
    first = np.cumsum(number) - number
    values = keys.astype(np.uint32).view(np.float32)
    median = np.zeros(genes)
    some = number > 0
    lower, upper = first + (number - 1) // 2, first + number // 2
    median[some] = (values[lower[some]].astype(float) + values[upper[some]]) / 2
    return median


def rank_genes(corpus_file: str | Path, cells_file: str | Path, genes_file: str | Path, path: str | Path) -> None:
    """Write the ranked genes of each of a dataset's cells, in the order of the corpus.

    Parameters
    ----------
    corpus_file
        The corpus (``contracts.CELLS``).
    cells_file
        Filtered counts of the dataset.
    genes_file
        What ``measure_genes`` wrote.
    path
        Where to write the table (``contracts.TOKENS``). ``expression`` is log1p of counts per 10,000, the
        cell's total being that over all genes of the file.
    """
    genes = pd.read_csv(genes_file, sep="\t", keep_default_na=False).set_index("gene_id")
    token = genes["token"].reindex(read_genes(cells_file).index).fillna(-1).to_numpy(dtype=np.int32)
    median = genes["median"].to_numpy()
    corpus = CELLS.read(corpus_file, ["cell_id"])["cell_id"]
    columns: dict[str, list] = {column: [] for column in TOKENS.columns}
    for ids, counts in read_blocks(cells_file, corpus):
        tokens, expression, ends = rank_counts(counts, token, median)
        columns["cell_id"].extend(ids)
        columns["tokens"].extend(np.split(tokens, ends[:-1]))
        columns["expression"].extend(np.split(expression, ends[:-1]))
    ranked = pd.DataFrame(columns, dtype=object).set_index("cell_id")
    ranked = ranked.loc[corpus[corpus.isin(ranked.index)]].reset_index()
    log.info("%d cells, %d ranked genes", len(ranked), ranked["tokens"].map(len).sum())
    TOKENS.write(ranked, path)


def rank_counts(
    counts: sparse.csr_matrix, token: np.ndarray, median: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the genes of each cell, the highest count per 10,000 over the gene's median first.

    Of two genes with equal quotients, the one with the lower token stands first.

    Parameters
    ----------
    counts
        Raw counts, cells by genes of the file.
    token
        Token of each gene of the file; -1 for one that has none.
    median
        Non-zero median of each token.

    Returns
    -------
    tuple of three arrays
        Tokens (int32) and log1p of counts per 10,000 (float32), cell after cell, and where each cell ends.
    """
    scaled = scale_counts(counts)
    tokens = token[counts.indices]
    cell = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    known = (tokens >= 0) & (counts.data > 0)
    scaled, tokens, cell = scaled[known], tokens[known], cell[known]
    order = np.lexsort((tokens, -(scaled / median[tokens]), cell))
    ends = np.cumsum(np.bincount(cell, minlength=counts.shape[0]))
    return tokens[order], np.log1p(scaled[order]).astype(np.float32), ends
