"""How sure the model is: the reported terms of each slot and what their threshold rests on, and the novel cells."""

from collections.abc import Iterator
from typing import Any

from cell2text.confidence.novelty import PASSING
from cell2text.contracts import TERM_SLOTS
from cell2text.report.results import METHOD, SLOTS, Results, slot_name
from cell2text.report.tables import score_slots

SCORES = {
    "precision": "reported_precision",
    "coverage": "coverage",
    "depth": "reported_depth",
    "error": "calibration_error",
    "reported_error": "reported_calibration_error",
}
LIKE_VALIDATION = "the same mixture of studies, donors and cell types"


def rate_slots(results: Results) -> list[dict[str, Any]]:
    """Return one row per slot with a confidence: threshold of reported terms, what it rests on, and scores.

    Gene programmes have no place in an ontology, so they are not replaced by more general ones and have no threshold.

    Returns
    -------
    list
        ``slot``; ``threshold``, a ``Threshold`` or None; ``basis``, in words; the numbers of the metrics in ``SCORES``,
        each None if it was not computed; ``true_depth``, see :func:`true_depth`; and ``only``, the name of the only
        true term, if there is just one, because scores are not informative then.
    """
    only = {row["slot"]: row["only"] for row in score_slots(results)}
    rows = []
    for slot in SLOTS:
        scores = {name: results.metric(METHOD, slot, metric) for name, metric in SCORES.items()}
        threshold = results.confidence.thresholds.get(slot)
        if threshold is not None or any(scores.values()):
            rows.append(
                {"slot": slot, "only": only.get(slot), "threshold": threshold, "basis": _basis(results, slot), **scores}
            )
            rows[-1]["true_depth"] = true_depth(results, slot) if scores["depth"] else None
    return rows


def _basis(results: Results, slot: str) -> str:
    threshold = results.confidence.thresholds.get(slot)
    if threshold is None:
        rated = results.confidence.programmes.programmes if slot == "pathways" else 0
        return f"{rated:,} programmes of validation cells" if rated else "not calibrated"
    cells = f"{threshold.cells:,} validation {'cell' if threshold.cells == 1 else 'cells'}"
    if not threshold.guaranteed:
        return f"{cells}: too few for a guarantee"
    return f"{cells}: too many terms wrong" if threshold.value > 1 else f"{cells}, guaranteed"


def true_depth(results: Results, slot: str) -> float:
    """Return the mean depth of the true terms of the cells that the metric ``reported_depth`` counts."""
    depths, true = results.depths.xs(slot), results.cells[f"true_{slot}_id"]
    counted = true.notna() & results.cells[f"{slot}_reported_id"].map(depths).notna()
    return float(true[counted].map(depths).mean())


def count_novel(results: Results) -> dict[str, Any] | None:
    """Return how many test cells are flagged as novel; None if none was judged.

    Returns
    -------
    dict or None
        ``cells`` and ``novel``; ``unseen_cells`` and ``unseen_novel``, those of types without training cells; and
        ``expected``, the greatest expected share among cells like the validation cells.
    """
    judged = results.cells["novel"].notna()
    if not judged.any():
        return None
    cells = results.cells[judged]
    novel, true = cells["novel"].astype(bool), cells["true_cell_type_id"]
    unseen = true.notna() & ~true.isin(results.model["labels"]["cell_type"])
    return {
        "cells": len(cells),
        "novel": int(novel.sum()),
        "unseen_cells": int(unseen.sum()),
        "unseen_novel": int((novel & unseen).sum()),
        "expected": max(1 - PASSING, 1 / (results.audit["cells"]["validation"] + 1)),
    }


def limits_of_confidence(results: Results) -> Iterator[str]:
    """Yield what the confidences of this run do not show, one sentence or two for each limit."""
    confidence = results.confidence
    yield (
        f"Confidences were calibrated on the validation cells. They hold for cells like these ({LIKE_VALIDATION}), on "
        "average and not for each cell type. They do not hold for a new study."
    )
    if confidence.new_studies is None:
        yield (
            "Cells of a new study get the same confidences, which are too high for them: with fewer than three studies "
            "in training, or without alignment, nothing tells how much lower theirs should be."
        )
    else:
        cells = max((fitted.cells for fitted in confidence.new_studies.slots.values()), default=0)
        studies = {study for found in confidence.studies.values() for study in found}
        yield (
            f"Cells of a new study have confidences of their own. These rest on {cells:,} cells of the "
            f"{len(studies):,} training studies, held out of alignment one after the other, and vary from "
            "study to study."
        )
        of_cell_type = confidence.new_studies.thresholds.get("cell_type")
        if of_cell_type and not of_cell_type.guaranteed:
            yield "Too few studies for a guarantee on the cell types reported in a new study."
        elif of_cell_type and of_cell_type.value > 1:
            yield "No cell type is reported in a new study, because too many were wrong in the studies held out."
    unfitted = [slot_name(slot) for slot, fitted in confidence.slots.items() if not fitted.cells]
    if unfitted:
        yield f"Without labelled validation cells, confidences are not calibrated: {', '.join(unfitted)}."
    thresholds = {slot: confidence.thresholds[slot] for slot in TERM_SLOTS if slot in confidence.thresholds}
    few = [f"{slot_name(slot)} ({one.cells:,})" for slot, one in thresholds.items() if not one.guaranteed]
    if few:
        yield f"Too few labelled validation cells for a guarantee on reported terms: {', '.join(few)}."
    none = [slot_name(slot) for slot, one in thresholds.items() if one.value > 1]
    if none:
        yield f"No term is reported, because too many were wrong on the validation cells: {', '.join(none)}."
    for slot, threshold in thresholds.items():
        precision = results.metric(METHOD, slot, "reported_precision")
        if precision and precision["high"] < threshold.confidence:
            value, low, high = (f"{100 * precision[end]:.1f}" for end in ("value", "low", "high"))
            yield (
                f"{slot_name(slot).capitalize()}: {value}% of the reported terms are right (95% interval {low} to "
                f"{high}), fewer than the requested {100 * threshold.confidence:g}%."
            )
    yield (
        "A cell that is not flagged as novel may still be of a new type: most cells of a type that resembles a "
        "training type are not flagged."
    )
