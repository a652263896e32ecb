"""The probabilities of candidate names under a language model, with their prefix tree packed into few forward passes.

All nodes that are read in a pass are in one row per cell. A mask lets each attend to the context and to its ancestors
alone, and its position is that in its own text.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from cell2text.generation.candidates import Candidates
from cell2text.generation.tree import Tree
from cell2text.model.cell2text import Cell2Text

NEGLIGIBLE = 1e-4
CELLS_TOGETHER = 16  # on a CPU, that read a tree together; those that must read much of it are with their like
LOGITS = 1 << 27  # in memory at once, 256 MB in bfloat16
LOGITS_IN_FLOAT32 = 1 << 24


class Packed:
    """Scores of a batch of cells, in which shared prefixes are read once and improbable names not to their end.

    Parameters
    ----------
    model, vectors, lengths
        The model, and the input of its projector for the cells.
    negligible
        Greatest share of the probability of a step that may stay unread, see :meth:`score`; 0 to read everything.
    """

    def __init__(self, model: Cell2Text, vectors: Tensor, lengths: Tensor, negligible: float = NEGLIGIBLE):
        self.model, self.negligible = model, negligible
        self.cache = DynamicCache()  # without the model's config: sliding windows could not be cut
        self.unread, self.mask = model.read_cells(vectors, lengths)  # embeddings, and the mask of the whole context

    def score(self, step: Candidates, excluded: Sequence[Tensor] = ()) -> Tensor:
        """Return the log-probability of each candidate in the context so far, float32 (cells, candidates).

        The probable runs of the tree are read, each after the one that leads to it. The others have a share of at
        most ``negligible`` of the probability of all candidates, and those that begin with them get equal parts of
        it. So no probability changes by more than ``negligible``.

        Parameters
        ----------
        step
            The candidates.
        excluded
            Candidates of each cell that have probability 0, each int64 (cells,).
        """
        tree = step.tree.to(self.mask.device)
        possible = torch.ones(len(self.mask), len(tree.ends), dtype=torch.bool, device=self.mask.device)
        possible = ~mark(excluded, possible)
        together = Reading(self.model, tree, self.cache, self.mask, possible)
        together.read(tree.stem.expand(len(possible), -1), self.unread)
        self.unread = self.unread[:, :0]
        cells = together.choose(self.negligible).sum(1).argsort()
        scores = torch.empty(possible.shape, device=cells.device)
        for rows in cells.split(len(cells) if cells.is_cuda else CELLS_TOGETHER):
            part = together.take(rows)
            while bool((reading := part.choose(self.negligible)).any()):
                part.read(reading)
            scores[rows] = part.scores()
        if together.nodes.shape[1]:
            self.cache.crop(-together.nodes.shape[1])
        return scores

    def append(self, step: Candidates, chosen: Tensor) -> None:
        """Add the chosen candidate of each cell, int64 (cells,), to the context."""
        tokens, mask = (part.to(chosen.device)[chosen] for part in step.padded)
        self.unread = torch.cat([self.unread, self.model.embed_tokens(tokens)], dim=1)
        self.mask = torch.cat([self.mask, mask], dim=1)


class Reading:
    """Some cells that read a tree.

    Parameters
    ----------
    model, tree
        The model and the tree.
    cache
        Keys and values of the context, to which those of the nodes are added.
    mask
        Mask of the context, bool (cells, context).
    possible
        Which candidates may have a probability above 0, bool (cells, candidates).

    Attributes
    ----------
    nodes, is_node
        The nodes in the cache, int64 (cells, nodes read), and their mask, bool.
    edges
        Log-probability of each edge, 0 if not known yet, float32 (cells, edges).
    done
        Which nodes were read, bool (cells, nodes).
    """

    def __init__(self, model: Cell2Text, tree: Tree, cache: DynamicCache, mask: Tensor, possible: Tensor):
        self.model, self.tree, self.cache, self.mask, self.possible = model, tree, cache, mask, possible
        self.edges = torch.zeros(len(mask), len(tree.tokens), device=mask.device)
        self.done = mask.new_zeros(len(mask), len(tree.depths))
        self.nodes, self.is_node = self.done[:, :0].long(), self.done[:, :0]

    def take(self, rows: Tensor) -> "Reading":
        """Return some of the cells, with a copy of their part of the cache."""
        cache = DynamicCache()
        for number, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[rows], layer.values[rows], number)
        part = Reading(self.model, self.tree, cache, self.mask[rows], self.possible[rows])
        part.edges, part.done = self.edges[rows], self.done[rows]
        part.nodes, part.is_node = self.nodes[rows], self.is_node[rows]
        return part

    def choose(self, negligible: float) -> Tensor:
        """Return which nodes to read next, bool (cells, nodes): the runs ahead but a negligible share.

        The most probable runs are first if the logits of all would take too much memory.
        """
        tree, nodes = self.tree, self.done.shape[1]
        reached = tree.sum_paths(self.edges)
        ahead, known = self._ahead()
        complete = reached[:, tree.ends].masked_fill(~(known[:, tree.ends] & self.possible), -math.inf)
        masses, order = reached[:, :nodes].masked_fill(~ahead, -math.inf).sort(dim=1)
        total = torch.cat([complete, masses], dim=1).logsumexp(1, keepdim=True)
        least = total + math.log(negligible) if negligible else -math.inf
        vocabulary = self.model.base_model.config.get_text_config().vocab_size
        widest = LOGITS // (len(order) * vocabulary)
        probable = (masses.logcumsumexp(1) > least) & ahead.gather(1, order)
        sizes = tree.sizes[order] * probable
        upto = sizes.flip(1).cumsum(1).flip(1)  # nodes of a run and the more probable ones
        probable &= (upto <= widest) | (upto == sizes)
        return torch.zeros_like(ahead).scatter_(1, order, probable)[:, tree.heads]

    def _ahead(self) -> tuple[Tensor, Tensor]:
        """Return which nodes begin a run that can be read next, and which edges are known; bool (cells, ...)."""
        known = functional.pad(self.done, (1, 0), value=True)[:, self.tree.parents]
        return self.tree.is_head & known[:, : self.done.shape[1]] & ~self.done, known

    def read(self, reading: Tensor, context: Tensor | None = None) -> None:
        """Read nodes, and set the edges that start at them.

        Parameters
        ----------
        reading
            Which nodes to read, bool (cells, nodes).
        context
            Embeddings of the last tokens of the context, if they are not in the cache yet, (cells, tokens, width).
            The edges that start at the root are set too.
        """
        model, tree, device = self.model, self.tree, reading.device
        width = int(reading.sum(1).max()) if reading.shape[1] else 0
        picked = (~reading).to(torch.int8).argsort(dim=1, stable=True)[:, :width]  # ancestors come first
        self.nodes = torch.cat([self.nodes, picked], dim=1)
        self.is_node = torch.cat([self.is_node, reading.gather(1, picked)], dim=1)
        self.done = self.done | reading
        inputs = model.embed_tokens(tree.tokens[picked])
        inputs = inputs if context is None else torch.cat([context, inputs], dim=1)
        positions = self.mask.long().cumsum(1) - 1
        positions = torch.cat([positions, positions[:, -1:] + tree.depths[picked]], dim=1).clamp(min=0)
        allowed = self._attention(picked, inputs.shape[1] - width)[:, None]
        bias = torch.zeros(allowed.shape, dtype=inputs.dtype, device=device)
        needed = width + (context is not None)  # the outputs at the nodes, and after the context
        options = {"logits_to_keep": needed} if model.accepts("logits_to_keep") else {}
        logits = model.language_model(
            inputs_embeds=inputs,
            attention_mask=bias.masked_fill_(~allowed, torch.finfo(bias.dtype).min),
            position_ids=positions[:, -inputs.shape[1] :],
            past_key_values=self.cache,
            use_cache=True,
            **options,
        ).logits[:, -needed:]
        parts = logits.flatten(0, 1).split(max(1, LOGITS_IN_FLOAT32 // logits.shape[-1]))
        totals = torch.cat([part.float().logsumexp(1) for part in parts]).view(logits.shape[:2])
        # where in the output the root and each node are
        places = torch.zeros(len(reading), 1 + reading.shape[1], dtype=torch.long, device=device)
        places.scatter_(1, picked + 1, torch.arange(needed - width, needed, device=device).expand_as(picked))
        places = places[:, tree.parents]
        found = logits[torch.arange(len(logits), device=device)[:, None], places, tree.tokens].float()
        new = functional.pad(reading, (1, 0), value=context is not None)[:, tree.parents]
        self.edges = torch.where(new, found - totals.gather(1, places), self.edges)

    def _attention(self, picked: Tensor, unread: int) -> Tensor:
        """Return which keys each query attends to, bool (cells, unread + picked, context + nodes in the cache).

        Tokens of the context attend to those before them; nodes of the tree to the context and their ancestors.

        Parameters
        ----------
        picked
            The nodes that are queries, which are also the last keys, int64 (cells, picked).
        unread
            Number of queries before them, the last tokens of the context.
        """
        length = self.mask.shape[1]
        order = torch.arange(length, device=picked.device)
        causal = functional.pad(order <= order[length - unread :, None], (0, 0, 0, picked.shape[1]), value=True)
        within = self.tree.ancestors[picked[:, :, None], self.nodes[:, None]] & self.is_node[:, None]
        allowed = torch.cat([causal & self.mask[:, None], functional.pad(within, (0, 0, unread, 0))], dim=2)
        # padding attends to itself, because a softmax over no keys would be NaN
        allowed.diagonal(allowed.shape[2] - allowed.shape[1], dim1=1, dim2=2).fill_(True)
        return allowed

    def scores(self) -> Tensor:
        """Return the log-probability of each candidate, float32 (cells, candidates)."""
        ahead, _ = self._ahead()
        edges = self.edges.clone()
        edges[:, : ahead.shape[1]] -= self.tree.counts.log() * ahead
        return self.tree.sum_paths(edges)[:, self.tree.ends].masked_fill(~self.possible, -math.inf)


def mark(excluded: Sequence[Tensor], scores: Tensor) -> Tensor:
    """Return which candidates are excluded, bool (cells, candidates), in the shape of their scores."""
    found = torch.zeros_like(scores, dtype=torch.bool)
    for chosen in excluded:
        found.scatter_(1, chosen[:, None], True)
    return found
