"""The probability of every candidate name of a cell, and the most likely names.

Names are chosen step by step, in the order of the text. A step reads the name chosen in the last step and the prefix
tree of its own candidates in one forward pass. Keys and values of the tree are then dropped from the cache.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from cell2text.embedding.vectors import Vectors
from cell2text.generation.candidates import Candidates
from cell2text.generation.tree import Tree
from cell2text.grammar import PATHWAY
from cell2text.model.cell2text import Cell2Text
from cell2text.progress import Progress

log = logging.getLogger("cell2text.generation")

LOGITS = 1 << 27  # logits in memory at once, 256 MB in bfloat16
LOGITS_IN_FLOAT32 = 1 << 24
SEQUENCES = 16  # per forward pass of the plain method
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
        Maximum number of cells per batch; there are fewer if their logits would take too much memory.
    """
    vocabulary = model.base_model.config.get_text_config().vocab_size
    per_cell = vocabulary * (1 + max((len(step.tree.tokens) for step in candidates), default=0))
    size = max(1, min(batch_cells, LOGITS // per_cell))
    progress, method = Progress(len(vectors), "cells"), None
    for start in range(0, len(vectors), size):
        rows = np.arange(start, min(start + size, len(vectors)))
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
        scores = method.score(step)
        if step.slot == PATHWAY:  # all programmes are candidates of each of these steps, in the same order
            for earlier in (best for before, best in zip(candidates, chosen, strict=False) if before.slot == PATHWAY):
                scores = scores.scatter(1, earlier[:, None], -math.inf)
        total = scores.logsumexp(1)
        log_probabilities.append((scores - total[:, None]).cpu())
        mass.append(total.exp())
        chosen.append(scores.argmax(1))
        if number < len(candidates) - 1:
            method.append(step, chosen[-1])
    return Scores(log_probabilities, torch.stack(mass, 1).cpu(), torch.stack(chosen, 1).cpu())


class Packed:
    """Scores of a batch of cells, with one forward pass per step.

    Parameters
    ----------
    model, vectors, lengths
        The model, and the input of its projector for the cells.
    """

    def __init__(self, model: Cell2Text, vectors: Tensor, lengths: Tensor):
        self.model, self.cache = model, DynamicCache()  # without the model's config: sliding windows could not be cut
        self.unread, self.mask = model.read_cells(vectors, lengths)  # embeddings, and the mask of the whole context

    def score(self, step: Candidates) -> Tensor:
        """Return the log-probability of each candidate in the context so far, float32 (cells, candidates)."""
        model, tree, nodes = self.model, step.tree, len(step.tree.tokens)
        device = self.mask.device
        embedded = model.embed_tokens(tree.tokens.to(device)).expand(len(self.mask), -1, -1)
        inputs = torch.cat([self.unread, embedded], dim=1)
        positions = (self.mask.long().cumsum(1) - 1).clamp(min=0)
        positions = torch.cat([positions, positions[:, -1:] + tree.depths.to(device)], dim=1)
        allowed = attention_of(tree, self.mask, inputs.shape[1])[:, None]
        bias = torch.zeros(allowed.shape, dtype=inputs.dtype, device=device)
        options = {"logits_to_keep": nodes + 1} if model.accepts("logits_to_keep") else {}
        logits = model.language_model(
            inputs_embeds=inputs,
            attention_mask=bias.masked_fill_(~allowed, torch.finfo(bias.dtype).min),
            position_ids=positions[:, -inputs.shape[1] :],
            past_key_values=self.cache,
            use_cache=True,
            **options,
        ).logits[:, -nodes - 1 :]  # after the context, and after each node
        if nodes:
            self.cache.crop(-nodes)
        self.unread = inputs[:, :0]
        rows = logits.flatten(0, 1).split(max(1, LOGITS_IN_FLOAT32 // logits.shape[-1]))
        totals = torch.cat([part.float().logsumexp(1) for part in rows]).view(logits.shape[:2])
        parents, next_tokens = tree.parents.to(device), tree.next_tokens.to(device)
        return tree.sum_paths(logits[:, parents, next_tokens].float() - totals[:, parents])

    def append(self, step: Candidates, chosen: Tensor) -> None:
        """Add the chosen candidate of each cell, int64 (cells,), to the context."""
        tokens, mask = (part.to(chosen.device)[chosen] for part in step.padded)
        self.unread = torch.cat([self.unread, self.model.embed_tokens(tokens)], dim=1)
        self.mask = torch.cat([self.mask, mask], dim=1)


def attention_of(tree: Tree, context: Tensor, queries: int) -> Tensor:
    """Return which keys each query attends to, bool (cells, queries, context + nodes).

    The queries are the last tokens of the context, which attend to those before them, and the nodes of the tree, which
    attend to the context and their ancestors.

    Parameters
    ----------
    tree
        Its nodes come after the context.
    context
        Mask of the tokens in the context, bool (cells, context).
    queries
        Number of queries.
    """
    (cells, length), nodes = context.shape, len(tree.tokens)
    unread = queries - nodes
    order = torch.arange(length, device=context.device)
    causal = functional.pad(order <= order[length - unread :, None], (0, 0, 0, nodes), value=True)
    within = functional.pad(tree.ancestors.to(context.device), (0, 0, unread, 0))
    allowed = torch.cat([causal & context[:, None], within.expand(cells, -1, -1)], dim=2)
    # padding attends to itself, because a softmax over no keys would be NaN
    allowed.diagonal(length - unread, dim1=1, dim2=2).fill_(True)
    return allowed


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

    def score(self, step: Candidates) -> Tensor:
        """Return what :meth:`Packed.score` returns."""
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
        return torch.cat(sums).view(len(self.texts), len(step.tokens))

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
            packed = Packed(model, vectors, lengths)
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
