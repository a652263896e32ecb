"""The probability of every candidate name of a cell, by the language model."""

import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cell2text.embedding.vectors import Vectors
from cell2text.generation.candidates import Candidates
from cell2text.generation.packed import Packed
from cell2text.model.cell2text import Cell2Text
from cell2text.progress import Progress

log = logging.getLogger("cell2text.generation")

SEQUENCES = 16  # per forward pass
CELLS_TO_CHECK = 2
TOLERANCE = 1e-3  # of a log-probability in float32, and thus relative in the probability


def score_names(
    model: Cell2Text,
    vectors: Vectors,
    cells: np.ndarray,
    steps: Sequence[Candidates],
    drafts: np.ndarray,
    batch_cells: int,
) -> Iterator[list[Tensor]]:
    """Yield the log-probabilities of the names of each step, batch by batch and in the order of the cells.

    The probability of a name is the product of its shares wherever the names of its step part, each in the context of
    the draft's names of the steps before. So they sum to 1, without the words that no name has. A programme that the
    draft named before has probability 0.

    Parameters
    ----------
    model
        Model in evaluation mode, see ``Cell2Text.ready_to_write``.
    vectors, cells
        Input of its projector, and the rows of the cells to score, int64 (cells,).
    steps
        The candidates of each step, see ``candidates.find_candidates``.
    drafts
        Index of a candidate of each step, int64 (cells, steps).
    batch_cells
        Number of cells per batch.

    Yields
    ------
    list of Tensor
        For each step float32 (cells, candidates), on the CPU.
    """
    progress, method = Progress(len(cells), "cells"), None
    for start in range(0, len(cells), batch_cells):
        rows = slice(start, start + batch_cells)
        batch = [part.to(model.device) for part in (*vectors[cells[rows]], torch.from_numpy(drafts[rows]))]
        if method is None:
            some = _pick_cells(model, *batch[:2])
            packs = can_pack(model, *(part[some] for part in batch), steps)
            method = (Packed if packs else Plain)(model, steps)
        yield leave_out_named(method.score(*batch), steps, batch[-1])
        progress.advance(len(batch[-1]))


def leave_out_named(scores: Tensor, steps: Sequence[Candidates], drafts: Tensor) -> list[Tensor]:
    """Return the scores of each step, in which no programme that the draft named before has a share.

    Parameters
    ----------
    scores
        Log-probabilities of the names of all steps, (cells, names).
    steps, drafts
        As for :func:`score_names`.
    """
    parts = []
    for number, part in enumerate(scores.split([len(step.ids) for step in steps], dim=1)):
        # the candidates of gene programmes are the same in each of their steps
        named = [drafts[:, one] for one in range(number) if steps[one].slot == steps[number].slot]
        out = part.scatter(1, torch.stack(named, 1), -torch.inf) if named else part
        parts.append(out.log_softmax(1).cpu())
    return parts


