"""Baseline: the most frequent training label."""

import numpy as np
import pandas as pd

from cell2text.contracts import TERM_SLOTS
from cell2text.evaluation.baselines.slots import cells_to_describe, read_slots, training_rows, write_predictions


def predict_majority(descriptions: str, terms: str, predictions: str) -> None:
    """Predict the most frequent training label of each slot for every cell.

    The confidence is the label's share of the labelled training cells. For gene sets, the most frequent
    combination is predicted. Ties are resolved by id, the first in sorted order.
    """
    cells = read_slots(descriptions)
    training, predicted = training_rows(cells), cells_to_describe(cells)
    for slot in TERM_SLOTS:
        shares = training[f"{slot}_id"].value_counts(normalize=True)
        likely = min(shares.index[shares == shares.max()], default=None)
        predicted[f"{slot}_id"] = likely
        predicted[f"{slot}_confidence"] = shares.get(likely, np.nan)
    combinations = pd.Series([tuple(sorted(sets)) for sets in training["pathway_ids"]]).value_counts()
    likely = min(combinations.index[combinations == combinations.max()])
    predicted["pathway_ids"] = [list(likely)] * len(predicted)
    write_predictions(predicted, terms, predictions)
