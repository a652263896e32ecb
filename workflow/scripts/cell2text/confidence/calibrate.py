"""Calibration on the validation cells, the cells that the projector describes alone, and the limit of novelty."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from cell2text.confidence.calibration import (
    MOST_CELLS,
    ProgrammeCalibration,
    SlotCalibration,
    calibrate_programmes,
    calibrate_slot,
)
from cell2text.confidence.cascade import choose_least_lead, find_leads
from cell2text.confidence.decisions import FIX, Confidence, rank_programmes, score_places
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
    embeddings: Sequence[str],
    calibration: str,
    reference: str,
    seed: int,
    by: str = "model",
    agreement: float | None = None,
) -> None:
    """Fit how scores become probabilities, and write it; thresholds follow in ``choose_thresholds``.

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
    descriptions
        File of ``contracts.DESCRIPTIONS``.
    embeddings
        Files of ``contracts.EMBEDDINGS`` of all cells.
    calibration, reference
        Output files: the fitted numbers as JSON, and the training cells that new cells are compared with.
    seed
        Seed of the draw of training cells.
    by, agreement
        The config's ``generate.by`` and ``generate.agreement``.

    Raises
    ------
    InputError
        If there are fewer than two training cells.
    """
    about = read_json(f"{model}/cell2text.json", FIX)
    labels = about["labels"]
    training, validation = _read_training_cells(descriptions, labels), read_validation_cells(descriptions)
    drawn = training.iloc[draw_cells(len(training), seed)]
    types = pd.Index(labels["cell_type"]).get_indexer(drawn["cell_type_id"]) if "cell_type" in labels else None
    compared = Reference.of(EMBEDDINGS.read_cells(embeddings, drawn["cell_id"], ["pooled"])["pooled"], types)
    own = EMBEDDINGS.read_cells(embeddings, validation["cell_id"], ["pooled"])["pooled"]
    save_reference(compared, reference)
    limit = choose_limit(compared.novelty(own))
    found = read_scores(scores, validation, labels)
    shares = _find_shares(training, labels)
    # a projector that names all cells is not weighed against a language model, which a new file would need then
    alone = _fit_projector(found, about, shares, validation, limit) if by != "model" else None
    fitted = alone if by == "projector" else _fit(found, labels, shares, validation, limit)
    fitted = replace(fitted, studies=_find_studies(training, labels))
    new, cells = read_left_out(left_out, descriptions, labels)
    if len(cells):
        # How the language model's scores should be weighed in new studies is unknown: none was trained without a study.
        log.info("new studies: %d cells of studies that the projector had not seen", len(cells))
        fitted = replace(fitted, new_studies=_fit_projector(new, about, shares, cells, limit))
    if by == "cascade":
        fitted = _add_cascade(fitted, alone, found, agreement)
    _log_weights(fitted, "")
    if fitted.projector_alone:
        _log_weights(fitted.projector_alone, "the projector alone, ")
    if fitted.new_studies:
        _log_weights(fitted.new_studies, "new studies, ")
    fitted.save(calibration)


def _log_weights(fitted: Confidence, where: str) -> None:
    for slot, one in (fitted.slots | {"programmes": fitted.ranking}).items():
        line = "%s%s: weights of language model, projector and share of training cells %.2f, %.2f and %.2f"
        log.info(line, where, slot, *one.weights, one.share_weight)


def read_validation_cells(descriptions: str) -> pd.DataFrame:
    """Return rows of ``contracts.DESCRIPTIONS`` of at most 20,000 validation cells, evenly spaced."""
    cells = DESCRIPTIONS.read(descriptions, ["cell_id", "split"], categories=["split"])
    rows = np.flatnonzero(cells["split"] == "validation")
    return _read_rows(descriptions, cells["cell_id"][rows[:: -(-len(rows) // MOST_CELLS) or 1]])


def read_scores(
    scores: Sequence[str], cells: pd.DataFrame, labels: Mapping[str, Sequence[str]]
) -> dict[str, np.ndarray]:
    """Return the scores of both models of some cells, from files of ``contracts.SCORES``."""
    return SCORES.read_cells(scores, cells["cell_id"], [*labels, *(f"projector_{slot}" for slot in labels)])


def read_left_out(
    left_out: str | None, descriptions: str, labels: Mapping[str, Sequence[str]]
) -> tuple[dict[str, np.ndarray], pd.DataFrame]:
    """Return scores by projector and novelty of cells of left-out studies, and their ``contracts.DESCRIPTIONS``."""
    # without rows, the file has no tensors either
    ids = SCORES.read(left_out, [])[1] if left_out else []
    wanted = [*(f"projector_{slot}" for slot in labels), "novelty"]
    scores = SCORES.read(left_out, wanted)[0] if ids else {}
    return scores, _read_rows(descriptions, ids)


def _fit(
    scores: Mapping[str, np.ndarray],
    labels: Mapping[str, Sequence[str]],
    shares: Mapping[str, np.ndarray],
    cells: pd.DataFrame,
    limit: float | None,
) -> Confidence:
    """Fit calibrations on the scores of cells, given as rows of ``contracts.DESCRIPTIONS``.

    ``shares`` has the share of the training cells of each label of the slots with terms.
    """
    slots = {}
    for slot in [slot for slot in TERM_SLOTS if slot in labels]:
        truth = true_terms(cells, slot)
        language, projector = scores[slot], scores[f"projector_{slot}"]
        # A name without cells in the other studies was no candidate for a study left out of training.
        impossible = np.isneginf(projector[np.arange(len(truth)), pd.Index(labels[slot]).get_indexer(truth)])
        candidates = ["" if out and one else one for one, out in zip(truth, impossible, strict=True)]
        novelty = scores.get("novelty")
        studies = () if novelty is None else datasets_of(cells["cell_id"])
        slots[slot] = calibrate_slot(language, labels[slot], candidates, projector, shares[slot], novelty, studies)
    ranking, programmes = SlotCalibration(), ProgrammeCalibration()
    if PATHWAY in labels:
        ranking, programmes = _calibrate_programmes(scores, labels[PATHWAY], cells["pathway_ids"])
    return Confidence(slots, {}, ranking, programmes, limit)


def true_terms(cells: pd.DataFrame, slot: str) -> list[str | None]:
    """Return the true term of each cell, from rows of ``contracts.DESCRIPTIONS``; None if it is unknown."""
    terms = cells[f"{slot}_id"].astype(object)
    return terms.where(terms.notna(), None).to_list()


def _fit_projector(
    scores: Mapping[str, np.ndarray],
    about: Mapping[str, Any],
    shares: Mapping[str, np.ndarray],
    cells: pd.DataFrame,
    limit: float | None,
) -> Confidence:
    """Fit calibrations as :func:`_fit` does, on the projector's scores alone."""
    fitted = _fit(without_language_model(scores, about), about["labels"], shares, cells, limit)
    alone = {slot: _projector_alone(one) for slot, one in fitted.slots.items()}
    return replace(fitted, slots=alone, ranking=_projector_alone(fitted.ranking))


