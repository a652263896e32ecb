"""Principal axes of log-normalised counts from studies that measure different genes, and the place of cells on them.

A gene that a study does not measure is missing, not zero:

- A gene's mean is that of the studies that measure it, and missing values are replaced by it.
- A cell is placed by regression of its measured genes on their rows of the axes, in two ways: with equal weights,
  which keeps everything that the axes have of a cell, and with less weight for noisy genes, which agrees better between
  studies and gene panels.
- Counts per 10,000 are those that the cell would have if all genes were measured: they are multiplied by the share of
  the counts that the measured genes have in an average training cell.

Studies differ from each other in part for technical reasons, so the differences between their means count less than
those between the cells of a study.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from cell2text.embedding.ranked_cells import SCALE, RankedCells, RankedSplit
from cell2text.errors import InputError
from cell2text.progress import Progress

PASSES = 6  # over the training cells: with five, the last axes of real cells are still a few degrees off
OVERSAMPLING = 10  # columns of the start block beyond the requested axes
NEGLIGIBLE = 1e-8  # share of the first axis' variance; whitening an axis below it would amplify rounding errors
RIDGE = 0.05  # penalty of the regression with equal weights; each axis has a squared length of 1 over all genes
BETWEEN_STUDIES = 0.3  # weight of the differences between studies, relative to those within a study
PROFILE_STEPS = 50  # of the mean profile; the shares of genes that only some studies measure change by less each time


@dataclass(frozen=True)
class Axes:
    """Principal axes of cells, some of whose genes may not be measured.

    Parameters
    ----------
    vectors
        Unit columns, (genes, dimensions).
    mean
        Mean expression of each gene over the cells whose study measures it, (genes,).
    profile
        Share of each gene in the counts of an average cell, summing to 1, (genes,).
    variance
        Variance of the cells along each axis, (dimensions,).
    noise
        Variance of each gene that the axes leave over, (genes,).
    """

    vectors: np.ndarray
    mean: np.ndarray
    profile: np.ndarray
    variance: np.ndarray
    noise: np.ndarray

    @property
    def weights(self) -> np.ndarray:
        """1 over the noise of each gene, which is taken to be at least average, float64 (genes,)."""
        noise, least = self.noise.astype(float), NEGLIGIBLE * self.variance.max(initial=0)
        return 1 / np.maximum(noise, noise[noise > least].mean() if (noise > least).any() else 1)

    def expression(self, cells: RankedCells) -> np.ndarray:
        """Return the expression of the ranked genes as if all genes were measured, float32 (total genes,)."""
        return scale_to_all_genes(cells, self.profile)

    def place(self, cells: RankedCells, expression: np.ndarray | None = None) -> np.ndarray:
        """Return the coordinates of cells, float64 (cells, dimensions); the PCA coordinates if all genes are measured.

        Solves min ||V z - (x - mean)||^2 + RIDGE ||z||^2 over the measured genes; the coordinates of a cell with all
        genes, which the penalty shrinks by 1 / (1 + RIDGE), are brought back to their length.

        Parameters
        ----------
        cells
            Ranked genes of the cells.
        expression
            What :meth:`expression` returns for them, if it is known.
        """
        return self._regress(cells, expression, *self._equal) * (1 + RIDGE)

    def expect(self, cells: RankedCells, expression: np.ndarray | None = None) -> np.ndarray:
        """Return the coordinates that factor analysis expects of cells, float64 (cells, dimensions).

        They are the mean of z given the measured genes of x = mean + V z + noise, where coordinates and noise are
        independent and normal, with the variances of the axes and of the genes' noise. Parameters as for :meth:`place`.
        """
        return self._regress(cells, expression, *self._by_noise)

    def by_gene(self, cells: RankedCells, placed: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """Return derivatives by the expression of each gene, float64 (cells, genes), also of those not measured.

        Parameters
        ----------
        cells
            Only their panels are used.
        placed, expected
            Derivatives by the coordinates of :meth:`place` and :meth:`expect`, (cells, dimensions).
        """

        def back(derivatives: np.ndarray, weights: np.ndarray, penalty: np.ndarray) -> np.ndarray:
            # the matrix between projections and coordinates is symmetric
            return self._solve(cells, derivatives, weights, penalty) @ (self.vectors * weights[:, None]).T

        return back(placed * (1 + RIDGE), *self._equal) + back(expected, *self._by_noise)

    @property
    def _equal(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights of the genes and penalties of the axes for :meth:`place`."""
        return np.ones(len(self.vectors)), np.full(len(self.variance), RIDGE)

    @property
    def _by_noise(self) -> tuple[np.ndarray, np.ndarray]:
        return self.weights, 1 / self.variance.astype(float)

    def _regress(
        self, cells: RankedCells, expression: np.ndarray | None, weights: np.ndarray, penalty: np.ndarray
    ) -> np.ndarray:
        expression = self.expression(cells) if expression is None else expression
        weighted = self.vectors * weights[:, None]
        projections = np.asarray(cells.matrix(expression) @ weighted, dtype=float)
        for number in np.unique(cells.panel):
            projections[cells.panel == number] -= (self.mean * cells.panels[number]) @ weighted
        return self._solve(cells, projections, weights, penalty)

    def _solve(
        self, cells: RankedCells, projections: np.ndarray, weights: np.ndarray, penalty: np.ndarray
    ) -> np.ndarray:
        """Return the coordinates z from V' W (x - mean) over the measured genes, float64 (cells, dimensions)."""
        coordinates = np.empty(projections.shape)
        for number in np.unique(cells.panel):
            measured, own = cells.panels[number], cells.panel == number
            vectors = self.vectors[measured].astype(float)
            products = vectors.T @ (vectors * weights[measured, None]) + np.diag(penalty)
            coordinates[own] = np.linalg.solve(products, projections[own].T).T
        return coordinates

    def first(self, dimensions: int) -> "Axes":
        """Return the first axes alone; the variance along the others is noise."""
        rest = self.vectors[:, dimensions:] ** 2 @ self.variance[dimensions:]
        kept = {"vectors": self.vectors[:, :dimensions], "variance": self.variance[:dimensions]}
        return replace(self, **kept, noise=self.noise + rest)