class Plain:
    """Scores of names, with each in a sequence of its own and no cache.

    Slower than :class:`Packed`, but right for every language model.

    Parameters
    ----------
    model, steps
        As for :class:`Packed`.
    """

    def __init__(self, model: Cell2Text, steps: Sequence[Candidates]):
        self.model, self.steps = model, steps
        self.follows: list[dict[tuple[int, ...], list[int]]] = []  # for each step, the tokens that can follow a prefix
        for step in steps:
            prefixes = dict.fromkeys(tokens[:end] for tokens in step.tokens for end in range(1, len(tokens) + 1))
            follows: dict[tuple[int, ...], list[int]] = {}
            for prefix in prefixes:
                follows.setdefault(prefix[:-1], []).append(prefix[-1])
            self.follows.append(follows)

    @torch.no_grad()
    def score(self, vectors: Tensor, lengths: Tensor, draft: Tensor) -> Tensor:
        """Return what :meth:`Packed.score` returns, exactly."""
        soft, present = self.model.projector(vectors, lengths)
        sequences = []
        for cell, names in enumerate(draft.tolist()):
            text: tuple[int, ...] = ()
            for number, step in enumerate(self.steps):
                sequences += [(cell, number, len(text), text + tokens) for tokens in step.tokens]
                text += step.tokens[names[number]]
        scores = torch.zeros(len(sequences), device=soft.device)  # a name without others has probability 1
        read = [row for row, (_, number, *_) in enumerate(sequences) if len(self.steps[number].ids) > 1]
        for start in range(0, len(read), SEQUENCES):
            rows = read[start : start + SEQUENCES]
            found = self._score(soft, present, [sequences[row] for row in rows])
            scores[rows] = torch.tensor(list(found), device=soft.device)
        return scores.view(len(draft), -1)

    def _score(
        self, soft: Tensor, present: Tensor, sequences: Sequence[tuple[int, int, int, tuple[int, ...]]]
    ) -> Iterator[float]:
        """Yield the log-probability of names, each given as cell, step, where it begins in its text, and the text."""
        tokens = [torch.tensor(text, device=soft.device) for *_, text in sequences]
        padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one, dtype=torch.bool) for one in tokens], True)
        rows = torch.tensor([cell for cell, *_ in sequences], device=soft.device)
        logits = self.model.text_logits(soft[rows], present[rows], padded, mask).split([len(one) for one in tokens])
        for (_, step, first, text), found in zip(sequences, logits, strict=True):
            total = 0.0
            for place in range(first, len(text)):
                options = self.follows[step][text[first:place]]
                total += float(found[place, options].log_softmax(0)[options.index(text[place])])
            yield total


@torch.no_grad()
def can_pack(
    model: Cell2Text, vectors: Tensor, lengths: Tensor, draft: Tensor, candidates: Sequence[Candidates]
) -> bool:
    """Return whether :class:`Packed` scores some names of some cells as :class:`Plain` does; log why not.

    Not every language model takes an attention mask of its caller's, or positions. The scores are compared in float32,
    those of some names of the first and of the last step that has several.
    """
    several = [number for number, step in enumerate(candidates) if len(step.ids) > 1]
    some = []
    for number, step in enumerate(candidates):
        drafts = set(draft[:, number].tolist())
        some.append(step.take(_pick(step, drafts) if number in (*several[:1], *several[-1:]) else sorted(drafts)))
    names = [[candidates[number].ids[i] for i in row] for number, row in enumerate(draft.T.tolist())]
    draft = torch.tensor([[step.ids.index(one) for one in row] for step, row in zip(some, names, strict=True)]).T
    inputs, reason = (vectors, lengths, draft.to(vectors.device)), ""
    with model.in_float32():
        plain = Plain(model, some).score(*inputs)
        try:
            difference = float((Packed(model, some, negligible=0).score(*inputs) - plain).abs().max())
            if not difference <= (0.02 if model.is_quantised else TOLERANCE):
                reason = f"a log-probability differs by {difference:.2g}"
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


@torch.no_grad()
def _pick_cells(model: Cell2Text, vectors: Tensor, lengths: Tensor) -> np.ndarray:
    """Return a cell, and if there are any another one with another number of soft tokens, and so with padding."""
    numbers = model.projector(vectors, lengths)[1].sum(1).cpu().numpy()
    return np.unique(numbers, return_index=True)[1][-CELLS_TO_CHECK:]


def _pick(step: Candidates, drafts: set[int]) -> list[int]:
    """Return candidates of a step: those of the drafts, and two others that part as late as any, so off the draft."""
    others = sorted(set(range(len(step.ids))) - drafts, key=lambda i: step.tokens[i])
    late = max(pairwise(others), key=lambda pair: _count_shared(*(step.tokens[i] for i in pair)), default=others)
    return sorted({*drafts, *late})


def _count_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two names begin with that are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
