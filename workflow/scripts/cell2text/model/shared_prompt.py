"""Attention over many texts that begin with the same prompt, which is read once.

The tokens stand in one row without padding: the prompt, then the rest of each cell. Each of them passes through the
layers once; only here do cells part, each seeing the prompt and itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from cell2text.errors import InputError

NAME = "shared_prompt"
KEYS = 32  # lines of scores of a multiple of so many numbers fill a CPU's vectors


@dataclass(frozen=True)
class Row:
    """Where the tokens of a row belong.

    Parameters
    ----------
    prompt
        Number of tokens of the shared prompt, at the row's beginning; at least one.
    there
        bool (cells, length): which of a cell's tokens are there. The row holds these alone.
    places
        Where they are among all cells x length, int64 (tokens,).
    hidden
        What is added to the scores of the cells' tokens, (cells, 1, 1, length, keys): 0 where a token may look, else
        minus infinity. The keys are those of the prompt and the cell, filled up to a multiple of ``KEYS``.
    hidden_in_prompt
        The same for the prompt's tokens, (prompt, prompt).
    """

    prompt: int
    there: Tensor
    places: Tensor
    hidden: Tensor
    hidden_in_prompt: Tensor

    @classmethod
    def of(cls, prompt: int, there: Tensor, dtype: torch.dtype) -> "Row":
        """Return the row of cells whose tokens are ``there``, for scores of a dtype."""

        def causal(length: int) -> Tensor:
            return torch.ones(length, length, dtype=torch.bool, device=there.device).tril()

        # Every token sees the prompt, so that no line of scores is empty, even of one that is not there.
        seen = nn.functional.pad(causal(there.shape[1]) & there[:, None], (prompt, 0), value=True)
        seen = nn.functional.pad(seen, (0, -seen.shape[2] % KEYS))
        hidden, in_prompt = (
            torch.zeros(seen.shape, dtype=dtype, device=there.device).masked_fill_(~seen, float("-inf"))
            for seen in (seen[:, None, None], causal(prompt))
        )
        return cls(prompt, there, there.flatten().nonzero().squeeze(1), hidden, in_prompt)

    def positions(self) -> Tensor:
        """Return the position of each token in its own text, int64 (1, prompt + tokens)."""
        own = self.there.long().cumsum(1) - 1 + self.prompt
        return torch.cat([torch.arange(self.prompt, device=own.device), self.of_cells(own)])[None]

    def of_cells(self, by_cell: Tensor) -> Tensor:
        """Return the tokens that are there, (tokens, ...), of (cells, length, ...)."""
        return by_cell.flatten(0, 1).index_select(0, self.places)

    def by_cell(self, tokens: Tensor) -> Tensor:
        """Undo :meth:`of_cells`: return (cells, length, ...), zero where no token is."""
        padded = tokens.new_zeros(self.there.numel(), *tokens.shape[1:])
        return padded.index_copy_(0, self.places, tokens).unflatten(0, self.there.shape)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return softmax(q k' scale + hidden) v, (batch, groups, heads, queries, width), and what its gradient needs.

    In bfloat16 on CPUs this is much faster than fused attention at the lengths of a description.

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
    shares = scores.softmax(-1)
    return (shares @ v).view(q.shape), (rows, k, v, shares)


def differentiate_plainly(saved: tuple[Tensor, ...], of_output: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v of :func:`attend_plainly`."""
    rows, k, v, shares = saved
    shape = of_output.shape
    of_output = of_output.flatten(2, 3)
    of_shares = of_output @ v.transpose(-1, -2)
    of_scores = torch.ops.aten._softmax_backward_data(of_shares, shares, -1, shares.dtype)
    of_q = (of_scores @ k).mul_(scale).view(shape)
    of_k = (rows.transpose(-1, -2) @ of_scores).transpose(-1, -2)
    of_v = (of_output.transpose(-1, -2) @ shares).transpose(-1, -2)
    return of_q, of_k, of_v


class SharedPromptAttention(torch.autograd.Function):
    """The attention of a row: the prompt's tokens among themselves, each cell's to the prompt and its own."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, row: Row, scale: float) -> Tensor:
        """Return the output, (1, tokens, heads, width), for (1, heads or groups, tokens, width)."""
        prompt, groups = row.prompt, key.shape[1]
        in_prompt, saved_prompt = attend_plainly(
            query[:, :, :prompt].unflatten(1, (groups, -1)),
            key[:, :, :prompt],
            value[:, :, :prompt],
            row.hidden_in_prompt,
            scale,
        )
        keys, values = (_with_prompt(part, row) for part in (key, value))
        in_cells, saved_cells = attend_plainly(
            _by_cell(query, row).unflatten(1, (groups, -1)), keys, values, row.hidden, scale
        )
        ctx.save_for_backward(*saved_prompt, *saved_cells)
        ctx.row, ctx.scale = row, scale
        return torch.cat(
            [in_prompt.flatten(1, 2)[0].transpose(0, 1), row.of_cells(in_cells.flatten(1, 2).transpose(1, 2))]
        )[None]

    @staticmethod
    @once_differentiable
    def backward(ctx, of_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Return the gradients of query, key and value."""
        row, prompt, scale = ctx.row, ctx.row.prompt, ctx.scale
        saved = ctx.saved_tensors
        saved_prompt, saved_cells = saved[:4], saved[4:]
        groups = saved_prompt[1].shape[1]
        of_heads = of_output.transpose(1, 2)
        from_prompt = differentiate_plainly(saved_prompt, of_heads[:, :, :prompt].unflatten(1, (groups, -1)), scale)
        from_cells = differentiate_plainly(saved_cells, _by_cell(of_heads, row).unflatten(1, (groups, -1)), scale)
        gradients = []
        for of_prompt, of_cells in zip(from_prompt, from_cells, strict=True):
            if of_prompt.ndim == 5:  # of the query
                of_prompt, own = of_prompt.flatten(1, 2), of_cells.flatten(1, 2)
            else:  # keys and values of the prompt serve every cell
                last = prompt + row.there.shape[1]
                of_prompt, own = of_prompt + of_cells[:, :, :prompt].sum(0), of_cells[:, :, prompt:last]
            gradient = torch.cat([of_prompt[0].transpose(0, 1), row.of_cells(own.transpose(1, 2))])
            gradients.append(gradient[None].transpose(1, 2))
        return *gradients, None, None


def _by_cell(states: Tensor, row: Row) -> Tensor:
    """Return the cells' part of a row, (1, heads, tokens, width), as (cells, heads, length, width)."""
    return row.by_cell(states[0, :, row.prompt :].transpose(0, 1)).transpose(1, 2)


def _with_prompt(states: Tensor, row: Row) -> Tensor:
    """Return the keys or values that each cell sees: the prompt's, its own, and zeros, (cells, groups, keys, width)."""
    prompt, last = row.prompt, row.prompt + row.there.shape[1]
    all_keys = states.new_empty(len(row.there), states.shape[1], row.hidden.shape[-1], states.shape[3])
    all_keys[:, :, :prompt] = states[:, :, :prompt]
    all_keys[:, :, prompt:last] = _by_cell(states, row)
    all_keys[:, :, last:] = 0
    return all_keys


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
    window, length = kwargs.get("sliding_window"), row.prompt + row.there.shape[1]
    if window and length > window:
        raise InputError(
            "config: language_model",
            f"its attention looks {window} tokens back and a description with its prompt has {length}",
            "Choose fewer soft tokens or another model",
        )
    return SharedPromptAttention.apply(query, key, value, row, scaling), None


AttentionInterface.register(NAME, attend)
