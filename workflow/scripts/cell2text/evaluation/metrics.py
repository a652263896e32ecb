"""The rows of metrics.tsv: every metric of one method on the cells of one split."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from cell2text.contracts import TERM_SLOTS
from cell2text.evaluation import statistics
from cell2text.evaluation.bootstrap import Bootstrap
from cell2text.evaluation.similarity import TermGraph, ontology_edges
from cell2text.ontology import ONTOLOGIES, UNKNOWN

# The terms for sex and stage form no taxonomy, so graph distance does not measure how wrong a prediction is.
SIMILARITY_SLOTS = ("cell_type", "tissue", "disease")


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
) -> list[dict[str, Any]]:
    """Return slot, metric, value, low, high and n for every metric of a method.

    Parameters
    ----------
    truth, predicted
        Rows of ``contracts.DESCRIPTIONS`` and ``contracts.PREDICTIONS`` for the same cells in the same order;
        ids as :func:`known` returns them.
    similarities
        From :func:`term_similarities`.
    bootstrap
        Resamples of the same cells.
    """
    rows = []
    for slot, metric, sums, function, n in _all_statistics(truth, predicted, similarities):
        if n:
            value, low, high = bootstrap.estimate(sums, function)
            rows.append({"slot": slot, "metric": metric, "value": value, "low": low, "high": high, "n": n})
    return rows


# slot, metric, per-cell statistics, function of their sums, number of cells
Metric = tuple[str, str, Any, Callable[[np.ndarray], np.ndarray], int]


def _all_statistics(
    truth: pd.DataFrame, predicted: pd.DataFrame, similarities: dict[str, dict[str, pd.DataFrame]]
) -> Iterator[Metric]:
    for slot in TERM_SLOTS:
        yield from _slot_statistics(slot, truth[f"{slot}_id"], predicted, similarities.get(slot, {}))
    yield from _pathway_statistics(truth["pathway_ids"], predicted["pathway_ids"])
    yield from _text_statistics(truth["text"], predicted)


def _slot_statistics(
    slot: str, truth: pd.Series, table: pd.DataFrame, similarities: dict[str, pd.DataFrame]
) -> Iterator[Metric]:
    if truth.isna().all():
        return
    predicted, confidence = table[f"{slot}_id"], table[f"{slot}_confidence"].to_numpy(float)
    labelled = truth.notna().to_numpy()
    correct = labelled & (truth == predicted).to_numpy()
    classes = pd.Index(np.unique(truth.dropna().astype(str)))
    n = int(labelled.sum())
    yield slot, "accuracy", statistics.mean_statistics(correct, labelled), statistics.ratio, n
    yield slot, "macro_f1", statistics.class_statistics(truth, predicted, classes), statistics.macro_f1, n
    yield slot, "abstention", statistics.mean_statistics(predicted.isna(), labelled), statistics.ratio, n
    for metric, pairwise in similarities.items():
        similarity = statistics.look_up(pairwise, predicted, truth)
        yield slot, metric, statistics.mean_statistics(similarity, labelled), statistics.ratio, n
    if similarities:
        similarity = statistics.look_up(similarities["similarity"], predicted, truth)
        wrong = labelled & ~correct
        errors = statistics.mean_statistics(similarity, wrong)
        yield slot, "similarity_among_errors", errors, statistics.ratio, int(wrong.sum())
    counted = labelled & predicted.notna().to_numpy() & ~np.isnan(confidence)
    bins = statistics.calibration_statistics(confidence, correct, counted)
    yield slot, "calibration_error", bins, statistics.calibration_error, int(counted.sum())


def _pathway_statistics(truth: pd.Series, predicted: pd.Series) -> Iterator[Metric]:
    if not truth.explode().notna().any():
        return
    equal, jaccard = statistics.set_statistics(truth, predicted)
    yield "pathways", "subset_accuracy", statistics.mean_statistics(equal), statistics.ratio, len(truth)
    yield "pathways", "jaccard", statistics.mean_statistics(jaccard), statistics.ratio, len(truth)


def _text_statistics(reference: pd.Series, predicted: pd.DataFrame) -> Iterator[Metric]:
    n = len(reference)
    parsed = (predicted["status"] == "parsed").to_numpy()
    yield "text", "parsed", statistics.mean_statistics(parsed), statistics.ratio, n
    text = predicted["text"].fillna("").astype(str)
    if not text.any():
        return
    counts, overlap = statistics.text_statistics(reference, text)
    equal = (reference == text).to_numpy()
    yield "text", "bleu", counts, statistics.bleu, n
    yield "text", "rouge_l", statistics.mean_statistics(overlap), statistics.ratio, n
    yield "text", "exact_match", statistics.mean_statistics(equal), statistics.ratio, n
