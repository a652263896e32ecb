"""Figures with 95% intervals, by resampling donors."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import scipy.sparse


class Bootstrap:
    """Resampled cells of one split, the same for every figure, so that methods are compared on equal draws.

    Cells of a donor are alike, so whole donors are drawn; cells are drawn only where there is a single donor.
    A figure is a function of sums over cells, so a replicate is a sum weighted by how often each donor was
    drawn: one matrix product gives all of them.

    Parameters
    ----------
    donors
        Donor of each cell.
    replicates
        Number of resamples.
    seed
        Of the draws.

    Attributes
    ----------
    unit
        ``"donor"`` or ``"cell"``: what is drawn.
    units
        How many there are.
    """

    def __init__(self, donors: pd.Series, replicates: int, seed: int):
        codes, names = pd.factorize(donors, sort=True)
        self.unit = "donor" if len(names) > 1 else "cell"
        if self.unit == "cell":
            codes = np.arange(len(donors))
        self.units = int(codes.max()) + 1
        entries = (np.ones(len(codes), dtype=np.float32), (codes, np.arange(len(codes))))
        self._members = scipy.sparse.csr_array(entries, shape=(self.units, len(codes)))
        rng = np.random.default_rng(seed)
        self._drawn = np.stack(
            [np.bincount(rng.integers(self.units, size=self.units), minlength=self.units) for _ in range(replicates)]
        ).astype(np.float32)

    def estimate(
        self,
        statistics: np.ndarray | scipy.sparse.csr_array,
        figure: Callable[[np.ndarray], np.ndarray],
    ) -> tuple[float, float, float]:
        """Return a figure and the 2.5th and 97.5th percentiles of its resamples.

        Parameters
        ----------
        statistics
            What the figure sums over cells, shape (cells, sums).
        figure
            From sums, shape (replicates, sums), to the figure of each replicate; NaN where it is undefined.
        """
        statistics = scipy.sparse.csr_array(statistics, dtype=np.float64)
        value = figure(statistics.sum(axis=0)[None])[0]
        replicates = figure(self._drawn @ (self._members @ statistics).astype(np.float32))
        if np.isnan(replicates).all():
            return float(value), float("nan"), float("nan")
        low, high = np.nanpercentile(replicates, [2.5, 97.5])
        return float(value), float(low), float(high)
