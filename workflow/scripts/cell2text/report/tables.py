"""The tables of the page: methods side by side, slots, confusions, classes."""

from typing import Any

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from cell2text.contracts import TERM_SLOTS
from cell2text.evaluation.methods import METHODS, title_of
from cell2text.report.results import METHOD, SLOTS, Results

COLUMNS = {
    "Cell type accuracy": ("cell_type", "accuracy"),
    "Macro-F1": ("cell_type", "macro_f1"),
    "Ontology similarity": ("cell_type", "similarity"),
    "Similarity among errors": ("cell_type", "similarity_among_errors"),
    "Pathway Jaccard": ("pathways", "jaccard"),
    "BLEU": ("text", "bleu"),
    "ROUGE-L": ("text", "rouge_l"),
    "Exact match": ("text", "exact_match"),
}
MOST_CLASSES = 30


def compare_methods(results: Results) -> list[dict[str, Any]]:
    """Return a row for each method: name, what it is, and its figures, the clearly best ones marked.

    A figure is best where the lower end of its interval lies above the upper end of the next one's.
    """
    present = set(results.metrics["method"])
    rows = []
    for method in [name for name in METHODS if name in present] + sorted(present - set(METHODS)):
        figures = [results.metric(method, slot, metric) for slot, metric in COLUMNS.values()]
        what = METHODS[method].summary if method in METHODS else ""
        rows.append({"method": method, "name": title_of(method), "what": what, "figures": figures})
    for column in range(len(COLUMNS)):
        best = clearly_best([row["figures"][column] for row in rows])
        if best is not None:
            rows[best]["figures"][column]["best"] = True
    return rows


def clearly_best(figures: list[dict[str, float] | None]) -> int | None:
    """Return the place of the highest figure if its interval lies above the next one's, else None."""
    order = sorted(
        (i for i, figure in enumerate(figures) if figure is not None),
        key=lambda i: -figures[i]["value"],
    )
    if len(order) < 2:
        return None
    first, second = (figures[i] for i in order[:2])
    return order[0] if first["low"] > second["high"] else None


def best_neighbour(results: Results) -> dict[str, Any] | None:
    """Return name and cell type accuracy of the best method but Cell2Text; None where there is no other."""
    rows = [row for row in compare_methods(results) if row["method"] != METHOD and row["figures"][0]]
    if not rows:
        return None
    best = max(rows, key=lambda row: row["figures"][0]["value"])
    return {"name": best["name"], **best["figures"][0]}


def judge_slots(results: Results) -> list[dict[str, Any]]:
    """Return, for each slot, how many terms the reference holds and how Cell2Text did."""
    rows = []
    for slot in SLOTS:
        if slot in TERM_SLOTS:
            terms = results.cells[f"true_{slot}_id"].dropna().unique()
        else:
            terms = results.cells["true_pathway_ids"].explode().dropna().unique()
        rows.append(
            {
                "slot": slot,
                "terms": len(terms),
                "only": results.name(slot, terms[0]) if len(terms) == 1 else None,
                "accuracy": results.metric(METHOD, slot, "accuracy") or results.metric(METHOD, slot, "subset_accuracy"),
                "macro_f1": results.metric(METHOD, slot, "macro_f1"),
                "jaccard": results.metric(METHOD, slot, "jaccard"),
                "abstention": results.metric(METHOD, slot, "abstention"),
            }
        )
    return rows


def class_scores(results: Results) -> list[dict[str, Any]]:
    """Return the per-class scores of Cell2Text's cell types, the most frequent class first."""
    table = _of_cell_types(results.per_class)
    return table.sort_values(["n", "name"], ascending=[False, True]).to_dict("records")


def _of_cell_types(table: pd.DataFrame) -> pd.DataFrame:
    return table[(table["method"] == METHOD) & (table["slot"] == "cell_type")]


def confusion_matrix(results: Results, most: int = MOST_CLASSES) -> dict[str, Any]:
    """Return the confusions of cell types, classes that are confused standing side by side.

    Classes beyond the ``most`` frequent ones are put together as one.

    Returns
    -------
    dict
        ``rows``: name, whether it is several classes, n and, for each column, the count and its share of
        the row. ``columns``: names and the mark that stands for each: the number of its row, or a letter
        where it has none.
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
    said = table["predicted_id"]
    said = said.where(said.isin([*shown, ""]) | ~said.isin(totals.index), "rest")
    if said[~said.isin([*shown, "", "rest"])].nunique() > most:
        said = said.where(said.isin([*shown, "", "rest"]), "other")
    counts = pd.crosstab(true, said, values=table["n"], aggfunc="sum").fillna(0)
    rows = [shown[i] for i in order_by_confusion(counts.reindex(shown, axis=0).reindex(columns=shown))]
    rows += ["rest"] if rest else []
    further = sorted(set(counts.columns) - {*rows, ""}, key=lambda term: (term == "other", names.get(term)))
    columns = [*rows, *further, *([""] if "" in counts.columns else [])]
    names |= {"rest": rest, "other": "other types, not in the test split"}
    counts = counts.reindex(index=rows, columns=columns, fill_value=0)
    sums = counts.sum(axis=1)
    marks = [str(i + 1) for i in range(len(rows))] + [_letter(i) for i in range(len(further))]
    return {
        "columns": [
            {"mark": mark, "name": names[term], "extra": i >= len(rows)}
            for i, (mark, term) in enumerate(zip([*marks, "–"], columns, strict=False))
        ],
        "rows": [
            {
                "name": names[term],
                "lumped": term == "rest",
                "n": int(sums[term]),
                "cells": [(int(n), n / max(sums[term], 1)) for n in counts.loc[term]],
            }
            for term in rows
        ],
    }


def _letter(number: int) -> str:
    return chr(ord("a") + number % 26) * (number // 26 + 1)


def order_by_confusion(counts: pd.DataFrame) -> np.ndarray:
    """Return an order of classes in which those that are confused are near each other.

    Average linkage with optimal leaf order (Bar-Joseph et al., Bioinformatics 2001) on one minus the
    symmetric share of confusions; scipy's implementation.

    Parameters
    ----------
    counts
        True classes by predicted classes, the same in both.
    """
    counts = np.nan_to_num(counts.to_numpy(dtype=float))
    if len(counts) < 3:
        return np.arange(len(counts))
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    distance = 1 - (share + share.T) / 2
    np.fill_diagonal(distance, 0)
    return leaves_list(linkage(squareform(distance), method="average", optimal_ordering=True))


def limit_ranges(study: dict[str, Any]) -> dict[str, str]:
    """Return each QC limit of a study as text, from the least to the greatest where its donors' differ.

    Parameters
    ----------
    study
        What the JSON file of QC holds: ``samples``, each with the limits that hold in it.
    """
    by_limit: dict[str, list[float]] = {}
    for sample in study["samples"]:
        for limit, value in sample.items():
            if limit.startswith(("min_", "max_")):
                by_limit.setdefault(limit, []).append(value)
    ends = {limit: sorted({min(values), max(values)}) for limit, values in by_limit.items()}
    return {limit: " to ".join(f"{value:,.6g}" for value in values) for limit, values in ends.items()}
