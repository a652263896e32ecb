"""Limits of a run: what its scores do not show, in plain words."""

from collections.abc import Iterator

from cell2text.evaluation.bootstrap import FEWEST_UNITS
from cell2text.evaluation.methods import title_of
from cell2text.report.confidence import limits_of_confidence
from cell2text.report.results import METHOD, Results, slot_name
from cell2text.report.tables import DIFFERENCE, best_baseline, points, verdict

FEW_CELLS = 10
MISSING_GENES = (
    "Genes that a study does not measure count as missing, not as zero, so the model can read cells of any gene panel. "
    "These scores are those of the panels and depths of the test cells; others may be read less well."
)


def list_limits(results: Results, notes: dict[str, str]) -> list[str]:
    """Return one sentence per limit: of the split's audit, the datasets' notes, the scores and the confidences."""
    of_datasets = [f"{dataset}: {note}" for dataset, note in sorted(notes.items())]
    return [
        *results.audit.get("limits", []),
        *of_datasets,
        *_limits_of_species(results),
        *_limits_of_intervals(results),
        *_limits_of_comparison(results),
        *_limits_of_texts(results),
        *limits_of_confidence(results),
        MISSING_GENES,
    ]


def describe_intervals(results: Results) -> str:
    """Return how the 95% intervals of this run were computed, and what they leave out."""
    unit, donors = results.resampled()
    if unit == "donor":
        return f"The intervals come from resampling donors ({donors:,})."
    if unit == "cell":
        return (
            f"The intervals come from resampling cells, not donors: the test cells have {donors} "
            f"{'donor' if donors == 1 else 'donors'}, and fewer than {FEWEST_UNITS} are too few. They ignore the "
            "variation between donors and are too narrow for a new donor."
        )
    return f"There are no intervals, because the test split has fewer than {FEWEST_UNITS} cells."


def _limits_of_species(results: Results) -> Iterator[str]:
    mice = [study for study in results.qc if "orthologues" in study]
    for study in mice:
        yield (
            f"{study['dataset_id']} is a study of mice. Its genes count as their human orthologues, which have "
            f"{study['orthologues']['counts_kept']:.1%} of its counts; the other genes are not seen."
        )
    if mice and len(mice) < len(results.qc):
        yield "Species and study are confounded: differences between mice and humans may be those between studies."


def _limits_of_intervals(results: Results) -> Iterator[str]:
    accuracy = results.metric(METHOD, "cell_type", "accuracy")
    if accuracy and accuracy["low"] == accuracy["low"]:
        width = 100 * (accuracy["high"] - accuracy["low"])
        yield (
            f"With {accuracy['n']:,.0f} test cells, the 95% confidence interval of the cell type accuracy is "
            f"{width:.0f} percentage points wide. To compare two methods, read their paired difference, not whether "
            "their intervals overlap."
        )
    yield describe_intervals(results)
    scores = results.metrics[(results.metrics["method"] == METHOD) & (results.metrics["metric"] == "accuracy")]
    for slot, unit in zip(scores["slot"], scores["resampled"], strict=True):
        if unit != (results.resampled()[0] or ""):
            how = f"come from resampling cells: its cells are of fewer than {FEWEST_UNITS} donors"
            none = f"do not exist: it has fewer than {FEWEST_UNITS} cells"
            yield f"{slot_name(slot).capitalize()}: the intervals {how if unit == 'cell' else none}."
    sizes = results.cells["true_cell_type_id"].value_counts()
    few = int((sizes < FEW_CELLS).sum())
    if few:
        yield (
            f"{few} of {len(sizes)} cell types have fewer than {FEW_CELLS} test cells. Their scores, and the macro-F1, "
            "which weights all types equally, depend on single cells."
        )
    yield "The model was trained once, with one seed. The intervals do not include variation between training runs."


def _limits_of_comparison(results: Results) -> Iterator[str]:
    baseline = best_baseline(results, "cell_type", "accuracy")
    if baseline is None or verdict(baseline) is None:
        return
    difference, low, high = (points(baseline[end]) for end in DIFFERENCE)
    about = f"(paired difference in accuracy {difference} percentage points, 95% interval {low} to {high})"
    if verdict(baseline) == "better":
        yield f"Cell types: {baseline['name']} is more accurate than {title_of(METHOD)} on these cells {about}."
    elif verdict(baseline) == "unclear":
        yield f"Cell types: these cells do not show whether {title_of(METHOD)} or {baseline['name']} is better {about}."
    yield (
        "The best baseline of each score was chosen on the same test cells, which favours it slightly. The intervals "
        "of the differences are not corrected for the number of comparisons."
    )


def _limits_of_texts(results: Results) -> Iterator[str]:
    own = results.metric(METHOD, "text", "bleu")
    for blind in ("shuffled", "majority"):
        bleu = results.metric(blind, "text", "bleu")
        if own and bleu:
            yield (
                f"All texts share a template: {title_of(blind)}, a method that ignores the cell's own counts, reaches "
                f"a BLEU of {100 * bleu['value']:.0f}. The BLEU of {title_of(METHOD)}, {100 * own['value']:.0f}, "
                "therefore says less than its accuracy."
            )
            return
