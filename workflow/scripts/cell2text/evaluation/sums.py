"""Metrics as sums over cells: the terms of each cell, and a function of their sums.

In this form a resample is a weighted sum (see :class:`~.bootstrap.Bootstrap`). The functions take sums of shape
(resamples, sums), of which the first row is over all cells. Missing labels are None: cells without a true label are
excluded, and a missing prediction counts as wrong.
"""

from collections.abc import Collection, Mapping

import numpy as np
import pandas as pd
import scipy.sparse
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

BINS = 10
_ORDERS = 4  # longest n-gram of BLEU


def ratio(sums: np.ndarray) -> np.ndarray:
    """Return first sum / second sum, shape (resamples,): the mean of a value over the counted cells."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[:, 0] / sums[:, 1]


def mean_terms(values: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Return the terms of :func:`ratio` for the mean of a value over the counted cells, shape (cells, 2)."""
    counted = np.ones(len(values), dtype=bool) if counted is None else counted
    return np.column_stack([np.where(counted, values, 0), counted]).astype(float)


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Return the mean F1 over the classes, from sums of :func:`class_terms`.

    The classes are the same in every resample. In a resample with neither true nor predicted cells of a class, its F1
    is undefined (0/0), and its F1 over all cells is used. A class with predicted cells alone has an F1 of 0.
    """
    hits, true, predicted = np.split(sums, 3, axis=1)
    with np.errstate(invalid="ignore"):
        f1 = 2 * hits / (true + predicted)
    return np.where(np.isnan(f1), f1[0], f1).mean(axis=1)


def class_terms(truth: pd.Series, predicted: pd.Series, classes: pd.Index) -> scipy.sparse.csr_array:
    """Return indicators of hit, true class and predicted class for each class, shape (cells, 3 x classes).

    Predictions for cells without a true label are ignored.
    """
    labelled = truth.notna().to_numpy()
    true_codes = classes.get_indexer(truth)
    predicted_codes = np.where(labelled, classes.get_indexer(predicted), -1)
    hits = np.where(true_codes == predicted_codes, true_codes, -1)
    parts = [_one_hot(codes, len(classes)) for codes in (hits, true_codes, predicted_codes)]
    return scipy.sparse.hstack(parts, format="csr")


def _one_hot(codes: np.ndarray, classes: int) -> scipy.sparse.csr_array:
    """Return one column per class, shape (cells, classes); the row of a code of -1 is all zeros."""
    cells = np.flatnonzero(codes >= 0)
    return scipy.sparse.csr_array((np.ones(len(cells)), (cells, codes[cells])), shape=(len(codes), classes))


def look_up(similarity: pd.DataFrame, predicted: pd.Series, truth: pd.Series) -> np.ndarray:
    """Return the similarity of each cell's predicted (row) and true (column) term; 0 if either is missing."""
    rows, columns = similarity.index.get_indexer(predicted), similarity.columns.get_indexer(truth)
    return np.where((rows >= 0) & (columns >= 0), similarity.to_numpy()[rows, columns], 0.0)


def calibration_error(sums: np.ndarray) -> np.ndarray:
    """Return the expected calibration error (Naeini et al., AAAI 2015) from :func:`calibration_terms`.

    This is the mean over bins of |mean confidence - accuracy|, weighted by the number of cells in the bin.
    """
    confidence, correct, cells = np.split(sums, 3, axis=1)
    with np.errstate(invalid="ignore"):
        return np.abs(confidence - correct).sum(axis=1) / cells.sum(axis=1)


