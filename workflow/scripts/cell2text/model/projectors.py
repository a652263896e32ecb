"""Projectors: from a cell's encoder vectors to soft tokens, vectors that the language model reads like words.

``reads`` of each projector names the tensor of the embeddings that it takes. All soft tokens have the same norm: a
learnt scale, initialised to the mean norm of the language model's own token embeddings.
"""

from dataclasses import asdict
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from cell2text.settings import ProjectorSettings


class _Projector(nn.Module):
    """What all projectors share: standardised inputs, and soft tokens of equal norm.

    Parameters
    ----------
    dimensions
        Length of the encoder's vectors.
    width
        Length of the language model's token embeddings.
    """

    tokens_are_genes = False  # if not, any soft token can encode any property of the cell

    def __init__(self, dimensions: int, width: int):
        super().__init__()
        self.width = width
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("centre", torch.zeros(dimensions))
        self.register_buffer("spread", torch.ones(dimensions))

    def fit_inputs(self, vectors: Tensor) -> None:
        """Set centre and spread from training vectors, float (n, dimensions).

        All dimensions share one spread: dividing each by its own would raise the noise in the last principal
        components to the level of the first.
        """
        self.centre.copy_(vectors.mean(0))
        self.spread.fill_((vectors - self.centre).square().mean().sqrt().clamp(min=1e-6))

    def start_at(self, embeddings: Tensor) -> None:
        """Initialise the scale to the mean norm of token embeddings, (vocabulary, width)."""
        self.scale.data.fill_(embeddings.float().norm(dim=-1).mean())

    def _inputs(self, vectors: Tensor) -> Tensor:
        return (vectors - self.centre) / self.spread

    def _soft_tokens(self, states: Tensor) -> Tensor:
        return functional.normalize(states.unflatten(-1, (-1, self.width)), dim=-1) * self.scale


class _TwoLayers(_Projector):
    """Two linear layers, applied to each vector separately.

    Parameters
    ----------
    dimensions, width
        See :class:`_Projector`.
    hidden
        Units between the two layers.
    tokens
        Number of soft tokens per vector.
    """

    def __init__(self, dimensions: int, width: int, hidden: int, tokens: int):
        super().__init__(dimensions, width)
        self.layers = nn.Sequential(nn.Linear(dimensions, hidden), nn.GELU(), nn.Linear(hidden, tokens * width))

    def _project(self, vectors: Tensor) -> Tensor:
        return self._soft_tokens(self.layers(self._inputs(vectors)))


