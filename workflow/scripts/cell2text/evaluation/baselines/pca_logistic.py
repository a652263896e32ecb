"""Baseline: logistic regression on principal components of log-normalised counts."""

import logging

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression

from cell2text.embedding.axes import find_axes
from cell2text.embedding.ranked_cells import RankedSplit, read_measured
from cell2text.evaluation.baselines.slots import (
    is_training,
    predict_slots,
    read_slots,
    refuse_missing,
    write_predictions,
)

log = logging.getLogger("cell2text.baselines")

COMPONENTS = 50
# Training cells to fit the regressions on, drawn at random if there are more.
MOST_CELLS = 100_000


def predict_pca_logistic(
    descriptions: str, terms: str, corpus: str, genes: str, tokens: list[str], predictions: str, seed: int
) -> None:
    """Predict each slot by logistic regression on principal components of log-normalised counts.

    Components are fitted on the training cells, with genes that a study does not measure missing (see
    ``embedding.axes``); regressions on at most ``MOST_CELLS`` of them. The cells are read in parts.

    Parameters
    ----------
    descriptions, terms, corpus, genes
        Files of ``contracts.DESCRIPTIONS``, ``contracts.TERMS``, ``contracts.CELLS`` and ``contracts.GENES``.
    tokens
        Files of ``contracts.TOKENS``.
    predictions
        The file of ``contracts.PREDICTIONS`` to write.
    seed
        Seed of the components and of the drawn training cells.

    Raises
    ------
    InputError
        If a described cell is in none of the files.
    """
    described = _draw_training(read_slots(descriptions), seed)
    measured = read_measured(genes, tokens)
    axes = find_axes(RankedSplit(tokens, corpus, "train", measured), COMPONENTS, seed)
    ids, coordinates = [np.empty(0, dtype=object)], [np.empty((0, axes.vectors.shape[1]))]
    for split in described["split"].unique():
        for part in RankedSplit(tokens, corpus, split, measured):
            ids.append(part.cell_ids)
            coordinates.append(axes.place(part))
    order = pd.Index(np.concatenate(ids))
    refuse_missing(described["cell_id"], order, tokens)
    log.info("PCA: %d components of %d genes", axes.vectors.shape[1], len(axes.vectors))
    placed = np.concatenate(coordinates)[order.get_indexer(described["cell_id"])]
    known, new = placed[is_training(described)], placed[~is_training(described)]

    def classify(rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return LogisticRegression(max_iter=5000).fit(known[rows], codes).predict_proba(new)

    write_predictions(predict_slots(described, classify), terms, predictions)


def _draw_training(described: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Drop training cells at random until ``MOST_CELLS`` are left."""
    training = np.flatnonzero(is_training(described))
    surplus = max(0, len(training) - MOST_CELLS)
    dropped = np.random.default_rng(seed).choice(training, surplus, replace=False)
    return described.drop(index=described.index[dropped])
