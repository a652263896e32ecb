"""A prefix tree over token sequences, so that a language model reads each shared prefix once."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Tree:
    """The prefixes of some sequences.

    Every token of a prefix is an edge, from the root or a node to the next. The last token of a sequence ends in no
    node, because no token is predicted after it: the model reads nodes, and its output at a node scores the edges
    that start there. Nodes that follow each other without a branch in between are a run.

    Parameters
    ----------
    parents, tokens
        Where each edge starts, 0 for the root and i + 1 for node i, and its token, int64 (edges,). The first edges
        end in the nodes, in the same order, and a node comes after its ancestors.
    depths
        Number of tokens of each node's prefix, int64 (nodes,).
    ancestors
        Which nodes are ancestors of a node, or the node itself, bool (nodes, nodes).
    heads
        First node of each node's run, int64 (nodes,).
    sizes
        Number of nodes in the run that a node is the first of, 0 for the others, int64 (nodes,).
    stem
        Whether a node is in a run that all sequences begin with, bool (nodes,).
    counts
        Number of sequences that pass a node, int64 (nodes,).
    paths
        The edges from the root to each edge, filled up with the number of edges, int64 (edges, longest).
    ends
        Last edge of each sequence, int64 (sequences,).
    """

    parents: Tensor
    tokens: Tensor
    depths: Tensor
    ancestors: Tensor
    heads: Tensor
    sizes: Tensor
    stem: Tensor
    counts: Tensor
    paths: Tensor
    ends: Tensor

    @classmethod
    def of(cls, sequences: Sequence[tuple[int, ...]]) -> "Tree":
        """Return the tree of sequences of at least one token each."""
        passing = Counter(tokens[:end] for tokens in sequences for end in range(1, len(tokens) + 1))
        inner = {prefix[:-1] for prefix in passing} - {()}
        nodes = sorted(inner, key=lambda prefix: (len(prefix), prefix))
        edges = nodes + sorted(passing.keys() - inner)
        number = {prefix: i for i, prefix in enumerate(edges)}
        branches = Counter(prefix[:-1] for prefix in edges)
        ancestors, heads = torch.eye(len(nodes), dtype=torch.bool), []
        for i, prefix in enumerate(nodes):
            before = number.get(prefix[:-1])
            heads.append(i if before is None or branches[prefix[:-1]] > 1 else heads[before])
            if before is not None:
                ancestors[i] |= ancestors[before]
        paths = [torch.tensor([number[prefix[:end]] for end in range(1, len(prefix) + 1)]) for prefix in edges]
        heads = torch.tensor(heads, dtype=torch.long)
        return cls(
            parents=torch.tensor([number.get(prefix[:-1], -1) + 1 for prefix in edges]),
            tokens=torch.tensor([prefix[-1] for prefix in edges]),
            depths=torch.tensor([len(prefix) for prefix in nodes], dtype=torch.long),
            ancestors=ancestors,
            heads=heads,
            sizes=heads.bincount(minlength=len(nodes)),
            stem=(heads == 0) & (branches[()] == 1),
            counts=torch.tensor([passing[prefix] for prefix in nodes], dtype=torch.long),
            paths=torch.nn.utils.rnn.pad_sequence(paths, batch_first=True, padding_value=len(edges)),
            ends=torch.tensor([number[tokens] for tokens in sequences]),
        )

    @property
    def is_head(self) -> Tensor:
        """Whether a node is the first of its run, bool (nodes,)."""
        return self.heads == torch.arange(len(self.heads), device=self.heads.device)

    def to(self, device: torch.device) -> "Tree":
        """Return the tree on a device."""
        return Tree(*(getattr(self, field.name).to(device) for field in fields(self)))

    def sum_paths(self, edges: Tensor) -> Tensor:
        """Return the sum along the path to each edge, (cells, edges), of values of the edges, (cells, edges)."""
        return functional.pad(edges, (0, 1))[:, self.paths].sum(-1)
