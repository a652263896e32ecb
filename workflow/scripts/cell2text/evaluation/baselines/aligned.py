"""Baseline of the language half: the label whose name a cell's soft tokens are nearest to."""

import math

import numpy as np
import pandas as pd
import torch

from cell2text.contracts import PREDICTIONS, TERM_SLOTS, TERMS
from cell2text.embedding.vectors import Embeddings
from cell2text.generation.describe import cells_in
from cell2text.grammar import Slots, Terms, render, with_definition
from cell2text.model.alignment import LabelTargets
from cell2text.model.bundle import load

CELLS_AT_ONCE = 4096


@torch.no_grad()
def predict_aligned(
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
        render(with_definition(Slots(**dict(zip(TERM_SLOTS, row, strict=True))), known), known)
        for row in slots.itertuples(index=False, name=None)
    ]
    PREDICTIONS.write(told, predictions)
