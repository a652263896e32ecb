"""Attention over many texts that share their prompt, with the prompt computed once.

All tokens are packed into one row: the prompt, the remaining tokens of each cell, and filling. Each token passes once
through the layers. Only attention separates the cells: their tokens attend to the prompt and to their own cell.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NAME = "shared_prompt"
# The number of keys is padded to a multiple of this, which fills a CPU's vector registers.
KEYS = 16
# Number of cells in a part on CPUs, whose scores fit in the cache.
CELLS_IN_CACHE = 8
# Rows are padded to a multiple of this many tokens: oneDNN is slow at the first product of each new size
# in bfloat16 (Xeon with AMX); in float32 it makes no difference worth having.
TOKENS = 32


@dataclass(frozen=True)
class Part:
    """Cells of a row that attend in one batch, padded to the longest of them.

    Parameters
    ----------
    tokens
        Slice of the row that contains their tokens.
    cells, length
        Number of cells, and their padded length.
    places
        Indices of their tokens in the flattened cells x length, int64 (tokens,).
    queries, keys
        Indices into the row for each of cells x length and of cells x keys, int64. The keys are those of the prompt and
        the cell, padded to a multiple of ``KEYS``. Padding points to an arbitrary token.
    bias
        Added to the scores, (cells, 1, length, keys): 0 where a token may attend, minus infinity elsewhere.
    """

    tokens: slice
    cells: int
    length: int
    places: Tensor
    queries: Tensor
    keys: Tensor
    bias: Tensor

    @classmethod
    def of(cls, prompt: int, mask: Tensor, start: int, dtype: torch.dtype) -> "Part":
        """Return the part of cells with the tokens in ``mask``, bool (cells, length), which begins at ``start``."""
        places = mask.flatten().nonzero().squeeze(1)
        numbers = (mask.flatten().cumsum(0) - 1 + start).view(mask.shape).masked_fill_(~mask, 0)
        prompt_numbers = torch.arange(prompt, device=mask.device).expand(len(mask), -1)
        padding = -(prompt + mask.shape[1]) % KEYS
        keys = nn.functional.pad(torch.cat([prompt_numbers, numbers], dim=1), (0, padding))
        # Every query attends to the prompt, padding too: a softmax over no keys would be NaN.
        allowed = nn.functional.pad(_causal(mask.shape[1], mask.device) & mask[:, None], (prompt, 0), value=True)
        allowed = nn.functional.pad(allowed, (0, padding))[:, None]
        tokens = slice(start, start + len(places))
        return cls(tokens, *mask.shape, places, numbers.flatten(), keys.flatten(), _as_bias(allowed, dtype))

    def of_cells(self, by_cell: Tensor) -> Tensor:
        """Return the tokens without padding, (tokens, ...), of (cells, length, ...)."""
        return by_cell.flatten(0, 1).index_select(0, self.places)

    def by_cell(self, tokens: Tensor) -> Tensor:
        """Undo :meth:`of_cells`: return (cells, length, ...), zero at the padding."""
        padded = tokens.new_zeros(self.cells * self.length, *tokens.shape[1:])
        return padded.index_copy_(0, self.places, tokens).unflatten(0, (self.cells, self.length))


@dataclass(frozen=True)
class Row:
    """The layout of a packed row.

    Parameters
    ----------
    prompt
        Number of tokens of the shared prompt, at the start of the row; at least one.
    filling
        Number of tokens at the end of the row that belong to no cell.
    mask
        bool (cells, length): which tokens of each cell exist. The row contains only these.
    places
        Their indices in the flattened cells x length, int64 (tokens,).
    parts
        The cells, in order. On a CPU each part has few cells, so that cells sorted by length need little padding.
    prompt_bias
        Added to the scores among the prompt's tokens, (prompt, prompt).
    """

    prompt: int
    filling: int
    mask: Tensor
    places: Tensor
    parts: list[Part]
    prompt_bias: Tensor

    @classmethod
    def of(cls, prompt: int, mask: Tensor, dtype: torch.dtype) -> "Row":
        """Return the row of cells with the tokens in ``mask``, for scores of a dtype."""
        parts, start = [], prompt
        for part_mask in (mask,) if mask.is_cuda else mask.split(CELLS_IN_CACHE):
            if not mask.is_cuda:  # on a GPU, reading the longest length would wait for the device
                part_mask = part_mask[:, : int(part_mask.any(0).nonzero().max()) + 1]
            parts.append(Part.of(prompt, part_mask, start, dtype))
            start = parts[-1].tokens.stop
        places = mask.flatten().nonzero().squeeze(1)
        return cls(prompt, -start % TOKENS, mask, places, parts, _as_bias(_causal(prompt, mask.device), dtype))

    def join(self, of_prompt: Tensor, by_cell: Tensor) -> Tensor:
        """Pack (prompt, ...) and (cells, length, ...) into the row, (1, tokens, ...), with zeros as filling."""
        filling = of_prompt.new_zeros(self.filling, *of_prompt.shape[1:])
        return torch.cat([of_prompt, self.of_cells(by_cell), filling])[None]

    def positions(self) -> Tensor:
        """Return the position of each token in its own text, int64 (1, tokens)."""
        own = self.mask.long().cumsum(1) - 1 + self.prompt
        return self.join(torch.arange(self.prompt, device=own.device), own)

    def of_cells(self, by_cell: Tensor) -> Tensor:
        """Return the tokens without padding, (tokens, ...), of (cells, length, ...)."""
        return by_cell.flatten(0, 1).index_select(0, self.places)


def _causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _as_bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return softmax(q k' scale + bias) v, (batch, heads, queries, width), and what its gradient needs.

    In bfloat16 on CPUs this is much faster than fused attention for texts as short as a description.

    Parameters
    ----------
    q
        (batch, heads, queries, width).
    k, v
        (batch, groups, keys, width): consecutive heads share the keys and values of a group.
    bias
        Added to the scores, (batch, heads, queries, keys) or broadcastable to it.
    scale
        Factor of the scores.
    """
    rows, k, v = _by_group(q, k), k.contiguous(), v.contiguous()  # otherwise each product would copy them
    scores = rows @ k.transpose(-1, -2)
    head_scores = scores.view(*q.shape[:3], -1)
    torch.add(bias, head_scores, alpha=scale, out=head_scores)
    weights = scores.softmax(-1)
    return (weights @ v).view(q.shape), (rows, k, v, weights)


