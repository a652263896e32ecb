"""The probabilities of the cell types of a whole file, refined among its similar cells."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cell2text.annotation.pack_model import REFINEMENT, read_facts
from cell2text.confidence.decisions import FIX, Confidence
from cell2text.confidence.novelty import Reference
from cell2text.confidence.refinement import SLOT, Refinement
from cell2text.contracts import EMBEDDINGS, REFINED, SCORES
from cell2text.weights import read_weights

log = logging.getLogger("cell2text.annotation")


def refine_query(model: str, scores: Sequence[str], embeddings: Sequence[str], refined: Sequence[str]) -> None:
    """Refine the cell types of a file and write their probabilities, a file for each of the scores.

    Parameters
    ----------
    model
        Folder of a packed model.
    scores, embeddings
        Files of ``contracts.SCORES`` and ``contracts.EMBEDDINGS`` of all cells; the i-th of both have the same cells.
    refined
        Output files (``contracts.REFINED``).
    """
    folder, names = Path(model), [*read_facts(model)["labels"]]
    confidence = Confidence.load(folder / "confidence.json").of_new_study
    refinement = Refinement.load(folder / REFINEMENT)
    reference = Reference(**read_weights(folder / "reference.safetensors", FIX, "numpy"))
    cells, probabilities, vectors, measured = [], [], [], []
    for path, vectors_of_path in zip(scores, embeddings, strict=True):
        found, ids = SCORES.read(path, [*names, *(f"projector_{slot}" for slot in names)])
        read = EMBEDDINGS.read_cells([vectors_of_path], ids, ["pooled", "lengths"])
        found["novelty"] = reference.novelty(read["pooled"])
        cells.append(ids)
        probabilities.append(confidence.probabilities_of_each(SLOT, found))
        vectors.append(read["pooled"])
        measured.append(read["lengths"] > 0)
    before = np.concatenate(probabilities)
    after = refinement.refine(before, np.concatenate(vectors), np.concatenate(measured))
    changed = (before.argmax(axis=1) != after.argmax(axis=1)).mean() if len(before) else 0.0
    log.info("weight %g: another cell type for %.1f%% of %d cells", refinement.weight, 100 * changed, len(before))
    ends = np.cumsum([len(ids) for ids in cells])[:-1]
    for path, ids, part in zip(refined, cells, np.split(after, ends), strict=True):
        REFINED.write({SLOT: part.astype(np.float32)}, ids, path)
