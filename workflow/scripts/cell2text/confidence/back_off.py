"""Back-off in the ontology: the most specific term of a slot that is probable enough.

The probability of a term is the sum over the candidates at or below it. The reported term is the most specific one
whose probability reaches a threshold; if none does, the slot is "not determined".

The threshold is chosen on validation cells by conformal risk control (Angelopoulos et al., ICLR 2024, arXiv
2208.02814). For ``confidence`` = 1 - alpha it makes sure that

- at most a share of alpha of all cells gets a wrong term. This is the guarantee of Bioconductor's scConform (Corbetta
  et al. 2024, arXiv 2410.23786), whose prediction sets are all cell types below an ancestor. As there, a cell that is
  wrong at a threshold counts as wrong at all lower ones, so that the loss is monotone as the theorem demands. Exact
  in finite samples;
- at most a share of alpha of the *reported* terms is wrong, which is stricter. The loss is (wrong - alpha) for a
  reported cell and 0 for another, for which the same formula reads (wrong + 1) / (reported + 1) <= alpha. This loss
  is not monotone, so no theorem covers few cells. In simulations with 10 to 500 validation cells and miscalibrated
  probabilities, the average share of wrong terms (0 where nothing is reported) stayed below alpha; pooled over all
  reported terms it exceeded 0.1 with a poor model and few cells (0.15 with 30 cells, 0.12 with 100, 0.10 with 500).
  Demanding the inequality at all higher thresholds too was hardly safer, and reported nothing in up to 23% of the draws
  with 500 cells, because one wrong term among the few most probable ones is enough to break it.

A reported term is right if it is the true term or an ancestor of it.

Both assume that new cells are exchangeable with the validation cells: the same mixture of studies, donors and cell
types. They hold on average over draws of validation cells, not for each cell type, and not for a new study. Strictly,
the validation cells must not have fitted the probabilities; with few parameters it makes no difference (on real cells
the share of wrong terms moved by at most 0.003).

The cells of a new study are not exchangeable with those of other studies, but studies are with each other. Where each
cell comes from a study that was new to the model, the first condition is therefore demanded of studies: the loss is the
share of the cells of a study that get a wrong term, and the bound is that of the next study.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from cell2text.confidence.calibration import Steps, fit_steps

LEAST_THRESHOLD = 0.5  # two terms above it share candidates, so they never contradict each other
NOTHING = 2.0  # a threshold that no probability reaches
_CELLS_AT_ONCE = 8192
_UNITS = 1_000_000  # probabilities are compared as whole millionths, whatever order they were summed in


class TermsAbove:
    """The terms that may be reported for a slot, most specific first.

    The most specific term is the one with the longest chain of ancestors. (The shortest path to the root would put
    1,306 of 3,324 cell types level with or above one of their own ancestors.) Ties are resolved by probability, then
    id.

    A term above all candidates is true of every cell and says nothing, so it is not reported. Exceptions are
    candidates themselves, if they are not a root that has other candidates below it.

    Parameters
    ----------
    candidates
        Ids of the candidates, in the order of the columns of their probabilities.
    ancestors
        Ids of all ancestors of each term, without itself; a term that is missing has none.
    complete
        Whether what the probabilities of a cell lack to 1 is that of no candidate at all, for which see :meth:`report`.
        Otherwise it is lost, such as the share of a cluster's cells that have no type.

    Attributes
    ----------
    terms
        Ids, object (terms,).
    below
        1 for each candidate at or below a term, else 0; float64 (terms, candidates).
    """

    def __init__(self, candidates: Sequence[str], ancestors: Mapping[str, Collection[str]], complete: bool = True):
        self._ancestors = ancestors
        covered: dict[str, list[int]] = {}
        for column, candidate in enumerate(candidates):
            for term in {candidate, *self._above(candidate)}:
                covered.setdefault(term, []).append(column)

        chains = _longest_chains(covered, ancestors)

        def is_informative(term: str) -> bool:
            if len(covered[term]) < len(candidates):
                return True
            return term in candidates and (len(candidates) == 1 or chains[term] > 0)

        reported = sorted(filter(is_informative, covered), key=lambda term: (-chains[term], term))
        self.terms = np.array(reported, dtype=object)
        self.below = np.zeros((len(reported), len(candidates)))
        for row, term in enumerate(reported):
            self.below[row, covered[term]] = 1
        several = [len(covered[term]) > 1 or candidates[covered[term][0]] != term for term in reported]
        self._general = np.array(several, dtype=bool) & complete
        self._chain = np.array([chains[term] for term in reported], dtype=np.int64)

    def _above(self, term: str) -> Collection[str]:
        found = self._ancestors.get(term)
        return () if found is None else found

    def report(self, probabilities: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the reported term of each cell and its probability.

        Parameters
        ----------
        probabilities
            Of the candidates, (cells, candidates). What a row lacks to 1 is the probability that the true term is no
            candidate. Such a term may well lie below a more general one, so terms with several candidates at or below
            them, or with another one below, are as probable as if the true term were a candidate.
        threshold
            From :func:`choose_threshold`.

        Returns
        -------
        ids
            Object (cells,); None where no term reaches the threshold.
        probabilities
            float32 (cells,); NaN where no term is reported.
        """
        ids, found = np.full(len(probabilities), None, dtype=object), np.full(len(probabilities), np.nan, np.float32)
        for rows, sums in self._sums(probabilities):
            # reached terms come first, then the longest chain, then the greatest probability, then the first id
            rank = np.where(sums >= round(threshold * _UNITS), self._chain * (2 * _UNITS) + sums, -1)
            best = rank.argmax(axis=1) if rank.shape[1] else np.zeros(len(rank), dtype=int)
            reached = np.flatnonzero(rank.max(axis=1, initial=-1) >= 0)
            ids[rows][reached] = self.terms[best[reached]]
            found[rows][reached] = sums[reached, best[reached]] / _UNITS
        return ids, found

    def _sums(self, probabilities: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the probabilities of all terms in millionths, int64 (cells, terms), for a block of cells at a time."""
        for start in range(0, len(probabilities), _CELLS_AT_ONCE):
            rows = slice(start, start + _CELLS_AT_ONCE)
            some = np.asarray(probabilities[rows], dtype=np.float64)
            sums, whole = some @ self.below.T, some.sum(axis=1, keepdims=True)
            sums[:, self._general] /= np.maximum(whole, np.finfo(float).tiny)
            yield rows, np.rint(np.minimum(sums, 1) * _UNITS).astype(int)

    def right_terms(self, truth: Sequence[str]) -> np.ndarray:
        """Return which terms are right for each true term (itself or an ancestor), bool (cells, terms)."""
        known, codes = np.unique(np.asarray(truth, dtype=str), return_inverse=True)
        right = [np.isin(self.terms, [term, *self._above(term)]) for term in known.tolist()]
        return np.array(right, dtype=bool).reshape(len(known), len(self.terms))[codes]

    def intervals(self, probabilities: np.ndarray, truth: Sequence[str]) -> tuple[np.ndarray, ...]:
        """Return the thresholds at which each term of each cell is reported, and whether it is right.

        Returns
        -------
        cells, low, high, right
            One entry per reportable term of a cell: it is reported if low < threshold <= high, in millionths.
        """
        parts = []
        for rows, sums in self._sums(probabilities):
            order = np.argsort(-(self._chain * (2 * _UNITS) + sums), axis=1, kind="stable")
            high = np.take_along_axis(sums, order, axis=1)
            low = np.zeros_like(high)
            low[:, 1:] = np.maximum.accumulate(high, axis=1)[:, :-1]
            right = np.take_along_axis(self.right_terms(truth[rows]), order, axis=1)
            cell, place = np.nonzero(high > low)
            parts.append((cell + rows.start, low[cell, place], high[cell, place], right[cell, place]))
        empty = [np.empty(0, dtype=int)] * 3 + [np.empty(0, dtype=bool)]
        return tuple(map(np.concatenate, zip(empty, *parts, strict=True)))


def _longest_chains(terms: Collection[str], ancestors: Mapping[str, Collection[str]]) -> dict[str, int]:
    """Return the number of steps of the longest chain of ancestors above each term."""
    above = {term: set(ancestors[term]) & set(terms) if ancestors.get(term) is not None else set() for term in terms}
    chains: dict[str, int] = {}
    # ancestors are complete, so an ancestor of a term has fewer of them than the term
    for term in sorted(terms, key=lambda term: len(above[term])):
        chains[term] = 1 + max((chains[one] for one in above[term]), default=-1)
    return chains


@dataclass(frozen=True)
class Threshold:
    """The threshold of a slot.

    Parameters
    ----------
    value
        The smallest probability that is reported; ``NOTHING`` if the guarantee leaves no term to report.
    confidence
        The requested confidence.
    cells
        Number of labelled validation cells.
    guaranteed
        Whether there were enough of them, or of their studies, for a guarantee.
    studies
        Number of studies the cells are from, if each was new to the model; None if the cells are like new ones.
    steps
        Map from the probability of a reported term to the share of right ones, or None.
    """

    value: float
    confidence: float
    cells: int
    guaranteed: bool
    studies: int | None = None
    steps: Steps | None = None

    @property
    def note(self) -> str:
        """What the guarantee rests on, in a few words."""
        studies = "study" if self.studies == 1 else "studies"
        cells = f"{self.cells} validation cells" if self.studies is None else f"{self.studies} held-out {studies}"
        return f"{'' if self.guaranteed else 'no guarantee: '}{cells}"

    def confidences(self, probabilities: np.ndarray) -> np.ndarray:
        """Return the confidence in reported terms of these probabilities; NaN stays NaN."""
        return probabilities if self.steps is None else self.steps(probabilities).astype(probabilities.dtype)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Self:
        """Return the threshold of ``dataclasses.asdict``."""
        return cls(**saved | {"steps": Steps.from_dict(saved.get("steps"))})


def choose_threshold(
    terms: TermsAbove,
    probabilities: np.ndarray,
    truth: Sequence[str | None],
    confidence: float,
    studies: Sequence[str] | None = None,
) -> Threshold:
    """Return the smallest threshold (at least 0.5) with both guarantees; see the module.

    With fewer than 1 / (1 - confidence) - 1 labelled cells no threshold could have one. Then the threshold is the
    requested confidence itself, which is right if the probabilities are calibrated, and is marked as not guaranteed.
    With fewer studies than that it is also at least what the cells demand. If there are enough and too many of their
    terms are wrong at every threshold, nothing is reported.

    Parameters
    ----------
    terms
        The reportable terms.
    probabilities
        Calibrated probabilities of the candidates, (cells, candidates).
    truth
        True id of each validation cell; None if unknown. It may be no candidate.
    confidence
        The requested confidence, from 0 to below 1.
    studies
        The study of each cell, if it was new to the model that gave the probabilities. The guarantee is then for new
        studies, and confidences in reported terms are fitted too.
    """
    truth = np.array(truth, dtype=object)
    labelled = np.array([one is not None for one in truth], dtype=bool)
    count, alpha = int(labelled.sum()), 1 - confidence
    # each unit of exchange has a weight of 1: a cell, or a study, whose cells share it
    weights, units = np.ones(count), count
    if studies is not None:
        _, study, sizes = np.unique(np.asarray(studies)[labelled], return_inverse=True, return_counts=True)
        weights, units = (1 / sizes)[study], len(sizes)
    guaranteed = alpha * (units + 1) >= 1 - 1e-9
    given = (confidence, count, guaranteed, None if studies is None else units)
    if alpha * (count + 1) < 1 - 1e-9:
        return Threshold(max(confidence, LEAST_THRESHOLD), *given)
    if not guaranteed:
        weights, units = np.ones(count), count
    probabilities, truth = np.asarray(probabilities)[labelled], truth[labelled]
    cells, low, high, right = terms.intervals(probabilities, truth)
    lowest = round(LEAST_THRESHOLD * _UNITS)
    most_probable, wrong_up_to = np.zeros(count, dtype=int), np.zeros(count, dtype=int)
    np.maximum.at(most_probable, cells, high)
    np.maximum.at(wrong_up_to, cells[~right], high[~right])
    # the number of wrong terms falls only just above the probability of one
    thresholds = np.unique(np.concatenate([[lowest], high[~right] + 1]))
    thresholds = thresholds[thresholds >= lowest]

    def at_least(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        order = np.argsort(values)
        above = np.cumsum((np.ones(len(values)) if weights is None else weights[order])[::-1])[::-1]
        return np.append(above, 0)[np.searchsorted(values[order], thresholds)]

    wrong = at_least(high[~right]) - at_least(low[~right])
    selective = wrong + 1 <= alpha * (at_least(most_probable) + 1) + 1e-9
    marginal = at_least(wrong_up_to, weights) + 1 <= alpha * (units + 1) + 1e-9
    good = np.flatnonzero(selective & marginal)
    value = float(thresholds[good[0]] / _UNITS) if len(good) else NOTHING
    if not guaranteed:
        value = max(value, confidence)
    return Threshold(value, *given, None if studies is None else _fit_steps(terms, probabilities, truth, value))


def _fit_steps(terms: TermsAbove, probabilities: np.ndarray, truth: np.ndarray, threshold: float) -> Steps | None:
    ids, found = terms.report(probabilities, threshold)
    reported = np.flatnonzero(~np.isnan(found))
    column = {term: place for place, term in enumerate(terms.terms)}
    places = np.array([column[one] for one in ids[reported]], dtype=np.int64)
    return fit_steps(found[reported].astype(float), terms.right_terms(truth[reported])[np.arange(len(places)), places])
