"""Gene vectors from coexpression: the principal axes of the training cells, with no download and no GPU.

A gene's vector is its row of the right singular vectors of the centred log-normalised counts; in a cell it
is scaled by the gene's expression. The sum over the cell's genes, less a constant, is then the cell's PCA
coordinates, so nothing that a linear model on principal components sees is lost. How many axes are kept, and
whether they are whitened, is what best tells the cell types of validation cells.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import LogisticRegression

from cell2text.embedding.ranked_cells import RankedCells, RankedSplit, pad
from cell2text.errors import InputError
from cell2text.files import read_json, write_json
from cell2text.progress import Progress

log = logging.getLogger("cell2text.encoders")

PASSES = 6  # over the training cells: with five, the last axes of real cells are still a few degrees off
FURTHER_COLUMNS = 10  # of the start block, beyond the axes asked for
NEGLIGIBLE = 1e-8  # share of the first axis' variance; to whiten an axis below it would multiply rounding errors
FEWEST_DIMENSIONS = 8  # that a truncation leaves
CELLS_TO_CHOOSE_BY = 10_000  # of a split at most


class Coexpression:
    """Principal axes of training cells.

    Parameters
    ----------
    axes
        One row a gene, float32 (genes, dimensions).
    centre
        PCA coordinates of a cell without any counts, negated, float32 (dimensions,).
    whitened
        Whether each axis is divided by its standard deviation over the training cells.
    candidates
        What was chosen among; see :func:`compare_candidates`.
    """

    def __init__(
        self, axes: np.ndarray, centre: np.ndarray, whitened: bool = False, candidates: Sequence[dict[str, Any]] = ()
    ):
        self.axes, self.centre, self.whitened, self.candidates = axes, centre, whitened, list(candidates)
        self.dimensions = axes.shape[1]

    @classmethod
    def fit(
        cls, train: RankedSplit, validation: RankedSplit, settings: dict[str, Any], seed: int, checkpoints: Path
    ) -> "Coexpression":
        """Find the principal axes of training cells and choose on validation cells how to keep them.

        Parameters
        ----------
        train, validation
            Cells to learn from, and to choose by.
        settings
            ``dimensions``: how many axes at most; fewer are there with few cells or genes.
        seed
            Of the start block, and of the cells drawn to choose by.
        checkpoints
            Not needed.

        Raises
        ------
        InputError
            If the training cells do not differ in any gene.
        """
        axes, mean, deviations = find_axes(train, settings["dimensions"], seed)
        if not len(deviations):
            raise InputError(train.corpus, "the training cells do not differ in any gene", "Give more cells")
        candidates = compare_candidates(train, validation, axes, mean, deviations, seed)
        chosen = choose_candidate(candidates) if candidates else {"dimensions": len(deviations), "whitened": False}
        dimensions, whitened = chosen["dimensions"], chosen["whitened"]
        log.info("kept %d of %d dimensions, %s", dimensions, len(deviations), _told(whitened))
        axes = axes[:, :dimensions] / (deviations[:dimensions] if whitened else 1)
        centre = (mean @ axes).astype(np.float32)
        return cls(np.ascontiguousarray(axes, dtype=np.float32), centre, whitened, candidates)

    def save(self, directory: Path) -> None:
        """Write the axes, the centre and what was chosen among."""
        save_file({"axes": self.axes, "centre": self.centre}, directory / "coexpression.safetensors")
        about = {"kind": "coexpression", "dimensions": self.dimensions, "whitened": self.whitened}
        write_json(about | {"candidates": self.candidates}, directory / "encoder.json")

    @classmethod
    def load(cls, directory: Path) -> "Coexpression":
        """Read what :meth:`save` wrote."""
        tensors, about = load_file(directory / "coexpression.safetensors"), read_json(directory / "encoder.json")
        return cls(tensors["axes"], tensors["centre"], about.get("whitened", False), about.get("candidates", ()))

    def embed(self, cells: RankedCells, top_k: int, progress: Progress | None = None) -> dict[str, np.ndarray]:
        """Return gene vectors of the ``top_k`` highest ranked genes and each cell's PCA coordinates.

        Parameters
        ----------
        cells
            Their ranked genes.
        top_k
            Gene vectors to keep of a cell; shorter lists are padded with zeros behind.
        progress
            Told when all is done.

        Returns
        -------
        dict
            ``gene_vectors`` float16 (cells, top_k, dimensions), ``lengths`` int32 (cells,),
            ``pooled`` float32 (cells, dimensions), which counts every expressed gene.
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
    """Return the principal axes of cells that are read a part at a time, by randomised block Krylov iteration.

    Only matrices with one row a gene are held. After Musco & Musco, NeurIPS 2015, and Halko et al., SIAM Review
    2011; the covariance times each block is kept, so the final Rayleigh-Ritz step reads no cell again.

    Parameters
    ----------
    cells
        Read ``PASSES`` times; less often where there are so few genes that the blocks span them sooner.
    dimensions
        Axes to find; there are fewer where fewer vary, and always fewer than cells and than genes.
    seed
        Of the start block, which is random normal.

    Returns
    -------
    axes
        Unit columns by falling variance, the largest absolute entry of each positive; float64 (genes, dimensions).
    mean
        Of each gene, float64 (genes,).
    deviations
        Standard deviation of the cells along each axis, float64 (dimensions,).
    """
    width = min(dimensions + FURTHER_COLUMNS, cells.genes)
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
    # beside the first variance the mean, of which rounding errors are left where cells do not vary at all
    vary = np.count_nonzero(variances > NEGLIGIBLE * max(variances[0], mean @ mean))
    kept = min(dimensions, count - 1, cells.genes - 1, vary)
    axes = basis @ vectors[:, :kept]
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(kept)])
    return axes, mean, np.sqrt(variances[:kept])


