"""Baseline: logistic regression on principal components of log-normalised counts."""

import logging
from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from cell2text.cells.h5ad import id_parts, read_blocks, read_genes
from cell2text.evaluation.baselines.slots import (
    cells_to_describe,
    is_training,
    predict_slots,
    read_slots,
    refuse_missing,
    training_rows,
    write_predictions,
)

log = logging.getLogger("cell2text.baselines")

COMPONENTS = 50
# Training cells to fit on, drawn at random if there are more: about 2 GB of counts with 2,500 genes per cell.
MOST_CELLS = 100_000


def predict_pca_logistic(descriptions: str, terms: str, cells: list[str], predictions: str, seed: int) -> None:
    """Predict each slot by logistic regression on principal components of log-normalised counts.

    Counts are scaled to 10,000 per cell and log1p-transformed; components and regression are fitted on the training
    cells, at most ``MOST_CELLS`` of them. Only the counts of these are in memory.

    Parameters
    ----------
    descriptions, terms
        Files of ``contracts.DESCRIPTIONS`` and ``contracts.TERMS``.
    cells
        h5ad files of raw counts; genes are matched by id, and genes that a study lacks get count 0.
    predictions
        The file of ``contracts.PREDICTIONS`` to write.
    seed
        Seed of the PCA solver and of the drawn training cells.

    Raises
    ------
    InputError
        If a described cell is in none of the files.
    """
    described = _draw_training(read_slots(descriptions), seed)
    files = sorted(cells)
    genes = pd.Index(sorted(set().union(*(read_genes(path).index for path in files))))
    # cells stay in the order of the files
    order, parts = _gather(read_logs(files, training_rows(described)["cell_id"], genes))
    refuse_missing(training_rows(described)["cell_id"], order, files)
    training = sparse.vstack(parts, format="csr")
    del parts
    components = PCA(min(COMPONENTS, *(np.array(training.shape) - 1)), svd_solver="arpack", random_state=seed)
    known = components.fit_transform(training)[order.get_indexer(training_rows(described)["cell_id"])]
    log.info("PCA: %d components of %d genes, fitted on %d training cells", known.shape[1], len(genes), len(known))
    del training
    wanted = cells_to_describe(described)["cell_id"]
    order, parts = _gather((ids, components.transform(logs)) for ids, logs in read_logs(files, wanted, genes))
    refuse_missing(wanted, order, files)
    new = np.concatenate(parts)[order.get_indexer(wanted)]

    def classify(rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return LogisticRegression(max_iter=5000).fit(known[rows], codes).predict_proba(new)

    write_predictions(predict_slots(described, classify), terms, predictions)


def _draw_training(described: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Drop training cells at random until ``MOST_CELLS`` are left."""
    training = np.flatnonzero(is_training(described))
    surplus = max(0, len(training) - MOST_CELLS)
    dropped = np.random.default_rng(seed).choice(training, surplus, replace=False)
    return described.drop(index=described.index[dropped])


def _gather(parts: Iterator[tuple[np.ndarray, np.ndarray | sparse.csr_matrix]]) -> tuple[pd.Index, list]:
    found = list(parts)
    ids = [np.empty(0, dtype=object), *(ids for ids, _ in found)]
    return pd.Index(np.concatenate(ids)), [part for _, part in found]


def read_logs(files: list[str], cell_ids: pd.Series, genes: pd.Index) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
    """Yield ids and log1p of the counts per 10,000 of the given cells, one block of a file at a time.

    Parameters
    ----------
    files
        h5ad files of raw counts.
    cell_ids
        The cells to read.
    genes
        Gene ids of the columns; genes that a file lacks are zero.

    Yields
    ------
    tuple of array and csr_matrix
        Ids, and float32 (cells, genes).
    """
    wanted = pd.Index(cell_ids)
    for path in files:
        column = genes.get_indexer(read_genes(path).index).astype(np.int32)
        rows = np.concatenate([wanted.get_indexer(ids) >= 0 for ids in id_parts(path)])
        for ids, counts in read_blocks(path, rows):
            totals = np.asarray(counts.sum(axis=1)).ravel()
            logs = np.log1p(counts.data / np.repeat(totals, np.diff(counts.indptr)) * 1e4).astype(np.float32)
            placed = sparse.csr_matrix((logs, column[counts.indices], counts.indptr), (len(ids), len(genes)))
            yield ids, placed
