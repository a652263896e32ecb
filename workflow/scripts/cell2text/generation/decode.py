"""Greedy decoding of a batch of cells, with the probability of each chosen token."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from cell2text.errors import InputError
from cell2text.model.cell2text import Cell2Text


@dataclass(frozen=True)
class Written:
    """A generated text.

    Parameters
    ----------
    ids
        Token ids without the end token.
    log_probabilities
        Natural logarithm of the probability of each token, given all tokens before it.
    ended
        Whether the model generated the end token within the limit.
    """

    ids: list[int]
    log_probabilities: list[float]
    ended: bool


def check_limit(max_new_tokens: int | None, longest: int) -> None:
    """Raise an error if a limit would truncate a text like the longest training text.

    Parameters
    ----------
    max_new_tokens
        The config's ``generate.max_new_tokens``; None for no limit of its own.
    longest
        Number of tokens of the longest training text with its end token.
    """
    if max_new_tokens is not None and max_new_tokens < longest:
        raise InputError(
            "config: generate.max_new_tokens",
            f"{max_new_tokens} would truncate descriptions: the longest training text has {longest} tokens",
            f"Set at least {longest}, or remove the key",
        )


@torch.inference_mode()
def write_texts(
    model: Cell2Text,
    vectors: Tensor,
    lengths: Tensor,
    max_new_tokens: int,
    draft: Callable[[int, list[int]], list[int]] | None = None,
) -> list[Written]:
    """Append the most likely next token until the text of every cell has ended.

    Parameters
    ----------
    model
        Model in evaluation mode.
    vectors, lengths
        Input of its projector, (cells, ...) and (cells,).
    max_new_tokens
        Maximum length of a text, in tokens; longer texts, and those for which the language model has no positions,
        are truncated and marked as not ended.
    draft
        Returns from the number of a cell and the tokens of its text so far the tokens that probably follow.
        The model reads them in one pass and keeps those that it would have chosen itself, and its own token after them
        (arXiv 2211.17192). So the texts are the same without drafts, up to rounding; a good draft saves passes.

    Returns
    -------
    list of Written
        One per cell. The text of a cell does not depend on the other cells of its batch, up to rounding.
    """
    layers = DynamicCache(config=model.base_model.config).layers
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        draft = None  # a state that is not one of tokens cannot forget the rejected ones
    embeddings, mask = model.read_cells(vectors, lengths)
    end = model.tokenizer.eos_token_id
    if model.positions is not None:
        max_new_tokens = min(max_new_tokens, model.positions - embeddings.shape[1])
    # All of the prompt but its last token skips the head: its logits are not needed.
    last, mask = embeddings[:, -1:], mask[:, :-1]
    cache = model.base_model.get_decoder()(
        inputs_embeds=embeddings[:, :-1],
        attention_mask=mask.long(),
        past_key_values=DynamicCache() if draft else None,  # without sliding windows, which drop tokens
        use_cache=True,
        **_positions(model, mask),
    ).past_key_values
    ids: list[list[int]] = [[] for _ in vectors]
    log_probabilities: list[list[float]] = [[] for _ in vectors]
    cells = list(range(len(vectors)))  # whose texts have not ended
    while max_new_tokens > 0:
        room = [max_new_tokens - len(ids[cell]) - 1 for cell in cells]
        drafts = [draft(cell, ids[cell])[:most] if draft else [] for cell, most in zip(cells, room, strict=True)]
        drafted, is_drafted = _pad(drafts, mask.device)
        mask = torch.cat([mask, mask.new_ones(len(cells), 1), is_drafted], dim=1)
        output = model.language_model(
            inputs_embeds=torch.cat([last, model.embed_tokens(drafted)], dim=1),
            attention_mask=mask.long(),
            past_key_values=cache,
            use_cache=True,
            **_positions(model, mask, 1 + drafted.shape[1]),
        )
        cache, logits = output.past_key_values, output.logits.float()
        log_probability, token = (logits.max(-1).values - logits.logsumexp(-1)), logits.argmax(-1)
        kept = ((drafted == token[:, :-1]) & is_drafted).cumprod(1)
        lengths_kept = kept.sum(1)
        found = (part.tolist() for part in (lengths_kept, token, log_probability))  # one copy each from a GPU
        for cell, length, tokens, values in zip(cells, *found, strict=True):
            ids[cell] += tokens[: length + 1]
            log_probabilities[cell] += values[: length + 1]
        going_on = [row for row, cell in enumerate(cells) if end not in ids[cell] and len(ids[cell]) < max_new_tokens]
        if not going_on:
            break
        last = model.embed_tokens(token.gather(1, lengths_kept[:, None]))
        mask = torch.cat([mask[:, : mask.shape[1] - kept.shape[1]], kept.bool()], dim=1)
        if draft:
            rows = torch.tensor(going_on, device=mask.device)
            cells, last, mask = [cells[row] for row in going_on], last[rows], _cut(cache, rows, mask[rows])
    return [_cut_at_end(*row, end) for row in zip(ids, log_probabilities, strict=True)]


def _pad(drafts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return drafts as int64 (cells, longest), padded on the right, and their mask."""
    longest = max(map(len, drafts))
    padded = torch.tensor([one + [0] * (longest - len(one)) for one in drafts], dtype=torch.long, device=device)
    lengths = torch.tensor([len(one) for one in drafts], device=device)
    return padded, torch.arange(longest, device=device) < lengths[:, None]


def _cut(cache: DynamicCache, rows: Tensor, mask: Tensor) -> Tensor:
    """Cut a cache to some cells and to the tokens of their mask, and return the new mask.

    The tokens of each cell stay one after the other, with the padding on the left.
    """
    order = mask.to(torch.int8).argsort(dim=1, stable=True)[:, -int(mask.sum(1).max()) :]
    for layer in cache.layers:
        for name in ("keys", "values"):
            part = getattr(layer, name)[rows]
            index = order[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3])
            setattr(layer, name, part.gather(2, index))
    return mask.gather(1, order)


def _positions(model: Cell2Text, mask: Tensor, last: int | None = None) -> dict[str, Tensor]:
    """Return the position ids of all or the last tokens, which skip the padding; some models derive their own."""
    if not model.accepts("position_ids"):
        return {}
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return {"position_ids": positions if last is None else positions[:, -last:]}


def _cut_at_end(ids: list[int], log_probabilities: list[float], end: int) -> Written:
    length = ids.index(end) if end in ids else len(ids)
    return Written(ids[:length], log_probabilities[:length], length < len(ids))
