"""Evidence: the genes of a cell that argue most for and against the cell type it is named.

Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) of the projector's log-probability of the cell type.
The language model names the type from the same soft tokens.

Pooled vectors: the path starts at the cell with all its genes at half their expression, what is left of it on average
if each of its genes is removed with a probability of one half. Genes are removed, not set to their mean, so a gene that
the cell lacks is no evidence. A path from a cell without any counts leads through places where no cells are, and its
sum is mostly what tells any cell from none: in one in eight cells of a study, removing the ten genes listed from there
hurts the call no more than removing ten others does. From half the expression it hurt more in every cell tried
(``tests/benchmarks/deletion.py``). The gradient at the cell itself does as well, but its products with the genes sum to
no difference of log-probabilities.

Gene vectors: the path starts at zero vectors. Soft tokens of single genes have equal norms, so half of a gene's vector
still gives almost all of its token.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cell2text.embedding.encoders import Encoder
from cell2text.embedding.ranked_cells import RankedCells
from cell2text.errors import InputError
from cell2text.model.alignment import LabelTargets
from cell2text.model.cell2text import Cell2Text

KEPT = 0.5  # share of its expression that each gene has where the path of a pooled vector starts
STEPS = 32  # of the midpoint rule
POINTS = 2048  # vectors that the projector reads at a time; more do not fit in the caches


@dataclass(frozen=True)
class Evidence:
    """Genes that argue for and against the cell type of one cell, the weightiest first.

    The weights are nats of log-probability; those of all genes of the cell sum to :func:`attribute`'s difference.

    Parameters
    ----------
    for_genes, for_weights
        Tokens, int32 (genes,), and their weights, float64 (genes,), all positive.
    against_genes, against_weights
        The same of genes whose weights are negative.
    """

    for_genes: np.ndarray
    for_weights: np.ndarray
    against_genes: np.ndarray
    against_weights: np.ndarray


def explain_cells(
    model: Cell2Text,
    targets: LabelTargets,
    encoder: Encoder,
    cells: RankedCells,
    named: np.ndarray,
    most: int = 10,
    top_k: int = 64,
) -> list[Evidence]:
    """Return the genes that argue most for and against the cell type that each cell is named.

    Parameters
    ----------
    model, targets, encoder, cells, named, top_k
        See :func:`attribute`.
    most
        Maximum number of genes on each side. Only genes that the cell expresses are listed.

    Raises
    ------
    InputError
        As :func:`attribute`.
    """
    weights = attribute(model, targets, encoder, cells, named, top_k)
    sides = zip(_choose(cells, weights, most), _choose(cells, -weights, most), strict=True)
    return [Evidence(cells.tokens[pro], weights[pro], cells.tokens[con], weights[con]) for pro, con in sides]


def attribute(
    model: Cell2Text,
    targets: LabelTargets,
    encoder: Encoder,
    cells: RankedCells,
    named: np.ndarray,
    top_k: int = 64,
) -> np.ndarray:
    """Return the weight of each gene of each cell for the cell type that the cell is named.

    The weights of a cell sum to the difference of the projector's log-probability between the cell and the same cell
    with ``KEPT`` of the expression of its genes, or with zero gene vectors if the projector reads these.

    Parameters
    ----------
    model
        Only its projector is run.
    targets
        The labels of each slot; the first slot is the cell type.
    encoder
        The encoder that the projector was trained with.
    cells
        Ranked genes of the cells.
    named
        Index of the cell type of each cell among the labels, int64 (cells,).
    top_k
        Gene vectors per cell, as in training, if the projector reads gene vectors. Genes beyond it have no weight.

    Returns
    -------
    numpy.ndarray
        float64 (total genes,), in the order of ``cells.tokens``.

    Raises
    ------
    InputError
        If the projector reads a pooled vector that is not linear in the expression of the genes.
    """
    pooled = model.projector.reads == "pooled"
    if pooled and not hasattr(encoder, "share_out"):
        raise InputError(
            "config: encoder.kind",
            f"no gene can be made out in the pooled vectors of {type(encoder).__name__}",
            "Use coexpression, or a projector that reads gene vectors, such as perceiver",
        )
    at_once = max(1, POINTS // (STEPS * (1 if pooled else top_k)))
    weights = [np.empty(0)]
    for start in range(0, len(cells), at_once):
        rows = np.arange(start, min(start + at_once, len(cells)))
        part, score = cells.take(rows), _Score(model, targets, torch.from_numpy(named[rows]))
        weights.append(_by_expression(score, encoder, part) if pooled else _by_vectors(score, encoder, part, top_k))
    return np.concatenate(weights)


@dataclass(frozen=True)
class _Score:
    """The projector's log-probability of the cell type that each cell is named.

    Parameters
    ----------
    model, targets
        See :func:`attribute`.
    named
        Index of the cell type of each cell, int64 (cells,).
    """

    model: Cell2Text
    targets: LabelTargets
    named: Tensor

    def __call__(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """Return log-probabilities, float64 (steps, cells), of the projector's input, (steps, cells, ...)."""
        steps, device = len(vectors), self.model.device
        soft, present = self.model.projector(vectors.flatten(0, 1).to(device), lengths.repeat(steps).to(device))
        # in float64, so that 1 - p has a gradient where the probability p is almost 1
        scores = self.targets.scores(soft, present)[0].double().log_softmax(-1)
        return scores.gather(1, self.named.repeat(steps)[:, None].to(device)).view(steps, -1)


