"""Cell types of the test cells, predicted from a few labelled training cells per type."""

import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.metrics import accuracy_score, f1_score
from sklearn.neighbors import KNeighborsClassifier

from cell2text.contracts import FEW_SHOT
from cell2text.errors import InputError
from cell2text.evaluation.baselines.contrast import by_lda, fit_head
from cell2text.evaluation.baselines.slots import is_training, read_pooled, read_slots
from cell2text.spreadsheet import write_tsv

log = logging.getLogger("cell2text.evaluation")

DRAWS = 10
NEIGHBOURS = 5
SLOT, ALL = "cell_type", "all"
METRICS = ("accuracy", "macro_f1")


def few_shot(
    descriptions: str,
    embeddings: list[str],
    table: str,
    shots: Sequence[int],
    dimensions: int,
    temperature: float,
    steps: int,
    seed: int,
) -> None:
    """Score the cell types of the test cells, predicted from a few labelled training cells per type.

    Cells to label are drawn ``DRAWS`` times. The encoder has seen all training cells, without labels.

    Parameters
    ----------
    descriptions
        File of ``contracts.DESCRIPTIONS``.
    embeddings
        Files of ``contracts.EMBEDDINGS``.
    table
        TSV file to write, with the columns ``contracts.FEW_SHOT``: means over the draws, and the interval that holds
        95% of them. With ``all`` labelled cells there is one draw and no interval.
    shots
        Numbers of labelled cells per type; a type with fewer cells gives all of them.
    dimensions, temperature, steps
        See ``contrast.fit_head``.
    seed
        Seed of draws, heads and permutations.

    Raises
    ------
    InputError
        If no type has as many training cells as the largest number of ``shots``, if no test cell has a type, or if a
        described cell has no embedding.
    """
    described = read_slots(descriptions)
    training, test = is_training(described), (described["split"] == "test").to_numpy()
    types = described[f"{SLOT}_id"]
    largest = types[training].value_counts().to_numpy().max(initial=0)
    if max(shots) > largest:
        most = f"the most frequent cell type has only {largest} training cells"
        raise InputError("config: few_labels.shots", f"{max(shots)} is too many: {most}", "Set lower numbers")
    test &= types.notna().to_numpy()
    if not test.any():
        raise InputError(descriptions, "no test cell has a cell type", "Put labelled cells into the test split")
    pooled = read_pooled(embeddings, described["cell_id"])
    known, new, true = pooled[training], pooled[test], types[test].to_numpy(dtype=str)
    codes, names = pd.factorize(types[training], sort=True)
    names, scores = np.array(names, dtype=str), []
    for count in (*sorted(set(shots)), ALL):
        for draw in range(1 if count == ALL else DRAWS):
            rng = np.random.default_rng([seed, draw])
            rows = np.flatnonzero(codes >= 0) if count == ALL else draw_cells(codes, count, rng)
            predictions = predict_types(known, codes, new, rows, rng, dimensions, temperature, steps)
            scores += [(count, method, *score(true, names[found])) for method, found in predictions.items()]
        log.info("%s labelled cells per type: %d draws", count, draw + 1)
    write_tsv(summarise(pd.DataFrame(scores, columns=["shots", "method", *METRICS])), table)


def draw_cells(codes: np.ndarray, shots: int, rng: np.random.Generator) -> np.ndarray:
    """Return the rows of at most ``shots`` cells of each type, drawn at random; cells with the code -1 have no type."""
    order = rng.permutation(np.flatnonzero(codes >= 0))
    place = pd.Series(codes[order]).groupby(codes[order]).cumcount().to_numpy()
    return np.sort(order[place < shots])


def predict_types(
    known: np.ndarray,
    codes: np.ndarray,
    new: np.ndarray,
    rows: np.ndarray,
    rng: np.random.Generator,
    dimensions: int,
    temperature: float,
    steps: int,
) -> dict[str, np.ndarray]:
    """Return the predicted code of each new cell by each method, from some labelled training cells.

    Parameters
    ----------
    known, new
        Pooled vectors of training cells and of cells to predict, (cells, dimensions).
    codes
        Type of each training cell.
    rows
        The training cells whose types are used.
    rng
        Draws the seed of the heads, and permutes the labels of the control.
    dimensions, temperature, steps
        See ``contrast.fit_head``.
    """
    labelled, own, seed = known[rows], codes[rows], int(rng.integers(2**31))
    present, within = np.unique(own, return_inverse=True)
    neighbours = KNeighborsClassifier(min(NEIGHBOURS, np.bincount(within).max())).fit(labelled, within)
    found = {
        "knn": neighbours.predict(new),
        "lda": by_lda(labelled, new)(np.arange(len(rows)), within).argmax(axis=1),
    }
    for method, labels in (("contrast", within), ("contrast_permuted", rng.permutation(within))):
        head = fit_head(labelled, labels, dimensions, temperature, steps, seed)
        found[method] = head.probabilities(new).argmax(axis=1)
    return {method: present[one] for method, one in found.items()}


def score(true: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    """Return accuracy and macro-F1 over the types among the true ones, as ``evaluate`` does."""
    f1 = f1_score(true, predicted, labels=np.unique(true), average="macro", zero_division=0)
    return float(accuracy_score(true, predicted)), float(f1)


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the mean and the central 95% of the draws for each number of cells, method and metric."""
    rows = []
    for (count, method), draws in scores.groupby(["shots", "method"], sort=False):
        for metric in METRICS:
            values = draws[metric].to_numpy()
            low, high = np.quantile(values, (0.025, 0.975)) if len(values) > 1 else (np.nan, np.nan)
            rows.append((count, method, SLOT, metric, values.mean(), low, high))
    return pd.DataFrame(rows, columns=list(FEW_SHOT))
