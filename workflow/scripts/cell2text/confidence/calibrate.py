"""Confidence fitted on the validation cells: calibration, thresholds of reported terms, and the limit of novelty."""

import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from cell2text.confidence.back_off import TermsAbove, choose_threshold
from cell2text.confidence.calibration import (
    MOST_CELLS,
    ProgrammeCalibration,
    SlotCalibration,
    calibrate_programmes,
    calibrate_slot,
)
from cell2text.confidence.decisions import FIX, Confidence, rank_programmes, read_ancestors, score_places
from cell2text.confidence.novelty import Reference, choose_limit, draw_cells
from cell2text.contracts import DESCRIPTIONS, EMBEDDINGS, SCORES, TERM_SLOTS
from cell2text.errors import InputError
from cell2text.files import read_json, whole_file
from cell2text.grammar import PATHWAY

log = logging.getLogger("cell2text.confidence")


def calibrate(
    model: str,
    scores: Sequence[str],
    descriptions: str,
    terms: str,
    embeddings: Sequence[str],
    calibration: str,
    reference: str,
    confidence: float,
    seed: int,
) -> None:
    """Fit how scores become confidences, and write it.

    Of more than 20,000 validation cells, as many are used, evenly spaced.

    Parameters
    ----------
    model
        Directory of the fine-tuned model.
    scores
        Files of ``contracts.SCORES`` of the validation cells.
    descriptions, terms
        Files of ``contracts.DESCRIPTIONS`` and ``contracts.TERMS``.
    embeddings
        Files of ``contracts.EMBEDDINGS`` of all cells.
    calibration, reference
        Output files: the fitted numbers as JSON, and the training cells that new cells are compared with.
    confidence
        The share of the reported terms that should be right.
    seed
        Seed of the draw of training cells.

    Raises
    ------
    InputError
        If there are fewer than two training cells.
    """
    labels = read_json(f"{model}/cell2text.json", FIX)["labels"]
    training, validation = _read_cells(descriptions, seed)
    wanted = [*labels, *(f"projector_{slot}" for slot in labels)]
    found = SCORES.read_cells(scores, validation["cell_id"], wanted)
    ancestors = read_ancestors(terms)
    slots, thresholds = {}, {}
    for slot in [slot for slot in TERM_SLOTS if slot in labels]:
        truth = validation[f"{slot}_id"].astype(object).where(validation[f"{slot}_id"].notna(), None).to_list()
        slots[slot] = calibrate_slot(found[slot], labels[slot], truth, found[f"projector_{slot}"])
        probabilities = slots[slot].probabilities(found[slot], found[f"projector_{slot}"])
        above = TermsAbove(labels[slot], ancestors[slot])
        thresholds[slot] = choose_threshold(above, probabilities, truth, confidence)
        log.info(
            "%s: weights of language model and projector %.2f and %.2f, terms are reported from probability %.2f (%s)",
            slot, *slots[slot].weights, thresholds[slot].value, thresholds[slot].note,
        )  # fmt: skip
    ranking, programmes = SlotCalibration(), ProgrammeCalibration()
    if PATHWAY in labels:
        ranking, programmes = _calibrate_programmes(found, labels[PATHWAY], validation["pathway_ids"])
    compared = Reference.of(EMBEDDINGS.read_cells(embeddings, training, ["pooled"])["pooled"])
    own = EMBEDDINGS.read_cells(embeddings, validation["cell_id"], ["pooled"])["pooled"]
    save_reference(compared, reference)
    Confidence(slots, thresholds, ranking, programmes, choose_limit(compared.novelty(own))).save(calibration)


def _read_cells(descriptions: str, seed: int) -> tuple[pd.Series, pd.DataFrame]:
    """Return the ids of the training cells to compare with, and the descriptions of the validation cells, no texts."""
    splits = DESCRIPTIONS.read(descriptions, ["split"], categories=["split"])["split"]
    training, validation = (np.flatnonzero(splits == split) for split in ("train", "validation"))
    if len(training) < 2:
        raise InputError(
            descriptions, f"{len(training)} training cells, with which no cell can be compared", "Add training cells"
        )
    training = training[draw_cells(len(training), seed)]
    validation = validation[:: -(-len(validation) // MOST_CELLS) or 1]
    columns, parts, start = ["cell_id", "split", "pathway_ids", *(f"{slot}_id" for slot in TERM_SLOTS)], [], 0
    wanted = np.isin(np.arange(len(splits)), np.concatenate([training, validation]))
    for part in DESCRIPTIONS.read_parts(descriptions, columns):
        parts.append(part[wanted[start : start + len(part)]])
        start += len(part)
    cells = pd.concat(parts)
    return cells.loc[cells["split"] == "train", "cell_id"], cells[cells["split"] == "validation"]


def _calibrate_programmes(
    scores: dict[str, np.ndarray], candidates: Sequence[str], truth: pd.Series
) -> tuple[SlotCalibration, ProgrammeCalibration]:
    """Weigh the scores of programmes so that the true ones are most likely, each after those before it."""
    numbers = pd.Index(candidates)
    places = scores[PATHWAY].shape[1]
    rows = [[*numbers.get_indexer(list(named)), *[-1] * places][:places] for named in truth]
    true = np.array(rows, dtype=np.int64).reshape(len(truth), places)
    parts = list(score_places(scores, true))
    language, projector = (np.concatenate(part) for part in zip(*parts, strict=True))
    named = np.append(np.array(candidates, dtype=object), None)[true.T.ravel()]
    ranking = calibrate_slot(language, candidates, named, projector)
    found, probabilities = rank_programmes(scores, ranking)
    right = (found[:, :, None] == true[:, None, :]).any(axis=2)
    log.info("programmes: weights of language model and projector %.2f and %.2f", *ranking.weights)
    return ranking, calibrate_programmes(probabilities, right)


def save_reference(reference: Reference, path: str) -> None:
    """Write the reference cells of novelty as safetensors."""
    with whole_file(path) as unfinished:
        save_file({"vectors": reference.vectors, "spread": reference.spread}, unfinished)
