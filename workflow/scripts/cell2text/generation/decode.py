"""Greedy decoding of a batch of cells, with the probability of each chosen token."""

from dataclasses import dataclass

import torch
from torch import Tensor

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
def write_texts(model: Cell2Text, vectors: Tensor, lengths: Tensor, max_new_tokens: int) -> list[Written]:
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

    Returns
    -------
    list of Written
        One per cell. The text of a cell does not depend on the other cells of its batch, up to rounding.
    """
    embeddings, mask = model.read_cells(vectors, lengths)
    end = model.tokenizer.eos_token_id
    if model.positions is not None:
        max_new_tokens = min(max_new_tokens, model.positions - embeddings.shape[1])
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    ended = torch.zeros(len(vectors), dtype=torch.bool, device=mask.device)
    ids, log_probabilities = [], []
    # All of the prompt but its last token skips the head: its logits are not needed.
    cache = model.base_model.get_decoder()(
        inputs_embeds=embeddings[:, :-1],
        attention_mask=mask[:, :-1].long(),
        use_cache=True,
        **_positions(model, positions[:, :-1]),
    ).past_key_values
    embeddings, positions = embeddings[:, -1:], positions[:, -1:]
    for _ in range(max_new_tokens):
        output = model.language_model(
            inputs_embeds=embeddings,
            attention_mask=mask.long(),
            past_key_values=cache,
            use_cache=True,
            **_positions(model, positions),
        )
        cache = output.past_key_values
        logits = output.logits[:, -1].float()
        log_probability, token = (logits.max(1).values - logits.logsumexp(1)), logits.argmax(1)
        ids.append(token.masked_fill(ended, end))
        log_probabilities.append(log_probability)
        ended |= token == end
        if bool(ended.all()):
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions + 1
        embeddings = model.embed_tokens(ids[-1])[:, None]
    by_cell = torch.stack(ids, 1).tolist(), torch.stack(log_probabilities, 1).tolist()
    return [_cut_at_end(*row, end) for row in zip(*by_cell, strict=True)]


def _positions(model: Cell2Text, positions: Tensor) -> dict[str, Tensor]:
    """Return the position ids, which skip the padding, as an argument; some models take none and derive their own."""
    return {"position_ids": positions} if model.accepts("position_ids") else {}


def _cut_at_end(ids: list[int], log_probabilities: list[float], end: int) -> Written:
    length = ids.index(end) if end in ids else len(ids)
    return Written(ids[:length], log_probabilities[:length], length < len(ids))
