"""Descriptions beside their references, what differs between them marked by id."""

from typing import Any

import numpy as np

from cell2text.contracts import TERM_SLOTS
from cell2text.grammar import Terms, parse
from cell2text.report.results import SLOTS, Results

EXAMPLES = 20


def choose_examples(results: Results, seed: int, examples: int = EXAMPLES) -> list[dict[str, Any]]:
    """Return cells drawn at random, each with its text, its reference and the slots in which they differ."""
    total = len(results.cells)
    rows = np.random.default_rng(seed).choice(total, size=min(examples, total), replace=False)
    return [_compare(results, cell) for cell in results.cells.iloc[rows].to_dict("records")]


def _compare(results: Results, cell: dict[str, Any]) -> dict[str, Any]:
    slots = [_compare_slot(results, cell, slot) for slot in SLOTS]
    wrong = {row["slot"] for row in slots if row["differs"]}
    told, true = _pathways(cell["pathway_ids"]), _pathways(cell["true_pathway_ids"])
    return {
        "cell": cell["cell_id"],
        "status": cell["status"],
        "confidence": cell["cell_type_confidence"],
        "right": "cell_type" not in wrong,
        "judged": cell["true_cell_type_id"] is not None,
        "differing": [row for row in slots if row["differs"]],
        "told": mark_text(cell["text"], wrong, told - true, results.terms),
        "true": mark_text(cell["true_text"], wrong, true - told, results.terms),
    }


def _compare_slot(results: Results, cell: dict[str, Any], slot: str) -> dict[str, Any]:
    """Return what is told and what is true of a slot, of the pathways those on one side only.

    A slot whose truth is not known never differs.
    """
    if slot in TERM_SLOTS:
        told, true = cell[f"{slot}_id"], cell[f"true_{slot}_id"]
        differs = true is not None and told != true
        told, true = [told], [true]
    else:
        told, true = _pathways(cell["pathway_ids"]), _pathways(cell["true_pathway_ids"])
        differs = told != true
        told, true = sorted(told - true), sorted(true - told)
    return {
        "slot": slot,
        "differs": differs,
        "told": [(results.name(slot, term), term) for term in told],
        "true": [(results.name(slot, term), term) for term in true],
    }


def _pathways(ids: Any) -> set[str]:
    return set(() if ids is None or isinstance(ids, float) else ids)


def mark_text(text: str, wrong: set[str], pathways: set[str], terms: Terms) -> list[tuple[str, bool]]:
    """Return a text in pieces, each with whether it names a term that differs.

    Parameters
    ----------
    text
        A description.
    wrong
        Slots whose ids differ.
    pathways
        Ids of the gene sets that only this text names.
    terms
        Names of the terms.
    """
    spans = [span for slot, span in parse(text, terms).spans.items() if slot in wrong]
    for name in (terms.name.get("pathway", {}).get(term, term) for term in sorted(pathways)):
        start = text.rfind(name)
        spans += [(start, start + len(name))] if start >= 0 else []
    pieces, end = [], 0
    for first, last in sorted(spans):
        if first < end:
            continue
        pieces += [(text[end:first], False), (text[first:last], True)]
        end = last
    return [piece for piece in [*pieces, (text[end:], False)] if piece[0]]
