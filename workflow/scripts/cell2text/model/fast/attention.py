"""Attention over many texts that begin with the same prompt, which is read once.

The tokens stand in one row: the prompt, then the rest of each cell, then a few that fill it up. Each of them passes
through the layers once; only here do cells part, each seeing the prompt and itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NAME = "shared_prompt"
# Lines of scores of a multiple of so many numbers fill a CPU's vectors, and those of so many cells its cache.
KEYS, CELLS_IN_CACHE = 16, 8
# Rows are filled up to a multiple of so many tokens: oneDNN takes milliseconds for the first product of each new size.
TOKENS = 32


@dataclass(frozen=True)
class Part:
    """Cells of a row that attend together, padded to the longest of them.

    Parameters
    ----------
    tokens
        Where the row holds them.
    cells, length
        Their number, and the padded length.
    places
        Where their tokens are among all cells x length, int64 (tokens,).
    queries, keys
        Which token of the row each of cells x length is, and each of cells x keys, int64: the keys are those of the
        prompt and the cell, filled up to a multiple of ``KEYS``. Any token stands for one that is not there.
    hidden
        What is added to the scores, (cells, 1, length, keys): 0 where a token may look, else minus infinity.
    """

    tokens: slice
    cells: int
    length: int
    places: Tensor
    queries: Tensor
    keys: Tensor
    hidden: Tensor

    @classmethod
    def of(cls, prompt: int, there: Tensor, start: int, dtype: torch.dtype) -> "Part":
        """Return the part of cells whose tokens are ``there``, bool (cells, length), from a token of the row on."""
        places = there.flatten().nonzero().squeeze(1)
        numbers = (there.flatten().cumsum(0) - 1 + start).view(there.shape).masked_fill_(~there, 0)
        of_prompt = torch.arange(prompt, device=there.device).expand(len(there), -1)
        missing = -(prompt + there.shape[1]) % KEYS
        keys = nn.functional.pad(torch.cat([of_prompt, numbers], dim=1), (0, missing))
        # Every token sees the prompt, so that no line of scores is empty, even of one that is not there.
        seen = nn.functional.pad(_causal(there.shape[1], there.device) & there[:, None], (prompt, 0), value=True)
        seen = nn.functional.pad(seen, (0, missing))[:, None]
        tokens = slice(start, start + len(places))
        return cls(tokens, *there.shape, places, numbers.flatten(), keys.flatten(), _hide(seen, dtype))

    def of_cells(self, by_cell: Tensor) -> Tensor:
        """Return the tokens that are there, (tokens, ...), of (cells, length, ...)."""
        return by_cell.flatten(0, 1).index_select(0, self.places)

    def by_cell(self, tokens: Tensor) -> Tensor:
        """Undo :meth:`of_cells`: return (cells, length, ...), zero where no token is."""
        padded = tokens.new_zeros(self.cells * self.length, *tokens.shape[1:])
        return padded.index_copy_(0, self.places, tokens).unflatten(0, (self.cells, self.length))


@dataclass(frozen=True)
class Row:
    """Where the tokens of a row belong.

    Parameters
    ----------
    prompt
        Number of tokens of the shared prompt, at the row's beginning; at least one.
    filling
        Number of tokens at its end that belong to no cell.
    there
        bool (cells, length): which of a cell's tokens are there. The row holds these alone.
    places
        Where they are among all cells x length, int64 (tokens,).
    parts
        The cells, in their order. On a CPU a part is of few, so that cells sorted by length cost little padding.
    hidden_in_prompt
        What is added to the scores among the prompt's tokens, (prompt, prompt).
    """

    prompt: int
    filling: int
    there: Tensor
    places: Tensor
    parts: list[Part]
    hidden_in_prompt: Tensor

    @classmethod
    def of(cls, prompt: int, there: Tensor, dtype: torch.dtype) -> "Row":
        """Return the row of cells whose tokens are ``there``, for scores of a dtype."""
        parts, start = [], prompt
        for some in (there,) if there.is_cuda else there.split(CELLS_IN_CACHE):
            if not there.is_cuda:  # where the count would have to be waited for
                some = some[:, : int(some.any(0).nonzero().max()) + 1]
            parts.append(Part.of(prompt, some, start, dtype))
            start = parts[-1].tokens.stop
        places = there.flatten().nonzero().squeeze(1)
        return cls(prompt, -start % TOKENS, there, places, parts, _hide(_causal(prompt, there.device), dtype))

    def join(self, of_prompt: Tensor, by_cell: Tensor) -> Tensor:
        """Return the row, (1, tokens, ...), of (prompt, ...) and (cells, length, ...); zeros fill it up."""
        filling = of_prompt.new_zeros(self.filling, *of_prompt.shape[1:])
        return torch.cat([of_prompt, self.of_cells(by_cell), filling])[None]

    def positions(self) -> Tensor:
        """Return the position of each token in its own text, int64 (1, tokens)."""
        own = self.there.long().cumsum(1) - 1 + self.prompt
        return self.join(torch.arange(self.prompt, device=own.device), own)

    def of_cells(self, by_cell: Tensor) -> Tensor:
        """Return the tokens that are there, (tokens, ...), of (cells, length, ...)."""
        return by_cell.flatten(0, 1).index_select(0, self.places)


def _causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _hide(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return softmax(q k' scale + hidden) v, (batch, heads, queries, width), and what its gradient needs.

    In bfloat16 on CPUs this is much faster than fused attention at the lengths of a description.

    Parameters
    ----------
    q
        (batch, heads, queries, width).
    k, v
        (batch, groups, keys, width): so many heads, one after the other, share those of a group.
    hidden
        Added to the scores, (batch, heads, queries, keys) or what broadcasts to it.
    scale
        Of the scores.
    """
    rows, k, v = _in_groups(q, k), k.contiguous(), v.contiguous()  # else each product would copy them
    scores = rows @ k.transpose(-1, -2)
    of_heads = scores.view(*q.shape[:3], -1)
    torch.add(hidden, of_heads, alpha=scale, out=of_heads)
    shares = scores.softmax(-1)
    return (shares @ v).view(q.shape), (rows, k, v, shares)


