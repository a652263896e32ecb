"""Attention over many texts that begin with the same prompt, which is read once.

The tokens stand in one row: the prompt, then the rest of each cell. Each of them passes through the layers once;
only here do cells part, each seeing the prompt and itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from cell2text.errors import InputError

NAME = "shared_prompt"


@dataclass(frozen=True)
class Row:
    """Where the tokens of a row belong.

    Parameters
    ----------
    prompt
        Number of tokens of the shared prompt, at the row's beginning; at least one.
    there
        bool (cells, length): which of a cell's tokens are there. The row holds ``length`` tokens of each cell.
    hidden
        What is added to the scores of the cells' tokens, (cells, 1, 1, length, prompt + length): 0 where a token
        may look, else minus infinity.
    hidden_in_prompt
        The same for the prompt's tokens, (prompt, prompt).
    """

    prompt: int
    there: Tensor
    hidden: Tensor
    hidden_in_prompt: Tensor

    @classmethod
    def of(cls, prompt: int, there: Tensor, dtype: torch.dtype) -> "Row":
        """Return the row of cells whose tokens are ``there``, for scores of a dtype."""

        def causal(length: int) -> Tensor:
            return torch.ones(length, length, dtype=torch.bool, device=there.device).tril()

        # Every token sees the prompt, so that no line of scores is empty, even of one that is not there.
        seen = nn.functional.pad(causal(there.shape[1]) & there[:, None], (prompt, 0), value=True)
        hidden, in_prompt = (
            torch.zeros(seen.shape, dtype=dtype, device=there.device).masked_fill_(~seen, float("-inf"))
            for seen in (seen[:, None, None], causal(prompt))
        )
        return cls(prompt, there, hidden, in_prompt)

    def positions(self) -> Tensor:
        """Return the position of each token in its own text, int64 (1, tokens)."""
        own = (self.there.long().cumsum(1) - 1).clamp(min=0) + self.prompt
        return torch.cat([torch.arange(self.prompt, device=own.device), own.flatten()])[None]


class PlainAttention(torch.autograd.Function):
    """softmax(q k' scale + hidden) v; torch adds bfloat16 up in float32.

    In bfloat16 on CPUs this is much faster than fused attention at the lengths of a description. As much as
    possible is done to the queries and the output, which are narrower than the scores.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Tensor:
        """Return the output, (batch, groups, heads, queries, width).

        Parameters
        ----------
        q
            (batch, groups, heads, queries, width): the heads of a group share keys and values.
        k, v
            (batch, groups, keys, width).
        hidden
            Added to the scores, (batch, groups, heads, queries, keys) or what broadcasts to it.
        scale
            Of the scores.
        """
        rows = q.flatten(2, 3) * scale
        scores = rows @ k.transpose(-1, -2)
        scores.view(*q.shape[:4], -1).add_(hidden)
        exponentials = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
        inverse = exponentials.sum(-1, keepdim=True).reciprocal_()
        output = (exponentials @ v).mul_(inverse)
        ctx.save_for_backward(rows, k, v, exponentials, inverse, output)
        ctx.scale = scale
        return output.view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Return the gradients of q, k and v."""
        rows, k, v, exponentials, inverse, output = ctx.saved_tensors
        shape = of_output.shape
        of_output = of_output.flatten(2, 3) * inverse
        along = (of_output * output).sum(-1, keepdim=True)
        of_scores = (of_output @ v.transpose(-1, -2)).sub_(along).mul_(exponentials)
        of_q = (of_scores @ k).mul_(ctx.scale).view(shape)
        of_k = (rows.transpose(-1, -2) @ of_scores).transpose(-1, -2)
        of_v = (of_output.transpose(-1, -2) @ exponentials).transpose(-1, -2)
        return of_q, of_k, of_v, None, None


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **kwargs
) -> tuple[Tensor, None]:
    """Return the attention's output, (1, tokens, heads, width), as transformers' attention interface has it.

    Parameters
    ----------
    module
        The layer.
    query, key, value
        (1, heads, tokens, width), of one row of tokens; keys and values may have fewer heads.
    attention_mask
        None: the keyword ``row`` says who sees what.
    scaling
        Of the scores.

    Raises
    ------
    InputError
        If a text is longer than the window of a layer that looks back only so far.
    """
    row: Row = kwargs["row"]
    cells, length = row.there.shape
    groups, prompt = key.shape[1], row.prompt
    window = kwargs.get("sliding_window")
    if window and prompt + length > window:
        raise InputError(
            "config: language_model",
            f"its attention looks {window} tokens back and a description with its prompt has {prompt + length}",
            "Choose fewer soft tokens or another model",
        )

    def of_cells(states: Tensor) -> Tensor:
        return states[0, :, prompt:].unflatten(1, (cells, length)).transpose(0, 1)

    def with_prompt(states: Tensor) -> Tensor:
        return torch.cat([states[:, :, :prompt].expand(cells, -1, -1, -1), of_cells(states)], dim=2)

    in_prompt = PlainAttention.apply(
        query[:, :, :prompt].unflatten(1, (groups, -1)),
        key[:, :, :prompt],
        value[:, :, :prompt],
        row.hidden_in_prompt,
        scaling,
    )
    in_cells = PlainAttention.apply(
        of_cells(query).unflatten(1, (groups, -1)), with_prompt(key), with_prompt(value), row.hidden, scaling
    )
    # (batch, groups, heads, tokens, width) to (1, batch * tokens, all heads, width)
    return torch.cat([part.flatten(1, 2).transpose(1, 2).flatten(0, 1) for part in (in_prompt, in_cells)])[None], None


AttentionInterface.register(NAME, attend)
