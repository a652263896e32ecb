"""Cell types that a few labelled cells add to a finished model. Nothing is trained.

The labelled cells, the examples, are of several types, some of which the model may know. A cell whose nearest examples
are of a type that the model does not know gets this type. Nearest is the type with the nearest mean, in the distances
of linear discriminant analysis: relative to the covariance within the types of the training cells, shrunk as by Ledoit
and Wolf (2004). The mean of few cells lies off by chance; what this adds to a squared distance is subtracted.

Examples are compared with examples only, because they are of the same study as the cells. The means of the training
cells are of other studies: where they took part in the comparison, 93% of the cells of a new study were taken for a
type that one in ten was (model of the demo on pbmc3k); with examples of the other types instead, 1%.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.covariance import ledoit_wolf

from cell2text.confidence.back_off import TermsAbove
from cell2text.confidence.novelty import Reference

LEAST_EXAMPLES = 3
NEAR = 0.99  # share of the training cells whose distance from the mean of their own type is allowed
CELLS_AT_ONCE = 8192


@dataclass(frozen=True, eq=False)
class AddedTypes:
    """Means of the types of the examples, scaled so that cells of a type vary equally in all directions.

    Parameters
    ----------
    ids
        Id of each type, sorted.
    above
        The terms that may be reported: these types and those above them.
    known
        Whether the model knows each type, bool (types,).
    whitening
        By which vectors are multiplied, float64 (dimensions, dimensions).
    means
        Whitened mean of the examples of each type, float64 (types, dimensions).
    sizes
        Number of examples of each type, (types,).
    limit
        Greatest squared distance from the mean of an added type.
    temperature
        By which squared distances are divided, so that they tell training cells of different types apart as surely as
        they claim.
    least
        Probability of the terms that are reported.
    """

    ids: np.ndarray
    above: TermsAbove
    known: np.ndarray
    whitening: np.ndarray
    means: np.ndarray
    sizes: np.ndarray
    limit: float
    temperature: float
    least: float

    @classmethod
    def fit(
        cls,
        reference: Reference,
        labels: Sequence[str],
        examples: np.ndarray,
        types: pd.Series,
        ancestors: Mapping[str, Sequence[str]],
        least: float,
    ) -> Self:
        """Return the types that labelled cells add.

        Parameters
        ----------
        reference
            Training cells with their types.
        labels
            Ids of the model's cell types, which number those of the reference.
        examples
            Vectors of the labelled cells, (examples, dimensions).
        types
            Id of the type of each.
        ancestors
            Ids above each type.
        least
            See the class.

        Raises
        ------
        ValueError
            If no type has two training cells to compare with.
        """
        typed = reference.types >= 0
        vectors, codes = reference.vectors[typed].astype(float), reference.types[typed]
        means, sizes = mean_of_each(vectors, codes, len(labels))
        if sizes.max(initial=0) < 2:
            raise ValueError("no cell type has two training cells")
        whitening = whiten(vectors - means[codes])
        numbers, ids = pd.factorize(types, sort=True)
        means_of_examples, number_of_examples = mean_of_each(examples.astype(float), numbers, len(ids))
        return cls(
            np.array(ids, dtype=object),
            TermsAbove(list(ids), ancestors),
            np.isin(ids, labels),
            whitening,
            means_of_examples @ whitening,
            number_of_examples,
            *judge(vectors @ whitening, codes, means @ whitening, sizes),
            least,
        )

    def apply(self, table: pd.DataFrame, vectors: np.ndarray) -> pd.DataFrame:
        """Return descriptions with the added types in place; all other cells keep what the model says.

        Added types have no confidence, because nothing tells how often they are right among these cells.

        Parameters
        ----------
        table
            Rows of ``contracts.PREDICTIONS``.
        vectors
            Vectors of the cells, (cells, dimensions).
        """
        if not len(table):
            return table
        starts = range(0, len(table), CELLS_AT_ONCE)
        parts = [self.find(vectors[start : start + CELLS_AT_ONCE]) for start in starts]
        ids, reported = (np.concatenate(part) for part in zip(*parts, strict=True))
        taken = ids != None  # noqa: E711 - an array
        table = table.copy()
        table.loc[taken, "cell_type_id"] = ids[taken]
        table.loc[taken, "cell_type_reported_id"] = reported[taken]
        table.loc[taken, ["cell_type_confidence", "cell_type_reported_confidence"]] = None
        return table

    def find(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the added type of each cell, None if it has none, and the term to report then, which may be None."""
        distances = distances_from(vectors.astype(float) @ self.whitening, self.means, self.sizes)
        nearest, rows = distances.argmin(axis=1), np.arange(len(vectors))
        reported, _ = self.above.report(softmax(-distances / (2 * self.temperature), axis=1), self.least)
        taken = ~self.known[nearest] & (distances[rows, nearest] <= self.limit)
        return np.where(taken, self.ids[nearest], None), reported


def judge(placed: np.ndarray, codes: np.ndarray, means: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Return limit and temperature, see :class:`AddedTypes`, of training cells.

    Parameters
    ----------
    placed
        Whitened vectors, (cells, dimensions).
    codes
        Number of the type of each, (cells,).
    means, sizes
        Whitened mean and number of the cells of each type; NaN without cells.
    """
    several = sizes[codes] > 1
    placed, codes = placed[several], codes[several]
    present = np.flatnonzero(sizes)
    distances, rows = distances_from(placed, means[present], sizes[present]), np.arange(len(codes))
    own = np.searchsorted(present, codes)
    # each cell without its own share in the mean: from n others, its distance grows by (n + 1) / n
    others = sizes[codes] - 1
    squared = ((placed - means[codes]) ** 2).sum(axis=1) * ((others + 1) / others) ** 2
    distances[rows, own] = squared - placed.shape[1] / others
    limit = float(np.quantile(distances[rows, own], NEAR))
    if len(present) < 2:
        return limit, 1.0

    def loss(log_temperature: float) -> float:
        return -log_softmax(-distances / (2 * np.exp(log_temperature)), axis=1)[rows, own].mean()

    # from normal cells to those that vary a hundred times as much as the covariance says
    return limit, float(np.exp(minimize_scalar(loss, bounds=(0, np.log(100)), method="bounded").x))


def distances_from(placed: np.ndarray, means: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the squared distance of each whitened vector from the true mean of each type, float64 (cells, types).

    The mean of n cells lies off the true one by 1 / n per dimension on average.
    """
    squared = (placed**2).sum(axis=1)[:, None] - 2 * placed @ means.T + (means**2).sum(axis=1)
    return squared - placed.shape[1] / sizes


def mean_of_each(vectors: np.ndarray, codes: np.ndarray, types: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of the cells of each type, float64 (types, dimensions), and their number; NaN without cells."""
    sums, sizes = np.zeros((types, vectors.shape[1])), np.bincount(codes, minlength=types)
    np.add.at(sums, codes, vectors)
    with np.errstate(invalid="ignore"):
        return sums / sizes[:, None], sizes


def whiten(residuals: np.ndarray) -> np.ndarray:
    """Return the matrix that turns the shrunk covariance of centred vectors, (cells, dimensions), into the identity."""
    spread = residuals.std(axis=0)
    spread = np.where(spread > 0, spread, 1)
    covariance, _ = ledoit_wolf(residuals / spread, assume_centered=True)
    values, axes = np.linalg.eigh(covariance)
    # a direction in which no training cell varies tells nothing
    return (axes / spread[:, None]) / np.sqrt(np.maximum(values, values.max() * 1e-6))
