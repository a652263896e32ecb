"""Gene vectors from coexpression: the principal axes of the training cells, without a download or a GPU.

A gene's vector is its row of the right singular vectors of the centred log-normalised counts, scaled in each cell by
the gene's expression. The sum over the cell's genes minus a constant gives the cell's PCA coordinates, so a linear
model on these vectors has all the information in the principal components. The number of axes and whether to whiten
them are chosen by how well they predict the cell types of validation cells.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression

from cell2text.embedding.ranked_cells import RankedCells, RankedSplit, pad
from cell2text.errors import InputError
from cell2text.files import read_json, write_json
from cell2text.progress import Progress
from cell2text.settings import EncoderSettings
from cell2text.weights import read_weights

log = logging.getLogger("cell2text.encoders")

PASSES = 6  # over the training cells: with five, the last axes of real cells are still a few degrees off
OVERSAMPLING = 10  # columns of the start block beyond the requested axes
NEGLIGIBLE = 1e-8  # share of the first axis' variance; whitening an axis below it would amplify rounding errors
MIN_DIMENSIONS = 8  # after truncation
SELECTION_CELLS = 10_000  # maximum per split for choosing the number of axes


class Coexpression:
    """Principal axes of the training cells.

    Parameters
    ----------
    axes
        One row per gene, float32 (genes, dimensions).
    centre
        Negated PCA coordinates of a cell without counts, float32 (dimensions,).
    whitened
        Whether each axis is divided by its standard deviation over the training cells.
    candidates
        The options that were compared; see :func:`compare_candidates`.
    """

    def __init__(
        self, axes: np.ndarray, centre: np.ndarray, whitened: bool = False, candidates: Sequence[dict[str, Any]] = ()
    ):
        self.axes, self.centre, self.whitened, self.candidates = axes, centre, whitened, list(candidates)
        self.dimensions = axes.shape[1]

    @classmethod
    def fit(
        cls,
        train: RankedSplit,
        validation: RankedSplit,
        settings: EncoderSettings,
        seed: int,
        checkpoints: Path,
        fetched: Path | None = None,
    ) -> "Coexpression":
        """Find the principal axes of training cells; choose number and scaling of the axes on validation cells.

        Parameters
        ----------
        train, validation
            Cells to fit the axes, and cells for model selection.
        settings
            Only ``dimensions``, the maximum number of axes; few cells or genes give fewer.
        seed
            Seed of the start block, and of the cells drawn for model selection.
        checkpoints, fetched
            Not used.

        Raises
        ------
        InputError
            If all training cells have the same expression.
        """
        axes, mean, deviations = find_axes(train, settings.dimensions, seed)
        if not len(deviations):
            raise InputError(train.corpus, "all training cells have the same expression", "Add cells")
        candidates = compare_candidates(train, validation, axes, mean, deviations, seed)
        chosen = choose_candidate(candidates) if candidates else {"dimensions": len(deviations), "whitened": False}
        dimensions, whitened = chosen["dimensions"], chosen["whitened"]
        log.info("kept %d of %d dimensions, %s", dimensions, len(deviations), _scaling(whitened))
        axes = axes[:, :dimensions] / (deviations[:dimensions] if whitened else 1)
        centre = (mean @ axes).astype(np.float32)
        return cls(np.ascontiguousarray(axes, dtype=np.float32), centre, whitened, candidates)

    def save(self, directory: Path) -> None:
        """Write the axes, the centre and the candidates."""
        save_file({"axes": self.axes, "centre": self.centre}, directory / "coexpression.safetensors")
        metadata = {"kind": "coexpression", "dimensions": self.dimensions, "whitened": self.whitened}
        write_json(metadata | {"candidates": self.candidates}, directory / "encoder.json")

    @classmethod
    def load(cls, directory: Path) -> "Coexpression":
        """Load an encoder written by :meth:`save`.

        Raises
        ------
        InputError
            If a file is damaged, or axes and centre do not fit together.
        """
        file, fix = directory / "coexpression.safetensors", f"Delete {directory} and run the workflow again"
        tensors, metadata = read_weights(file, fix, "numpy"), read_json(directory / "encoder.json", fix)
        shapes = {name: tensors[name].shape for name in ("axes", "centre") if name in tensors}
        if len(shapes) < 2 or len(shapes["axes"]) != 2 or shapes["centre"] != shapes["axes"][1:]:
            raise InputError(file, f"not axes and their centre: found {shapes or 'neither'}", fix)
        return cls(tensors["axes"], tensors["centre"], metadata.get("whitened", False), metadata.get("candidates", ()))

    def embed(self, cells: RankedCells, top_k: int, progress: Progress | None = None) -> dict[str, np.ndarray]:
        """Return gene vectors of the ``top_k`` highest ranked genes and each cell's PCA coordinates.

        Parameters
        ----------
        cells
            Ranked genes of the cells.
        top_k
            Gene vectors per cell; cells with fewer genes are padded with zeros.
        progress
            Advanced once, by all cells.

        Returns
        -------
        dict
            ``gene_vectors`` float16 (cells, top_k, dimensions), ``lengths`` int32 (cells,),
            ``pooled`` float32 (cells, dimensions), over all expressed genes.
        """
        top_tokens, lengths = pad(cells.tokens, cells.offsets, top_k)
        top_expression, _ = pad(cells.expression, cells.offsets, top_k)
        if progress:
            progress.advance(len(cells))
        return {
            "gene_vectors": (self.axes[top_tokens] * top_expression[:, :, None]).astype(np.float16),
            "lengths": lengths,
            "pooled": np.asarray(cells.matrix(len(self.axes)) @ self.axes - self.centre, dtype=np.float32),
        }


def find_axes(cells: RankedSplit, dimensions: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the principal axes of cells read in parts, by randomised block Krylov iteration.

    Only matrices with one row per gene are in memory. After Musco & Musco, NeurIPS 2015, and Halko et al., SIAM Review
    2011. The products of the covariance with each block are kept, so the final Rayleigh-Ritz step needs no pass over
    the cells.

    Parameters
    ----------
    cells
        Cells to read, in ``PASSES`` passes; fewer if there are so few genes that the blocks span them sooner.
    dimensions
        Maximum number of axes. Axes without variance are dropped, and there are fewer axes than cells and genes.
    seed
        Seed of the start block, which is standard normal.

    Returns
    -------
    axes
        Unit columns by decreasing variance, signed so that the entry with the largest magnitude is positive; float64
        (genes, dimensions).
    mean
        Mean of each gene, float64 (genes,).
    deviations
        Standard deviation of the cells along each axis, float64 (dimensions,).
    """
    width = min(dimensions + OVERSAMPLING, cells.genes)
    columns = min(PASSES * width, cells.genes)
    starts = range(0, columns, width)
    progress = Progress(len(starts) * len(cells), "cells read")
    basis, products = np.empty((2, cells.genes, columns))
    block = np.random.default_rng(seed).standard_normal((cells.genes, width))
    for start in starts:
        here = slice(start, start + width)
        basis[:, here] = _orthonormalise(block[:, : columns - start], basis[:, :start])
        block, mean, count = _multiply_covariance(cells, basis[:, here], progress)
        products[:, here] = block
    projected = basis.T @ products
    variances, vectors = np.linalg.eigh((projected + projected.T) / 2)
    variances, vectors = variances[::-1], vectors[:, ::-1]
    # the mean sets the scale of the rounding errors that remain if cells do not vary at all
    vary = np.count_nonzero(variances > NEGLIGIBLE * max(variances[0], mean @ mean))
    kept = min(dimensions, count - 1, cells.genes - 1, vary)
    axes = basis @ vectors[:, :kept]
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(kept)])
    return axes, mean, np.sqrt(variances[:kept])