def _by_expression(score: _Score, encoder: Encoder, cells: RankedCells) -> np.ndarray:
    """Return the weight of each gene by its part in the pooled vector, float64 (total genes,)."""
    none = np.zeros_like(cells.offsets)
    without = replace(cells, tokens=cells.tokens[:0], expression=cells.expression[:0], offsets=none)
    empty, pooled = (torch.from_numpy(encoder.embed(part, 0)["pooled"]) for part in (without, cells))
    lengths = torch.from_numpy(cells.lengths)
    gradients = integrate(lambda points: score(points, lengths), torch.lerp(empty, pooled, KEPT), pooled)
    return (1 - KEPT) * encoder.share_out(cells, gradients.numpy())


def _by_vectors(score: _Score, encoder: Encoder, cells: RankedCells, top_k: int) -> np.ndarray:
    """Return the weight of each gene by its vector, float64 (total genes,); 0 for genes after the first ``top_k``."""
    tensors = encoder.embed(cells, top_k)
    vectors, lengths = torch.from_numpy(tensors["gene_vectors"]).float(), torch.from_numpy(tensors["lengths"]).long()
    gradients = integrate(lambda points: score(points, lengths), torch.zeros_like(vectors), vectors)
    rank = torch.arange(top_k)
    place, read = torch.from_numpy(cells.offsets[:-1, None]) + rank, rank < lengths[:, None]
    weights = torch.zeros(len(cells.tokens), dtype=torch.float64)
    weights[place[read]] = (gradients * vectors).sum(-1)[read]
    return weights.numpy()


def integrate(function: Callable[[Tensor], Tensor], start: Tensor, end: Tensor) -> Tensor:
    """Return the mean gradient on the straight path between two points, by the midpoint rule.

    Parameters
    ----------
    function
        Takes points (steps, cells, ...) to values (steps, cells); the value of a cell depends on its own point alone.
    start, end
        Ends of the path of each cell, float (cells, ...).

    Returns
    -------
    Tensor
        float64 (cells, ...), on the CPU. Its product with ``end - start`` sums to the difference of the values at the
        two ends, but for the error of the midpoint rule.
    """
    share = (torch.arange(STEPS) + 0.5) / STEPS
    with torch.enable_grad():
        points = torch.lerp(start, end, share.view(-1, *[1] * start.ndim)).requires_grad_()
        (gradients,) = torch.autograd.grad(function(points).sum(), points)
    return gradients.double().mean(0).cpu()


def _choose(cells: RankedCells, weights: np.ndarray, most: int) -> list[np.ndarray]:
    """Return where the genes of each cell with the greatest positive weights are, the greatest first."""
    cell = cells.cell
    order = np.lexsort((-weights, cell))  # stable: of equal weights, the gene of higher rank comes first
    place = np.arange(len(order)) - cells.offsets[cell]
    order = order[(place < most) & (weights[order] > 0)]
    ends = np.concatenate([[0], np.cumsum(np.bincount(cell[order], minlength=len(cells)))])
    return [order[first:last] for first, last in zip(ends[:-1], ends[1:], strict=True)]