class Pooled(_TwoLayers):
    """A fixed number of soft tokens from a cell's pooled vector."""

    reads = "pooled"

    def __init__(self, dimensions: int, width: int, hidden: int, soft_tokens: int):
        super().__init__(dimensions, width, hidden, soft_tokens)

    def forward(self, vectors: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return soft tokens and which of them are present.

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
        present
            bool (cells, soft_tokens), all true.
        """
        return _all_present(self._project(vectors))


class Mlp(_TwoLayers):
    """One soft token for each of a cell's highest ranked genes, as in the paper."""

    reads = "gene_vectors"
    tokens_are_genes = True

    def __init__(self, dimensions: int, width: int, hidden: int):
        super().__init__(dimensions, width, hidden, tokens=1)

    def forward(self, vectors: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return soft tokens and which of them are present.

        Parameters
        ----------
        vectors
            float (cells, genes, dimensions), zeros after a cell's last gene.
        lengths
            Number of genes of each cell, (cells,).

        Returns
        -------
        soft
            float (cells, genes, width); zero where there is no gene.
        present
            bool (cells, genes).
        """
        present = _gene_mask(vectors, lengths)
        return self._project(vectors).squeeze(2) * present[..., None], present


class _Queries(_Projector):
    """Learnt queries that attend to a cell's gene vectors; each query becomes one soft token.

    Parameters
    ----------
    dimensions, width
        See :class:`_Projector`.
    hidden
        Width of the queries, rounded down to a multiple of the number of heads, which is one per 64 units.
    soft_tokens
        Number of queries.
    """

    reads = "gene_vectors"

    def __init__(self, dimensions: int, width: int, hidden: int, soft_tokens: int):
        super().__init__(dimensions, width)
        self.heads = max(1, hidden // 64)
        self.hidden = hidden - hidden % self.heads
        self.enter = nn.Linear(dimensions, self.hidden)
        self.queries = nn.Parameter(torch.randn(soft_tokens, self.hidden))
        self.leave = nn.Linear(self.hidden, width)

    def forward(self, vectors: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return soft tokens and which of them are present.

        Parameters
        ----------
        vectors
            float (cells, genes, dimensions), a cell's genes in rank order; values after its last gene are ignored.
        lengths
            Number of genes of each cell, (cells,).

        Returns
        -------
        soft
            float (cells, soft_tokens, width).
        present
            bool (cells, soft_tokens), all true.
        """
        inputs = self._inputs(vectors).masked_fill(~_gene_mask(vectors, lengths)[..., None], 0)
        genes = self.enter(inputs) + embed_ranks(vectors.shape[1], self.hidden, vectors.device)
        # Attention over no keys is NaN, so a cell without genes attends to one average gene.
        mask = _gene_mask(vectors, lengths.clamp(min=1))
        queries = self._read(self.queries.expand(len(vectors), -1, -1), genes, mask)
        return _all_present(self._soft_tokens(self.leave(queries)).squeeze(2))

    def _read(self, queries: Tensor, genes: Tensor, mask: Tensor) -> Tensor:
        """Return queries (cells, soft_tokens, hidden) after attention to genes (cells, genes, hidden) in the mask."""
        raise NotImplementedError


class Perceiver(_Queries):
    """Layers of attention to the genes, attention among the queries, and a feed-forward network.

    The Perceiver (Jaegle et al. 2021, arXiv 2103.03206), placed before a language model as in Flamingo (Alayrac et
    al. 2022, arXiv 2204.14198).

    Parameters
    ----------
    dimensions, width, hidden, soft_tokens
        See :class:`_Queries`.
    layers
        Number of layers, at least one.
    """

    def __init__(self, dimensions: int, width: int, hidden: int, soft_tokens: int, layers: int):
        super().__init__(dimensions, width, hidden, soft_tokens)
        self.blocks = nn.ModuleList(_PerceiverLayer(self.hidden, self.heads) for _ in range(layers))
        self.norm = nn.LayerNorm(self.hidden)

    def _read(self, queries: Tensor, genes: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            queries = block(queries, genes, mask)
        return self.norm(queries)


class _PerceiverLayer(nn.Module):
    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.norm_genes, self.norm_queries, self.norm_own = (nn.LayerNorm(hidden) for _ in range(3))
        self.attend_genes, self.attend_own = (nn.MultiheadAttention(hidden, heads, batch_first=True) for _ in range(2))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden)
        )

    def forward(self, queries: Tensor, genes: Tensor, mask: Tensor) -> Tensor:
        genes, normed = self.norm_genes(genes), self.norm_queries(queries)
        queries = queries + self.attend_genes(normed, genes, genes, key_padding_mask=~mask, need_weights=False)[0]
        normed = self.norm_own(queries)
        queries = queries + self.attend_own(normed, normed, normed, need_weights=False)[0]
        return queries + self.feed_forward(queries)


class QFormer(_Queries):
    """The Q-Former of BLIP-2 (Li et al. 2023, arXiv 2301.12597), as in transformers, with random weights.

    It attends to the genes in every layer instead of every other one, because it has few layers.

    Parameters
    ----------
    dimensions, width, hidden, soft_tokens
        See :class:`_Queries`.
    layers
        Number of layers, at least one.
    """

    def __init__(self, dimensions: int, width: int, hidden: int, soft_tokens: int, layers: int):
        super().__init__(dimensions, width, hidden, soft_tokens)
        self.reader = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=self.hidden,
                num_hidden_layers=layers,
                num_attention_heads=self.heads,
                intermediate_size=4 * self.hidden,
                encoder_hidden_size=self.hidden,
                cross_attention_frequency=1,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )

    def _read(self, queries: Tensor, genes: Tensor, mask: Tensor) -> Tensor:
        return self.reader(queries, encoder_hidden_states=genes, encoder_attention_mask=mask).last_hidden_state


PROJECTORS: dict[str, type[_Projector]] = {"pooled": Pooled, "mlp": Mlp, "perceiver": Perceiver, "qformer": QFormer}


def build_projector(settings: ProjectorSettings, dimensions: int, width: int) -> _Projector:
    """Return a new projector of the kind that the config's ``projector`` section names.

    It gets those settings that its class takes; the config's schema names them, too (``only_with``).
    """
    kind = PROJECTORS[settings.kind]
    taken = {name: value for name, value in asdict(settings).items() if name in signature(kind).parameters}
    return kind(dimensions, width, **taken)


def embed_ranks(ranks: int, hidden: int, device: torch.device) -> Tensor:
    """Return sines and cosines of the logarithm of each rank, counted from 1; float32 (ranks, hidden).

    On this scale, neighbouring ranks differ more at the top of the list than further down. Frequencies range from 0.1
    to 10: the lowest makes less than half a turn over any list, the highest separates neighbours down to rank 100 and
    beyond.
    """
    logarithm = torch.arange(1, ranks + 1, device=device).log()
    angles = logarithm[:, None] * torch.logspace(-1, 1, (hidden + 1) // 2, device=device)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :hidden]


def _gene_mask(vectors: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(vectors.shape[1], device=vectors.device) < lengths[:, None]


def _all_present(soft: Tensor) -> tuple[Tensor, Tensor]:
    return soft, torch.ones(soft.shape[:2], dtype=torch.bool, device=soft.device)
