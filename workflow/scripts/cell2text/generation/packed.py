"""The probabilities of the candidate names of cells, in a few passes of the language model.

A draft, one name for each step, is read in one pass together with the prompt; other probable names in one or two more,
up to where they part for the last time. All nodes of the tree that are read in a pass are in one row per cell: a mask
lets each attend to the prompt, to the draft's names of earlier steps, and to the nodes before it in its own step, and
its position is that in its own text.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from cell2text.generation.attention import among_few_tokens
from cell2text.generation.candidates import Candidates
from cell2text.generation.tree import Tree
from cell2text.model.cell2text import Cell2Text

NEGLIGIBLE = 1e-3
CELLS_TOGETHER = 32  # on a CPU


class Packed:
    """Scores of names, for which shared prefixes are read once and improbable names not to their end.

    Parameters
    ----------
    model
        Model in evaluation mode.
    steps
        The candidates of each step.
    negligible
        Probability up to which the names after a fork may stay unread; 0 to read everything.
    """

    @torch.inference_mode()
    def __init__(self, model: Cell2Text, steps: Sequence[Candidates], negligible: float = NEGLIGIBLE):
        self.model, self.negligible = model, negligible
        self.tree = Tree.of(steps).to(model.device)
        self.first_names = torch.tensor([0, *(len(step.ids) for step in steps[:-1])], device=model.device).cumsum(0)
        self.beginning = DynamicCache()  # without the model's config: sliding windows could not be extended
        if len(model.prompt.before):
            before = model.embed_tokens(model.prompt.before.to(model.device))[None]
            model.base_model.get_decoder()(inputs_embeds=before, past_key_values=self.beginning, use_cache=True)

    @torch.inference_mode()
    def score(self, vectors: Tensor, lengths: Tensor, draft: Tensor) -> Tensor:
        """Return the log-probability of each name of the tree, float32 (cells, names).

        Those of a step share 1 among them, in the context of the draft's names of the steps before. Names that part at
        an unread fork get equal shares, so that no probability is off by more than ``negligible``.

        Parameters
        ----------
        vectors, lengths
            Input of the projector.
        draft
            Index of a candidate of each step, int64 (cells, steps).
        """
        model, tree, names = self.model, self.tree, self.first_names + draft
        beginning = len(model.prompt.before)
        prompt, mask = model.read_cells(vectors, lengths, beginning)
        mask = functional.pad(mask, (beginning, 0), value=True)
        scores = torch.empty(len(draft), len(tree.names), device=draft.device)
        unread = Reading(model, tree, self.beginning, mask, names)
        forks = unread.on_draft.gather(1, unread.sources)
        for rows in self._split(unread.nodes_up_to(forks).sum(1)):
            reading = unread.take(rows)
            reading.read(forks[rows], prompt[rows])
            scores[rows] = self._read_probable(reading)
        return scores

    def _read_probable(self, reading: "Reading") -> Tensor:
        """Read on at probable forks, and return the log-probability of each name."""
        scores = reading.scores()
        forks = reading.probable_forks(scores, self.negligible)
        cells = forks.any(1).nonzero()[:, 0]
        for rows in self._split(reading.nodes_up_to(forks).sum(1)[cells]):
            part = reading.take(cells[rows])
            part.read(forks[cells[rows]])
            scores[cells[rows]] = self._read_probable(part)
        return scores

    def _split(self, tokens: Tensor) -> Iterator[Tensor]:
        """Yield the rows of cells that are read together, those with many tokens together with their like."""
        most = len(tokens) if tokens.is_cuda else CELLS_TOGETHER
        return iter(tokens.argsort(stable=True).split(most) if len(tokens) else ())


class Reading:
    """Some cells, and what the language model has read of their trees.

    Parameters
    ----------
    model, tree
        The model and the tree.
    cache
        Keys and values of what was read of each cell, or of all cells alike in a single row.
    mask
        Mask of the whole prompt, bool (cells, prompt).
    names
        The draft: a name of each step, int64 (cells, steps).

    Attributes
    ----------
    on_draft
        Which nodes belong to the draft, bool (cells, nodes).
    sources
        The node after which each fork is, int64 (cells, forks).
    log_shares
        Logarithm of the share of each option in its fork, 0 for other nodes and undecided forks, (cells, nodes).
    decided, is_read
        Which forks have shares, bool (cells, forks), and which nodes were read, bool (cells, nodes).
    keys, is_key
        The nodes in the cache, int64 (cells, keys), and which of them are not padding, bool.
    """

    def __init__(self, model: Cell2Text, tree: Tree, cache: DynamicCache, mask: Tensor, names: Tensor):
        self.model, self.tree, self.cache, self.mask, self.names = model, tree, cache, mask, names
        self.on_draft = tree.names[names].any(1)
        self.on_draft[:, 0] = True
        ends = functional.pad(tree.ends[names], (1, 0))  # of the prompt and of each name
        self.sources = torch.where(tree.forks < 0, ends[:, tree.steps_of_forks], tree.forks)
        self.log_shares = torch.zeros(self.on_draft.shape, device=mask.device)
        self.decided, self.is_read = torch.zeros_like(self.sources, dtype=torch.bool), torch.zeros_like(self.on_draft)
        self.keys, self.is_key = names[:, :0], self.on_draft[:, :0]

    def take(self, rows: Tensor) -> "Reading":
        """Return some of the cells, with a copy of their part of the cache."""
        part = Reading(self.model, self.tree, _copy(self.cache, rows), self.mask[rows], self.names[rows])
        for name in ("log_shares", "decided", "is_read", "keys", "is_key"):
            setattr(part, name, getattr(self, name)[rows])
        return part

    def scores(self) -> Tensor:
        """Return the log-probability of each name, float32 (cells, names)."""
        tree, ahead = self.tree, self._ahead().float()
        equal_shares = tree.below_forks * tree.below_forks.sum(1, keepdim=True).log()
        return self.log_shares @ tree.names.float().T - ahead @ equal_shares

    def probable_forks(self, scores: Tensor, negligible: float) -> Tensor:
        """Return the undecided forks to read next, given the scores so far, bool (cells, forks)."""
        reached = scores.exp() @ self.tree.below_forks.float().T
        return ~self.decided & (reached > negligible)

    def _ahead(self) -> Tensor:
        """Return the undecided forks before which all are decided, bool (cells, forks)."""
        return ~self.decided & ((~self.decided).float() @ self.tree.earlier_forks.float().T == 0)

    def nodes_up_to(self, forks: Tensor) -> Tensor:
        """Return the unread nodes that decide the given forks, bool (cells, nodes)."""
        at_forks, steps = self._nodes_at(forks), self.tree.steps
        inside = at_forks.float() @ self.tree.within.float() > 0
        latest = torch.where(at_forks, steps, -1).amax(1, keepdim=True)
        return (inside | (self.on_draft & (steps < latest))) & ~self.is_read

    def _nodes_at(self, forks: Tensor) -> Tensor:
        """Return the nodes after which the given forks are, bool (cells, nodes)."""
        found = torch.zeros(self.is_read.shape, dtype=torch.int8, device=forks.device)
        return found.scatter_add_(1, self.sources, forks.to(torch.int8)).bool()

    def read(self, forks: Tensor, prompt: Tensor | None = None) -> None:
        """Read the nodes that decide some forks.

        Parameters
        ----------
        forks
            Undecided forks, bool (cells, forks).
        prompt
            Embeddings of the prompt from the soft tokens on, (cells, tokens, width), if it has not been read.
        """
        model, tree, unread = self.model, self.tree, self.nodes_up_to(forks)
        at_forks = self._nodes_at(forks)
        width, outputs = int(unread.sum(1).max()), int(at_forks.sum(1).max())
        if not outputs:
            return
        # padding, then nodes, then nodes with outputs
        nodes = (unread.to(torch.int8) + at_forks).argsort(dim=1, stable=True)[:, len(tree.tokens) - width :]
        self.keys = torch.cat([self.keys, nodes], dim=1)
        self.is_key = torch.cat([self.is_key, unread.gather(1, nodes)], dim=1)
        self.is_read, self.decided = self.is_read | unread, self.decided | forks
        inputs = model.embed_tokens(tree.tokens[nodes])
        if prompt is not None:
            inputs = torch.where((nodes == 0)[..., None], prompt[:, -1:], inputs)
            inputs = torch.cat([prompt[:, :-1], inputs], dim=1)
        allowed = self._attention(nodes, inputs.shape[1] - width)
        bias = torch.zeros(allowed.shape, dtype=inputs.dtype, device=inputs.device)
        # as indices: states cut out by a slice are not contiguous, for which torch copies the head once for each cell
        last = torch.arange(inputs.shape[1] - outputs, inputs.shape[1], device=inputs.device)
        options = {"logits_to_keep": last} if model.accepts("logits_to_keep") else {}
        with model.head_for(tree.words), among_few_tokens(model.base_model):
            logits = model.language_model(
                inputs_embeds=inputs,
                attention_mask=bias.masked_fill_(~allowed, torch.finfo(bias.dtype).min)[:, None],
                position_ids=self._positions(nodes, inputs.shape[1] - width),
                past_key_values=self.cache,
                use_cache=True,
                **options,
            ).logits[:, -outputs:]
        if logits.shape[2] > len(tree.words):
            logits = logits[:, :, tree.words]
        self._decide(forks, nodes[:, width - outputs :], logits)

    def _attention(self, nodes: Tensor, unread: int) -> Tensor:
        """Return which keys each query attends to, bool (cells, unread + nodes, prompt and nodes in the cache).

        Tokens of the prompt attend to those before them; nodes to the prompt, to the draft's names of earlier steps,
        and to the nodes before them in their own step.

        Parameters
        ----------
        nodes
            The nodes that are queries, which are also the last keys, int64 (cells, queries).
        unread
            Number of queries before them, tokens of the prompt.
        """
        tree, keys, length = self.tree, self.keys, self.mask.shape[1] - 1  # node 0 is the last token of the prompt
        order = torch.arange(length, device=nodes.device)
        causal = functional.pad(order <= order[length - unread :, None], (0, 0, 0, nodes.shape[1]), value=True)
        earlier = (tree.steps[keys][:, None] < tree.steps[nodes][..., None]) & self.on_draft.gather(1, keys)[:, None]
        before = (tree.within[nodes[..., None], keys[:, None]] | earlier) & self.is_key[:, None]
        allowed = torch.cat([causal & self.mask[:, None, :-1], functional.pad(before, (0, 0, unread, 0))], dim=2)
        # padding attends to itself, because a softmax over no keys would be NaN
        allowed.diagonal(allowed.shape[2] - allowed.shape[1], dim1=1, dim2=2).fill_(True)
        return allowed

    def _positions(self, nodes: Tensor, unread: int) -> Tensor:
        """Return the position of each query in its own text, int64 (cells, unread + nodes)."""
        tree, prompt = self.tree, self.mask.long().cumsum(1)
        starts = functional.pad(tree.sizes[self.names].cumsum(1), (1, 0))
        steps = tree.steps[nodes]
        inside = torch.where(steps < 0, -1, starts.gather(1, steps.clamp(min=0)) + tree.depths[nodes])
        before = prompt[:, prompt.shape[1] - 1 - unread : -1] - 1
        return torch.cat([before, prompt[:, -1:] + inside], dim=1).clamp(min=0)

    def _decide(self, forks: Tensor, nodes: Tensor, logits: Tensor) -> None:
        """Set the shares of the options of some forks.

        Parameters
        ----------
        forks
            The forks, bool (cells, forks).
        nodes, logits
            Nodes, int64 (cells, outputs), and the logits of the tree's words at them, (cells, outputs, words).
        """
        tree, cells = self.tree, torch.arange(len(logits), device=logits.device)[:, None]
        places = torch.zeros_like(self.is_read, dtype=torch.long)
        places.scatter_(1, nodes, torch.arange(nodes.shape[1], device=nodes.device).expand_as(nodes))
        places = places.gather(1, self.sources)[:, tree.forks_of_options]
        found = tree.log_shares(logits[cells, places, tree.words_of_options].float())
        known = self.log_shares[:, tree.options]
        self.log_shares[:, tree.options] = torch.where(forks[:, tree.forks_of_options], found, known)


def _copy(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """Return a copy of some rows of a cache; a single row stands for all."""
    copied = DynamicCache()
    for number, layer in enumerate(cache.layers):
        some = rows % len(layer.keys)
        copied.update(layer.keys[some], layer.values[some], number)
    return copied
