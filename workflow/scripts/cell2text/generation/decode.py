"""Greedy decoding of a batch of cells, with the probability of each token that was chosen."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cell2text.model.cell2text import Cell2Text


@dataclass(frozen=True)
class Written:
    """A text as the model wrote it.

    Parameters
    ----------
    ids
        Token ids without the end token.
    log_probabilities
        Natural logarithm of the probability of each of them, given all before.
    ended
        Whether the model ended the text itself, before the limit.
    """

    ids: list[int]
    log_probabilities: list[float]
    ended: bool


@torch.inference_mode()
def write_texts(model: Cell2Text, vectors: Tensor, lengths: Tensor, max_new_tokens: int) -> list[Written]:
    """Return the most likely next token again and again, until every cell's text has ended.

    Parameters
    ----------
    model
        In evaluation mode.
    vectors, lengths
        What its projector reads, (cells, ...) and (cells,).
    max_new_tokens
        Longest text, in tokens; longer ones are cut and marked as not ended.

    Returns
    -------
    list of Written
        One a cell. A cell's text does not depend on the others of its batch but for rounding.
    """
    embeddings, mask = model.read_cells(vectors, lengths)
    end = model.tokenizer.eos_token_id
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    ended = torch.zeros(len(vectors), dtype=torch.bool, device=mask.device)
    ids, chances, cache = [], [], None
    for _ in range(max_new_tokens):
        output = model.decoder(
            inputs_embeds=embeddings,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        # As a matrix: with a third dimension the head's weights would be copied for each cell of the prompt.
        logits = model.head(output.last_hidden_state[:, -1]).float()
        chance, token = (logits.max(1).values - logits.logsumexp(1)), logits.argmax(1)
        ids.append(token.masked_fill(ended, end))
        chances.append(chance)
        ended |= token == end
        if bool(ended.all()):
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
        embeddings = model.embed_tokens(ids[-1])[:, None]
    tokens, chances = torch.stack(ids, 1).tolist(), torch.stack(chances, 1).tolist()
    return [_cut(row, chance, end) for row, chance in zip(tokens, chances, strict=True)]


def _cut(ids: list[int], chances: list[float], end: int) -> Written:
    length = ids.index(end) if end in ids else len(ids)
    return Written(ids[:length], chances[:length], length < len(ids))
