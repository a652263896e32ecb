"""What the figures of this run cannot say, in plain words."""

from collections.abc import Iterator

from cell2text.evaluation.methods import title_of
from cell2text.report.results import METHOD, Results
from cell2text.report.tables import best_neighbour

FEW_CELLS = 10


def tell_limits(results: Results, notes: dict[str, str]) -> list[str]:
    """Return a sentence for each limit: of the split's audit, of each dataset's notes, and of the scores."""
    told = [f"{dataset}: {note}" for dataset, note in sorted(notes.items())]
    return [*results.audit.get("limits", []), *told, *_interval(results), *_neighbour(results), *_texts(results)]


def _interval(results: Results) -> Iterator[str]:
    accuracy = results.metric(METHOD, "cell_type", "accuracy")
    if accuracy is None:
        return
    width = 100 * (accuracy["high"] - accuracy["low"])
    yield (
        f"{accuracy['n']:,.0f} test cells: the 95% interval of the cell type accuracy is {width:.0f} "
        f"percentage points wide, so a difference of a few points may be chance."
    )
    if results.resampled_unit() == "cell":
        yield (
            "The intervals are drawn by resampling cells, not donors: they leave out how donors differ, "
            "and are too narrow for a new donor."
        )
    sizes = results.cells["true_cell_type_id"].value_counts()
    few = int((sizes < FEW_CELLS).sum())
    if few:
        yield (
            f"{few} of {len(sizes)} cell types have fewer than {FEW_CELLS} test cells: their rows in the "
            "tables, and the macro-F1 that counts every type alike, hang on single cells."
        )
    yield "One seed: how much another training run would differ is not in the intervals."


def _neighbour(results: Results) -> Iterator[str]:
    accuracy, other = results.metric(METHOD, "cell_type", "accuracy"), best_neighbour(results)
    if accuracy is None or other is None:
        return
    if accuracy["low"] > other["high"]:
        return
    if accuracy["high"] < other["low"]:
        yield f"Cell types: {other['name']} is better than Cell2Text on these cells, beyond both intervals."
    else:
        yield (
            f"Cell types: the intervals of Cell2Text and of {other['name']} overlap, so neither is called better here."
        )


def _texts(results: Results) -> Iterator[str]:
    own = results.metric(METHOD, "text", "bleu")
    for blind in ("shuffled", "majority"):
        bleu = results.metric(blind, "text", "bleu")
        if own and bleu:
            yield (
                f"The texts share a template: {title_of(blind)}, which knows nothing of the cell, reaches a "
                f"BLEU of {100 * bleu['value']:.0f}, so Cell2Text's {100 * own['value']:.0f} says less than "
                "its accuracy does."
            )
            return