def differentiate_plainly(saved: tuple[Tensor, ...], of_output: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v of :func:`attend_plainly`."""
    rows, k, v, shares = saved
    shape = of_output.shape
    of_output = _in_groups(of_output, k)
    of_shares = of_output @ v.transpose(-1, -2)
    of_scores = torch.ops.aten._softmax_backward_data(of_shares, shares, -1, shares.dtype)
    of_q = (of_scores @ k).mul_(scale).view(shape)
    of_k = (rows.transpose(-1, -2) @ of_scores).mul_(scale).transpose(-1, -2)
    of_v = (of_output.transpose(-1, -2) @ shares).transpose(-1, -2)
    return of_q, of_k, of_v


def _in_groups(of_heads: Tensor, k: Tensor) -> Tensor:
    """Return (batch, heads, queries, width) as (batch, groups, heads of a group x queries, width)."""
    return of_heads.unflatten(1, (k.shape[1], -1)).flatten(2, 3)


class SharedPromptAttention(torch.autograd.Function):
    """The attention of a row: the prompt's tokens among themselves, each cell's to the prompt and its own."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, row: Row, scale: float) -> Tensor:
        """Return the output, (1, tokens, heads, width), for (1, heads or groups, tokens, width)."""
        tokens = [states[0].transpose(0, 1) for states in (query, key, value)]  # (tokens, heads or groups, width)
        of_prompt = (states[: row.prompt].transpose(0, 1)[None] for states in tokens)
        in_prompt, saved = attend_plainly(*of_prompt, row.hidden_in_prompt, scale)
        output = torch.empty_like(tokens[0], memory_format=torch.contiguous_format)
        output[: row.prompt] = in_prompt[0].transpose(0, 1)
        for part in row.parts:
            by_cell = (
                states.index_select(0, which).unflatten(0, (part.cells, -1)).transpose(1, 2)
                for states, which in zip(tokens, (part.queries, part.keys, part.keys), strict=True)
            )
            in_cells, saved_cells = attend_plainly(*by_cell, part.hidden, scale)
            output[part.tokens] = part.of_cells(in_cells.transpose(1, 2))
            saved += saved_cells
        output[len(output) - row.filling :] = 0
        ctx.save_for_backward(*saved)
        ctx.row, ctx.scale = row, scale
        return output[None]

    @staticmethod
    @once_differentiable
    def backward(ctx, of_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Return the gradients of query, key and value."""
        row, prompt, scale = ctx.row, ctx.row.prompt, ctx.scale
        saved, of_output = ctx.saved_tensors, of_output[0]
        from_prompt = differentiate_plainly(saved[:4], of_output[:prompt].transpose(0, 1)[None], scale)
        gradients = [
            of_output.new_empty(len(of_output), gradient.shape[1], gradient.shape[3]) for gradient in from_prompt
        ]
        for gradient, start in zip(gradients, from_prompt, strict=True):
            gradient[:prompt] = start[0].transpose(0, 1)
            gradient[len(gradient) - row.filling :] = 0
        for number, part in enumerate(row.parts, 1):
            of_cells = part.by_cell(of_output[part.tokens]).transpose(1, 2)
            of_q, *of_keys = differentiate_plainly(saved[4 * number : 4 * number + 4], of_cells, scale)
            gradients[0][part.tokens] = part.of_cells(of_q.transpose(1, 2))
            for gradient, of_key in zip(gradients[1:], of_keys, strict=True):
                # keys and values of the prompt serve every cell
                gradient[:prompt] += of_key[:, :, :prompt].sum(0).transpose(0, 1)
                own = of_key[:, :, prompt : prompt + part.length]
                gradient[part.tokens] = part.of_cells(own.transpose(1, 2))
        return *(gradient.transpose(0, 1)[None] for gradient in gradients), None, None


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
    ValueError
        If the model's layers do not pass the row on, or a text is longer than a layer's sliding window.
    """
    row: Row | None = kwargs.get("row")
    if row is None:
        raise ValueError("its layers do not hand the row to the attention")
    window, length = kwargs.get("sliding_window"), row.prompt + row.there.shape[1]
    if window and length > window:
        raise ValueError(f"its attention looks {window} tokens back, and a description with its prompt has {length}")
    return SharedPromptAttention.apply(query, key, value, row, scaling), None
