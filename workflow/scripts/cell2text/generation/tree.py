"""The prefix tree of all names that a description can have, so that a language model reads each prefix once."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from cell2text.generation.candidates import Candidates


@dataclass(frozen=True)
class Tree:
    """The tokens of the candidates of all steps, in which names with the same beginning share its nodes.

    Node 0 is the last token of the prompt; every other node is a token of one step. Where the names of a step part is
    a fork, and the nodes that follow there are its options. Only at forks has the language model anything to decide.

    Parameters
    ----------
    tokens
        Token of each node, int64 (nodes,).
    steps
        Step of each node, -1 for node 0, int64 (nodes,).
    depths
        Number of tokens before a node in its step, int64 (nodes,).
    within
        Whether one node is another, or comes after it in the same step, bool (nodes, nodes).
    names
        The nodes of each name, names of all steps one after the other, bool (names, nodes).
    ends, sizes
        Last node of each name, and number of its nodes, int64 (names,).
    forks, steps_of_forks
        The node after which each fork is, -1 if its step begins with it, and the step, int64 (forks,).
    earlier_forks, below_forks
        The forks of its step before each fork, and the names that pass it, bool (forks, ...).
    options, forks_of_options, words_of_options
        The nodes that are options, the fork of each, and the index of its token in ``words``, int64 (options,).
    words
        The tokens that options have, int64 (words,).
    """

    tokens: Tensor
    steps: Tensor
    depths: Tensor
    within: Tensor
    names: Tensor
    ends: Tensor
    sizes: Tensor
    forks: Tensor
    steps_of_forks: Tensor
    earlier_forks: Tensor
    below_forks: Tensor
    options: Tensor
    forks_of_options: Tensor
    words_of_options: Tensor
    words: Tensor

    @classmethod
    def of(cls, steps: Sequence[Candidates]) -> "Tree":
        """Return the tree of the candidates of a description's steps."""
        names = [(number, tokens) for number, step in enumerate(steps) for tokens in step.tokens]
        # A prefix comes after the shorter ones.
        prefixes = dict.fromkeys((step, tokens[:end]) for step, tokens in names for end in range(1, len(tokens) + 1))
        nodes = {prefix: number for number, prefix in enumerate(prefixes, 1)}
        before = {(step, prefix): (step, prefix[:-1]) for step, prefix in nodes}
        continued = Counter(before.values())
        forks = {prefix: number for number, prefix in enumerate(one for one in continued if continued[one] > 1)}
        within = torch.eye(len(nodes) + 1, dtype=torch.bool)
        for prefix, node in nodes.items():
            if before[prefix] in nodes:
                within[node] |= within[nodes[before[prefix]]]
        ends = torch.tensor([nodes[name] for name in names])
        steps_of_names, steps_of_forks = (
            torch.tensor([step for step, _ in one], dtype=torch.long) for one in (names, forks)
        )
        at = torch.tensor([nodes.get(prefix, -1) for prefix in forks], dtype=torch.long)
        begins = (at < 0)[:, None]
        before_forks, same_step = within[at] & ~begins, steps_of_forks[:, None] == steps_of_forks
        options = [prefix for prefix in nodes if before[prefix] in forks]
        chosen = torch.tensor([prefix[-1] for _, prefix in options], dtype=torch.long)
        words, words_of_options = chosen.unique(return_inverse=True)
        return cls(
            tokens=torch.tensor([0, *(prefix[-1] for _, prefix in nodes)]),
            steps=torch.tensor([-1, *(step for step, _ in nodes)]),
            depths=torch.tensor([0, *(len(prefix) - 1 for _, prefix in nodes)]),
            within=within,
            names=within[ends],
            ends=ends,
            sizes=torch.tensor([len(tokens) for _, tokens in names]),
            forks=at,
            steps_of_forks=steps_of_forks,
            earlier_forks=same_step & (before_forks[:, at] | begins.T) & ~torch.eye(len(at), dtype=torch.bool),
            below_forks=(steps_of_forks[:, None] == steps_of_names) & (within[ends][:, at].T | begins),
            options=torch.tensor([nodes[prefix] for prefix in options], dtype=torch.long),
            forks_of_options=torch.tensor([forks[before[prefix]] for prefix in options], dtype=torch.long),
            words_of_options=words_of_options,
            words=words,
        )

    def to(self, device: torch.device) -> "Tree":
        """Return the tree on a device."""
        return Tree(*(getattr(self, field.name).to(device) for field in fields(self)))

    def log_shares(self, scores: Tensor) -> Tensor:
        """Return the logarithm of the share that each option has in its fork.

        Parameters
        ----------
        scores
            Logits of the options, float32 (cells, options).
        """
        index = self.forks_of_options.expand_as(scores)
        empty = scores.new_full((len(scores), len(self.forks)), -torch.inf)
        greatest = empty.scatter_reduce(1, index, scores, "amax").gather(1, index)
        sums = torch.zeros_like(empty).scatter_add(1, index, (scores - greatest).exp())
        return scores - greatest - sums.log().gather(1, index)
