"""Gene vectors from coexpression: the principal axes of the training cells, without a download or a GPU.

A gene's vector is its row of the right singular vectors of the centred log-normalised counts, scaled in each cell by
the gene's expression. If all genes are measured, the sum over the cell's genes minus a constant gives the cell's PCA
coordinates, so a linear model on these vectors has all the information in the principal components. The number of axes
and whether to whiten them are chosen by how well they predict the cell types of validation cells.

The pooled vector has these coordinates, and after them the ones that factor analysis expects (see ``Axes``). With both,
a projector names more cells of held-out studies rightly, above all where few genes are measured. On cells of the
training studies it loses nothing; with the expected coordinates alone, gene programmes are named worse.

Last come the mean expressions of the gene programmes that descriptions name. The axes keep what differs most between
cells, which is little of a programme with few genes.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression

from cell2text.embedding.axes import NEGLIGIBLE, Axes, find_axes
from cell2text.embedding.ranked_cells import RankedCells, RankedSplit, scale_vectors
from cell2text.errors import InputError
from cell2text.files import read_json, write_json
from cell2text.progress import Progress
from cell2text.settings import EncoderSettings
from cell2text.weights import read_weights

log = logging.getLogger("cell2text.encoders")

MIN_DIMENSIONS = 8  # after truncation
SELECTION_CELLS = 10_000  # maximum per split for choosing the number of axes


@dataclass(frozen=True)
class ProgrammeMeans:
    """The mean expression of gene programmes over their measured genes, relative to that of the training cells.

    Parameters
    ----------
    members
        1 for the genes of each programme, else 0; uint8 (genes, programmes).
    scale
        What each mean is multiplied by, float32 (programmes,).
    """

    members: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, members: np.ndarray, train: RankedSplit, axes: Axes, spread: float) -> "ProgrammeMeans":
        """Scale the means so that each has this standard deviation over the training cells, or 0 if it is constant."""
        # safetensors writes arrays as they lie in memory
        members = np.ascontiguousarray(members, dtype=np.uint8)
        means = cls(members, np.ones(members.shape[1], dtype=np.float32))
        sums = np.zeros((2, members.shape[1]))
        cells = 0
        for part in train:
            values = means.place(part, axes.expression(part), axes.mean)
            sums += values.sum(axis=0), (values**2).sum(axis=0)
            cells += len(part)
        mean, square = sums / cells
        deviation = np.sqrt(np.maximum(square - mean**2, 0))
        scale = np.divide(spread, deviation, out=np.zeros_like(deviation), where=deviation > NEGLIGIBLE)
        return cls(members, scale.astype(np.float32))

    def by_gene(self, panel: np.ndarray) -> np.ndarray:
        """Return what each gene of a panel, bool (genes,), adds per unit of expression, float32 (genes, programmes)."""
        measured = self.members * panel[:, None]
        return measured * (self.scale / np.maximum(measured.sum(axis=0), 1)).astype(np.float32)

    def place(self, cells: RankedCells, expression: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Return the means of cells, float64 (cells, programmes); 0 for a programme without a measured gene.

        Parameters
        ----------
        cells, expression
            Ranked genes of the cells and what ``Axes.expression`` returns for them.
        mean
            Mean expression of each gene over the training cells.
        """
        matrix, means = cells.matrix(expression), np.empty((len(cells), self.members.shape[1]))
        for number in np.unique(cells.panel):
            own, weights = cells.panel == number, self.by_gene(cells.panels[number])
            means[own] = matrix[np.flatnonzero(own)] @ weights - mean @ weights
        return means


