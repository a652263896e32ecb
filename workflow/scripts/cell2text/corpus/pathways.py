"""The most active gene sets of each cell, from AUCell scores."""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

ROUNDING = 1e-9  # standard deviations of scores up to this are rounding errors


def fit_sets(read: Callable[[], Iterable[pd.DataFrame]], per_cell: int, min_active_share: float) -> pd.DataFrame:
    """Return mean, standard deviation and active share of the gene sets to keep.

    A set is active in a cell if ``choose_pathways`` would choose it for that cell from all sets. A threshold on the
    standardised score would miss sets that are active in half of the cells: their scores are never far above the
    mean.

    Parameters
    ----------
    read
        Yields the scores of the training cells in parts, cells by gene sets, with NaN for sets that a cell's dataset
        does not measure; called three times.
    per_cell
        Number of sets in a cell's description.
    min_active_share
        A set is kept if it is active in more than this share of the cells that have a score for it.

    Returns
    -------
    DataFrame
        ``mean``, ``sd`` (population) and ``active_share`` of each kept set, in the order of the scores.
    """
    number = total = 0
    for scores in read():
        number, total = number + scores.notna().sum(), total + scores.astype(float).sum()
    if not np.any(number):
        return pd.DataFrame(columns=["mean", "sd", "active_share"])
    mean = total / number
    squares = sum(((scores - mean) ** 2).sum() for scores in read())
    fitted = pd.DataFrame({"mean": mean, "sd": np.sqrt(squares / number)})
    fitted = fitted[fitted["sd"] > ROUNDING]
    active = np.zeros(len(fitted))
    for scores in read():
        chosen = choose_pathways(scores, fitted, per_cell)
        active += np.bincount(chosen[chosen >= 0], minlength=len(fitted))
    fitted["active_share"] = active / number[fitted.index]
    return fitted[fitted["active_share"] > min_active_share]


def choose_pathways(scores: pd.DataFrame, fitted: pd.DataFrame, per_cell: int) -> np.ndarray:
    """Return each cell's gene sets with the highest standardised scores, highest first.

    Only sets with a score above zero are chosen; ties go to the first in ``fitted``.

    Parameters
    ----------
    scores
        Cells by gene sets.
    fitted
        ``mean`` and ``sd`` of the sets to choose from, as returned by ``fit_sets``.
    per_cell
        Maximum number of sets per cell.

    Returns
    -------
    array
        Rows of ``fitted``, int32 (cells, per_cell); -1 where fewer sets are chosen.
    """
    scores = scores[fitted.index]
    standard = ((scores - fitted["mean"]) / fitted["sd"]).where(scores > 0, -np.inf).to_numpy(dtype=float)
    best = np.argsort(-standard, axis=1, kind="stable")[:, :per_cell]
    chosen = np.where(np.isfinite(np.take_along_axis(standard, best, axis=1)), best, -1)
    return np.pad(chosen, ((0, 0), (0, per_cell - best.shape[1])), constant_values=-1).astype(np.int32)
