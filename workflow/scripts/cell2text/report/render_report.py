"""The report of a run: one self-contained HTML page, byte-identical for the same inputs."""

import base64
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cell2text.contracts import SPLITS, TERM_SLOTS
from cell2text.evaluation.methods import GREEDY, title_of
from cell2text.progress import clock
from cell2text.report.cell_map import MOST_CELLS, map_data
from cell2text.report.charts import reliability, training_curve
from cell2text.report.confidence import LIKE_VALIDATION, count_novel, rate_slots
from cell2text.report.examples import choose_examples
from cell2text.report.limits import describe_intervals, list_limits
from cell2text.report.model_card import write_model_card
from cell2text.report.page import percent, write_page
from cell2text.report.results import METHOD, Results, RunFiles, read_results, slot_name
from cell2text.report.tables import (
    COLUMNS,
    best_baseline,
    class_scores,
    compare_methods,
    compare_with_best,
    confusion_matrix,
    limit_ranges,
    list_unparsed,
    points,
    score_slots,
)
from cell2text.report.timings import rule_costs

log = logging.getLogger("cell2text.report")

SEPARATOR = " · "
HASH = re.compile("[0-9a-f]{64}")
STATUSES = {"parsed": "text parsed", "partial": "text partly parsed", "failed": "text not parsed"}
# The scores of the first screen: title, slot, metric, and a note where the score needs one. {coverage} is the share
# of cells with a reported cell type, {requested} the requested confidence, both in percent.
HEADLINE = (
    ("Cell type accuracy", "cell_type", "accuracy", ""),
    ("Gene programmes", "pathways", "jaccard", "Jaccard index of predicted and true programmes"),
    (
        "Reported cell types right",
        "cell_type",
        "reported_precision",
        "the true type or an ancestor; {coverage}% of the cells have one; {requested:g}% requested",
    ),
)
STAGES = {
    "pretrain": ("Pre-training of the encoder", "masked gene"),
    "align": ("Alignment", "cell"),
    "openings": ("Fine-tuning on names", "token"),
    "finetune": ("Fine-tuning on whole texts", "token"),
}


def render_report(
    files: RunFiles,
    path: str | Path,
    card: str | Path,
    run: str,
    seed: int,
    benchmarks: dict[str, list[str]],
    notes: dict[str, str],
) -> None:
    """Write the report and the model card of a run.

    Parameters
    ----------
    files
        Files of the run.
    path
        The HTML file to write.
    card
        The Markdown file to write; see :mod:`~.model_card`.
    run
        Name of the run.
    seed
        Seed of the map's layout and of the choice of examples.
    benchmarks
        Snakemake's benchmark files of each rule; files may be missing.
    notes
        Notes for readers from the sheet of datasets, by dataset.

    Raises
    ------
    InputError
        If a file is missing or invalid.
    """
    results = read_results(files)
    log.info("laying out the map of %d test cells", len(results.cells))
    filters = {
        "points": points,
        "clock": clock,
        "words": lambda name: name.replace("_", " "),
        "slot": slot_name,
        "picture": picture,
    }
    variables = _sections(results, files, run, seed, benchmarks, notes)
    write_page(path, "page.html.j2", ["page.css"], ["map.js", "page.js"], variables, filters)
    write_model_card(results, run, notes, card)


def _sections(
    results: Results, files: RunFiles, run: str, seed: int, benchmarks: dict[str, list[str]], notes: dict[str, str]
) -> dict[str, Any]:
    """Return the variables of the template."""
    slots = score_slots(results)
    informative = [row["slot"] for row in slots if row["slot"] in TERM_SLOTS and row["terms"] > 1]
    return {
        "run": run,
        "seed": seed,
        "method": METHOD,
        "title": title_of(METHOD),
        "splits": SPLITS,
        "statuses": STATUSES,
        "audit": results.audit,
        "datasets": results.datasets,
        "language_model": model_name(results.model.get("language_model") or {}),
        "cells": len(results.cells),
        "cell_types": results.cells["true_cell_type_id"].nunique(),
        "headline": list(_headline(results)),
        "compared": compare_with_best(results),
        "map": map_data(results, seed),
        "most_cells": MOST_CELLS,
        "columns": {title: list(group) for title, (_, group) in COLUMNS.items()},
        "methods": compare_methods(results),
        "greedy": GREEDY,
        "unparsed": list_unparsed(results),
        "intervals": describe_intervals(results),
        "comparison": files.comparison,
        "slots": slots,
        "confusion": confusion_matrix(results),
        "classes": class_scores(results),
        "confidences": rate_slots(results),
        "requested": results.requested,
        "like_validation": LIKE_VALIDATION,
        "novel": count_novel(results),
        "reliability": [
            chart
            for slot in dict.fromkeys(["cell_type", "pathways", *informative])
            if (chart := reliability(results, slot))
        ],
        "examples": choose_examples(results, seed),
        "curves": [
            {"title": title, "unit": unit, **curve}
            for stage, (title, unit) in STAGES.items()
            if (curve := training_curve(results.history, stage))
        ],
        "model": [fact for fact in _flatten(results.model) if not HASH.fullmatch(fact[1])],
        "qc": [study | {"limits": limit_ranges(study)} for study in results.qc],
        "costs": rule_costs(benchmarks),
        "trail": sort_facts(results.provenance),
        "limits": list_limits(results, notes),
    }


def _headline(results: Results) -> Iterator[dict[str, Any]]:
    """Yield title, note, numbers and best baseline of each score of the first screen."""
    covered = results.metric(METHOD, "cell_type", "coverage")
    numbers = {
        "coverage": percent(covered["value"]) if covered else "–",
        "requested": 100 * (results.requested or 0),
    }
    for title, slot, metric, note in HEADLINE:
        own = results.metric(METHOD, slot, metric)
        if own:
            baseline = best_baseline(results, slot, metric)
            yield {"title": title, "note": note.format(**numbers), "own": own, "baseline": baseline}


def picture(path: str | Path) -> str:
    """Return an SVG file as a data URI, so that it cannot run scripts, fetch files, or clash with ids of the page."""
    return "data:image/svg+xml;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def model_name(source: dict[str, Any]) -> str:
    """Return a readable name of a model from its source.

    Examples
    --------
    >>> model_name({"source": "pypi://smol==1.0/smol/Smol-135M.gguf#sha256=0"})
    'Smol-135M'
    >>> model_name({"source": "hf://org/Smol@main"})
    'Smol'
    """
    name = str(source.get("source", "a language model")).split("#")[0].rstrip("/").split("/")[-1]
    return name.split("@")[0].removesuffix(".gguf")


def sort_facts(provenance: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Return the entries of a run's provenance as names and values: ``facts``, ``versions`` and ``hashes``."""
    found: dict[str, list[tuple[str, str]]] = {"facts": [], "versions": [], "hashes": []}
    for name, value in _flatten(provenance):
        section, _, rest = name.partition(SEPARATOR)
        if section == "packages" and rest:
            found["versions"].append((rest, value))
        else:
            found["hashes" if HASH.fullmatch(value) else "facts"].append((name, value))
    return found


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield name and value of each entry; the name of a nested entry starts with those of its parents."""
    for key, value in sorted(values.items()):
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{name}{SEPARATOR}")
        elif isinstance(value, list):
            yield name, f"{len(value)} values" if len(value) > 8 else ", ".join(map(str, value))
        elif value is not None:
            yield name, f"{value:,.6g}" if isinstance(value, float) else str(value)
