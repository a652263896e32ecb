"""Helpers of the baselines.

Each baseline learns from the training cells alone and writes ``contracts.PREDICTIONS`` for the validation and
test cells, including the text.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

from cell2text.contracts import DESCRIPTIONS, EMBEDDINGS, PREDICTIONS, TERM_SLOTS, TERMS
from cell2text.errors import InputError
from cell2text.grammar import Terms, render_rows

# Takes the rows of the training cells with a known label, and the code of each label. Returns the probability of
# each code for each cell to describe, shape (cells, codes); a row of zeros is an abstention.
Classifier = Callable[[np.ndarray, np.ndarray], np.ndarray]


def predict_slots(described: pd.DataFrame, classify: Classifier) -> pd.DataFrame:
    """Return predicted ids, confidences and gene sets of the validation and test cells.

    A slot with a single training label gets that label with confidence 1; a slot without labels stays empty.
    Gene sets are predicted one-vs-rest, and their number per cell is capped at the maximum over training cells.

    Parameters
    ----------
    described
        Rows of ``contracts.DESCRIPTIONS``.
    classify
        The baseline's classifier, fitted and applied once per slot and gene set.
    """
    training, predicted = training_rows(described), cells_to_describe(described)
    for slot in TERM_SLOTS:
        probabilities, labels = _predict(training[f"{slot}_id"], len(predicted), classify)
        confidence, best = probabilities.max(axis=1, initial=0), probabilities.argmax(axis=1)
        predicted[f"{slot}_id"] = np.where(confidence > 0, labels[best], None)
        predicted[f"{slot}_confidence"] = np.where(confidence > 0, confidence, np.nan)
    predicted["pathway_ids"] = _predict_pathways(training["pathway_ids"], len(predicted), classify)
    return predicted


def _predict(labels: pd.Series, cells: int, classify: Classifier) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability of each label for each cell, shape (cells, labels), and the sorted labels."""
    codes, names = pd.factorize(labels, sort=True)
    names = np.array(names, dtype=object)
    if len(names) == 0:
        return np.zeros((cells, 1)), np.array([None], dtype=object)
    if len(names) == 1:
        return np.ones((cells, 1)), names
    rows = np.flatnonzero(codes >= 0)
    return classify(rows, codes[rows]), names


def _predict_pathways(sets: pd.Series, cells: int, classify: Classifier) -> list[list[str]]:
    """Return the most probable gene sets of each cell, in descending order of probability."""
    sets = sets.reset_index(drop=True)
    members = sets.explode().dropna()
    most, names = int(sets.map(len).max()), np.array(sorted(members.unique()), dtype=object)
    probability = np.zeros((cells, len(names)))
    for column, name in enumerate(names):
        active = pd.Series(sets.index.isin(members.index[members == name]))
        probabilities, _ = _predict(active, cells, classify)
        probability[:, column] = probabilities[:, -1]
    order = np.argsort(-probability, axis=1, kind="stable")[:, :most]
    likely = np.take_along_axis(probability, order, axis=1) > 0
    return [names[chosen[kept]].tolist() for chosen, kept in zip(order, likely, strict=True)]


def read_slots(descriptions: str) -> pd.DataFrame:
    """Return ``contracts.DESCRIPTIONS`` without the texts, which take most of the memory."""
    columns = [name for name in DESCRIPTIONS.columns if name != "text"]
    return DESCRIPTIONS.read(descriptions, columns)


def read_pooled(files: list[str], cell_ids: pd.Series) -> np.ndarray:
    """Return the pooled embeddings of the given cells in the given order, float32 (cells, dimensions).

    Raises
    ------
    InputError
        If a cell is in none of the files.
    """
    return EMBEDDINGS.read_cells(files, cell_ids, ["pooled"])["pooled"]


def refuse_missing(wanted: pd.Series, given: pd.Index, files: list[str]) -> None:
    """Raise an InputError that names the files if a wanted cell is missing from the given ones."""
    missing = pd.Index(wanted).difference(given)
    if len(missing):
        raise InputError(
            ", ".join(map(str, files)),
            f"cells with a description are missing ({len(missing)}, such as {missing[0]})",
            "Delete the files and run the workflow again",
        )


def is_training(described: pd.DataFrame) -> np.ndarray:
    """Return a mask of the training cells among rows of ``contracts.DESCRIPTIONS``, bool (cells,)."""
    return (described["split"] == "train").to_numpy()


def training_rows(described: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the training cells."""
    return described[is_training(described)]


def cells_to_describe(described: pd.DataFrame) -> pd.DataFrame:
    """Return id and split of the validation and test cells, the cells that every baseline describes."""
    return described.loc[~is_training(described), ["cell_id", "split"]].reset_index(drop=True)


def write_predictions(predicted: pd.DataFrame, terms: str, predictions: str) -> None:
    """Render the text of each cell from its slots and write the predictions."""
    predicted = predicted.assign(status="parsed", text=render_rows(predicted, Terms(TERMS.read(terms))))
    PREDICTIONS.write(predicted.reindex(columns=list(PREDICTIONS.columns)), predictions)