class Coexpression:
    """Principal axes of the training cells.

    Parameters
    ----------
    axes
        The axes, in float32.
    scale
        What each axis is divided by: its standard deviation over the training cells, or 1; float32 (dimensions,).
    candidates
        The options that were compared; see :func:`compare_candidates`.
    programmes
        The mean expressions of gene programmes; None for no programmes.
    """

    def __init__(
        self,
        axes: Axes,
        scale: np.ndarray,
        candidates: Sequence[dict[str, Any]] = (),
        programmes: ProgrammeMeans | None = None,
    ):
        self.axes, self.scale, self.candidates = axes, scale, list(candidates)
        none = ProgrammeMeans(np.zeros((len(axes.mean), 0), np.uint8), np.zeros(0, np.float32))
        self.programmes = none if programmes is None else programmes
        self.dimensions, self.pooled_dimensions = len(scale), 2 * len(scale) + len(self.programmes.scale)

    @classmethod
    def fit(
        cls,
        train: RankedSplit,
        validation: RankedSplit,
        settings: EncoderSettings,
        seed: int,
        checkpoints: Path,
        fetched: Path | None = None,
        programmes: np.ndarray | None = None,
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
        programmes
            The genes of each gene programme, bool (genes, programmes); None for no programmes.

        Raises
        ------
        InputError
            If all training cells have the same expression.
        """
        axes = find_axes(train, settings.dimensions, seed)
        candidates = compare_candidates(train, validation, axes, seed)
        chosen = choose_candidate(candidates) if candidates else {"dimensions": len(axes.variance), "whitened": False}
        dimensions, whitened = chosen["dimensions"], chosen["whitened"]
        log.info("kept %d of %d dimensions, %s", dimensions, len(axes.variance), _scaling(whitened))
        scale = np.sqrt(axes.variance[:dimensions]) if whitened else np.ones(dimensions)
        parts = asdict(axes.first(dimensions))
        kept = Axes(**{name: np.ascontiguousarray(values, dtype=np.float32) for name, values in parts.items()})
        # as far apart as the axes are on average: a projector divides all by one spread (docs/finetuning.md)
        spread = float(np.sqrt(np.mean(kept.variance / scale**2)))
        means = None if programmes is None else ProgrammeMeans.fit(programmes, train, kept, spread)
        return cls(kept, scale.astype(np.float32), candidates, means)

    def save(self, directory: Path) -> None:
        """Write the axes, their scale and the candidates."""
        tensors = asdict(self.axes) | {"scale": self.scale}
        if len(self.programmes.scale):
            tensors |= {"members": self.programmes.members, "programme_scale": self.programmes.scale}
        save_file(tensors, directory / "coexpression.safetensors")
        metadata = {"kind": "coexpression", "dimensions": self.dimensions, "candidates": self.candidates}
        write_json(metadata, directory / "encoder.json")

    @classmethod
    def load(cls, directory: Path) -> "Coexpression":
        """Load an encoder written by :meth:`save`.

        Raises
        ------
        InputError
            If a file is damaged, or its tensors do not fit together.
        """
        file, fix = directory / "coexpression.safetensors", f"Delete {directory} and run the workflow again"
        tensors, metadata = read_weights(file, fix, "numpy"), read_json(directory / "encoder.json", fix)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        genes, dimensions = (*shapes.get("vectors", ()), None, None)[:2]
        shapes = {"members": (genes, 0), "programme_scale": (0,)} | shapes  # of a model without programmes
        programmes = (*shapes["members"], None)[1]
        of_genes = dict.fromkeys(("mean", "profile", "noise"), (genes,))
        of_axes = dict.fromkeys(("variance", "scale"), (dimensions,))
        of_programmes = {"members": (genes, programmes), "programme_scale": (programmes,)}
        if shapes != {"vectors": (genes, dimensions)} | of_genes | of_axes | of_programmes:
            raise InputError(file, f"not axes with mean, profile, noise, variance and scale: found {shapes}", fix)
        scale = tensors.pop("scale")
        parts = [tensors.pop(name) for name in ("members", "programme_scale") if name in tensors]
        means = ProgrammeMeans(*parts) if parts else None
        return cls(Axes(**tensors), scale, metadata.get("candidates", ()), means)

    def embed(self, cells: RankedCells, top_k: int, progress: Progress | None = None) -> dict[str, np.ndarray]:
        """Return gene vectors of the ``top_k`` highest ranked genes and each cell's coordinates.

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
            ``pooled`` float32 (cells, 2 * dimensions + programmes), over all expressed genes.
        """
        expression = self.axes.expression(cells)
        both = self.axes.place(cells, expression), self.axes.expect(cells, expression)
        means = self.programmes.place(cells, expression, self.axes.mean)
        if progress:
            progress.advance(len(cells))
        pooled = np.hstack([*(places / self.scale for places in both), means]).astype(np.float32)
        return scale_vectors(cells, expression, self.axes.vectors / self.scale, top_k) | {"pooled": pooled}

    def share_out(self, cells: RankedCells, gradients: np.ndarray) -> np.ndarray:
        """Return what each ranked gene adds to the pooled vector, multiplied by a gradient with respect to that vector.

        The pooled vector is linear in expression. The values of a cell sum to the product of the gradient with the
        difference between the pooled vectors of this cell and of one without any counts in the same panel.

        Parameters
        ----------
        cells
            Ranked genes of the cells.
        gradients
            One gradient per cell, float (cells, 2 * dimensions + programmes).

        Returns
        -------
        numpy.ndarray
            float64 (total genes,), in the order of ``cells.tokens``. All genes of the vocabulary are in memory for each
            cell meanwhile.
        """
        gradients, of_programmes = np.hsplit(gradients, [2 * self.dimensions])
        by_gene = self.axes.by_gene(cells, *np.hsplit(gradients / np.tile(self.scale.astype(float), 2), 2))
        for number in np.unique(cells.panel):
            own = cells.panel == number
            by_gene[own] += of_programmes[own] @ self.programmes.by_gene(cells.panels[number]).T
        return self.axes.expression(cells) * by_gene[cells.cell, cells.tokens]


def compare_candidates(
    train: RankedSplit,
    validation: RankedSplit,
    axes: Axes,
    seed: int,
) -> list[dict[str, Any]]:
    """Compare options for the axes by how well a logistic regression on them predicts cell types.

    Parameters
    ----------
    train, validation
        The regression is fitted on training cells and scored on validation cells of the same types; at most
        ``SELECTION_CELLS`` of each.
    axes
        Output of :func:`~cell2text.embedding.axes.find_axes`.
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
    splits = [_project(train, train_types, axes), _project(validation, validation_types, axes)]
    candidates, scores = [], []
    dimensions = len(axes.variance)
    while not candidates or dimensions >= MIN_DIMENSIONS:
        for whitened in (False, True):
            scale = np.sqrt(axes.variance[:dimensions]) if whitened else 1
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


def _project(split: RankedSplit, types: pd.Series, axes: Axes) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates, float64 (cells, dimensions), and cell types of the cells in ``types``."""
    coordinates, found = [], []
    for part in split:
        row = types.index.get_indexer(part.cell_ids)
        coordinates.append(axes.place(part.take(np.flatnonzero(row >= 0))))
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
