"""Attention among few tokens of many cells, on a CPU.

torch's own reads keys in blocks made for long texts, and each of them once for every head that shares it. For the 20 to
60 queries and 60 to 90 keys of a cell, one product of matrices for all heads with the same keys takes half as long.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "cell2text_few_tokens"


@contextmanager
def among_few_tokens(model: PreTrainedModel) -> Iterator[None]:
    """Let a language model on a CPU that uses torch's attention use :func:`attend` instead."""
    usual = model.config._attn_implementation
    if model.device.type != "cpu" or usual != "sdpa":
        yield
        return
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = usual


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return what transformers' function for torch's attention returns, with the same arguments; without gradients.

    Parameters
    ----------
    query
        (cells, heads, queries, width).
    key, value
        (cells, heads that have keys of their own, keys, width).
    attention_mask
        What is added to the scores, (cells, 1, queries, keys). With any other mask, or none, torch's attention is used.
    scaling
        Of the scores; None for one over the square root of the width.
    """
    is_sum = attention_mask is not None and attention_mask.is_floating_point() and attention_mask.shape[1] == 1
    if not is_sum or others.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    (cells, heads, queries, width), (groups, keys) = query.shape, key.shape[1:3]
    scores = query.reshape(cells * groups, -1, width) @ key.reshape(cells * groups, keys, width).mT
    scores = scores.view(cells, groups, -1, queries, keys).mul_(width**-0.5 if scaling is None else scaling)
    shares = scores.add_(attention_mask[:, :, None]).softmax(-1)
    found = shares.view(cells * groups, -1, keys) @ value.reshape(cells * groups, keys, -1)
    return found.view(cells, heads, queries, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
