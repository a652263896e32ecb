"""95% confidence intervals of metrics, by resampling donors."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import scipy.sparse


class Bootstrap:
    """Resamples of the cells of one split, shared by all metrics, so that methods are compared on the same draws.

    Cells of one donor are correlated, so whole donors are drawn; only with a single donor are cells drawn.
    A metric is a function of sums over cells. In a replicate, each donor's sums are weighted by how often the
    donor was drawn, so one matrix product gives all replicates.

    Parameters
    ----------
    donors
        Donor of each cell.
    replicates
        Number of resamples.
    seed
        Seed of the draws.

    Attributes
    ----------
    unit
        What is resampled: ``"donor"`` or ``"cell"``.
    units
        Number of donors or cells to draw from.
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
        metric: Callable[[np.ndarray], np.ndarray],
    ) -> tuple[float, float, float]:
        """Return a metric and the 2.5th and 97.5th percentiles of its replicates.

        Parameters
        ----------
        statistics
            Per-cell terms of the sums that the metric is computed from, shape (cells, sums).
        metric
            Maps sums of shape (replicates, sums) to one value per replicate; NaN where it is undefined.
        """
        statistics = scipy.sparse.csr_array(statistics, dtype=np.float64)
        value = metric(statistics.sum(axis=0)[None])[0]
        replicates = metric(self._drawn @ (self._members @ statistics).astype(np.float32))
        if np.isnan(replicates).all():
            return float(value), float("nan"), float("nan")
        low, high = np.nanpercentile(replicates, [2.5, 97.5])
        return float(value), float(low), float(high)
