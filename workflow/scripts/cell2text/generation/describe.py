"""Descriptions of cells: generated, parsed to slots with ids, each with the model's confidence."""

import logging
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from cell2text.contracts import CELLS, EMBEDDINGS, PREDICTIONS, TERM_SLOTS, TERMS, write_jsonl
from cell2text.descriptions import Slots, Terms, describe, parse, render
from cell2text.generation.greedy import Written, write_texts
from cell2text.model.alignment import LabelTargets
from cell2text.model.cell2text import Cell2Text, load
from cell2text.progress import Progress
from cell2text.vectors import Embeddings, Vectors

log = logging.getLogger("cell2text.generation")

CELLS_AT_ONCE = 4096


def describe_cells(model: Cell2Text, vectors: Vectors, terms: Terms, settings: dict) -> Iterator[dict]:
    """Yield what the model says of each cell: text, parse status, an id and a confidence a slot.

    Parameters
    ----------
    model
        In evaluation mode.
    vectors
        What its projector reads.
    terms
        The names that a text may use.
    settings
        The config's ``generate`` section.
    """
    progress = Progress(len(vectors), "cells")
    for start in range(0, len(vectors), settings["batch_cells"]):
        rows = np.arange(start, min(start + settings["batch_cells"], len(vectors)))
        batch = [part.to(model.device) for part in vectors[rows]]
        for written in write_texts(model, *batch, settings["max_new_tokens"]):
            yield read_text(written, terms, model.tokenizer)
        progress.advance(len(batch[0]))


def read_text(written: Written, terms: Terms, tokenizer: PreTrainedTokenizerBase) -> dict:
    """Return the text of one cell, its slots, and how sure the model was of each.

    The confidence of a slot is the probability that the model gave to the tokens of its name, given all that
    stands before: its own, not yet calibrated.
    """
    text, ends = decode(written.ids, tokenizer)
    parsed = parse(text, terms)
    status = parsed.status if written.ended or parsed.status == "failed" else "partial"
    row = {"text": text, "status": status, "pathway_ids": list(parsed.slots.pathways)}
    for slot in TERM_SLOTS:
        row[f"{slot}_id"] = getattr(parsed.slots, slot)
        row[f"{slot}_confidence"] = None
        if slot in parsed.spans:
            start, end = parsed.spans[slot]
            inside = (ends > start) & (np.concatenate([[0], ends[:-1]]) < end)
            row[f"{slot}_confidence"] = math.exp(float(np.sum(np.array(written.log_probabilities)[inside])))
    return row


def decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, np.ndarray]:
    """Return the text of token ids and where each token ends in it, int64 (tokens,)."""
    text = tokenizer.decode(ids)
    again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if again["input_ids"] == ids:
        return text, np.array([end for _, end in again["offset_mapping"]], dtype=np.int64)
    # The model cut a word into other tokens than the tokenizer does: decode ever longer beginnings.
    return text, np.array([len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))], dtype=np.int64)


def generate_descriptions(
    model: str,
    language_model: str,
    corpus: str,
    terms: str,
    embeddings: Embeddings,
    generations: str,
    split: str,
    settings: dict,
) -> None:
    """Describe the cells of a split that lie in the given shards of embeddings.

    Parameters
    ----------
    model, language_model
        Directories of the fine-tuned and the original model.
    corpus, terms
        Files of ``contracts.CELLS`` and ``contracts.TERMS``.
    embeddings
        Of the cells.
    generations
        Where the JSONL goes; one object a cell, with the fields of ``contracts.PREDICTIONS``.
    split
        Of the cells to describe.
    settings
        The config's ``generate`` section.
    """
    loaded = load(model, language_model).ready_to_write()
    cells = cells_in(embeddings.files, corpus, split)
    vectors = embeddings.vectors(cells["cell_id"].to_list(), loaded.projector.reads)
    said = describe_cells(loaded, vectors, Terms(TERMS.read(terms)), settings)
    rows = [{"cell_id": cell, "split": split, **row} for cell, row in zip(cells["cell_id"], said, strict=True)]
    counts = pd.Series([row["status"] for row in rows]).value_counts().sort_index().to_dict()
    log.info("%d cells of %s: %s", len(rows), split, counts)
    write_jsonl(rows, generations)


