"""Tables next to the metrics: scores per class, confusions, and accuracy by confidence."""

import numpy as np
import pandas as pd

from cell2text.evaluation.sums import BINS, calibration_terms, class_terms
from cell2text.grammar import Terms

ABSTAINED = "not determined"


def per_class(slot: str, truth: pd.Series, predicted: pd.Series, terms: Terms) -> pd.DataFrame:
    """Return id, name, n, precision, recall and F1 of each class among the true labels.

    Precision is empty for a class that is never predicted.
    """
    classes = pd.Index(np.unique(truth.dropna().astype(str)))
    sums = class_terms(truth, predicted, classes).sum(axis=0)
    hits, true_cells, predicted_cells = np.split(sums, 3)
    precision = np.divide(hits, predicted_cells, where=predicted_cells > 0, out=np.full(len(classes), np.nan))
    return pd.DataFrame(
        {
            "id": classes,
            "name": _names(slot, classes, terms),
            "n": true_cells.astype(int),
            "precision": precision,
            "recall": hits / true_cells,
            "f1": 2 * hits / (true_cells + predicted_cells),
        }
    )


def confusion(slot: str, truth: pd.Series, predicted: pd.Series, terms: Terms) -> pd.DataFrame:
    """Return the number of cells for each pair of true and predicted term; an abstention has an empty id."""
    pairs = pd.DataFrame({"true_id": truth, "predicted_id": predicted.fillna("")})[truth.notna()]
    table = pairs.groupby(["true_id", "predicted_id"], sort=True).size().reset_index(name="n")
    table["true_name"] = _names(slot, table["true_id"], terms)
    table["predicted_name"] = _names(slot, table["predicted_id"], terms)
    return table[["true_id", "true_name", "predicted_id", "predicted_name", "n"]]


def calibration(confidence: np.ndarray, correct: np.ndarray, counted: np.ndarray) -> pd.DataFrame:
    """Return mean confidence, accuracy and n of each non-empty bin of confidence."""
    sums = calibration_terms(confidence, correct, counted).sum(axis=0)
    total_confidence, hits, cells = np.split(sums, 3)
    edges = np.arange(BINS + 1) / BINS
    filled = cells > 0
    return pd.DataFrame(
        {
            "bin_low": edges[:-1][filled],
            "bin_high": edges[1:][filled],
            "confidence": total_confidence[filled] / cells[filled],
            "accuracy": hits[filled] / cells[filled],
            "n": cells[filled].astype(int),
        }
    )


def _names(slot: str, ids: pd.Index | pd.Series, terms: Terms) -> list[str]:
    names = {"": ABSTAINED, **terms.name.get(slot, {})}
    return [names.get(term, term) for term in ids]
