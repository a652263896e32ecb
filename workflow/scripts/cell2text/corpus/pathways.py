"""The most active gene sets of each cell, from their scores.

Scores are standardised over all training cells together. Per dataset, a study would lose what sets its cells apart
from those of other studies, and a cell's programmes would depend on which cells are in its shard.

The counts of a cell are a sample, and small sets vary more by chance than by biology. A set's standardised score is
therefore multiplied by the square root of its reliability, the share of its variance that is not sampling noise: this
is the expected activity, in standard deviations of the true activity, given the score.
"""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

LEAST_RELIABILITY = 0.01  # so that sets are still ranked where all of them are noise
ROUNDING = 1e-9  # standard deviations of scores up to this are rounding errors


def fit_sets(
    read: Callable[[], Iterable[tuple[pd.DataFrame, np.ndarray]]], per_cell: int, min_active_share: float
) -> pd.DataFrame:
    """Return how the gene sets to keep are standardised and how often they are active.

    A set is active in a cell if ``choose_pathways`` would choose it for that cell from all sets. A threshold on the
    standardised score would miss sets that are active in half of the cells: their scores are never far above the
    mean.

    Parameters
    ----------
    read
        Yields the scores of the training cells in parts, cells by gene sets, with NaN for sets that a cell's dataset
        does not measure, and the share of each cell's counts that the scores thin it to; called three times.
    per_cell
        Number of sets in a cell's description.
    min_active_share
        A set is kept if it is active in more than this share of the cells that have a score for it.

    Returns
    -------
    DataFrame
        ``mean``, ``sd`` (population), ``reliability`` and ``active_share`` of each kept set, in the order of the
        scores. A score is a sum of expected numbers; like those of a Poisson distribution, its sampling variance is
        the score times the share to which the cell is thinned.
    """
    number = total = noise = 0
    for scores, kept in read():
        scores = scores.astype(float)
        number, total = number + scores.notna().sum(), total + scores.sum()
        noise += scores.mul(kept, axis=0).sum()
    if not np.any(number):
        return pd.DataFrame(columns=["mean", "sd", "reliability", "active_share"])
    mean = total / number
    variance = sum(((scores - mean) ** 2).sum() for scores, _ in read()) / number
    fitted = pd.DataFrame({"mean": mean, "sd": np.sqrt(variance)})[variance > ROUNDING**2]
    fitted["reliability"] = (1 - noise / number / variance).clip(LEAST_RELIABILITY, 1)
    active = np.zeros(len(fitted))
    for scores, _ in read():
        chosen = choose_pathways(scores, fitted, per_cell)
        active += np.bincount(chosen[chosen >= 0], minlength=len(fitted))
    fitted["active_share"] = active / number[fitted.index]
    return fitted[fitted["active_share"] > min_active_share]


def choose_pathways(scores: pd.DataFrame, fitted: pd.DataFrame, per_cell: int) -> np.ndarray:
    """Return each cell's gene sets with the highest expected activity, highest first.

    Only sets with a score above zero are chosen; ties go to the first in ``fitted``.

    Parameters
    ----------
    scores
        Cells by gene sets.
    fitted
        ``mean``, ``sd`` and ``reliability`` of the sets to choose from, as returned by ``fit_sets``.
    per_cell
        Maximum number of sets per cell.

    Returns
    -------
    array
        Rows of ``fitted``, int32 (cells, per_cell); -1 where fewer sets are chosen.
    """
    scores = scores[fitted.index]
    activity = (scores - fitted["mean"]) / fitted["sd"] * np.sqrt(fitted["reliability"])
    activity = activity.where(scores > 0, -np.inf).to_numpy(dtype=float)
    best = np.argsort(-activity, axis=1, kind="stable")[:, :per_cell]
    chosen = np.where(np.isfinite(np.take_along_axis(activity, best, axis=1)), best, -1)
    return np.pad(chosen, ((0, 0), (0, per_cell - best.shape[1])), constant_values=-1).astype(np.int32)
