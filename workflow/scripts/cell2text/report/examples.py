"""Example descriptions next to their references, with the differing terms marked."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from cell2text.contracts import TERM_SLOTS
from cell2text.grammar import PATHWAY, Terms, parse
from cell2text.report.results import SLOTS, Results, slot_name

EXAMPLES = 20


def choose_examples(results: Results, seed: int, examples: int = EXAMPLES) -> list[dict[str, Any]]:
    """Return random cells, each with text, reference, confidences and the slots in which text and reference differ."""
    total = len(results.cells)
    rows = np.random.default_rng(seed).choice(total, size=min(examples, total), replace=False)
    return [_compare(results, cell) for cell in results.cells.iloc[rows].to_dict("records")]


def _compare(results: Results, cell: dict[str, Any]) -> dict[str, Any]:
    slots = [_compare_slot(results, cell, slot) for slot in SLOTS]
    wrong = {row["slot"] for row in slots if row["differs"]}
    predicted, true = _pathways(cell["pathway_ids"]), _pathways(cell["true_pathway_ids"])
    return {
        "cell": cell["cell_id"],
        "status": cell["status"],
        "novel": cell["novel"] is True,
        "confidences": list(_list_confidences(results, cell)),
        "correct": "cell_type" not in wrong,
        "labelled": cell["true_cell_type_id"] is not None,
        "differing": [row for row in slots if row["differs"]],
        "predicted": mark_text(cell["text"], wrong, predicted - true, results.terms),
        "true": mark_text(cell["true_text"], wrong, true - predicted, results.terms),
    }


def _list_confidences(results: Results, cell: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the confidence of each guess, and the reported term with its own if it is another one."""
    for slot in TERM_SLOTS:
        guess, confidence, reported = (cell[f"{slot}_{part}"] for part in ("id", "confidence", "reported_id"))
        if guess is not None and pd.notna(confidence):
            row = {"name": slot_name(slot), "confidence": confidence, "backed_off": reported != guess}
            yield row | {"reported": results.name(slot, reported), "probability": cell[f"{slot}_reported_confidence"]}
    if isinstance(cell["pathway_confidences"], list):
        for term, confidence in zip(cell["pathway_ids"], cell["pathway_confidences"], strict=True):
            yield {"name": results.name("pathways", term), "confidence": confidence, "backed_off": False}


def _compare_slot(results: Results, cell: dict[str, Any], slot: str) -> dict[str, Any]:
    """Return predicted and true terms of a slot; for gene programmes, only those that differ.

    A slot without a true label never differs.
    """
    if slot in TERM_SLOTS:
        predicted, true = cell[f"{slot}_id"], cell[f"true_{slot}_id"]
        differs = true is not None and predicted != true
        predicted, true = [predicted], [true]
    else:
        predicted, true = _pathways(cell["pathway_ids"]), _pathways(cell["true_pathway_ids"])
        differs = predicted != true
        predicted, true = sorted(predicted - true), sorted(true - predicted)
    return {
        "slot": slot,
        "differs": differs,
        "predicted": [(results.name(slot, term), term) for term in predicted],
        "true": [(results.name(slot, term), term) for term in true],
    }


def _pathways(ids: Any) -> set[str]:
    return set(() if ids is None or isinstance(ids, float) else ids)


def mark_text(text: str, wrong: set[str], pathways: set[str], terms: Terms) -> list[tuple[str, bool]]:
    """Return a text in pieces, each with a flag: whether it names a differing term.

    Parameters
    ----------
    text
        A description.
    wrong
        Slots whose ids differ.
    pathways
        Ids of the gene sets that occur only in this text.
    terms
        Names of the terms.
    """
    parsed = parse(text, terms)
    differ = iter(term in pathways for term in parsed.slots.pathways)
    pieces, end = [], 0
    for slot, first, last in parsed.names:
        if not (next(differ) if slot == PATHWAY else slot in wrong):
            continue
        pieces += [(text[end:first], False), (text[first:last], True)]
        end = last
    return [piece for piece in [*pieces, (text[end:], False)] if piece[0]]
