"""Thresholds of reported terms, chosen for the requested confidence."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from cell2text.confidence.back_off import TermsAbove, choose_threshold
from cell2text.confidence.calibrate import (
    read_left_out,
    read_scores,
    read_validation_cells,
    true_terms,
    without_language_model,
)
from cell2text.confidence.decisions import FIX, Confidence, read_ancestors
from cell2text.contracts import datasets_of
from cell2text.files import read_json

log = logging.getLogger("cell2text.confidence")


def choose_thresholds(
    calibration: str,
    model: str,
    scores: Sequence[str],
    left_out: str | None,
    descriptions: str,
    terms: str,
    output: str,
    confidence: float,
) -> None:
    """Choose the thresholds of all slots, and write them with the calibration.

    Parameters
    ----------
    calibration
        File written by ``calibrate``.
    model, scores, left_out, descriptions
        As for ``calibrate``.
    terms
        File of ``contracts.TERMS``.
    output
        Output file: the calibration with its thresholds, as JSON.
    confidence
        The share of the reported terms that should be right.
    """
    about = read_json(f"{model}/cell2text.json", FIX)
    labels = about["labels"]
    fitted, ancestors = Confidence.load(calibration), read_ancestors(terms)
    validation = read_validation_cells(descriptions)
    found = read_scores(scores, validation, labels)
    chosen = _choose(fitted, found, labels, validation, ancestors, confidence)
    if fitted.projector_alone:
        alone = _choose(fitted.projector_alone, found, labels, validation, ancestors, confidence)
        chosen = replace(chosen, projector_alone=alone)
    if fitted.new_studies:
        new, cells = read_left_out(left_out, descriptions, labels)
        new = without_language_model(new, about)
        studies = datasets_of(cells["cell_id"]).to_list()
        new_studies = _choose(fitted.new_studies, new, labels, cells, ancestors, confidence, studies)
        chosen = replace(chosen, new_studies=new_studies)
    chosen.save(output)


def _choose(
    fitted: Confidence,
    scores: Mapping[str, np.ndarray],
    labels: Mapping[str, Sequence[str]],
    cells: pd.DataFrame,
    ancestors: Mapping[str, Mapping[str, Sequence[str]]],
    confidence: float,
    studies: Sequence[str] | None = None,
) -> Confidence:
    """Return the confidence with thresholds for cells like the given ones, rows of ``contracts.DESCRIPTIONS``."""
    thresholds = {}
    for slot in fitted.slots:
        above = TermsAbove(labels[slot], ancestors[slot])
        probabilities = fitted.probabilities(slot, scores)
        thresholds[slot] = choose_threshold(above, probabilities, true_terms(cells, slot), confidence, studies)
        chosen = thresholds[slot]
        log.info("%s: terms are reported from probability %.2f (%s)", slot, chosen.value, chosen.note)
    return replace(fitted, thresholds=thresholds)
