"""Baseline from the projector alone: the label nearest to a cell's soft tokens."""

import math

import numpy as np
import pandas as pd
import torch

from cell2text.contracts import PREDICTIONS, TERM_SLOTS, TERMS
from cell2text.embedding.vectors import Embeddings
from cell2text.evaluation.baselines.slots import write_predictions
from cell2text.generation.describe import cells_in
from cell2text.grammar import PATHWAY
from cell2text.model.alignment import LabelTargets, order_slots
from cell2text.model.bundle import load_projector

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
    """Predict for each slot the label whose words are nearest to the cell's soft tokens, with the projector alone.

    The words are embedded by the original language model, as in the alignment; ``mode: full`` changes the embeddings
    afterwards. The confidence is the softmax over the labels of a slot. Of the gene programmes, the nearest are
    predicted, as many as a training text has. The parameters are those of :func:`score_candidates`, except
    ``predictions``: the file of ``contracts.PREDICTIONS`` to write.
    """
    loaded, table = load_projector(model, language_model), TERMS.read(terms)
    labels = order_slots(loaded.about["labels"])
    targets = LabelTargets.of_model(labels, table, loaded)
    tables = []
    for split in splits:
        cells = cells_in(embeddings.files, corpus, split)["cell_id"].to_numpy()
        vectors = embeddings.vectors(cells.tolist(), loaded.projector.reads)
        for rows in np.array_split(np.arange(len(cells)), max(math.ceil(len(cells) / CELLS_AT_ONCE), 1)):
            batch = [part.to(loaded.device) for part in vectors[rows]]
            predicted = {"cell_id": cells[rows], "split": split, "pathway_ids": [[]] * len(rows)}
            for (slot, ids), scores in zip(labels.items(), targets.scores(*loaded.projector(*batch)), strict=True):
                confidence, order = scores.softmax(-1).cpu().sort(descending=True, stable=True)
                most = loaded.about["programmes_per_cell"] if slot == PATHWAY else 1
                best = np.array(ids, dtype=object)[order[:, :most].numpy()]
                if slot == PATHWAY:
                    predicted["pathway_ids"] = best.tolist()
                else:
                    predicted[f"{slot}_id"] = best[:, 0]
                    predicted[f"{slot}_confidence"] = confidence[:, 0].numpy()
            tables.append(pd.DataFrame(predicted).reindex(columns=list(PREDICTIONS.columns)))
    result = pd.concat(tables, ignore_index=True)
    ids = [f"{slot}_id" for slot in TERM_SLOTS]
    result[ids] = result[ids].astype(object).where(result[ids].notna(), None)
    write_predictions(result, terms, predictions)
