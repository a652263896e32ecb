"""95% confidence intervals of metrics, by resampling donors or cells."""

from functools import cached_property

import numpy as np
import pandas as pd
import scipy.sparse

FEWEST_UNITS = 8  # fewer donors or cells are too few to estimate how much they vary
_RESAMPLES_AT_ONCE = 64


class Bootstrap:
    """Resamples of the cells of one split, shared by all metrics and methods, so that differences are paired.

    Cells of one donor are correlated, so whole donors are drawn. With fewer than eight donors, cells are drawn; such an
    interval ignores the variation between donors. With fewer than eight cells there is no interval.

    A metric is a function of sums over cells, so a resample is a weighted sum. All resamples of any number of metrics
    are one matrix product. Draws of cells take one byte per cell and resample.

    Parameters
    ----------
    donors
        Donor of each cell.
    resamples
        Number of resamples.
    seed
        Seed of the draws.
    """

    def __init__(self, donors: pd.Series, resamples: int, seed: int):
        self._donor = pd.factorize(donors, sort=True, use_na_sentinel=False)[0]
        self._resamples, self._seed = resamples, seed

    def count_donors(self, counted: np.ndarray | None = None) -> int:
        """Return the number of donors of the counted cells, by default of all cells."""
        return len(np.unique(self._donor if counted is None else self._donor[counted]))

    def unit(self, counted: np.ndarray | None = None) -> str | None:
        """Return what is drawn for a metric of the counted cells (by default all): donor, cell, or None for neither."""
        if self.count_donors(counted) >= FEWEST_UNITS:
            return "donor"
        cells = len(self._donor) if counted is None else np.count_nonzero(counted)
        return "cell" if cells >= FEWEST_UNITS else None

    def sum_up(self, terms: np.ndarray | scipy.sparse.csr_array, unit: str | None) -> np.ndarray:
        """Return the sums over all cells, and below them the sums over each resample.

        Parameters
        ----------
        terms
            The terms of the sums, shape (cells, sums).
        unit
            As returned by :meth:`unit`.

        Returns
        -------
        numpy.ndarray
            float64, shape (1 + resamples, sums), or (1, sums) if there is no unit.
        """
        terms = scipy.sparse.csr_array(terms, dtype=np.float64)
        parts = [terms.sum(axis=0)[None]]
        if unit == "donor":
            parts.append(self._drawn_donors @ (self._members @ terms).toarray())
        elif unit == "cell":
            columns = terms.astype(np.float32).T
            for start in range(0, self._resamples, _RESAMPLES_AT_ONCE):
                weights = self._drawn_cells[start : start + _RESAMPLES_AT_ONCE].T.astype(np.float32, order="C")
                parts.append((columns @ weights).T)
        return np.concatenate(parts)

    @cached_property
    def _members(self) -> scipy.sparse.csr_array:
        """Which cells each donor has, shape (donors, cells)."""
        cells = np.arange(len(self._donor))
        return scipy.sparse.csr_array((np.ones(len(cells)), (self._donor, cells)))

    @cached_property
    def _drawn_donors(self) -> np.ndarray:
        return self._draw(self.count_donors()).astype(np.float64)

    @cached_property
    def _drawn_cells(self) -> np.ndarray:
        return self._draw(len(self._donor))

    def _draw(self, units: int) -> np.ndarray:
        """Return how often each resample draws each unit, uint8 (resamples, units); 255 is out of reach."""
        rng = np.random.default_rng(self._seed)
        drawn = np.empty((self._resamples, units), dtype=np.uint8)
        for resample in drawn:
            resample[:] = np.bincount(rng.integers(units, size=units), minlength=units)
        return drawn


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return a value and the 2.5th and 97.5th percentiles of its resamples, NaN if there are none.

    Parameters
    ----------
    values
        The value on all cells, followed by those of the resamples; NaN where it is undefined.
    """
    value, resampled = float(values[0]), values[1:][~np.isnan(values[1:])]
    if not len(resampled):
        return value, float("nan"), float("nan")
    low, high = np.percentile(resampled, [2.5, 97.5])
    return value, float(low), float(high)