def scale_to_all_genes(cells: RankedCells, profile: np.ndarray) -> np.ndarray:
    """Return the expression of the ranked genes as if all genes were measured, float32 (total genes,).

    Parameters
    ----------
    cells
        Ranked genes of the cells.
    profile
        See :class:`Axes`.
    """
    coverage = (cells.panels @ profile).astype(np.float32)[cells.panel]
    return np.log1p(np.expm1(cells.expression) * np.repeat(coverage, cells.lengths))


def find_axes(cells: RankedSplit, dimensions: int, seed: int) -> Axes:
    """Return the principal axes of cells read in parts, by randomised block Krylov iteration.

    Only matrices with one row per gene are in memory. After Musco & Musco, NeurIPS 2015, and Halko et al., SIAM Review
    2011. The products of the covariance with each block are kept, so the final Rayleigh-Ritz step needs no pass over
    the cells.

    Parameters
    ----------
    cells
        Cells to read, in ``PASSES`` + 1 passes; fewer if there are so few genes that the blocks span them sooner.
    dimensions
        Maximum number of axes. Axes without variance are dropped, and there are fewer axes than cells and genes.
    seed
        Seed of the start block, which is standard normal.

    Returns
    -------
    Axes
        Axes by decreasing variance, signed so that the entry with the largest magnitude is positive; float64. In all
        variances, differences between studies are weighted by ``BETWEEN_STUDIES``.

    Raises
    ------
    InputError
        If all cells have the same expression.
    """
    width = min(dimensions + OVERSAMPLING, cells.genes)
    columns = min(PASSES * width, cells.genes)
    starts = range(0, columns, width)
    progress = Progress((1 + len(starts)) * len(cells), "cells read")
    profile = find_profile(cells, progress)
    basis, products = np.empty((2, cells.genes, columns))
    block = np.random.default_rng(seed).standard_normal((cells.genes, width))
    for start in starts:
        here = slice(start, start + width)
        basis[:, here] = _orthonormalise(block[:, : columns - start], basis[:, :start])
        block, found = _multiply_covariance(cells, profile, basis[:, here], progress)
        products[:, here] = block
    projected = basis.T @ products
    variances, vectors = np.linalg.eigh((projected + projected.T) / 2)
    variances, vectors = variances[::-1], vectors[:, ::-1]
    # the mean sets the scale of the rounding errors that remain if cells do not vary at all
    vary = np.count_nonzero(variances > NEGLIGIBLE * max(variances[0], found.mean @ found.mean))
    kept = min(dimensions, found.cells - 1, cells.genes - 1, vary)
    if kept < 1:
        raise InputError(cells.corpus, "all training cells have the same expression", "Add cells")
    axes = basis @ vectors[:, :kept]
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(kept)])
    left = np.maximum(found.variance - axes**2 @ variances[:kept], 0)
    # the variance of a gene is that over all cells, and 0 where it is not measured
    noise = left * found.cells / np.maximum(found.measuring, 1)
    return Axes(axes, found.mean, profile, variances[:kept], noise)