def _orthonormalise(block: np.ndarray, basis: np.ndarray) -> np.ndarray:
    for _ in range(2):  # columns that all but lie in the basis need it twice
        block, _ = np.linalg.qr(block - basis @ (basis.T @ block))
    return block


def _multiply_covariance(
    cells: RankedSplit, block: np.ndarray, progress: Progress
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the covariance of genes times a block, (genes, columns), the mean of each gene and the number of cells."""
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
    """Score each way to keep the axes by how well a logistic regression on them tells cell types.

    Parameters
    ----------
    train, validation
        The regression is fitted on some of the first and scored on some of the second, of types that it knows;
        at most ``CELLS_TO_CHOOSE_BY`` of each.
    axes, mean, deviations
        What :func:`find_axes` returned.
    seed
        Of the drawing of cells.

    Returns
    -------
    list of dict
        ``dimensions`` and ``whitened`` of each candidate, preferred ones first; ``log_likelihood``, the mean over
        validation cells; ``behind``, how far it is below the best one's; ``standard_error`` of that paired
        difference. Nothing where validation cells are not known to be of two types.
    """
    known = _draw(pd.Series(train.cell_types(), dtype=object), seed)
    asked = pd.Series(validation.cell_types(), dtype=object)
    asked = _draw(asked[asked.isin(known.unique())], seed)
    if asked.nunique() < 2:
        log.info("no choice of dimensions: validation cells are not known to be of two types seen in training")
        return []
    known, asked = (_place(split, of, axes, mean) for split, of in ((train, known), (validation, asked)))
    candidates, scores = [], []
    dimensions = len(deviations)
    while not candidates or dimensions >= FEWEST_DIMENSIONS:
        for whitened in (False, True):
            scale = deviations[:dimensions] if whitened else 1
            scores.append(_score([(places[:, :dimensions] / scale, types) for places, types in (known, asked)]))
            candidates.append({"dimensions": dimensions, "whitened": whitened})
            log.info(
                "%d dimensions, %s: log likelihood %.4f a validation cell",
                dimensions, _told(whitened), scores[-1].mean(),
            )  # fmt: skip
        dimensions //= 2
    best = max(scores, key=np.mean)
    for candidate, score in zip(candidates, scores, strict=True):
        candidate["log_likelihood"] = float(score.mean())
        candidate["behind"] = float((best - score).mean())
        candidate["standard_error"] = float((best - score).std(ddof=1) / np.sqrt(len(score)))
    return candidates


def choose_candidate(candidates: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first candidate that is behind the best by no more than one standard error."""
    return next(candidate for candidate in candidates if candidate["behind"] <= candidate["standard_error"])


def _draw(types: pd.Series, seed: int) -> pd.Series:
    return types.sample(min(len(types), CELLS_TO_CHOOSE_BY), random_state=seed)


def _place(split: RankedSplit, types: pd.Series, axes: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return PCA coordinates, float64 (cells, dimensions), and type of the cells that ``types`` names."""
    places, found = [], []
    for part in split:
        row = types.index.get_indexer(part.cell_ids)
        places.append(part.take(np.flatnonzero(row >= 0)).matrix(split.genes) @ axes - mean @ axes)
        found.append(types.to_numpy()[row[row >= 0]])
    return np.concatenate(places), np.concatenate(found)


def _score(splits: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the log likelihood of the type of each cell of the second split, fitted on the first."""
    (known, known_types), (asked, asked_types) = splits
    spread = known.std()  # one for all axes, or every candidate would be whitened
    model = LogisticRegression(max_iter=5000).fit(known / spread, known_types)
    of_type = np.searchsorted(model.classes_, asked_types)
    likelihood = model.predict_proba(asked / spread)[np.arange(len(asked)), of_type]
    return np.log(np.maximum(likelihood, np.finfo(float).eps))


def _told(whitened: bool) -> str:
    return "whitened" if whitened else "not whitened"
