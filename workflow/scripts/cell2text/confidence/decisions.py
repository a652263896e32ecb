"""What is said of a cell: the most specific guess of each slot, and the term that is probable enough to be reported."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from cell2text.confidence.back_off import TermsAbove, Threshold
from cell2text.confidence.calibration import ProgrammeCalibration, SlotCalibration
from cell2text.contracts import PREDICTIONS, TERM_SLOTS, TERMS
from cell2text.files import read_json, write_json
from cell2text.grammar import PATHWAY

FIX = "Delete it and run the workflow again"


@dataclass(frozen=True)
class Confidence:
    """How the scores of candidate names become confidences, and which terms are reported.

    Parameters
    ----------
    slots
        Calibration of each slot with labels.
    thresholds
        Threshold of each of these slots.
    ranking
        Calibration of the most active gene programme, which also weighs the scores of the others.
    programmes
        Calibration of named programmes.
    limit
        A cell whose novelty is greater is novel; None if there were no validation cells.
    """

    slots: dict[str, SlotCalibration]
    thresholds: dict[str, Threshold]
    ranking: SlotCalibration
    programmes: ProgrammeCalibration
    limit: float | None

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        write_json(asdict(self), path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises
        ------
        InputError
            If the file is damaged.
        """
        saved = read_json(Path(path), FIX)
        return cls(
            {slot: SlotCalibration.from_dict(one) for slot, one in saved["slots"].items()},
            {slot: Threshold(**one) for slot, one in saved["thresholds"].items()},
            SlotCalibration.from_dict(saved["ranking"]),
            ProgrammeCalibration.from_dict(saved["programmes"]),
            saved["limit"],
        )

    def describe(
        self, scores: Mapping[str, np.ndarray], labels: Mapping[str, Sequence[str]], ancestors: Mapping[str, Any]
    ) -> pd.DataFrame:
        """Return ids and confidences of all slots, one row per cell; other columns of the predictions are None.

        Parameters
        ----------
        scores
            Tensors of ``contracts.SCORES``.
        labels
            Ids of the candidates of each slot.
        ancestors
            For each slot, the ancestors of each term.
        """
        cells = len(next(iter(scores.values())))
        columns: dict[str, Any] = {"pathway_ids": [[] for _ in range(cells)]}
        for slot in TERM_SLOTS:
            if slot not in labels:
                continue
            ids, found = np.array(labels[slot], dtype=object), self.probabilities(slot, scores)
            columns[f"{slot}_id"], columns[f"{slot}_confidence"] = ids[found.argmax(axis=1)], found.max(axis=1)
            reported = TermsAbove(labels[slot], ancestors[slot]).report(found, self.thresholds[slot].value)
            columns[f"{slot}_reported_id"], columns[f"{slot}_reported_confidence"] = reported
        if PATHWAY in labels:
            ranked, found = rank_programmes(scores, self.ranking)
            columns["pathway_ids"] = np.array(labels[PATHWAY], dtype=object)[ranked].tolist()
            columns["pathway_confidences"] = self.programmes.confidences(found).astype(np.float32).tolist()
        table = pd.DataFrame(columns).reindex(columns=list(PREDICTIONS.columns)).astype(object)
        return table.where(table.notna(), None)

    def probabilities(self, slot: str, scores: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the calibrated probability of each candidate of a slot, float64 (cells, candidates)."""
        return self.slots[slot].probabilities(scores[slot], scores[f"projector_{slot}"])


def rank_programmes(scores: Mapping[str, np.ndarray], ranking: SlotCalibration) -> tuple[np.ndarray, np.ndarray]:
    """Return the most probable gene programmes of each cell, most active first, and a probability of each.

    Parameters
    ----------
    scores
        Tensors of ``contracts.SCORES``.
    ranking
        Weights of language model and projector.

    Returns
    -------
    numbers
        Indices of the candidates, int64 (cells, programmes in a text).
    probabilities
        That the programme is at this place or an earlier one, given those chosen before; float64, the same shape.
    """
    cells, count, candidates = scores[PATHWAY].shape
    rows, numbers = np.arange(cells), np.full((cells, count), -1)
    found, absent = np.empty((cells, count)), np.ones((cells, candidates))  # absent: probability of no earlier place
    for place, (language, projector) in enumerate(score_places(scores, numbers)):
        now = ranking.probabilities(language, projector)
        now[rows[:, None], numbers[:, :place]] = 0
        numbers[:, place] = now.argmax(axis=1)
        absent *= 1 - now
        found[:, place] = 1 - absent[rows, numbers[:, place]]
    return numbers, found


def score_places(scores: Mapping[str, np.ndarray], named: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the log-probabilities of language model and projector for each place, (cells, candidates).

    The language model scored the second programme after the one that it chose itself as the first. Where another one
    is named, its scores of the first programme are used, without this one.

    Parameters
    ----------
    scores
        Tensors of ``contracts.SCORES``.
    named
        Indices of the programmes named at each place, int64 (cells, places), -1 for none. Only the places before the
        one to score are read, so the caller may fill in each place after its scores.
    """
    steps, projector = scores[PATHWAY].astype(float), scores[f"projector_{PATHWAY}"].astype(float)
    language, agreed = steps[:, 0], np.ones(len(steps), dtype=bool)
    for place in range(steps.shape[1]):
        if place:
            before = named[:, place - 1]
            agreed &= before == steps[:, place - 1].argmax(axis=1)
            language = np.where(agreed[:, None], steps[:, place], language)
            known = np.flatnonzero(before >= 0)
            for taken in (language, projector):
                taken[known, before[known]] = -np.inf
        yield _normalise(language), _normalise(projector)


def _normalise(log_probabilities: np.ndarray) -> np.ndarray:
    greatest = log_probabilities.max(axis=1, keepdims=True)
    greatest = np.where(np.isfinite(greatest), greatest, 0)  # the only candidate was taken
    with np.errstate(divide="ignore"):
        return log_probabilities - greatest - np.log(np.exp(log_probabilities - greatest).sum(axis=1, keepdims=True))


def read_ancestors(terms: str) -> dict[str, dict[str, Sequence[str]]]:
    """Return the ancestors of each term, by slot, from a file of ``contracts.TERMS``."""
    table = TERMS.read(terms, ["slot", "id", "ancestors"])
    return {slot: dict(zip(rows["id"], rows["ancestors"], strict=True)) for slot, rows in table.groupby("slot")}
