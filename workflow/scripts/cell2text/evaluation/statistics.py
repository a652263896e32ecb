"""The figures of an evaluation, each as sums over cells and a function of those sums.

Written so because a bootstrap replicate is then a weighted sum (see :class:`~.bootstrap.Bootstrap`). Missing
labels are None: a missing truth leaves the cell out, a missing prediction is wrong.
"""

import numpy as np
import pandas as pd
import scipy.sparse
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

BINS = 10
_ORDERS = 4  # n-grams of BLEU


def ratio(sums: np.ndarray) -> np.ndarray:
    """Return first sum / second sum, shape (replicates,): the mean of a value over the cells that have it."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[:, 0] / sums[:, 1]


def mean_statistics(values: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Return the sums of :func:`ratio`, shape (cells, 2), of a value over the cells that are counted."""
    counted = np.ones(len(values), dtype=bool) if counted is None else counted
    return np.column_stack([np.where(counted, values, 0), counted]).astype(float)


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Return the mean F1 over the classes that the truth holds, from the sums of :func:`class_statistics`."""
    hits, true, predicted = np.split(sums, 3, axis=1)
    present = true > 0
    f1 = np.divide(2 * hits, true + predicted, where=present, out=np.zeros_like(hits))
    with np.errstate(invalid="ignore"):
        return f1.sum(axis=1) / present.sum(axis=1)


def class_statistics(truth: pd.Series, predicted: pd.Series, classes: pd.Index) -> scipy.sparse.csr_array:
    """Return hits, true cells and predicted cells of each class, shape (cells, 3 x classes).

    A prediction counts only where the truth is known.
    """
    known = truth.notna().to_numpy()
    true = classes.get_indexer(truth)
    said = np.where(known, classes.get_indexer(predicted), -1)
    hit = np.where(true == said, true, -1)
    return scipy.sparse.hstack([_one_hot(codes, len(classes)) for codes in (hit, true, said)], format="csr")


def _one_hot(codes: np.ndarray, classes: int) -> scipy.sparse.csr_array:
    """Return one column a class, shape (cells, classes); a code of -1 is a row of zeros."""
    cells = np.flatnonzero(codes >= 0)
    return scipy.sparse.csr_array((np.ones(len(cells)), (cells, codes[cells])), shape=(len(codes), classes))


def look_up(similarity: pd.DataFrame, predicted: pd.Series, truth: pd.Series) -> np.ndarray:
    """Return the similarity of each cell's predicted (row) and true (column) term; 0 where one is missing."""
    rows, columns = similarity.index.get_indexer(predicted), similarity.columns.get_indexer(truth)
    return np.where((rows >= 0) & (columns >= 0), similarity.to_numpy()[rows, columns], 0.0)


def calibration_error(sums: np.ndarray) -> np.ndarray:
    """Return the expected calibration error (Naeini et al., AAAI 2015) from :func:`calibration_statistics`.

    It is the mean over cells of |mean confidence - accuracy| of the cell's bin.
    """
    confidence, right, cells = np.split(sums, 3, axis=1)
    with np.errstate(invalid="ignore"):
        return np.abs(confidence - right).sum(axis=1) / cells.sum(axis=1)


def calibration_statistics(confidence: np.ndarray, right: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Return confidence, hits and cells by bin of confidence, shape (cells, 3 x bins).

    The ten bins are equally wide; a confidence on a border falls in the upper bin, 1 in the last.
    """
    told = np.nan_to_num(confidence)
    # In single precision, as confidences are stored, 0.9 lies on its border and not just below it.
    bins = np.minimum(told.astype(np.float32) * np.float32(BINS), BINS - 1).astype(int)
    inside = (bins[:, None] == np.arange(BINS)) & counted[:, None]
    return np.hstack([inside * told[:, None], inside * right[:, None], inside])


def set_statistics(truth: pd.Series, predicted: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return whether two sets of ids are equal, and their Jaccard index (1 for two empty sets)."""
    names = pd.Index(pd.unique(pd.concat([truth, predicted]).explode().dropna()))
    true, said = (_multi_hot(sets, names) for sets in (truth, predicted))
    shared = true.multiply(said).sum(axis=1)
    union = true.sum(axis=1) + said.sum(axis=1) - shared
    jaccard = np.divide(shared, union, where=union > 0, out=np.ones(len(truth)))
    return (shared == union).astype(float), jaccard


def _multi_hot(sets: pd.Series, names: pd.Index) -> scipy.sparse.csr_array:
    """Return one column an id, shape (cells, ids); None is the empty set."""
    members = sets.reset_index(drop=True).explode().dropna()
    entries = (np.ones(len(members)), (members.index, names.get_indexer(members)))
    return (scipy.sparse.csr_array(entries, shape=(len(sets), len(names))) > 0).astype(float)


def bleu(sums: np.ndarray) -> np.ndarray:
    """Return corpus BLEU-4 in 0..1, as sacrebleu computes it, from the sums of :func:`text_statistics`."""
    scores = [
        BLEU.compute_bleu(row[:_ORDERS], row[_ORDERS:-2], *row[-2:], smooth_method="exp").score
        for row in np.rint(sums).astype(int).tolist()
    ]
    return np.array(scores) / 100


def text_statistics(reference: pd.Series, text: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return the n-gram counts of BLEU, shape (cells, 10), and ROUGE-L's F of each cell.

    The counts are sacrebleu's: matching n-grams, n-grams, length of the text, length of the reference.
    Equal pairs of texts, of which templates make many, are scored once.
    """
    codes, pairs = pd.factorize(pd.MultiIndex.from_arrays([reference, text]))
    # Only the counts are used; effective_order keeps sacrebleu from warning about single sentences.
    counter, rouge = BLEU(effective_order=True), RougeScorer(["rougeL"])
    scores = [counter.sentence_score(said, [true]) for true, said in pairs]
    counts = np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores])
    overlap = np.array([rouge.score(true, said)["rougeL"].fmeasure for true, said in pairs])
    return counts[codes], overlap[codes]
