"""Descriptions of cells: generated, and parsed to ids of slots with the model's confidence."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from cell2text.contracts import CELLS, EMBEDDINGS, TERM_SLOTS
from cell2text.embedding.vectors import Vectors
from cell2text.generation.decode import Written, check_limit, write_texts
from cell2text.generation.drafts import Drafts
from cell2text.grammar import PATHWAY, Terms, parse
from cell2text.model.cell2text import Cell2Text
from cell2text.progress import Progress

# A description may be longer than all training texts, because it combines names that they do not.
MARGIN = 1.25
LOGITS = 1 << 27  # in memory at once, 512 MB in float32


def describe_cells(
    model: Cell2Text,
    vectors: Vectors,
    terms: Terms,
    batch_cells: int,
    max_new_tokens: int | None,
    drafts: Drafts | None = None,
) -> Iterator[dict]:
    """Yield the text of each cell, its parse status, and an id and a confidence for each slot.

    Parameters
    ----------
    model
        Model in evaluation mode.
    vectors
        Input of its projector.
    terms
        Terms that a text may name.
    batch_cells
        Number of cells per batch; fewer are read together if their logits take too much memory.
    max_new_tokens
        The config's ``generate.max_new_tokens``; None for no limit of its own.
    drafts
        Drafts of the texts, which save time.
    """
    longest = model.about["longest_text"]
    check_limit(max_new_tokens, longest)
    limit = max_new_tokens or math.ceil(MARGIN * longest)
    if drafts:
        batch_cells = min(batch_cells, max(1, LOGITS // (model.vocabulary * longest)))
    progress = Progress(len(vectors), "cells")
    for start in range(0, len(vectors), batch_cells):
        rows = np.arange(start, min(start + batch_cells, len(vectors)))
        batch = [part.to(model.device) for part in vectors[rows]]
        draft = drafts.of_cells_from(start) if drafts else None
        for written in write_texts(model, *batch, limit, draft):
            yield read_text(written, terms, model.tokenizer)
        progress.advance(len(batch[0]))


def read_text(written: Written, terms: Terms, tokenizer: PreTrainedTokenizerBase) -> dict:
    """Return the text of one cell, its slots and their confidences.

    The confidence of a slot is the model's probability of the tokens of its piece, see ``grammar.pieces``, given all
    tokens before them. It is not calibrated.
    """
    text, ends = decode(written.ids, tokenizer)
    parsed = parse(text, terms)
    status = parsed.status if written.ended or parsed.status == "failed" else "partial"
    row = {"text": text, "status": status, "pathway_ids": list(parsed.slots.pathways)}
    row |= {f"{slot}_id": getattr(parsed.slots, slot) for slot in TERM_SLOTS}
    row |= {f"{slot}_confidence": None for slot in TERM_SLOTS}
    starts, log_probabilities = np.concatenate([[0], ends[:-1]]), np.array(written.log_probabilities)
    for slot, start, end in parsed.pieces:
        if slot != PATHWAY:
            inside = (ends > start) & (starts < end)
            row[f"{slot}_confidence"] = math.exp(float(log_probabilities[inside].sum()))
    return row


def decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, np.ndarray]:
    """Return the text of token ids and where each token ends in it, int64 (tokens,)."""
    text = tokenizer.decode(ids)
    again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if again["input_ids"] == ids:
        return text, np.array([end for _, end in again["offset_mapping"]], dtype=np.int64)
    # The model split a word differently from the tokenizer: decode every prefix.
    return text, np.array([len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))], dtype=np.int64)


def cells_in(embeddings: Sequence[str], corpus: str, split: str) -> pd.DataFrame:
    """Return the cells of a split in the given shards of embeddings, in corpus order."""
    cells = CELLS.read(corpus, ["cell_id", "split"])
    present = {cell for path in embeddings for cell in EMBEDDINGS.read(path, [])[1]}
    return cells[(cells["split"] == split) & cells["cell_id"].isin(present)]