def without_language_model(scores: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the tensors of ``contracts.SCORES`` as if the language model found all names equally probable.

    Parameters
    ----------
    scores
        At least the projector's tensors.
    about
        The model's ``labels`` and ``programmes_per_cell``.
    """
    equal = {}
    for slot, candidates in about["labels"].items():
        programmes = min(about["programmes_per_cell"], len(candidates))
        cells, names = scores[f"projector_{slot}"].shape
        equal[slot] = np.zeros((cells, programmes, names) if slot == PATHWAY else (cells, names), dtype=np.float32)
    return {**scores, **equal}


def _projector_alone(calibration: SlotCalibration) -> SlotCalibration:
    # without a labelled cell, nothing supports any of the names
    none = calibration.none if calibration.cells else 1.0
    return replace(calibration, weights=(0.0, calibration.weights[1]), none=none)


def _add_cascade(
    fitted: Confidence, alone: Confidence, scores: Mapping[str, np.ndarray], agreement: float
) -> Confidence:
    """Let the projector alone describe cells with a lead from which both confidences name the same on these cells."""
    same = (_find_names(fitted, scores) == _find_names(alone, scores)).all(axis=1)
    leads = find_leads(scores, fitted.slots, fitted.ranking)
    least = choose_least_lead(leads, same, agreement)
    log.info(
        "the projector alone names %d of %d validation cells as both models do; %s", same.sum(), len(same),
        f"too few for an agreement of {agreement:.0%}: the language model reads all cells" if least is None
        else f"from a lead of {least:.2f} nats, which {(leads >= least).sum()} cells have, it describes cells alone",
    )  # fmt: skip
    return fitted if least is None else replace(fitted, least_lead=least, projector_alone=alone)


def _find_names(confidence: Confidence, scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the indices of the names of each cell, int64 (cells, names)."""
    names = [confidence.probabilities(slot, scores).argmax(axis=1)[:, None] for slot in confidence.slots]
    if PATHWAY in scores:
        names.append(rank_programmes(scores, confidence.ranking)[0])
    return np.hstack(names)


def _read_training_cells(descriptions: str, labels: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Return ids and terms of the training cells, which must be two or more to compare others with."""
    columns = [f"{slot}_id" for slot in labels if slot != PATHWAY]
    cells = DESCRIPTIONS.read(descriptions, ["cell_id", "split", *columns], categories=["split", *columns])
    cells = cells[cells["split"] == "train"]
    if len(cells) < 2:
        raise InputError(
            descriptions, f"{len(cells)} training cells, with which no cell can be compared", "Add training cells"
        )
    return cells


def _find_shares(cells: pd.DataFrame, labels: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    """Return the share of each label of a slot with terms among the training cells that have one, (labels,)."""
    shares = {}
    for slot in [slot for slot in labels if slot != PATHWAY]:
        count = cells[f"{slot}_id"].value_counts().reindex(labels[slot]).fillna(0).clip(lower=1).to_numpy()
        shares[slot] = count / count.sum()
    return shares


def _find_studies(cells: pd.DataFrame, labels: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return for each slot the datasets with training cells whose term is known; of programmes all are."""
    dataset = datasets_of(cells["cell_id"])
    has_term = {slot: cells[f"{slot}_id"].notna() for slot in labels if slot != PATHWAY}
    return {slot: sorted(dataset[has_term.get(slot, slice(None))].unique()) for slot in labels}


def _read_rows(descriptions: str, cells: Sequence[str]) -> pd.DataFrame:
    """Return ids and gene programmes of some cells, in the given order, reading a part of the file at a time."""
    columns = ["cell_id", "pathway_ids", *(f"{slot}_id" for slot in TERM_SLOTS)]
    wanted = pd.Index(cells, name="cell_id")
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
    return ranking, calibrate_programmes(probabilities, right)


def save_reference(reference: Reference, path: str) -> None:
    """Write the reference cells of novelty as safetensors."""
    with whole_file(path) as unfinished:
        save_file(vars(reference), unfinished)
