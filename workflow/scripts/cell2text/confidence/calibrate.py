"""Confidence fitted on the validation cells: calibration, thresholds of reported terms, and the limit of novelty."""

import logging
from collections.abc import Sequence
from dataclasses import replace

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
from cell2text.confidence.cascade import choose_least_lead, find_leads
from cell2text.confidence.decisions import FIX, Confidence, rank_programmes, read_ancestors, score_places
from cell2text.confidence.novelty import Reference, choose_limit, draw_cells
from cell2text.contracts import DESCRIPTIONS, EMBEDDINGS, SCORES, TERM_SLOTS, datasets_of
from cell2text.errors import InputError
from cell2text.files import read_json, whole_file
from cell2text.grammar import PATHWAY

log = logging.getLogger("cell2text.confidence")


def calibrate(
    model: str,
    scores: Sequence[str],
    left_out: str | None,
    descriptions: str,
    terms: str,
    embeddings: Sequence[str],
    calibration: str,
    reference: str,
    confidence: float,
    seed: int,
    agreement: float | None = None,
) -> None:
    """Fit how scores become confidences, and write it.

    Of more than 20,000 validation cells, as many are used, evenly spaced.

    Parameters
    ----------
    model
        Directory of the fine-tuned model.
    scores
        Files of ``contracts.SCORES`` of the validation cells.
    left_out
        File of ``contracts.SCORES`` of training cells by projectors that have not seen their study; None, or without
        rows, if there are too few studies.
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
    agreement
        Share of the cells described by the projector alone that both models should describe alike; None if no cell
        is to be described by it alone.

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
    compared = Reference.of(EMBEDDINGS.read_cells(embeddings, training, ["pooled"])["pooled"])
    own = EMBEDDINGS.read_cells(embeddings, validation["cell_id"], ["pooled"])["pooled"]
    save_reference(compared, reference)
    limit = choose_limit(compared.novelty(own))
    fitted = _fit(found, labels, ancestors, validation, confidence, limit)
    new = _fit_new_studies(left_out, labels, ancestors, descriptions, confidence, limit) if left_out else None
    fitted = replace(fitted, studies=_find_studies(descriptions, labels), new_studies=new)
    if agreement is not None:
        alone = _fit_projector(found, labels, ancestors, validation, confidence, limit)
        fitted = _add_cascade(fitted, alone, found, labels, ancestors, agreement)
    fitted.save(calibration)


def _fit(
    scores: dict[str, np.ndarray],
    labels: dict[str, list[str]],
    ancestors: dict[str, dict[str, Sequence[str]]],
    cells: pd.DataFrame,
    confidence: float,
    limit: float | None,
) -> Confidence:
    """Fit calibrations and thresholds on the scores of cells, given as rows of ``contracts.DESCRIPTIONS``."""
    slots, thresholds = {}, {}
    for slot in [slot for slot in TERM_SLOTS if slot in labels]:
        truth = cells[f"{slot}_id"].astype(object).where(cells[f"{slot}_id"].notna(), None).to_list()
        language, projector = scores[slot], scores[f"projector_{slot}"]
        # A name without cells in the other studies was no candidate for a study left out of training.
        impossible = np.isneginf(projector[np.arange(len(truth)), pd.Index(labels[slot]).get_indexer(truth)])
        candidates = ["" if out and one else one for one, out in zip(truth, impossible, strict=True)]
        slots[slot] = calibrate_slot(language, labels[slot], candidates, projector)
        above = TermsAbove(labels[slot], ancestors[slot], slots[slot].none)
        probabilities = slots[slot].probabilities(language, projector)
        thresholds[slot] = choose_threshold(above, probabilities, truth, confidence)
        log.info(
            "%s: weights of language model and projector %.2f and %.2f, terms are reported from probability %.2f (%s)",
            slot, *slots[slot].weights, thresholds[slot].value, thresholds[slot].note,
        )  # fmt: skip
    ranking, programmes = SlotCalibration(), ProgrammeCalibration()
    if PATHWAY in labels:
        ranking, programmes = _calibrate_programmes(scores, labels[PATHWAY], cells["pathway_ids"])
    return Confidence(slots, thresholds, ranking, programmes, limit)


def _fit_new_studies(
    left_out: str,
    labels: dict[str, list[str]],
    ancestors: dict[str, dict[str, Sequence[str]]],
    descriptions: str,
    confidence: float,
    limit: float | None,
) -> Confidence | None:
    """Fit the confidence of cells of new studies, for which only the projector's scores are weighed.

    How the language model's scores should be weighed there is unknown: no language model was trained without a study.
    """
    scores, ids = SCORES.read(left_out, [])
    if not ids:
        return None
    scores, ids = SCORES.read(left_out, [f"projector_{slot}" for slot in labels])
    log.info("new studies: %d cells of studies that the projector had not seen", len(ids))
    return _fit_projector(scores, labels, ancestors, _read_rows(descriptions, ids), confidence, limit)


def _fit_projector(
    scores: dict[str, np.ndarray],
    labels: dict[str, list[str]],
    ancestors: dict[str, dict[str, Sequence[str]]],
    cells: pd.DataFrame,
    confidence: float,
    limit: float | None,
) -> Confidence:
    """Fit calibrations and thresholds as :func:`_fit` does, on the projector's scores alone."""
    alike, places = {}, cells["pathway_ids"].map(len).max()
    for slot in labels:
        projector = scores[f"projector_{slot}"]
        shape = (len(cells), places, len(labels[slot])) if slot == PATHWAY else projector.shape
        alike[slot] = np.zeros(shape, dtype=np.float32)
    log.info("the projector alone:")
    fitted = _fit(scores | alike, labels, ancestors, cells, confidence, limit)
    alone = {slot: _projector_alone(one) for slot, one in fitted.slots.items()}
    return replace(fitted, slots=alone, ranking=_projector_alone(fitted.ranking))


