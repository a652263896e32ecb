"""The candidate names of a cell, as the tokens that the language model was trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from cell2text.grammar import PATHWAY, Slots, Terms, pieces, render


@dataclass(frozen=True)
class Candidates:
    """The candidates of one step, which are names of one slot.

    Parameters
    ----------
    slot
        Name of the slot; each gene programme of a description is a step of its own.
    ids
        Id of each candidate.
    tokens
        Token ids of each candidate: its name with the words that introduce it and what terminates it.
    """

    slot: str
    ids: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]

    def take(self, some: Sequence[int]) -> "Candidates":
        """Return the candidates with some indices."""
        return Candidates(self.slot, tuple(self.ids[i] for i in some), tuple(self.tokens[i] for i in some))


def find_candidates(
    labels: Mapping[str, Sequence[str]], programmes_per_cell: int, terms: Terms, tokenizer: PreTrainedTokenizerBase
) -> list[Candidates]:
    """Return the candidates of each step, in the order of the text.

    Tokens are those of a whole description in which the slots of all steps are known.

    Parameters
    ----------
    labels
        Ids of the candidates of each slot, as in ``cell2text.json``; those of gene programmes under ``pathway``.
    programmes_per_cell
        Number of gene programmes in a description.
    terms
        Names and explanations.
    tokenizer
        Tokenizer of the language model.
    """
    programmes = tuple(labels.get(PATHWAY, ()))[:programmes_per_cell]
    example = Slots(**{slot: ids[0] for slot, ids in labels.items() if slot != PATHWAY}, pathways=programmes)
    found, programme = [], 0
    for number, (slot, _) in enumerate(pieces(example, terms)):
        if slot == PATHWAY:
            before, after = programmes[:programme], programmes[programme + 1 :]
            variants = [replace(example, pathways=(*before, name, *after)) for name in labels[slot]]
            programme += 1
        else:
            variants = [replace(example, **{slot: name}) for name in labels[slot]]
        found.append(Candidates(slot, tuple(labels[slot]), tuple(_tokens_of(number, variants, terms, tokenizer))))
    return found


def _tokens_of(
    piece: int, variants: Sequence[Slots], terms: Terms, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, ...]]:
    """Return the tokens of one piece of each description, cut out of the tokens of the description."""
    encoded = tokenizer(
        [render(slots, terms) for slots in variants], add_special_tokens=False, return_offsets_mapping=True
    )
    tokens = []
    for slots, ids, offsets in zip(variants, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        borders = np.cumsum([0, *(len(text) for _, text in pieces(slots, terms))])
        # A token belongs to the piece in which it ends; some tokenizers begin a text with an empty token.
        first, last = borders[piece] if piece else -1, borders[piece + 1]
        tokens.append(tuple(token for token, (_, end) in zip(ids, offsets, strict=True) if first < end <= last))
    return tokens
