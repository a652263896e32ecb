"""Baseline: the description of the nearest training cell, copied."""

from sklearn.neighbors import NearestNeighbors

from cell2text.contracts import DESCRIPTIONS, PREDICTIONS, TERM_SLOTS
from cell2text.evaluation.baselines.slots import cells_to_describe, is_training, read_pooled, training_rows


def predict_nearest_text(descriptions: str, embeddings: list[str], predictions: str) -> None:
    """Copy the reference description of the training cell with the nearest pooled embedding.

    Nearest by cosine similarity. This baseline gives no confidence.
    """
    described = DESCRIPTIONS.read(descriptions)
    pooled = read_pooled(embeddings, described["cell_id"])
    training, predicted = training_rows(described), cells_to_describe(described)
    nearest = NearestNeighbors(n_neighbors=1, metric="cosine").fit(pooled[is_training(described)])
    chosen = nearest.kneighbors(pooled[~is_training(described)], return_distance=False)[:, 0]
    copied = [*(f"{slot}_id" for slot in TERM_SLOTS), "pathway_ids", "text"]
    predicted[copied] = training[copied].iloc[chosen].to_numpy()
    predicted = predicted.assign(status="parsed").reindex(columns=list(PREDICTIONS.columns))
    PREDICTIONS.write(predicted, predictions)
