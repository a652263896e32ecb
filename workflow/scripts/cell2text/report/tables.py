"""Tables of the report: methods, slots, confusions and classes."""

from typing import Any

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from cell2text.contracts import HELD_OUT, SEEN, TERM_SLOTS
from cell2text.evaluation.methods import GREEDY, METHODS, NO_RIVALS, title_of
from cell2text.report.results import METHOD, SLOTS, Results, slot_name

# The table of methods: for each group of columns, the slot and the title and metric of each column.
COLUMNS = {
    "Cell type": (
        "cell_type",
        {
            "Accuracy": "accuracy",
            "Macro-F1": "macro_f1",
            "Ontology similarity": "similarity",
            "Similarity among errors": "similarity_among_errors",
            "Calibration error": "calibration_error",
        },
    ),
    "Gene programmes": (
        "pathways",
        {"Jaccard": "jaccard", "All correct": "subset_accuracy", "Calibration error": "calibration_error"},
    ),
    "Text": ("text", {"BLEU": "bleu", "ROUGE-L": "rouge_l", "Exact match": "exact_match"}),
}
# The scores of the first screen that are compared with the best baseline: title, slot, metric.
COMPARED = (
    ("Cell type, accuracy", "cell_type", "accuracy"),
    ("Cell type, macro-F1", "cell_type", "macro_f1"),
    *((f"{slot_name(slot).capitalize()}, accuracy", slot, "accuracy") for slot in (SEEN, HELD_OUT, *TERM_SLOTS[1:])),
    ("Gene programmes, Jaccard index", "pathways", "jaccard"),
    ("Gene programmes, all correct", "pathways", "subset_accuracy"),
)
DIFFERENCE = ("difference", "difference_low", "difference_high")
MOST_CLASSES = 30


def compare_methods(results: Results) -> list[dict[str, Any]]:
    """Return one row per method: title, summary and scores, each of a baseline with its :func:`verdict`.

    Unconstrained text is no baseline, because the same model writes it.
    """
    rows = []
    for method in _list_methods(results):
        scores = [results.metric(method, slot, metric) for slot, group in COLUMNS.values() for metric in group.values()]
        summary = METHODS[method].summary if method in METHODS else ""
        scores = [score and score | {"verdict": None if method == GREEDY else verdict(score)} for score in scores]
        rows.append({"method": method, "name": title_of(method), "summary": summary, "scores": scores})
    return rows


def verdict(score: dict[str, float]) -> str | None:
    """Return whether a baseline is ``"better"``, ``"worse"`` or ``"unclear"``; None if no difference was computed.

    It is unclear if the 95% interval of the paired difference includes zero, or if there is no interval.
    """
    if np.isnan(score["difference"]):
        return None
    if score["difference_high"] < 0:
        return "better"
    return "worse" if score["difference_low"] > 0 else "unclear"


def points(difference: float) -> str:
    """Return a difference of shares in percentage points, with its sign.

    Examples
    --------
    >>> points(0.0123), points(float("nan"))
    ('+1.2', '–')
    """
    return f"{100 * difference:+.1f}".replace("-", "\N{MINUS SIGN}") if difference == difference else "–"


def _list_methods(results: Results) -> list[str]:
    """Return the methods of a run: those of the registry in its order, then any others by name."""
    present = set(results.metrics["method"])
    return [name for name in METHODS if name in present] + sorted(present - set(METHODS))


def best_baseline(results: Results, slot: str, metric: str) -> dict[str, Any] | None:
    """Return name and numbers of the baseline that scores highest; None if no baseline has a score.

    The fine-tuned model without constraints or with shuffled embeddings is no baseline to beat.
    """
    baselines = (method for method in _list_methods(results) if method not in (METHOD, *NO_RIVALS))
    scores = [
        {"name": title_of(method), **score} for method in baselines if (score := results.metric(method, slot, metric))
    ]
    return max(scores, key=lambda score: score["value"], default=None)


def compare_with_best(results: Results) -> list[dict[str, Any]]:
    """Return one row per score of ``COMPARED``: title, Cell2Text's score, the best baseline's, and the verdict on it.

    Slots with one term, which every method names, are skipped.
    """
    words = {"better": "baseline better", "worse": f"{title_of(METHOD)} better", "unclear": "no clear difference"}
    rows = []
    for title, slot, metric in COMPARED:
        own, baseline = results.metric(METHOD, slot, metric), best_baseline(results, slot, metric)
        varies = slot not in TERM_SLOTS or len(_true_terms(results, slot)) > 1
        if varies and own and baseline and (found := verdict(baseline)):
            rows.append({"title": title, "own": own, "baseline": baseline, "verdict": found, "words": words[found]})
    return rows


def list_unparsed(results: Results) -> list[tuple[str, float]]:
    """Return title and share of parsed texts of the methods with texts that do not follow the grammar."""
    shares = ((title_of(method), results.metric(method, "text", "parsed")) for method in _list_methods(results))
    return [(title, share["value"]) for title, share in shares if share and share["value"] < 1]