def find_profile(cells: RankedSplit, progress: Progress | None = None) -> np.ndarray:
    """Return the share of each gene in the counts of an average cell, float64 (genes,), summing to 1.

    The shares of a study's genes sum to 1 in the study's own cells, although it may measure only half of the counts
    that others do. Each study is therefore weighted by its coverage: the share that the profile gives to its genes.
    The profile that agrees with all studies is found by repeating this, from a coverage of 1. If studies have no genes
    in common, nothing says how their shares compare, and they count as halves of equal size.
    """
    sums, sizes = np.zeros((len(cells.files), cells.genes)), np.zeros(len(cells.files))
    for number in range(len(cells.files)):
        for part in cells.of_file(number):
            shares = np.expm1(part.expression.astype(float)) / SCALE
            sums[number] += np.bincount(part.tokens, shares, minlength=cells.genes)
            sizes[number] += len(part)
            if progress:
                progress.advance(len(part))
    sums /= np.maximum(_count_measured(cells, sizes), 1)
    coverage = np.ones(len(sums))
    for _ in range(PROFILE_STEPS):
        profile = coverage @ sums
        profile /= max(profile.sum(), np.finfo(float).tiny)
        coverage = np.einsum("sg,g->s", cells.measured, profile)
    return profile


def _count_measured(cells: RankedSplit, sizes: np.ndarray) -> np.ndarray:
    """Return the number of cells whose study measures each gene, float64 (genes,); ``sizes``: cells of each study."""
    return np.einsum("s,sg->g", sizes, cells.measured)  # unlike a matrix product, without a copy in float64


def _orthonormalise(block: np.ndarray, basis: np.ndarray) -> np.ndarray:
    for _ in range(2):  # columns almost in the span of the basis need it twice
        block, _ = np.linalg.qr(block - basis @ (basis.T @ block))
    return block


class Moments(NamedTuple):
    """Mean and variance of each gene, (genes,), the number of cells whose study measures it, and of all cells."""

    mean: np.ndarray
    variance: np.ndarray
    measuring: np.ndarray
    cells: int


def _multiply_covariance(
    cells: RankedSplit, profile: np.ndarray, block: np.ndarray, progress: Progress
) -> tuple[np.ndarray, Moments]:
    """Return covariance @ block, (genes, columns), with the diagonal of the covariance among the moments.

    Within a study, unmeasured genes are zero, and so is their mean: they add nothing. Of the arrays, only ``sums``
    grows with the number of studies: 0.5 GB for 1,000 studies of 60,000 genes.
    """
    product, sums, sizes = np.zeros(block.shape), np.zeros((len(cells.files), cells.genes)), np.zeros(len(cells.files))
    squares = np.zeros(cells.genes)
    for number in range(len(cells.files)):
        for part in cells.of_file(number):
            expression = part.matrix(scale_to_all_genes(part, profile))
            product += expression.T @ (expression @ block)
            sums[number] += expression.T @ np.ones(len(part))
            squares += np.bincount(expression.indices, expression.data.astype(float) ** 2, minlength=cells.genes)
            sizes[number] += len(part)
            progress.advance(len(part))
    measuring = _count_measured(cells, sizes)
    mean = sums.sum(axis=0) / np.maximum(measuring, 1)
    for number in np.flatnonzero(sizes):
        own = sums[number] / sizes[number]
        apart = (own - mean * cells.measured[number]) * BETWEEN_STUDIES
        product -= np.outer(sums[number], own @ block)
        product += np.outer(sizes[number] * apart, apart @ block)
        squares += sizes[number] * (apart**2 - own**2)
    count = int(sizes.sum())
    free = max(count - 1, 1)
    return product / free, Moments(mean, np.maximum(squares, 0) / free, measuring, count)
