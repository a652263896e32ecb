"""Which gene programmes a cell runs: AUCell scores, and the descriptions written with them."""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

ROUNDING = 1e-9  # a standard deviation of scores up to this comes of rounding


def fit_sets(read: Callable[[], Iterable[pd.DataFrame]], per_cell: int, min_active_share: float) -> pd.DataFrame:
    """Return mean, standard deviation and active share of the gene sets worth telling.

    A set is active in a cell if it is among the ``per_cell`` sets that ``choose_pathways`` would choose
    from all of them. A threshold on the standardised score would not do: a programme that half of the
    cells run never lies far above its mean.

    Parameters
    ----------
    read
        Yields the scores of the training cells, cells by gene sets, some cells at a time; called three times.
        NaN where a cell's dataset does not measure a set.
    per_cell
        How many sets are told of a cell.
    min_active_share
        A set is kept if it is active in more than this share of the cells in which it is measured.

    Returns
    -------
    DataFrame
        ``mean``, ``sd`` (of the population) and ``active_share`` of each kept set, in the order of the scores.
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

    Only sets with a score above nought are chosen; of equals, the first in ``fitted``.

    Parameters
    ----------
    scores
        Cells by gene sets.
    fitted
        ``mean`` and ``sd`` of the sets to choose from, as ``fit_sets`` gives them.
    per_cell
        How many to choose, at most.

    Returns
    -------
    array
        Rows of ``fitted``, int32 (cells, per_cell); -1 where there is no further set.
    """
    scores = scores[fitted.index]
    standard = ((scores - fitted["mean"]) / fitted["sd"]).where(scores > 0, -np.inf).to_numpy(dtype=float)
    best = np.argsort(-standard, axis=1, kind="stable")[:, :per_cell]
    chosen = np.where(np.isfinite(np.take_along_axis(standard, best, axis=1)), best, -1)
    return np.pad(chosen, ((0, 0), (0, per_cell - best.shape[1])), constant_values=-1).astype(np.int32)