def describe_shuffled(
    model: str,
    language_model: str,
    corpus: str,
    terms: str,
    embeddings: Embeddings,
    predictions: str,
    splits: list[str],
    settings: dict,
    seed: int,
) -> None:
    """Describe each cell from the embedding of another cell of its split, chosen at random.

    A model that reads its cells falls to chance; one that does not, betrays itself by staying. Parameters are
    those of :func:`generate_descriptions`, but for ``predictions``, a table of ``contracts.PREDICTIONS``.
    """
    loaded, known = load(model, language_model).ready_to_write(), Terms(TERMS.read(terms))
    tables = []
    for split in splits:
        cells = cells_in(embeddings.files, corpus, split)["cell_id"].to_numpy()
        # Moved on by one along a random order, no cell keeps its own embedding.
        order = np.random.default_rng(seed).permutation(len(cells))
        others = np.empty_like(cells)
        others[order] = cells[np.roll(order, 1)]
        vectors = embeddings.vectors(others.tolist(), loaded.projector.reads)
        said = pd.DataFrame(describe_cells(loaded, vectors, known, settings))
        tables.append(said.assign(cell_id=cells, split=split))
    PREDICTIONS.write(pd.concat(tables, ignore_index=True)[list(PREDICTIONS.columns)], predictions)


@torch.no_grad()
def describe_aligned(
    model: str,
    language_model: str,
    corpus: str,
    terms: str,
    embeddings: Embeddings,
    predictions: str,
    splits: list[str],
) -> None:
    """Say of each cell the labels whose words its soft tokens are nearest to: what the projector alone knows.

    The confidence is the softmax over a slot's labels. Of gene sets nothing is said. Parameters are those of
    :func:`generate_descriptions`, but for ``predictions``, a table of ``contracts.PREDICTIONS``.
    """
    loaded, table = load(model, language_model), TERMS.read(terms)
    # in the order in which slots have their soft tokens; the file has them by name
    labels = {slot: loaded.settings["labels"][slot] for slot in TERM_SLOTS if slot in loaded.settings["labels"]}
    known = Terms(table)
    to_descriptions = loaded.settings["finetune"].get("align_to") == "descriptions"
    targets_of = LabelTargets.of_sentences if to_descriptions else LabelTargets.of_labels
    targets = targets_of(labels, table, loaded)
    tables = []
    for split in splits:
        cells = cells_in(embeddings.files, corpus, split)["cell_id"].to_numpy()
        vectors = embeddings.vectors(cells.tolist(), loaded.projector.reads)
        for rows in np.array_split(np.arange(len(cells)), math.ceil(len(cells) / CELLS_AT_ONCE)):
            batch = [part.to(loaded.device) for part in vectors[rows]]
            said = {"cell_id": cells[rows], "split": split, "status": "parsed", "pathway_ids": [[]] * len(rows)}
            for (slot, ids), scores in zip(labels.items(), targets.scores(*loaded.projector(*batch)), strict=True):
                confidence, best = scores.softmax(-1).cpu().max(-1)
                said[f"{slot}_id"] = np.array(ids, dtype=object)[best.numpy()]
                said[f"{slot}_confidence"] = confidence.numpy()
            tables.append(pd.DataFrame(said).reindex(columns=list(PREDICTIONS.columns)))
    told = pd.concat(tables, ignore_index=True)
    slots = told[[f"{slot}_id" for slot in TERM_SLOTS]].astype(object).where(told.notna(), None)
    told["text"] = [
        render(describe(Slots(**dict(zip(TERM_SLOTS, row, strict=True))), known), known)
        for row in slots.itertuples(index=False, name=None)
    ]
    PREDICTIONS.write(told, predictions)


def cells_in(embeddings: Sequence[str], corpus: str, split: str) -> pd.DataFrame:
    """Return the cells of a split that the given shards of embeddings hold, in corpus order."""
    cells = CELLS.read(corpus, ["cell_id", "split"])
    here = {cell for path in embeddings for cell in EMBEDDINGS.read(path, [])[1]}
    return cells[(cells["split"] == split) & cells["cell_id"].isin(here)]
