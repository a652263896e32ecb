"""AUCell scores of the gene sets in each cell of a dataset."""

import logging
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import decoupler as dc
import numba
import numpy as np
import pandas as pd

from cell2text.cells.h5ad import find_cells, read_blocks, read_genes
from cell2text.contracts import PATHWAY_SCORES
from cell2text.corpus.gene_sets import read_gene_sets
from cell2text.errors import InputError
from cell2text.progress import Progress

log = logging.getLogger("cell2text.pathways")

CELLS_AT_ONCE = 1000
TOP_SHARE = 0.05  # of the ranked genes: the default of AUCell


def score_pathways(
    cells_file: str | Path,
    corpus_file: str | Path,
    gene_sets_file: str | Path,
    min_genes: int,
    path: str | Path,
) -> None:
    """Score each gene set in each of a dataset's cells with AUCell (Aibar et al., Nature Methods 2017).

    The score is the area under the recovery curve over a cell's top genes, as computed by decoupler. All genes of
    the file are ranked by their raw counts (normalising a cell would not change the order), so a cell's score does
    not depend on other cells. Ties, also at the last of the top genes, are broken by an order of the genes that
    decoupler draws once with a fixed seed and uses for all cells.

    Parameters
    ----------
    cells_file
        Filtered counts of the dataset.
    corpus_file
        The corpus; only its cells are scored.
    gene_sets_file
        GMT file with gene symbols.
    min_genes
        A set with fewer measured genes is not scored: its column is NaN.
    path
        Where to write the scores (``contracts.PATHWAY_SCORES``), in the order of the dataset, block by block.

    Raises
    ------
    InputError
        If no set has enough genes.
    """
    sets = read_gene_sets(gene_sets_file)
    symbols = read_genes(cells_file)["symbol"]
    measured = set(symbols)
    usable = {name: genes for name, genes in sets.items() if len(measured & set(genes)) >= min_genes}
    if not usable:
        raise InputError(
            gene_sets_file,
            f"no set has {min_genes} genes that {Path(cells_file).stem} measures ({symbols.iloc[0]}, ...)",
            "Give gene sets with the symbols of human genes",
        )
    skipped = [name for name in sets if name not in usable]
    if skipped:
        log.info("Gene sets with fewer than %d measured genes are not scored: %s", min_genes, ", ".join(skipped))
    # decoupler distributes the few sets of one cell over threads; waking a second thread costs more than it saves.
    numba.set_num_threads(1)
    net = pd.DataFrame([(name, gene) for name, genes in usable.items() for gene in genes], columns=["source", "target"])
    rows, training = find_cells(cells_file, corpus_file), find_cells(cells_file, corpus_file, "train")
    top_genes = count_top_genes(cells_file, training if training.any() else rows)
    progress = Progress(int(rows.sum()), "cells")
    # A symbol shared by several genes belongs to the first of them.
    unique = ~symbols.duplicated().to_numpy()
    var = pd.DataFrame(index=symbols[unique].to_numpy())

    def score() -> Iterator[pd.DataFrame]:
        for ids, counts in read_blocks(cells_file, rows, CELLS_AT_ONCE):
            block = ad.AnnData(counts[:, unique], obs=pd.DataFrame(index=ids), var=var)
            dc.mt.aucell(block, net, tmin=min_genes, empty=False, n_up=top_genes)
            scores = block.obsm["score_aucell"].reindex(columns=list(sets)).astype("float32")
            yield scores.reset_index(names="cell_id")
            progress.advance(len(ids))

    PATHWAY_SCORES.write_parts(score(), path, rest=sets)


def count_top_genes(path: str | Path, rows: np.ndarray) -> int:
    """Return the number of top genes over which AUCell integrates: at most 5% of the genes.

    A cell that expresses fewer genes would fill the remaining ranks with genes it does not express, so the number
    is capped at what 95% of the cells express.

    Parameters
    ----------
    path
        Filtered counts of the dataset.
    rows
        Cells to use: the training cells, or all cells if there are none.
    """
    expressed = [np.diff(counts.indptr) for _, counts in read_blocks(path, rows)]
    limit = np.quantile(np.concatenate(expressed), 0.05) if expressed else 0
    return max(2, int(min(np.ceil(TOP_SHARE * len(read_genes(path))), limit)))