def _projector_alone(calibration: SlotCalibration) -> SlotCalibration:
    # without a labelled cell, nothing supports any of the names
    none = calibration.none if calibration.cells else 1.0
    return replace(calibration, weights=(0.0, calibration.weights[1]), none=none)


def _add_cascade(
    fitted: Confidence,
    alone: Confidence,
    scores: dict[str, np.ndarray],
    labels: dict[str, list[str]],
    ancestors: dict[str, dict[str, Sequence[str]]],
    agreement: float,
) -> Confidence:
    """Let the projector alone describe cells with a lead from which both confidences name the same on these cells."""
    both, one = (confidence.describe(scores, labels, ancestors) for confidence in (fitted, alone))
    named = [f"{slot}_id" for slot in TERM_SLOTS if slot in labels] + ["pathway_ids"]
    same = (both[named] == one[named]).all(axis=1).to_numpy(bool)
    leads = find_leads(scores, fitted.slots, fitted.ranking)
    least = choose_least_lead(leads, same, agreement)
    log.info(
        "the projector alone names %d of %d validation cells as both models do; %s", same.sum(), len(same),
        f"too few for an agreement of {agreement:.0%}: the language model reads all cells" if least is None
        else f"from a lead of {least:.2f} nats, which {(leads >= least).sum()} cells have, it describes cells alone",
    )  # fmt: skip
    return fitted if least is None else replace(fitted, least_lead=least, projector_alone=alone)


def _read_cells(descriptions: str, seed: int) -> tuple[pd.Series, pd.DataFrame]:
    """Return ids of training cells to compare with, and descriptions of the validation cells."""
    cells = DESCRIPTIONS.read(descriptions, ["cell_id", "split"], categories=["split"])
    training, validation = (np.flatnonzero(cells["split"] == split) for split in ("train", "validation"))
    if len(training) < 2:
        raise InputError(
            descriptions, f"{len(training)} training cells, with which no cell can be compared", "Add training cells"
        )
    ids, validation = cells["cell_id"], validation[:: -(-len(validation) // MOST_CELLS) or 1]
    return ids[training[draw_cells(len(training), seed)]], _read_rows(descriptions, ids[validation])


def _find_studies(descriptions: str, labels: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return for each slot the datasets with training cells whose term is known; of programmes all are."""
    columns = [f"{slot}_id" for slot in labels if slot != PATHWAY]
    cells = DESCRIPTIONS.read(descriptions, ["cell_id", "split", *columns], categories=["split", *columns])
    cells = cells[cells["split"] == "train"]
    dataset = datasets_of(cells["cell_id"])
    has_term = {slot: cells[f"{slot}_id"].notna() for slot in labels if slot != PATHWAY}
    return {slot: sorted(dataset[has_term.get(slot, slice(None))].unique()) for slot in labels}


def _read_rows(descriptions: str, cells: Sequence[str]) -> pd.DataFrame:
    """Return ids and gene programmes of some cells, in the given order, reading a part of the file at a time."""
    columns, wanted = ["cell_id", "pathway_ids", *(f"{slot}_id" for slot in TERM_SLOTS)], pd.Index(cells)
    parts = [part[part["cell_id"].isin(wanted)] for part in DESCRIPTIONS.read_parts(descriptions, columns)]
    return pd.concat(parts).set_index("cell_id").loc[wanted].reset_index()


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
