"""Baseline: the most frequent training label."""

import numpy as np
import pandas as pd

from cell2text.contracts import DESCRIPTIONS, TERM_SLOTS
from cell2text.evaluation.baselines.slots import cells_to_describe, training_rows, write_predictions


def predict_majority(descriptions: str, terms: str, predictions: str) -> None:
    """Call every cell by the most frequent training label; its share of the training cells is its confidence.

    Of gene sets it says the most frequent combination. Of equally frequent ones it says the first by id.
    """
    cells = DESCRIPTIONS.read(descriptions)
    training, told = training_rows(cells), cells_to_describe(cells)
    for slot in TERM_SLOTS:
        shares = training[f"{slot}_id"].value_counts(normalize=True)
        likely = min(shares.index[shares == shares.max()], default=None)
        told[f"{slot}_id"] = likely
        told[f"{slot}_confidence"] = shares.get(likely, np.nan)
    combinations = pd.Series([tuple(sorted(sets)) for sets in training["pathway_ids"]]).value_counts()
    told["pathway_ids"] = [list(min(combinations.index[combinations == combinations.max()]))] * len(told)
    write_predictions(told, terms, predictions)
