"""Calibration: probabilities that equal the share of right answers on validation cells.

A slot's candidates get the probabilities (1 - none) * softmax(a * language model + b * projector + c * log(share)) of
their two log-probabilities and their share of the training cells. 1 / a is the temperature of Guo et al., ICML 2017.
c, from -1 to 0, takes back some or all of what a name gains by being common in training (logit adjustment, Menon et
al., ICLR 2021): models trained on few cells overrate common types. The weights are those of the greatest likelihood,
which is convex in them, with a weak normal prior around (1, 0, 0) so that few cells change little. ``none`` is the
share of labelled validation cells whose true term is no candidate. It is 0 where every type has training cells, and
keeps confidences from being overstated where validation studies bring types of their own. In a new study it grows with
the novelty of the cell (see :mod:`novelty`) as it does in studies held out of training.

With at least 1,000 labelled cells, isotonic regression then maps the greatest probability of a cell to the share of
right answers, but only if it lowers the Brier score and the log loss in five-fold cross-validation.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit, softmax

FEWEST_FOR_ISOTONIC = 1000
MOST_CELLS = 20_000  # evenly spaced among more; three weights and a step function need no more
_DEFAULTS = np.array([1.0, 0.0, 0.0])  # of the weights a, b and c
_PRIOR_SD = 1.0  # of each weight around its default
_BOUNDS = ((0.05, 20.0), (0.0, 20.0), (-1.0, 0.0))  # a temperature from 0.05 to 20
_LEAST = -50.0  # log-probabilities below are raised to it, which changes no probability and keeps the fit finite
_EDGE = 1e-6
_NOVELTIES = (1e-3, 1e3)  # range, before the logarithm
_FOLDS = 5


@dataclass(frozen=True)
class Steps:
    """A monotone map of probabilities, linear between its points.

    Parameters
    ----------
    given, calibrated
        The points, in ascending order.
    """

    given: tuple[float, ...]
    calibrated: tuple[float, ...]

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        """Return the calibrated probabilities."""
        return np.interp(probabilities, self.given, self.calibrated)

    @classmethod
    def from_dict(cls, saved: dict[str, Any] | None) -> Self | None:
        """Return the map of ``dataclasses.asdict``, or None for None."""
        return saved and cls(tuple(saved["given"]), tuple(saved["calibrated"]))


@dataclass(frozen=True)
class SlotCalibration:
    """The calibration of a slot with one term.

    Parameters
    ----------
    cells
        Number of labelled validation cells it rests on.
    weights
        Of the log-probabilities of the language model and of the projector.
    share_weight
        Of the logarithms of the candidates' shares of the training cells.
    log_shares
        These logarithms; empty if they are not known.
    none
        Probability that the true term is no candidate.
    none_by_novelty
        Intercept and slope of its logit in the logarithm of a cell's novelty; None if it is the same for all cells.
    steps
        Map of the greatest probability of a cell, or None.
    """

    cells: int = 0
    weights: tuple[float, float] = (1.0, 0.0)
    none: float = 0.0
    steps: Steps | None = None
    share_weight: float = 0.0
    log_shares: tuple[float, ...] = ()
    none_by_novelty: tuple[float, float] | None = None

    @property
    def gains(self) -> np.ndarray:
        """What each candidate's score gains by its share of the training cells, float64 (candidates,) or ()."""
        return self.share_weight * np.array(self.log_shares or 0.0)

    def probabilities(
        self,
        log_probabilities: np.ndarray,
        projector: np.ndarray | None = None,
        novelty: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return the calibrated probabilities of the candidates.

        Parameters
        ----------
        log_probabilities
            Of the language model, normalised over the candidates, (cells, candidates).
        projector
            Those of the projector, if the calibration was fitted with them.
        novelty
            Novelty of each cell, (cells,); NaN for a cell of a study with training cells. None if all are.

        Returns
        -------
        numpy.ndarray
            float64 (cells, candidates). What a row lacks to 1 is the probability of none of the candidates.
        """
        if (projector is None) and self.weights[1]:
            raise ValueError("the calibration was fitted with the projector's scores")
        inputs = _inputs(log_probabilities, projector)
        scores = np.tensordot(inputs, self.weights[: len(inputs.T)], 1) + self.gains
        found = (1 - self._find_none(novelty)) * softmax(scores, axis=1)
        return found if self.steps is None else _with_greatest(found, self.steps)

    def _find_none(self, novelty: np.ndarray | None) -> np.ndarray | float:
        """Return the probability that the true term is no candidate, of all cells or float64 (cells, 1)."""
        if novelty is None or self.none_by_novelty is None:
            return self.none
        known = np.isnan(novelty)
        found = _none_of(self.none_by_novelty, _log_novelty(np.where(known, 1, novelty)))
        return np.where(known, self.none, found)[:, None]

    def to_dict(self) -> dict[str, Any]:
        """Return what a JSON file holds."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Self:
        """Return the calibration of :meth:`to_dict`."""
        # models of older versions have neither shares nor novelty
        tuples = {"weights": tuple(saved["weights"]), "log_shares": tuple(saved.get("log_shares", ()))}
        by_novelty = saved.get("none_by_novelty")
        tuples["none_by_novelty"] = by_novelty and tuple(by_novelty)
        return cls(**saved | tuples | {"steps": Steps.from_dict(saved["steps"])})


def calibrate_slot(
    log_probabilities: np.ndarray,
    candidates: Sequence[str],
    truth: Sequence[str | None],
    projector: np.ndarray | None = None,
    shares: np.ndarray | None = None,
    novelty: np.ndarray | None = None,
    studies: Sequence[str] = (),
) -> SlotCalibration:
    """Fit the calibration of a slot on validation cells, at most 20,000 of them.

    Parameters
    ----------
    log_probabilities
        Of the language model, normalised over the candidates, (cells, candidates).
    candidates
        Id of each column.
    truth
        True id of each cell; None if unknown, which excludes the cell. It may be no candidate.
    projector
        Log-probabilities of the projector for the same candidates, or None.
    shares
        Share of each candidate of the training cells, above 0, (candidates,); None to give it no weight.
    novelty, studies
        Novelty of each cell, (cells,), and its study, if all studies were new to the model.

    Raises
    ------
    ValueError
        If a log-probability is NaN or positive infinity.
    """
    column = {candidate: place for place, candidate in enumerate(candidates)}
    labelled = np.array([one is not None for one in truth], dtype=bool)
    rows = np.flatnonzero(labelled)
    rows = rows[:: -(-len(rows) // MOST_CELLS) or 1]
    codes = np.array([column.get(truth[row], -1) for row in rows], dtype=np.int64)
    inputs = _inputs(*(part if part is None else part[rows] for part in (log_probabilities, projector)))
    if not len(codes) or not column:
        return SlotCalibration(len(codes))
    known = codes >= 0
    log_shares = np.log(np.ones(len(column)) if shares is None else shares)
    *weights, share_weight = _fit_weights(inputs[known], log_shares, codes[known])
    none = float(np.mean(~known))
    fitted = SlotCalibration(len(codes), tuple(weights), none, None, share_weight, tuple(log_shares.tolist()))
    novelty = None if novelty is None else novelty[rows]
    if novelty is not None:
        fitted = replace(fitted, none_by_novelty=fit_none(novelty, ~known, np.asarray(studies, dtype=object)[rows]))
    if len(column) == 1:
        return fitted
    found = fitted.probabilities(inputs[:, :, 0], inputs[:, :, 1] if inputs.shape[2] > 1 else None, novelty)
    return replace(fitted, steps=fit_steps(found.max(axis=1), found.argmax(axis=1) == codes))


def fit_none(novelty: np.ndarray, none: np.ndarray, studies: np.ndarray) -> tuple[float, float] | None:
    """Return how the probability that the true term is no candidate depends on novelty, see :class:`SlotCalibration`.

    Logistic regression in which all studies count the same. None if there are no such cells, or only such cells.

    Parameters
    ----------
    novelty
        Novelty of each cell, (cells,).
    none
        Whether its true term is no candidate, bool (cells,).
    studies
        Its study, new to the model.
    """
    if not none.any() or none.all():
        return None
    _, numbers, sizes = np.unique(studies.astype(str), return_inverse=True, return_counts=True)
    return _fit_logistic(_log_novelty(novelty), none, (1 / sizes)[numbers])


def _fit_logistic(given: np.ndarray, right: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Return intercept and slope of the logit, which is at least 0 and has a weak normal prior around it."""
    counted = weights * len(weights) / weights.sum()

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scores = parameters[0] + parameters[1] * given
        residual = counted * (expit(scores) - right)
        away = parameters[1] / _PRIOR_SD**2
        value = counted @ np.logaddexp(0, np.where(right, -scores, scores)) + away * parameters[1] / 2
        return float(value), np.array([residual.sum(), residual @ given + away])

    intercept, slope = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=[(-20, 20), (0, 20)]).x
    return float(intercept), float(slope)


def _none_of(fitted: tuple[float, float], log_novelty: np.ndarray) -> np.ndarray:
    return expit(fitted[0] + fitted[1] * log_novelty)


def _log_novelty(novelty: np.ndarray) -> np.ndarray:
    return np.log(np.clip(np.asarray(novelty, dtype=np.float64), *_NOVELTIES))


def _inputs(log_probabilities: np.ndarray, projector: np.ndarray | None) -> np.ndarray:
    """Return the scores, float64 (cells, candidates, 1 or 2)."""
    parts = [log_probabilities] if projector is None else [log_probabilities, projector]
    scores = np.stack([np.asarray(part, dtype=np.float64) for part in parts], axis=-1)
    if np.isnan(scores).any() or np.isposinf(scores).any():
        raise ValueError("log-probabilities must be numbers below infinity")
    return np.maximum(scores, _LEAST)


def _fit_weights(inputs: np.ndarray, log_shares: np.ndarray, codes: np.ndarray) -> tuple[float, float, float]:
    """Return the weights of the greatest posterior probability for cells whose true term is a candidate."""
    cells = np.arange(len(codes))
    scored = inputs.shape[2]
    used = [*range(scored), 2]  # without the projector, its weight is missing
    start = _DEFAULTS[used]
    right = np.append(inputs[cells, codes].sum(axis=0), log_shares[codes].sum())

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        probabilities = softmax(inputs @ weights[:scored] + weights[scored] * log_shares, axis=1)
        likelihood = np.log(np.maximum(probabilities[cells, codes], 1e-300)).sum()
        expected = np.append(np.einsum("nc,ncw->w", probabilities, inputs), probabilities.sum(axis=0) @ log_shares)
        away = (weights - start) / _PRIOR_SD**2
        return float(away @ (weights - start) / 2 - likelihood), away + expected - right

    found = _DEFAULTS.copy()
    found[used] = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[_BOUNDS[i] for i in used]).x
    return tuple(found.tolist())


def _with_greatest(probabilities: np.ndarray, steps: Steps) -> np.ndarray:
    """Return probabilities whose greatest of each row is mapped; what it loses or gains is shared by the others.

    It stays the greatest. The probability of none of the candidates is one of the others.
    """
    if not probabilities.shape[1]:
        return probabilities
    rows, best = np.arange(len(probabilities)), probabilities.argmax(axis=1)
    greatest = probabilities[rows, best]
    rest = np.maximum(1 - greatest, 1e-12)
    others = probabilities.copy()
    others[rows, best] = 0
    second = others.max(axis=1) / rest
    mapped = np.maximum(steps(greatest), (1 + _EDGE) * second / (1 + second))
    others *= ((1 - mapped) / rest)[:, None]
    others[rows, best] = mapped
    return others


def fit_steps(probabilities: np.ndarray, right: np.ndarray) -> Steps | None:
    """Return the isotonic map from probability to the share of right answers, or None if it does not help.

    It helps if there are at least 1,000 answers, and if it lowers both the Brier score and the log loss in five-fold
    cross-validation. The folds are every fifth answer.

    Parameters
    ----------
    probabilities, right
        Probability of each answer, and whether it is right.
    """
    if len(right) < FEWEST_FOR_ISOTONIC:
        return None
    predicted = np.empty(len(right))
    folds = np.arange(len(right)) % _FOLDS
    for fold in range(_FOLDS):
        held_out = folds == fold
        predicted[held_out] = _isotonic(probabilities[~held_out], right[~held_out])(probabilities[held_out])
    before, after = _losses(probabilities, right), _losses(predicted, right)
    return _isotonic(probabilities, right) if (after < before).all() else None


def _isotonic(probabilities: np.ndarray, right: np.ndarray) -> Steps:
    from sklearn.isotonic import IsotonicRegression  # takes seconds, and jobs that only apply a map do without

    least = 1 / (len(right) + 2)  # no probability of exactly 0 or 1 from a finite number of answers
    fitted = IsotonicRegression(y_min=least, y_max=1 - least).fit(probabilities, right.astype(float))
    return Steps(tuple(fitted.X_thresholds_.tolist()), tuple(fitted.y_thresholds_.tolist()))


def _losses(probabilities: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return Brier score and log loss."""
    clipped = np.clip(probabilities, _EDGE, 1 - _EDGE)
    return np.array([np.mean((probabilities - right) ** 2), -np.mean(np.log(np.where(right, clipped, 1 - clipped)))])


@dataclass(frozen=True)
class ProgrammeCalibration:
    """The calibration of gene programmes: from the model's probability of a programme to that of being a true one.

    The logit of the result is slope * logit of the probability + intercept.

    Parameters
    ----------
    programmes
        Number of programmes reported for validation cells that it rests on.
    slope, intercept
        Of the logit.
    steps
        Isotonic map of the result, or None.
    """

    programmes: int = 0
    slope: float = 1.0
    intercept: float = 0.0
    steps: Steps | None = None

    def confidences(self, probabilities: np.ndarray) -> np.ndarray:
        """Return the calibrated probability of each reported programme, float64 of the same shape; NaN stays NaN."""
        found = expit(self.slope * _logit(probabilities) + self.intercept)
        return found if self.steps is None else self.steps(found)

    def to_dict(self) -> dict[str, Any]:
        """Return what a JSON file holds."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Self:
        """Return the calibration of :meth:`to_dict`."""
        return cls(**saved | {"steps": Steps.from_dict(saved["steps"])})


def calibrate_programmes(probabilities: np.ndarray, right: np.ndarray) -> ProgrammeCalibration:
    """Fit the calibration of gene programmes on validation cells.

    Logistic regression of being right on the logit of the probability, with a normal prior around slope 1 and
    intercept 0, then isotonic regression as in :func:`fit_steps`.

    Parameters
    ----------
    probabilities
        The model's probability of each reported programme, one entry per cell and programme, in any shape. For a cell
        with two programmes, the sum of its probabilities as first and as second is the natural choice.
    right
        Whether the programme is among the true ones of its cell; same shape.
    """
    right = np.ravel(right).astype(bool)
    given = _logit(np.ravel(probabilities))
    start = np.array([1.0, 0.0])

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scores = parameters[0] * given + parameters[1]
        away = (parameters - start) / _PRIOR_SD**2
        residual = expit(scores) - right
        slope = np.array([residual @ given, residual.sum()])
        return float(np.logaddexp(0, np.where(right, -scores, scores)).sum() + away @ (parameters - start) / 2), (
            away + slope
        )

    slope, intercept = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, 20), (-20, 20)]).x
    steps = fit_steps(expit(slope * given + intercept), right)
    return ProgrammeCalibration(len(right), float(slope), float(intercept), steps)


def _logit(probabilities: np.ndarray) -> np.ndarray:
    return logit(np.clip(np.asarray(probabilities, dtype=np.float64), _EDGE, 1 - _EDGE))
