"""Baseline: vote of the nearest training cells."""

import numpy as np
import scipy.sparse
from sklearn.neighbors import NearestNeighbors

from cell2text.evaluation.baselines.slots import is_training, predict_slots, read_pooled, read_slots, write_predictions

NEIGHBOURS = 15


def predict_knn(descriptions: str, terms: str, embeddings: list[str], predictions: str) -> None:
    """Predict each slot by a vote of the 15 training cells with the nearest pooled embeddings.

    The confidence is the share of the votes; neighbours without a known label do not vote.
    """
    described = read_slots(descriptions)
    pooled = read_pooled(embeddings, described["cell_id"])
    known, new = pooled[is_training(described)], pooled[~is_training(described)]
    nearest = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(known))).fit(known)
    neighbours = scipy.sparse.csr_array(nearest.kneighbors_graph(new))

    def classify(rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
        labels = scipy.sparse.csr_array((np.ones(len(rows)), (rows, codes)), shape=(len(known), codes.max() + 1))
        votes = (neighbours @ labels).toarray()
        return votes / np.maximum(votes.sum(axis=1, keepdims=True), 1)

    write_predictions(predict_slots(described, classify), terms, predictions)