def differentiate_plainly(
    saved: tuple[Tensor, ...], grad_output: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v of :func:`attend_plainly`."""
    rows, k, v, weights = saved
    shape = grad_output.shape
    grad_output = _by_group(grad_output, k)
    grad_weights = grad_output @ v.transpose(-1, -2)
    grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    grad_q = (grad_scores @ k).mul_(scale).view(shape)
    grad_k = (rows.transpose(-1, -2) @ grad_scores).mul_(scale).transpose(-1, -2)
    grad_v = (grad_output.transpose(-1, -2) @ weights).transpose(-1, -2)
    return grad_q, grad_k, grad_v


def _by_group(by_head: Tensor, k: Tensor) -> Tensor:
    """Return (batch, heads, queries, width) as (batch, groups, heads per group x queries, width)."""
    return by_head.unflatten(1, (k.shape[1], -1)).flatten(2, 3)


class SharedPromptAttention(torch.autograd.Function):
    """Causal attention in a row: the prompt attends to itself, each cell to the prompt and to itself."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, row: Row, scale: float) -> Tensor:
        """Return the output, (1, tokens, heads, width), for (1, heads or groups, tokens, width)."""
        tokens = [states[0].transpose(0, 1) for states in (query, key, value)]  # (tokens, heads or groups, width)
        of_prompt = (states[: row.prompt].transpose(0, 1)[None] for states in tokens)
        prompt_output, saved = attend_plainly(*of_prompt, row.prompt_bias, scale)
        output = torch.empty_like(tokens[0], memory_format=torch.contiguous_format)
        output[: row.prompt] = prompt_output[0].transpose(0, 1)
        for part in row.parts:
            by_cell = (
                states.index_select(0, indices).unflatten(0, (part.cells, -1)).transpose(1, 2)
                for states, indices in zip(tokens, (part.queries, part.keys, part.keys), strict=True)
            )
            part_output, part_saved = attend_plainly(*by_cell, part.bias, scale)
            output[part.tokens] = part.of_cells(part_output.transpose(1, 2))
            saved += part_saved
        output[len(output) - row.filling :] = 0
        ctx.save_for_backward(*saved)
        ctx.row, ctx.scale = row, scale
        return output[None]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Return the gradients of query, key and value."""
        row, prompt, scale = ctx.row, ctx.row.prompt, ctx.scale
        saved, grad_output = ctx.saved_tensors, grad_output[0]
        grads_prompt = differentiate_plainly(saved[:4], grad_output[:prompt].transpose(0, 1)[None], scale)
        gradients = [grad_output.new_empty(len(grad_output), grad.shape[1], grad.shape[3]) for grad in grads_prompt]
        for gradient, grad_prompt in zip(gradients, grads_prompt, strict=True):
            gradient[:prompt] = grad_prompt[0].transpose(0, 1)
            gradient[len(gradient) - row.filling :] = 0
        for number, part in enumerate(row.parts, 1):
            grad_part = part.by_cell(grad_output[part.tokens]).transpose(1, 2)
            grad_q, *grads_kv = differentiate_plainly(saved[4 * number : 4 * number + 4], grad_part, scale)
            gradients[0][part.tokens] = part.of_cells(grad_q.transpose(1, 2))
            for gradient, grad_kv in zip(gradients[1:], grads_kv, strict=True):
                # all cells share the keys and values of the prompt
                gradient[:prompt] += grad_kv[:, :, :prompt].sum(0).transpose(0, 1)
                own = grad_kv[:, :, prompt : prompt + part.length]
                gradient[part.tokens] = part.of_cells(own.transpose(1, 2))
        return *(gradient.transpose(0, 1)[None] for gradient in gradients), None, None


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **kwargs
) -> tuple[Tensor, None]:
    """Return the output of attention, (1, tokens, heads, width), as transformers' attention interface expects.

    Parameters
    ----------
    module
        The layer.
    query, key, value
        (1, heads, tokens, width), of one row of tokens; keys and values may have fewer heads.
    attention_mask
        None: the keyword ``row`` says which tokens attend to which.
    scaling
        Factor of the scores.

    Raises
    ------
    ValueError
        If the model's layers do not pass the row on, or a text is longer than a layer's sliding window.
    """
    row: Row | None = kwargs.get("row")
    if row is None:
        raise ValueError("its layers do not pass the packed row on to the attention")
    window, length = kwargs.get("sliding_window"), row.prompt + row.mask.shape[1]
    if window and length > window:
        raise ValueError(f"its sliding window is {window} tokens, and a description with its prompt has {length}")
    return SharedPromptAttention.apply(query, key, value, row, scaling), None
