"""The rows of metrics.tsv: every metric of one method on the cells of one split."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse

from cell2text.contracts import HELD_OUT, SEEN, TERM_SLOTS
from cell2text.evaluation import sums
from cell2text.evaluation.bootstrap import Bootstrap, interval
from cell2text.evaluation.similarity import TermGraph, ontology_edges
from cell2text.ontology import ONTOLOGIES, UNKNOWN

# The terms for sex and stage form no taxonomy, so graph distance does not measure how wrong a prediction is.
SIMILARITY_SLOTS = ("cell_type", "tissue", "disease")


@dataclass(frozen=True)
class Metric:
    """A metric as a function of sums over cells.

    Parameters
    ----------
    slot, metric
        Names, as in ``contracts.METRICS``.
    terms
        The terms of the sums, dense or sparse, shape (cells, sums).
    function
        Maps sums of shape (resamples, sums) to one value per resample; NaN where it is undefined.
    counted
        The cells that are scored, bool (cells,).
    compared
        Whether methods can be compared: each is scored on the same cells, and more is better.
    """

    slot: str
    metric: str
    terms: np.ndarray | scipy.sparse.csr_array
    function: Callable[[np.ndarray], np.ndarray]
    counted: np.ndarray
    compared: bool = True


@dataclass(frozen=True)
class Score:
    """A metric of one method.

    Parameters
    ----------
    metric
        The metric.
    estimates
        Its value on all cells, followed by those of the resamples, float64 (1 + resamples,).
    resampled
        What was resampled: ``"donor"``, ``"cell"`` or None.
    """

    metric: Metric
    estimates: np.ndarray
    resampled: str | None

    @property
    def key(self) -> tuple[str, str]:
        """Slot and metric."""
        return self.metric.slot, self.metric.metric

    def row(self, reference: "Score | None" = None) -> dict[str, Any]:
        """Return the row of ``contracts.METRICS``, without split and method.

        The difference is that of the reference (the same metric of the fine-tuned model on the same resamples) minus
        this score.
        """
        row = dict(zip(("slot", "metric"), self.key, strict=True))
        row |= dict(zip(("value", "low", "high"), interval(self.estimates), strict=True))
        row |= {"n": int(self.metric.counted.sum()), "resampled": self.resampled}
        if reference is not None and self.metric.compared:
            difference = interval(reference.estimates - self.estimates)
            row |= dict(zip(("difference", "difference_low", "difference_high"), difference, strict=True))
        return row


def known(ids: pd.Series) -> pd.Series:
    """Return the ids of a slot with None for missing and uninformative ones, so that "unknown" is never correct."""
    ids = ids.astype(object)
    return ids.mask(ids.isna() | ids.astype(str).str.lower().isin(UNKNOWN), None)


def term_similarities(tables: list[pd.DataFrame]) -> dict[str, dict[str, pd.DataFrame]]:
    """Return the pairwise similarity of all terms in the tables, by slot and metric; rows are predicted terms."""
    similarities = {}
    for slot in SIMILARITY_SLOTS:
        terms = sorted(set().union(*(table[f"{slot}_id"].dropna() for table in tables)))
        graph = TermGraph(ontology_edges(ONTOLOGIES[slot]))
        similarities[slot] = {
            "similarity": graph.similarity(terms),
            "similarity_paper": graph.paper_similarity(terms),
        }
    return similarities


def score_method(
    truth: pd.DataFrame,
    predicted: pd.DataFrame,
    similarities: dict[str, dict[str, pd.DataFrame]],
    bootstrap: Bootstrap,
    trained: Collection[str] | None = None,
    terms: pd.DataFrame | None = None,
) -> list[Score]:
    """Return the scores of a method.

    Parameters
    ----------
    truth, predicted
        Rows of ``contracts.DESCRIPTIONS`` and ``contracts.PREDICTIONS`` for the same cells in the same order;
        ids as :func:`known` returns them.
    similarities
        From :func:`term_similarities`.
    bootstrap
        Resamples of the same cells.
    trained
        Ids of the cell types of the training cells. Cells of other types are scored apart. None: there are no others.
    terms
        Rows of ``contracts.TERMS``, for the ancestors and depths of reported terms. None: these are not scored.
    """
    metrics = chain(_all_metrics(truth, predicted, similarities, trained), _reported_metrics(truth, predicted, terms))
    metrics = [metric for metric in metrics if metric.counted.any()]
    units = [bootstrap.unit(metric.counted) for metric in metrics]
    values: dict[int, np.ndarray] = {}
    for unit in set(units):
        rows = [row for row, one in enumerate(units) if one == unit]
        terms = [scipy.sparse.csr_array(metrics[row].terms) for row in rows]
        resampled = bootstrap.sum_up(scipy.sparse.hstack(terms, format="csr"), unit)
        ends = np.cumsum([part.shape[1] for part in terms])
        for row, part in zip(rows, np.split(resampled, ends[:-1], axis=1), strict=True):
            values[row] = metrics[row].function(part)
    return [Score(metric, values[row], units[row]) for row, metric in enumerate(metrics)]


def _all_metrics(
    truth: pd.DataFrame,
    predicted: pd.DataFrame,
    similarities: dict[str, dict[str, pd.DataFrame]],
    trained: Collection[str] | None,
) -> Iterator[Metric]:
    for slot in TERM_SLOTS:
        true, ids = truth[f"{slot}_id"], predicted[f"{slot}_id"]
        yield from _label_metrics(slot, true, ids, similarities.get(slot, {}))
        confidence = predicted[f"{slot}_confidence"].to_numpy(float)
        yield from _error_metrics(slot, true, ids, confidence, similarities.get(slot, {}))
    true, ids = truth["cell_type_id"], predicted["cell_type_id"]
    seen = true.isin(true if trained is None else trained)
    if (true.notna() & ~seen).any():
        for part, among in ((SEEN, seen), (HELD_OUT, ~seen)):
            yield from _label_metrics(part, true.where(among, None), ids, similarities.get("cell_type", {}))
    yield from _pathway_metrics(truth["pathway_ids"], predicted["pathway_ids"], predicted["pathway_confidences"])
    yield from _text_metrics(truth["text"], predicted)


def _label_metrics(
    slot: str, truth: pd.Series, predicted: pd.Series, similarities: dict[str, pd.DataFrame]
) -> Iterator[Metric]:
    labelled = truth.notna().to_numpy()
    if not labelled.any():
        return
    correct = labelled & (truth == predicted).to_numpy()
    classes = pd.Index(np.unique(truth.dropna().astype(str)))
    abstained = sums.mean_terms(predicted.isna(), labelled)
    yield Metric(slot, "accuracy", sums.mean_terms(correct, labelled), sums.ratio, labelled)
    yield Metric(slot, "macro_f1", sums.class_terms(truth, predicted, classes), sums.macro_f1, labelled)
    yield Metric(slot, "abstention", abstained, sums.ratio, labelled, compared=False)
    for metric, pairwise in similarities.items():
        similarity = sums.look_up(pairwise, predicted, truth)
        yield Metric(slot, metric, sums.mean_terms(similarity, labelled), sums.ratio, labelled)


def _error_metrics(
    slot: str, truth: pd.Series, predicted: pd.Series, confidence: np.ndarray, similarities: dict[str, pd.DataFrame]
) -> Iterator[Metric]:
    labelled = truth.notna().to_numpy()
    if not labelled.any():
        return
    correct = labelled & (truth == predicted).to_numpy()
    if similarities:
        similarity, wrong = sums.look_up(similarities["similarity"], predicted, truth), labelled & ~correct
        errors = sums.mean_terms(similarity, wrong)
        yield Metric(slot, "similarity_among_errors", errors, sums.ratio, wrong, compared=False)
    counted = labelled & predicted.notna().to_numpy() & ~np.isnan(confidence)
    bins = sums.calibration_terms(confidence, correct, counted)
    yield Metric(slot, "calibration_error", bins, sums.calibration_error, counted, compared=False)


def _reported_metrics(truth: pd.DataFrame, predicted: pd.DataFrame, terms: pd.DataFrame | None) -> Iterator[Metric]:
    """Yield the metrics of reported terms, for all slots if the method reports a term for any cell."""
    if terms is None or not predicted[[f"{slot}_reported_id" for slot in TERM_SLOTS]].notna().any(axis=None):
        return
    for slot in TERM_SLOTS:
        true, ids = truth[f"{slot}_id"], predicted[f"{slot}_reported_id"]
        places = terms[terms["slot"] == slot].set_index("id")
        ancestors = {key: above for key, above in places["ancestors"].items() if above is not None}
        right = sums.is_at_or_above(ids, true, ancestors)
        labelled = true.notna().to_numpy()
        reported = labelled & ids.notna().to_numpy()
        depth = ids.map(places["depth"]).to_numpy(float)
        deep = reported & ~np.isnan(depth)
        confidence = predicted[f"{slot}_reported_confidence"].to_numpy(float)
        rated = reported & ~np.isnan(confidence)
        for metric, values, counted in (
            ("reported_precision", right, reported),
            ("coverage", reported, labelled),
            ("reported_depth", depth, deep),
        ):
            yield Metric(slot, metric, sums.mean_terms(values, counted), sums.ratio, counted, compared=False)
        bins = sums.calibration_terms(confidence, right, rated)
        yield Metric(slot, "reported_calibration_error", bins, sums.calibration_error, rated, compared=False)


def _pathway_metrics(truth: pd.Series, predicted: pd.Series, confidences: pd.Series) -> Iterator[Metric]:
    if not truth.explode().notna().any():
        return
    every = np.ones(len(truth), dtype=bool)
    equal, jaccard = sums.compare_sets(truth, predicted)
    yield Metric("pathways", "subset_accuracy", sums.mean_terms(equal), sums.ratio, every)
    yield Metric("pathways", "jaccard", sums.mean_terms(jaccard), sums.ratio, every)
    confidence, right = sums.rate_programmes(truth, predicted, confidences)
    rated = ~np.isnan(confidence)
    parts = [sums.calibration_terms(*rank) for rank in zip(confidence.T, right.T, rated.T, strict=True)]
    if parts:
        counted = rated.any(axis=1)
        yield Metric("pathways", "calibration_error", sum(parts), sums.calibration_error, counted, compared=False)


def _text_metrics(reference: pd.Series, predicted: pd.DataFrame) -> Iterator[Metric]:
    every = np.ones(len(reference), dtype=bool)
    parsed = (predicted["status"] == "parsed").to_numpy()
    yield Metric("text", "parsed", sums.mean_terms(parsed), sums.ratio, every)
    text = predicted["text"].fillna("").astype(str)
    if not text.any():
        return
    counts, overlap = sums.text_terms(reference, text)
    equal = (reference == text).to_numpy()
    yield Metric("text", "bleu", counts, sums.bleu, every)
    yield Metric("text", "rouge_l", sums.mean_terms(overlap), sums.ratio, every)
    yield Metric("text", "exact_match", sums.mean_terms(equal), sums.ratio, every)