def calibration_terms(confidence: np.ndarray, correct: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Return confidence, correctness and membership by bin of confidence, shape (cells, 3 x bins).

    The ten bins have equal width. A confidence on an edge falls into the upper bin; 1 falls into the last.
    """
    confidence = np.nan_to_num(confidence)
    # In single precision, the precision of stored confidences, 0.9 lies on its edge and not just below it.
    bins = np.minimum(confidence.astype(np.float32) * np.float32(BINS), BINS - 1).astype(int)
    members = (bins[:, None] == np.arange(BINS)) & counted[:, None]
    return np.hstack([members * confidence[:, None], members * correct[:, None], members])


def is_at_or_above(predicted: pd.Series, truth: pd.Series, ancestors: Mapping[str, Collection[str]]) -> np.ndarray:
    """Return whether each cell's predicted term is its true term or an ancestor of it; False if either is missing.

    Parameters
    ----------
    predicted, truth
        Ids, None where missing.
    ancestors
        Ids of all ancestors of a true term.
    """
    codes, pairs = pd.factorize(pd.MultiIndex.from_arrays([predicted, truth]))
    right = [isinstance(one, str) and (one == true or one in ancestors.get(true, ())) for one, true in pairs]
    return np.array(right, dtype=bool)[codes]


def rate_programmes(truth: pd.Series, predicted: pd.Series, confidences: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return the confidence of each predicted programme and whether it is among the cell's true ones.

    Parameters
    ----------
    truth, predicted
        Lists of ids.
    confidences
        Lists of confidences in the order of the predicted ids; None for a cell without them.

    Returns
    -------
    confidence, right
        float64 and bool, shape (cells, most programmes of a cell); NaN and False where a cell has fewer.
    """
    given = confidences.notna().to_numpy()
    rated = pd.DataFrame({"id": predicted.to_numpy()[given], "confidence": confidences.to_numpy()[given]})
    rated.index = np.flatnonzero(given)
    rated = rated.explode(["id", "confidence"]).dropna()
    rank = rated.groupby(level=0).cumcount().to_numpy()
    confidence = np.full((len(truth), rank.max(initial=-1) + 1), np.nan)
    confidence[rated.index, rank] = rated["confidence"].astype(float)
    right = np.zeros(confidence.shape, dtype=bool)
    members = truth.reset_index(drop=True).explode()
    true_pairs = pd.MultiIndex.from_arrays([members.index, members])
    right[rated.index, rank] = pd.MultiIndex.from_arrays([rated.index, rated["id"]]).isin(true_pairs)
    return confidence, right


def compare_sets(truth: pd.Series, predicted: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return for each cell whether its two sets of ids are equal, and their Jaccard index (1 for two empty sets)."""
    names = pd.Index(pd.unique(pd.concat([truth, predicted]).explode().dropna()))
    true_sets, predicted_sets = (_multi_hot(sets, names) for sets in (truth, predicted))
    shared = true_sets.multiply(predicted_sets).sum(axis=1)
    union = true_sets.sum(axis=1) + predicted_sets.sum(axis=1) - shared
    jaccard = np.divide(shared, union, where=union > 0, out=np.ones(len(truth)))
    return (shared == union).astype(float), jaccard


def _multi_hot(sets: pd.Series, names: pd.Index) -> scipy.sparse.csr_array:
    """Return one column per id, shape (cells, ids); None is the empty set."""
    members = sets.reset_index(drop=True).explode().dropna()
    entries = (np.ones(len(members)), (members.index, names.get_indexer(members)))
    return (scipy.sparse.csr_array(entries, shape=(len(sets), len(names))) > 0).astype(float)


def bleu(sums: np.ndarray) -> np.ndarray:
    """Return corpus BLEU-4 from 0 to 1, computed by sacrebleu from sums of :func:`text_terms`."""
    scores = [
        BLEU.compute_bleu(row[:_ORDERS], row[_ORDERS:-2], *row[-2:], smooth_method="exp").score
        for row in np.rint(sums).astype(int).tolist()
    ]
    return np.array(scores) / 100


def text_terms(reference: pd.Series, text: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return each cell's n-gram counts for BLEU, shape (cells, 10), and its ROUGE-L F-score.

    The counts are sacrebleu's: matching n-grams, all n-grams, length of the text, length of the reference.
    The texts come from a template, so many pairs repeat; each distinct pair is scored once.
    """
    codes, pairs = pd.factorize(pd.MultiIndex.from_arrays([reference, text]))
    # Only the counts are used; effective_order keeps sacrebleu from warning about single sentences.
    counter, rouge = BLEU(effective_order=True), RougeScorer(["rougeL"])
    scores = [counter.sentence_score(generated, [target]) for target, generated in pairs]
    counts = np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores])
    overlap = np.array([rouge.score(target, generated)["rougeL"].fmeasure for target, generated in pairs])
    return counts[codes], overlap[codes]
