"""What is said of a cell: the most specific guess of each slot, and the term that is probable enough to be reported."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from scipy.special import log_softmax

from cell2text.confidence.back_off import TermsAbove, Threshold
from cell2text.confidence.calibration import ProgrammeCalibration, SlotCalibration
from cell2text.confidence.cascade import find_leads
from cell2text.contracts import PREDICTIONS, TERM_SLOTS, TERMS, datasets_of
from cell2text.files import read_json, reading, write_json
from cell2text.grammar import PATHWAY

FIX = "Delete it and run the workflow again"
CELLS_AT_ONCE = 8192


@dataclass(frozen=True)
class Confidence:
    """How the scores of candidate names become confidences, and which terms are reported.

    Parameters
    ----------
    slots
        Calibration of each slot with labels.
    thresholds
        Threshold of each of these slots; none before they are chosen.
    ranking
        Weights of the scores of gene programmes, the same for all places.
    programmes
        Calibration of named programmes.
    limit
        A cell whose novelty is greater is novel; None if there were no validation cells.
    studies
        Datasets with training cells whose term is known, by slot, and those with any training cells for ``"pathway"``.
        Any other dataset is a new study for the slot.
    new_studies
        The confidence of cells of new studies; None if it could not be fitted: theirs is like that of the others.
    least_lead, projector_alone
        Cells with at least this lead (see ``cascade``) are described by the projector alone, with this confidence; None
        if the language model reads all cells.
    """

    slots: dict[str, SlotCalibration]
    thresholds: dict[str, Threshold]
    ranking: SlotCalibration
    programmes: ProgrammeCalibration
    limit: float | None
    studies: Mapping[str, Sequence[str]] = field(default_factory=dict)
    new_studies: "Confidence | None" = None
    least_lead: float | None = None
    projector_alone: "Confidence | None" = None

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
        saved = read_json(path, FIX)
        with reading(path, FIX):
            return cls._from_dict(saved)

    @classmethod
    def _from_dict(cls, saved: dict[str, Any]) -> Self:
        return cls(
            {slot: SlotCalibration.from_dict(one) for slot, one in saved["slots"].items()},
            {slot: Threshold.from_dict(one) for slot, one in saved["thresholds"].items()},
            SlotCalibration.from_dict(saved["ranking"]),
            ProgrammeCalibration.from_dict(saved["programmes"]),
            saved["limit"],
            saved["studies"],
            cls._from_dict(saved["new_studies"]) if saved["new_studies"] else None,
            saved["least_lead"],
            cls._from_dict(saved["projector_alone"]) if saved["projector_alone"] else None,
        )

    @property
    def of_new_study(self) -> "Confidence":
        """The confidence of a study without training cells."""
        return self.new_studies or self

    def novelty_of_new(self, novelty: np.ndarray, cells: Sequence[str]) -> np.ndarray:
        """Return the novelty of cells of datasets without training cells, NaN for the others; (cells,)."""
        trained = {study for studies in self.studies.values() for study in studies}
        return np.where(datasets_of(cells).isin(trained), np.nan, novelty)

    def needs_language_model(self, scores: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return for which cells the language model's scores count, bool (cells,).

        Parameters
        ----------
        scores
            At least the projector's tensors of ``contracts.SCORES``.
        """
        cells = len(next(iter(scores.values())))
        if not any(one.weights[0] for one in (*self.slots.values(), self.ranking)):
            return np.zeros(cells, dtype=bool)
        if self.least_lead is None:
            return np.ones(cells, dtype=bool)
        return find_leads(scores, self.slots, self.ranking) < self.least_lead

    def describe(
        self,
        scores: Mapping[str, np.ndarray],
        labels: Mapping[str, Sequence[str]],
        ancestors: Mapping[str, Any],
        cells: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """Return ids and confidences of all slots, one row per cell; other columns of the predictions are None.

        Parameters
        ----------
        scores
            Tensors of ``contracts.SCORES``, and the ``novelty`` of each cell of a study without training cells.
        labels
            Ids of the candidates of each slot.
        ancestors
            For each slot, the ancestors of each term.
        cells
            Cell ids, whose datasets tell which cells are of new studies; None if none is.
        """
        table = self._describe_by_both(scores, labels, ancestors)
        if cells is None:
            return table
        datasets = datasets_of(cells).reset_index(drop=True)
        trained = {study for studies in self.studies.values() for study in studies}
        for slot in labels:
            new = ~datasets.isin(self.studies[slot]).to_numpy(bool)
            if self.new_studies and new.any():
                wanted = (slot, f"projector_{slot}", "novelty")
                some = {name: scores[name][new] for name in wanted if name in scores}
                found = self.new_studies._describe_all(some, {slot: labels[slot]}, ancestors)
                for column in [column for column in table if column.startswith(f"{slot}_")]:
                    values = table[column].to_numpy(copy=True)
                    values[new] = found[column].to_numpy()
                    table[column] = values
            elif slot != PATHWAY:
                # the validation cells of these datasets do not tell whether the names of others are right for them
                reported = [f"{slot}_reported_id", f"{slot}_reported_confidence"]
                table.loc[new & datasets.isin(trained).to_numpy(bool), reported] = None
        return table

    def _describe_by_both(
        self, scores: Mapping[str, np.ndarray], labels: Mapping[str, Sequence[str]], ancestors: Mapping[str, Any]
    ) -> pd.DataFrame:
        if self.projector_alone is None:
            return self._describe_all(scores, labels, ancestors)
        needed = self.needs_language_model(scores)
        parts = []
        for confidence, some in ((self, needed), (self.projector_alone, ~needed)):
            part = confidence._describe_all({name: tensor[some] for name, tensor in scores.items()}, labels, ancestors)
            parts.append(part.set_index(np.flatnonzero(some)))
        return pd.concat(parts).sort_index()

    def _describe_all(
        self, scores: Mapping[str, np.ndarray], labels: Mapping[str, Sequence[str]], ancestors: Mapping[str, Any]
    ) -> pd.DataFrame:
        terms = {slot: TermsAbove(labels[slot], ancestors[slot]) for slot in TERM_SLOTS if slot in labels}
        count, parts = len(next(iter(scores.values()))), []
        for start in range(0, max(count, 1), CELLS_AT_ONCE):  # their probabilities in float64 take most of the memory
            some = {name: tensor[start : start + CELLS_AT_ONCE] for name, tensor in scores.items()}
            parts.append(self._describe(some, labels, terms))
        return pd.concat(parts, ignore_index=True)

    def _describe(
        self,
        scores: Mapping[str, np.ndarray],
        labels: Mapping[str, Sequence[str]],
        terms: Mapping[str, TermsAbove],
    ) -> pd.DataFrame:
        columns: dict[str, Any] = {"pathway_ids": [[] for _ in next(iter(scores.values()))]}
        for slot, above in terms.items():
            found = self.probabilities(slot, scores)
            columns |= report_terms(slot, labels[slot], found, above, self.thresholds[slot])
        if PATHWAY in labels:
            ranked, found = rank_programmes(scores, self.ranking)
            columns["pathway_ids"] = np.array(labels[PATHWAY], dtype=object)[ranked].tolist()
            columns["pathway_confidences"] = self.programmes.confidences(found).astype(np.float32).tolist()
        table = pd.DataFrame(columns).reindex(columns=list(PREDICTIONS.columns)).astype(object)
        return table.where(table.notna(), None)

    def probabilities(self, slot: str, scores: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the calibrated probability of each candidate of a slot, float64 (cells, candidates).

        The scores may include ``novelty``, see ``SlotCalibration.probabilities``.
        """
        return self.slots[slot].probabilities(scores[slot], scores[f"projector_{slot}"], scores.get("novelty"))

    def probabilities_of_each(self, slot: str, scores: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the same, for each cell by the confidence that describes it; see ``projector_alone``."""
        found = self.probabilities(slot, scores)
        if self.projector_alone:
            alone = ~self.needs_language_model(scores)
            some = {name: tensor[alone] for name, tensor in scores.items()}
            found[alone] = self.projector_alone.probabilities(slot, some)
        return found


def report_terms(
    slot: str, labels: Sequence[str], probabilities: np.ndarray, above: TermsAbove, threshold: Threshold
) -> dict[str, np.ndarray]:
    """Return the columns of ``contracts.PREDICTIONS`` with guess and reported term of a slot, and their confidences.

    Parameters
    ----------
    slot
        Name of the slot.
    labels
        Ids of its candidates.
    probabilities
        Of the candidates, (cells, candidates).
    above
        The terms that may be reported.
    threshold
        From which probability on they are.
    """
    reported, found = above.report(probabilities, threshold.value)
    return {
        f"{slot}_id": np.array(labels, dtype=object)[probabilities.argmax(axis=1)],
        f"{slot}_confidence": probabilities.max(axis=1).astype(np.float32),
        f"{slot}_reported_id": reported,
        f"{slot}_reported_confidence": threshold.confidences(found),
    }


def rank_programmes(scores: Mapping[str, np.ndarray], ranking: SlotCalibration) -> tuple[np.ndarray, np.ndarray]:
    """Return the most probable gene programmes of each cell, most active first, and a probability of each.

    With several programmes in a text, the probability is that of being among the two most active ones, if the second
    were drawn from what the first leaves (Plackett-Luce model). It takes the same scores for all places, so that one
    calibration fits the first programme and the others.

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
        float64, the same shape; to be calibrated.
    """
    cells, count, _ = scores[PATHWAY].shape
    rows, numbers = np.arange(cells), np.full((cells, count), -1)
    for place, (language, projector) in enumerate(score_places(scores, numbers)):
        now = ranking.probabilities(language, projector)
        if not place:
            found = now if count == 1 else _among_two(now)
        now[rows[:, None], numbers[:, :place]] = 0
        numbers[:, place] = now.argmax(axis=1)
    return numbers, np.take_along_axis(found, numbers, axis=1)


def score_places(scores: Mapping[str, np.ndarray], named: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the log-probabilities of language model and projector for each place, (cells, candidates).

    The language model scored the second programme after a draft of the first, which has no probability as the second.
    Where another one is named, its scores of the first programme are used, without this one.

    Parameters
    ----------
    scores
        Tensors of ``contracts.SCORES``.
    named
        Indices of the programmes named at each place, int64 (cells, places), -1 for none. Only the places before the
        one to score are read, so the caller may fill in each place after its scores.
    """
    steps, projector = scores[PATHWAY].astype(float), scores[f"projector_{PATHWAY}"].astype(float)
    language, rows, agreed = steps[:, 0], np.arange(len(steps)), np.ones(len(steps), dtype=bool)
    for place in range(steps.shape[1]):
        if place:
            before = named[:, place - 1]
            agreed &= (before >= 0) & np.isneginf(steps[rows, place, before])
            language = np.where(agreed[:, None], steps[:, place], language)
            known = np.flatnonzero(before >= 0)
            for taken in (language, projector):
                taken[known, before[known]] = -np.inf
        yield log_softmax(language, axis=1), log_softmax(projector, axis=1)


def _among_two(first: np.ndarray) -> np.ndarray:
    """Return the probability of each candidate to be first or second, from that of being first, (cells, candidates)."""
    rows, best = np.arange(len(first)), first.argmax(axis=1)
    others = first.copy()
    others[rows, best] = 0
    # p / (1 - p), for the most probable candidate without rounding 1 - p to 0
    odds, odds_of_best = others / (1 - others), first[rows, best] / np.maximum(others.sum(axis=1), 1e-300)
    before = odds.sum(axis=1, keepdims=True) - odds + odds_of_best[:, None]  # over all other candidates
    before[rows, best] = odds.sum(axis=1)
    return np.minimum(first * (1 + before), 1)


def read_ancestors(terms: str) -> dict[str, dict[str, Sequence[str]]]:
    """Return the ancestors of each term, by slot, from a file of ``contracts.TERMS``."""
    table = TERMS.read(terms, ["slot", "id", "ancestors"])
    return {slot: dict(zip(rows["id"], rows["ancestors"], strict=True)) for slot, rows in table.groupby("slot")}
