"""The probability of every candidate name of a cell, and the most likely names.

Names are chosen step by step, in the order of the text: the most likely name of a slot is the context of the next one.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cell2text.embedding.vectors import Vectors
from cell2text.generation.candidates import Candidates
from cell2text.generation.packed import Packed, mark
from cell2text.model.cell2text import Cell2Text
from cell2text.progress import Progress

log = logging.getLogger("cell2text.generation")

SEQUENCES = 16  # per forward pass
CELLS_TO_CHECK, CANDIDATES_TO_CHECK = 2, 4
TOLERANCE = 1e-3  # of a log-probability in float32, and thus relative in the probability


@dataclass(frozen=True)
class Scores:
    """The scored candidates of a batch of cells.

    Parameters
    ----------
    log_probabilities
        For each step, the natural logarithm of the probability of each candidate, float32 (cells, candidates). The
        probabilities of a step sum to 1; that of a gene programme which an earlier step chose is 0.
    mass
        Probability that the language model gives to the candidates of a step together, float32 (cells, steps).
    chosen
        Index of the most likely candidate, int64 (cells, steps).
    """

    log_probabilities: list[Tensor]
    mass: Tensor
    chosen: Tensor


def score_names(
    model: Cell2Text, vectors: Vectors, candidates: Sequence[Candidates], batch_cells: int
) -> Iterator[Scores]:
    """Yield the scores of all cells, batch by batch and in order.

    Parameters
    ----------
    model
        Model in evaluation mode, see ``Cell2Text.ready_to_write``.
    vectors
        Input of its projector.
    candidates
        The candidates of each step, see ``candidates.find_candidates``.
    batch_cells
        Number of cells per batch.
    """
    progress, method = Progress(len(vectors), "cells"), None
    for start in range(0, len(vectors), batch_cells):
        rows = np.arange(start, min(start + batch_cells, len(vectors)))
        batch = [part.to(model.device) for part in vectors[rows]]
        if method is None:
            method = Packed if can_pack(model, *(part[:CELLS_TO_CHECK] for part in batch), candidates) else Plain
        yield choose_names(method(model, *batch), candidates)
        progress.advance(len(rows))


@torch.no_grad()
def choose_names(method: "Packed | Plain", candidates: Sequence[Candidates]) -> Scores:
    """Return the scores of a batch of cells; the most likely candidate of a step is the context of the next one."""
    log_probabilities, mass, chosen = [], [], []
    for number, step in enumerate(candidates):
        # the candidates of gene programmes are the same in each of their steps
        named = [best for earlier, best in zip(candidates, chosen, strict=False) if earlier.slot == step.slot]
        scores = method.score(step, named)
        total = scores.logsumexp(1)
        log_probabilities.append((scores - total[:, None]).cpu())
        mass.append(total.exp())
        chosen.append(scores.argmax(1))
        if number < len(candidates) - 1:
            method.append(step, chosen[-1])
    return Scores(log_probabilities, torch.stack(mass, 1).cpu(), torch.stack(chosen, 1).cpu())


class Plain:
    """Scores of a batch of cells, with each candidate in a sequence of its own and no cache.

    Slower than :class:`Packed`, but right for every language model.

    Parameters
    ----------
    model, vectors, lengths
        As for :class:`Packed`.
    """

    def __init__(self, model: Cell2Text, vectors: Tensor, lengths: Tensor):
        self.model = model
        self.soft, self.present = model.projector(vectors, lengths)
        self.texts: list[tuple[int, ...]] = [()] * len(vectors)

    def score(self, step: Candidates, excluded: Sequence[Tensor] = ()) -> Tensor:
        """Return what :meth:`Packed.score` returns, exactly."""
        pairs = [(cell, text + tokens) for cell, text in enumerate(self.texts) for tokens in step.tokens]
        sums = []
        for start in range(0, len(pairs), SEQUENCES):
            cells, texts = zip(*pairs[start : start + SEQUENCES], strict=True)
            tokens = [torch.tensor(text, device=self.soft.device) for text in texts]
            padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
            places = torch.arange(padded.shape[1], device=padded.device)
            first, last = (
                torch.tensor(lengths, device=padded.device)[:, None]
                for lengths in ([len(self.texts[cell]) for cell in cells], [len(text) for text in texts])
            )
            rows = torch.tensor(cells, device=padded.device)
            found = self.model.score_text(self.soft[rows], self.present[rows], padded, places < last)
            sums.append(found.masked_fill(places < first, 0).sum(1))
        scores = torch.cat(sums).view(len(self.texts), -1)
        return scores.masked_fill(mark(excluded, scores), -math.inf)

    def append(self, step: Candidates, chosen: Tensor) -> None:
        """Add the chosen candidate of each cell, int64 (cells,), to the context."""
        self.texts = [text + step.tokens[best] for text, best in zip(self.texts, chosen.tolist(), strict=True)]


@torch.no_grad()
def can_pack(model: Cell2Text, vectors: Tensor, lengths: Tensor, candidates: Sequence[Candidates]) -> bool:
    """Return whether :class:`Packed` scores some candidates of some cells as :class:`Plain` does; log why not.

    Not every language model takes an attention mask of its caller's, or positions. The scores are compared in float32.
    """
    reason = ""
    with model.in_float32():
        plain = Plain(model, vectors, lengths)
        try:
            packed = Packed(model, vectors, lengths, negligible=0)
            for step in candidates:
                found = packed.score(step)
                by_length = sorted(range(len(step.tokens)), key=lambda i: len(step.tokens[i]))
                some = sorted(
                    {by_length[i] for i in np.linspace(0, len(by_length) - 1, CANDIDATES_TO_CHECK, dtype=int)}
                )
                difference = float((found[:, some] - plain.score(step.take(some))).abs().max())
                if not difference <= (0.02 if model.is_quantised else TOLERANCE):
                    reason = f"a log-probability of {step.slot} differs by {difference:.2g}"
                    break
                for method in (packed, plain):
                    method.append(step, found.argmax(1))
        except (
            TypeError,
            ValueError,
            AttributeError,
            KeyError,
            IndexError,
            RuntimeError,
            NotImplementedError,
        ) as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if reason:
        log.info(
            "the names' probabilities under %s cannot be computed in one pass (%s): one sequence per name, slower",
            type(model.base_model).__name__, reason,
        )  # fmt: skip
    return not reason
