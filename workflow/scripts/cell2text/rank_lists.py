"""Lists of ranked genes as arrays, without a loop over cells."""

import numpy as np
import pandas as pd


def flatten(lists: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of all lists one after another, and where each list starts, as CSR matrices have it."""
    lengths = lists.str.len().to_numpy(dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = np.concatenate(lists.to_list()) if len(lists) else np.empty(0)
    return values, offsets


def pad(values: np.ndarray, offsets: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first ``width`` values of each list, zeros behind shorter ones, and how many each has.

    Parameters
    ----------
    values, offsets
        As :func:`flatten` gives them.
    width
        Values to keep a list.

    Returns
    -------
    padded
        (lists, width), dtype of ``values``.
    lengths
        int32 (lists,), at most ``width``.
    """
    lengths = np.minimum(np.diff(offsets), width).astype(np.int32)
    there = np.arange(width) < lengths[:, None]
    padded = np.zeros(there.shape, dtype=values.dtype)
    padded[there] = values[(offsets[:-1, None] + np.arange(width))[there]]
    return padded, lengths
