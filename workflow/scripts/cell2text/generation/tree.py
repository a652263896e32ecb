"""A prefix tree over token sequences, so that a language model reads each shared prefix once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Tree:
    """The prefixes of some sequences; the nodes are those that another token follows.

    The model reads the nodes. An edge is a token after a node, or after the root: the context of all sequences. The
    last token of a sequence is thus an edge but no node, because nothing is predicted from it.

    Parameters
    ----------
    tokens, depths
        Token of each node, which is the last one of its prefix, and its number of tokens, int64 (nodes,). A node
        comes after its ancestors.
    ancestors
        Which nodes are ancestors of a node, or the node itself, bool (nodes, nodes).
    parents, next_tokens
        The edges: where each starts, with 0 for the root and i + 1 for node i, and its token, int64 (edges,).
    paths
        The edges of each sequence, filled up with the number of edges, int64 (sequences, longest).
    """

    tokens: Tensor
    depths: Tensor
    ancestors: Tensor
    parents: Tensor
    next_tokens: Tensor
    paths: Tensor

    @classmethod
    def of(cls, sequences: Sequence[tuple[int, ...]]) -> "Tree":
        """Return the tree of sequences of at least one token each."""
        prefixes = {tokens[:end] for tokens in sequences for end in range(1, len(tokens) + 1)}
        inner = {prefix[:-1] for prefix in prefixes} - {()}
        nodes = sorted(inner, key=lambda prefix: (len(prefix), prefix))
        edges = nodes + sorted(prefixes - inner)
        number = {prefix: i for i, prefix in enumerate(edges)}
        ancestors = torch.eye(len(nodes), dtype=torch.bool)
        for i, prefix in enumerate(nodes):
            if len(prefix) > 1:
                ancestors[i] |= ancestors[number[prefix[:-1]]]
        paths = [torch.tensor([number[tokens[: end + 1]] for end in range(len(tokens))]) for tokens in sequences]
        return cls(
            torch.tensor([prefix[-1] for prefix in nodes], dtype=torch.long),
            torch.tensor([len(prefix) for prefix in nodes], dtype=torch.long),
            ancestors,
            torch.tensor([number[prefix[:-1]] + 1 if len(prefix) > 1 else 0 for prefix in edges]),
            torch.tensor([prefix[-1] for prefix in edges]),
            torch.nn.utils.rnn.pad_sequence(paths, batch_first=True, padding_value=len(edges)),
        )

    def sum_paths(self, log_probabilities: Tensor) -> Tensor:
        """Return the log-probability of each sequence, (cells, sequences), from those of the edges, (cells, edges)."""
        return functional.pad(log_probabilities, (0, 1))[:, self.paths.to(log_probabilities.device)].sum(-1)