def score_slots(results: Results) -> list[dict[str, Any]]:
    """Return for each slot the number of terms in the reference and the scores of the fine-tuned model."""
    rows = []
    for slot in (SLOTS[0], SEEN, HELD_OUT, *SLOTS[1:]):
        accuracy = results.metric(METHOD, slot, "accuracy") or results.metric(METHOD, slot, "subset_accuracy")
        if accuracy is None and slot in (SEEN, HELD_OUT):
            continue
        terms = _true_terms(results, slot)
        rows.append(
            {
                "slot": slot,
                "terms": len(terms),
                "only": results.name(slot, terms[0]) if len(terms) == 1 and slot in SLOTS else None,
                "accuracy": accuracy,
                "macro_f1": results.metric(METHOD, slot, "macro_f1"),
                "jaccard": results.metric(METHOD, slot, "jaccard"),
                "abstention": results.metric(METHOD, slot, "abstention"),
            }
        )
    return rows


def _true_terms(results: Results, slot: str) -> np.ndarray:
    if slot == "pathways":
        return results.cells["true_pathway_ids"].explode().dropna().unique()
    if slot in TERM_SLOTS:
        return results.cells[f"true_{slot}_id"].dropna().unique()
    types = results.cells["true_cell_type_id"].dropna()
    return types[types.isin(results.model["labels"]["cell_type"]) == (slot == SEEN)].unique()


def class_scores(results: Results) -> list[dict[str, Any]]:
    """Return the fine-tuned model's scores per cell type, the most frequent type first."""
    table = _of_cell_types(results.per_class)
    return table.sort_values(["n", "name"], ascending=[False, True]).to_dict("records")


def _of_cell_types(table: pd.DataFrame) -> pd.DataFrame:
    return table[(table["method"] == METHOD) & (table["slot"] == "cell_type")]


def confusion_matrix(results: Results, most: int = MOST_CLASSES) -> dict[str, Any]:
    """Return the confusion matrix of cell types, ordered so that confused types are adjacent.

    Types beyond the ``most`` frequent ones are merged into one.

    Returns
    -------
    dict
        ``rows``: name, whether the row is merged, n and, for each column, the count and its share of the row.
        ``columns``: name and label of each column. The label is the number of the type's row, or a letter if it
        has no row.
    """
    table = _of_cell_types(results.confusion).copy()
    totals = table.groupby("true_id")["n"].sum().sort_index().sort_values(ascending=False, kind="stable")
    names = {
        **dict(zip(table["predicted_id"], table["predicted_name"], strict=True)),
        **dict(zip(table["true_id"], table["true_name"], strict=True)),
        "": "not determined",
    }
    shown = list(totals.index[:most])
    rest = f"{len(totals) - most} rarer types" if len(totals) > most else None
    true = table["true_id"].where(table["true_id"].isin(shown), "rest")
    predicted = table["predicted_id"]
    predicted = predicted.where(predicted.isin([*shown, ""]) | ~predicted.isin(totals.index), "rest")
    if predicted[~predicted.isin([*shown, "", "rest"])].nunique() > most:
        predicted = predicted.where(predicted.isin([*shown, "", "rest"]), "other")
    counts = pd.crosstab(true, predicted, values=table["n"], aggfunc="sum").fillna(0)
    rows = [shown[i] for i in order_by_confusion(counts.reindex(shown, axis=0).reindex(columns=shown))]
    rows += ["rest"] if rest else []
    further = sorted(set(counts.columns) - {*rows, ""}, key=lambda term: (term == "other", names.get(term)))
    columns = [*rows, *further, *([""] if "" in counts.columns else [])]
    names |= {"rest": rest, "other": "other types, absent from the test split"}
    counts = counts.reindex(index=rows, columns=columns, fill_value=0)
    sums = counts.sum(axis=1)
    labels = [str(i + 1) for i in range(len(rows))] + [_letter(i) for i in range(len(further))]
    return {
        "columns": [
            {"label": label, "name": names[term], "extra": i >= len(rows)}
            for i, (label, term) in enumerate(zip([*labels, "–"], columns, strict=False))
        ],
        "rows": [
            {
                "name": names[term],
                "merged": term == "rest",
                "n": int(sums[term]),
                "cells": [(int(n), n / max(sums[term], 1)) for n in counts.loc[term]],
            }
            for term in rows
        ],
    }


def _letter(number: int) -> str:
    return chr(ord("a") + number % 26) * (number // 26 + 1)


def order_by_confusion(counts: pd.DataFrame) -> np.ndarray:
    """Return an order of the classes in which confused classes are close to each other.

    Average linkage with optimal leaf ordering (Bar-Joseph et al., Bioinformatics 2001) on one minus the
    symmetrised share of confusions.

    Parameters
    ----------
    counts
        True classes by predicted classes, in the same order.
    """
    counts = np.nan_to_num(counts.to_numpy(dtype=float))
    if len(counts) < 3:
        return np.arange(len(counts))
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    distance = 1 - (share + share.T) / 2
    np.fill_diagonal(distance, 0)
    return leaves_list(linkage(squareform(distance), method="average", optimal_ordering=True))


def limit_ranges(study: dict[str, Any]) -> dict[str, str]:
    """Return each QC limit of a study as text, as a range if it differs between donors.

    Parameters
    ----------
    study
        Content of the JSON file of QC: ``samples``, each with its limits.
    """
    by_limit: dict[str, list[float]] = {}
    for sample in study["samples"]:
        for limit, value in sample.items():
            if limit.startswith(("min_", "max_")):
                by_limit.setdefault(limit, []).append(value)
    ends = {limit: sorted({min(values), max(values)}) for limit, values in by_limit.items()}
    return {limit: " to ".join(f"{value:,.6g}" for value in values) for limit, values in ends.items()}