def _orthonormalise(block: np.ndarray, basis: np.ndarray) -> np.ndarray:
    for _ in range(2):  # columns almost in the span of the basis need it twice
        block, _ = np.linalg.qr(block - basis @ (basis.T @ block))
    return block


def _multiply_covariance(
    cells: RankedSplit, block: np.ndarray, progress: Progress
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return covariance @ block, (genes, columns), the mean of each gene, (genes,), and the number of cells."""
    product, total, count = np.zeros(block.shape), np.zeros(cells.genes), 0
    for part in cells:
        expression = part.matrix(cells.genes)
        product += expression.T @ (expression @ block)
        total += expression.T @ np.ones(len(part))
        count += len(part)
        progress.advance(len(part))
    mean = total / count
    return (product - np.outer(total, mean @ block)) / max(count - 1, 1), mean, count


def compare_candidates(
    train: RankedSplit,
    validation: RankedSplit,
    axes: np.ndarray,
    mean: np.ndarray,
    deviations: np.ndarray,
    seed: int,
) -> list[dict[str, Any]]:
    """Compare options for the axes by how well a logistic regression on them predicts cell types.

    Parameters
    ----------
    train, validation
        The regression is fitted on training cells and scored on validation cells of the same types; at most
        ``SELECTION_CELLS`` of each.
    axes, mean, deviations
        Output of :func:`find_axes`.
    seed
        Seed of the draw of cells.

    Returns
    -------
    list of dict
        ``dimensions`` and ``whitened`` of each candidate, in order of preference; ``log_likelihood``, the mean over
        validation cells; ``behind``, its difference from the best candidate; and ``standard_error`` of that paired
        difference. Empty if the validation cells have fewer than two of the training cell types.
    """
    train_types = _draw(pd.Series(train.cell_types(), dtype=object), seed)
    validation_types = pd.Series(validation.cell_types(), dtype=object)
    validation_types = _draw(validation_types[validation_types.isin(train_types.unique())], seed)
    if validation_types.nunique() < 2:
        log.info("keeping all dimensions: fewer than two training cell types among the validation cells")
        return []
    splits = [_project(train, train_types, axes, mean), _project(validation, validation_types, axes, mean)]
    candidates, scores = [], []
    dimensions = len(deviations)
    while not candidates or dimensions >= MIN_DIMENSIONS:
        for whitened in (False, True):
            scale = deviations[:dimensions] if whitened else 1
            scores.append(_score([(coordinates[:, :dimensions] / scale, types) for coordinates, types in splits]))
            candidates.append({"dimensions": dimensions, "whitened": whitened})
            log.info(
                "%d dimensions, %s: log likelihood %.4f per validation cell",
                dimensions, _scaling(whitened), scores[-1].mean(),
            )  # fmt: skip
        dimensions //= 2
    best = max(scores, key=np.mean)
    for candidate, score in zip(candidates, scores, strict=True):
        candidate["log_likelihood"] = float(score.mean())
        candidate["behind"] = float((best - score).mean())
        candidate["standard_error"] = float((best - score).std(ddof=1) / np.sqrt(len(score)))
    return candidates


def choose_candidate(candidates: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first candidate within one standard error of the best."""
    return next(candidate for candidate in candidates if candidate["behind"] <= candidate["standard_error"])


def _draw(types: pd.Series, seed: int) -> pd.Series:
    return types.sample(min(len(types), SELECTION_CELLS), random_state=seed)


def _project(split: RankedSplit, types: pd.Series, axes: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return PCA coordinates, float64 (cells, dimensions), and cell types of the cells in ``types``."""
    coordinates, found = [], []
    for part in split:
        row = types.index.get_indexer(part.cell_ids)
        coordinates.append(part.take(np.flatnonzero(row >= 0)).matrix(split.genes) @ axes - mean @ axes)
        found.append(types.to_numpy()[row[row >= 0]])
    return np.concatenate(coordinates), np.concatenate(found)


def _score(splits: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the log likelihood of the cell type of each cell in the second split, with a model fitted on the first."""
    (fitted, fitted_types), (scored, scored_types) = splits
    spread = fitted.std()  # the same for all axes, otherwise every candidate would be whitened
    model = LogisticRegression(max_iter=5000).fit(fitted / spread, fitted_types)
    column = np.searchsorted(model.classes_, scored_types)
    likelihood = model.predict_proba(scored / spread)[np.arange(len(scored)), column]
    return np.log(np.maximum(likelihood, np.finfo(float).eps))


def _scaling(whitened: bool) -> str:
    return "whitened" if whitened else "not whitened"
