"""Limits of a run: what its scores do not show, in plain words."""

from collections.abc import Iterator

from cell2text.evaluation.methods import title_of
from cell2text.report.results import METHOD, Results
from cell2text.report.tables import best_baseline

FEW_CELLS = 10


def list_limits(results: Results, notes: dict[str, str]) -> list[str]:
    """Return one sentence per limit: those of the split's audit, of the datasets' notes, and of the scores."""
    of_datasets = [f"{dataset}: {note}" for dataset, note in sorted(notes.items())]
    return [
        *results.audit.get("limits", []),
        *of_datasets,
        *_limits_of_intervals(results),
        *_limits_of_comparison(results),
        *_limits_of_texts(results),
    ]


def _limits_of_intervals(results: Results) -> Iterator[str]:
    accuracy = results.metric(METHOD, "cell_type", "accuracy")
    if accuracy is None:
        return
    width = 100 * (accuracy["high"] - accuracy["low"])
    yield (
        f"With {accuracy['n']:,.0f} test cells, the 95% confidence interval of the cell type accuracy is {width:.0f} "
        "percentage points wide. Differences of a few points may be due to chance."
    )
    if results.resampled_unit() == "cell":
        yield (
            "The intervals come from resampling cells, not donors. They ignore the variation between donors and are "
            "too narrow for a new donor."
        )
    sizes = results.cells["true_cell_type_id"].value_counts()
    few = int((sizes < FEW_CELLS).sum())
    if few:
        yield (
            f"{few} of {len(sizes)} cell types have fewer than {FEW_CELLS} test cells. Their scores, and the macro-F1, "
            "which weights all types equally, depend on single cells."
        )
    yield "The model was trained once, with one seed. The intervals do not include variation between training runs."


def _limits_of_comparison(results: Results) -> Iterator[str]:
    accuracy, baseline = (
        results.metric(METHOD, "cell_type", "accuracy"),
        best_baseline(results, "cell_type", "accuracy"),
    )
    if accuracy is None or baseline is None:
        return
    if accuracy["low"] > baseline["high"]:
        return
    if accuracy["high"] < baseline["low"]:
        yield (
            f"Cell types: {baseline['name']} is more accurate than {title_of(METHOD)} on these cells, and the "
            "95% intervals do not overlap."
        )
    else:
        yield (
            f"Cell types: the 95% intervals of {title_of(METHOD)} and {baseline['name']} overlap, so these cells do "
            "not show which one is better."
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
