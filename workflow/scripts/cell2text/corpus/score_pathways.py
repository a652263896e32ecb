"""Activity of the gene sets in each cell of a dataset, comparable between sequencing depths.

The score of a set is the number of its genes expected to remain expressed if the cell were thinned to ``THINNED_TO``
counts. Each count is then kept with probability p = ``THINNED_TO`` / total, so a gene with c counts remains with
probability 1 - (1 - p)^c. A cell sequenced at a fifth of the depth has the same expected score, because thinning to a
fifth and then to ``THINNED_TO`` counts is thinning to ``THINNED_TO`` counts. A score depends on nothing but the counts
of its own cell: not on other cells, the number of cells, or the shard.

AUCell (Aibar et al., Nature Methods 2017) is not used, because its ranks depend on depth: in a shallow cell most genes
have the same count, so that the top genes end within a tie or include genes that are not expressed. On four studies as
they are and thinned to a fifth of their counts (`tests/benchmarks/pathway_depth.py`, which compares more scores):

                                              AUCell, top 5%   share of       genes left at
                                                or fewer       the counts       50 counts
    Jaccard index of a cell's two sets, whole      0.37           0.51            0.60
        and thinned
    shift of a set's mean, standard deviations     0.60           0.02            0.02
    Jaccard index with a linear prediction         0.39           0.44            0.52
    mutual information with the cell type, bits    0.82           0.92            1.02
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from cell2text.cells.h5ad import find_cells, read_blocks, read_genes
from cell2text.contracts import PATHWAY_SCORES
from cell2text.corpus.gene_sets import find_members, read_gene_sets
from cell2text.errors import InputError
from cell2text.progress import Progress

log = logging.getLogger("cell2text.pathways")

THINNED_TO = 50  # counts; QC lets few cells with less pass, even in a panel of 2,000 genes


def score_pathways(
    cells_file: str | Path,
    corpus_file: str | Path,
    gene_sets_file: str | Path,
    min_genes: int,
    path: str | Path,
) -> None:
    """Score each gene set in each of a dataset's cells, see ``count_expressed``.

    Parameters
    ----------
    cells_file
        Filtered counts of the dataset.
    corpus_file
        The corpus; only its cells are scored.
    gene_sets_file
        GMT file with gene symbols.
    min_genes
        A set with fewer measured genes is not scored: its column is NaN. In a small panel, this may be every set.
    path
        Where to write the scores (``contracts.PATHWAY_SCORES``), in the order of the dataset, block by block.

    Raises
    ------
    InputError
        If the dataset measures no gene of any set.
    """
    sets = read_gene_sets(gene_sets_file)
    symbols = read_genes(cells_file)["symbol"]
    members = find_members(sets.values(), symbols)
    measured = np.diff(members.indptr)
    skipped = [name for name, genes in zip(sets, measured, strict=True) if genes < min_genes]
    if not measured.any():
        raise InputError(
            gene_sets_file,
            f"no set has a gene that {Path(cells_file).stem} measures ({symbols.iloc[0]}, ...)",
            "Give gene sets with the symbols of human genes",
        )
    if len(skipped) == len(sets):
        log.warning("no set has %d measured genes, so these cells are described without gene programmes", min_genes)
    elif skipped:
        log.info("Gene sets with fewer than %d measured genes are not scored: %s", min_genes, ", ".join(skipped))
    rows = find_cells(cells_file, corpus_file)
    progress = Progress(int(rows.sum()), "cells")

    def score() -> Iterator[pd.DataFrame]:
        for ids, counts in read_blocks(cells_file, rows):
            scores = pd.DataFrame(count_expressed(counts, members), columns=list(sets), dtype="float32")
            scores[skipped] = np.float32(np.nan)
            yield scores.assign(cell_id=ids)
            progress.advance(len(ids))

    PATHWAY_SCORES.write_parts(score(), path, rest=sets)


def count_expressed(counts: sparse.csr_matrix, members: sparse.csc_matrix) -> np.ndarray:
    """Return how many genes of each set are expected to remain expressed in each cell at ``THINNED_TO`` counts.

    Parameters
    ----------
    counts
        Raw counts, cells by genes. A cell with fewer counts than ``THINNED_TO`` is not thinned.
    members
        Whether a gene belongs to a set, genes by sets: 0 or 1.

    Returns
    -------
    array
        float64, cells by sets.
    """
    kept = kept_share(np.asarray(counts.sum(axis=1, dtype=float)).ravel())
    remains = 1 - (1 - np.repeat(kept, np.diff(counts.indptr))) ** counts.data
    return (sparse.csr_matrix((remains, counts.indices, counts.indptr), shape=counts.shape) @ members).toarray()


def kept_share(totals: np.ndarray) -> np.ndarray:
    """Return the share of a cell's counts that thinning keeps, from the total counts of each cell."""
    return THINNED_TO / np.maximum(totals, THINNED_TO)
