"""The test cells of a dataset without their labels, as a file to annotate."""

import logging

import pandas as pd

from cell2text.cells.h5ad import find_cells, kept_ids, read_blocks, read_genes, write_cells

log = logging.getLogger("cell2text.annotation")


def hide_labels(counts: str, corpus: str, unlabelled: str) -> None:
    """Write the counts of the test cells of a dataset, with nothing else about them.

    Parameters
    ----------
    counts
        The cells of the dataset after QC, an h5ad file.
    corpus
        File of ``contracts.CELLS``.
    unlabelled
        Output file (h5ad).
    """
    rows = find_cells(counts, corpus, "test")
    nothing = pd.DataFrame(index=range(int(rows.sum())))
    blocks = (block for _, block in read_blocks(counts, rows))
    write_cells(unlabelled, blocks, kept_ids(counts, rows), nothing, read_genes(counts), {})
    log.info("%d test cells without labels", len(nothing))
