"""Projectors: from an encoder's vectors of a cell to soft tokens, vectors that a language model reads like words.

Each projector says in ``reads`` which tensor of the embeddings it takes. The soft tokens have length one
times a learnt scale that starts at the typical length of the language model's own token embeddings.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class _Projector(nn.Module):
    """What all projectors share: inputs on one scale, two linear layers, soft tokens of one length.

    Parameters
    ----------
    dimensions
        Of the encoder's vectors.
    width
        Of the language model's embeddings.
    hidden
        Units between the two linear layers.
    tokens
        Soft tokens made of one vector.
    """

    def __init__(self, dimensions: int, width: int, hidden: int, tokens: int):
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(nn.Linear(dimensions, hidden), nn.GELU(), nn.Linear(hidden, tokens * width))
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("centre", torch.zeros(dimensions))
        self.register_buffer("spread", torch.ones(dimensions))

    def fit_inputs(self, vectors: Tensor) -> None:
        """Take centre and spread from training vectors, float (n, dimensions).

        One spread for all dimensions: dividing each by its own would raise the noise of the last principal
        components to the level of the first.
        """
        self.centre.copy_(vectors.mean(0))
        self.spread.fill_((vectors - self.centre).square().mean().sqrt().clamp(min=1e-6))

    def start_at(self, embeddings: Tensor) -> None:
        """Start the scale at the mean length of token embeddings, (vocabulary, width)."""
        self.scale.data.fill_(embeddings.float().norm(dim=-1).mean())

    def _soft_tokens(self, vectors: Tensor) -> Tensor:
        soft = self.layers((vectors - self.centre) / self.spread)
        return functional.normalize(soft.unflatten(-1, (-1, self.width)), dim=-1) * self.scale


class Pooled(_Projector):
    """A fixed number of soft tokens from a cell's pooled vector."""

    reads = "pooled"

    def __init__(self, dimensions: int, width: int, hidden: int, soft_tokens: int):
        super().__init__(dimensions, width, hidden, soft_tokens)

    def forward(self, vectors: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return soft tokens and which of them are there.

        Parameters
        ----------
        vectors
            float (cells, dimensions).
        lengths
            Not used: every cell has the same number of soft tokens.

        Returns
        -------
        soft
            float (cells, soft_tokens, width).
        there
            bool (cells, soft_tokens), all true.
        """
        soft = self._soft_tokens(vectors)
        return soft, torch.ones(soft.shape[:2], dtype=torch.bool, device=soft.device)


class Mlp(_Projector):
    """One soft token for each of a cell's highest ranked genes, as in the paper."""

    reads = "gene_vectors"

    def __init__(self, dimensions: int, width: int, hidden: int, soft_tokens: int):
        super().__init__(dimensions, width, hidden, 1)

    def forward(self, vectors: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return soft tokens and which of them are there.

        Parameters
        ----------
        vectors
            float (cells, genes, dimensions), zeros behind a cell's last gene.
        lengths
            Genes of each cell, (cells,).

        Returns
        -------
        soft
            float (cells, genes, width); zero where there is no gene.
        there
            bool (cells, genes).
        """
        there = torch.arange(vectors.shape[1], device=vectors.device) < lengths[:, None]
        return self._soft_tokens(vectors).squeeze(2) * there[..., None], there


PROJECTORS: dict[str, type[_Projector]] = {"pooled": Pooled, "mlp": Mlp}


def build_projector(settings: dict, dimensions: int, width: int) -> _Projector:
    """Return a new projector of the kind that the config's ``projector`` section names."""
    kind = PROJECTORS[settings["kind"]]
    return kind(dimensions, width, settings["hidden"], settings["soft_tokens"])
