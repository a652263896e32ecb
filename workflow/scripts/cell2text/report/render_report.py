"""One HTML page of a run: everything inline, nothing fetched, the same bytes for the same inputs."""

import base64
import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cell2text.contracts import SPLITS, TERM_SLOTS
from cell2text.files import whole_file
from cell2text.progress import clock
from cell2text.report.cell_map import MOST_CELLS, map_data
from cell2text.report.charts import reliability, training_curve
from cell2text.report.examples import choose_examples
from cell2text.report.limits import tell_limits
from cell2text.report.model_card import write_model_card
from cell2text.report.results import METHOD, Results, RunFiles, read_results
from cell2text.report.tables import (
    COLUMNS,
    best_neighbour,
    class_scores,
    compare_methods,
    confusion_matrix,
    judge_slots,
    limit_ranges,
)
from cell2text.report.timings import rule_costs

log = logging.getLogger("cell2text.report")

FOLDER = Path(__file__).parent
ABOVE = " · "
HASH = re.compile("[0-9a-f]{64}")
STATUSES = {"parsed": "follows the grammar", "partial": "partly readable", "failed": "not readable"}


def render_report(
    files: RunFiles,
    path: str | Path,
    card: str | Path,
    run: str,
    seed: int,
    benchmarks: str | Path,
    notes: dict[str, str],
) -> None:
    """Write the page of a run and the model card.

    Parameters
    ----------
    files
        What the page is made of.
    path
        The HTML file to write.
    card
        The Markdown file to write, see ``model_card``.
    run
        Name of the run.
    seed
        Of the map's layout and of the examples' choice.
    benchmarks
        Folder of Snakemake's benchmark files; it may be missing.
    notes
        What the sheet of datasets says a reader should know, by dataset.

    Raises
    ------
    InputError
        If a file is missing or is not what it should be.
    """
    results = read_results(files)
    log.info("%d test cells, laying out the map", len(results.cells))
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "count": lambda value: f"{value:,.0f}",
        "clock": clock,
        "words": lambda name: name.replace("_", " "),
        "picture": picture,
    }
    script = (FOLDER / "page.js").read_text()
    page = environment.get_template("page.html.j2").render(
        **_sections(results, files, run, seed, benchmarks, notes),
        style=Markup((FOLDER / "page.css").read_text()),  # noqa: S704 - the project's own file
        script=Markup(script),  # noqa: S704 - the project's own file
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    with whole_file(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    log.info("%s: %.1f MB", path, len(page.encode()) / 1e6)
    write_model_card(results, run, notes, card)


def _sections(
    results: Results, files: RunFiles, run: str, seed: int, benchmarks: str | Path, notes: dict[str, str]
) -> dict[str, Any]:
    """Return what the template shows, by section."""
    slots = judge_slots(results)
    judged = [row["slot"] for row in slots if row["slot"] in TERM_SLOTS and row["terms"] > 1]
    return {
        "run": run,
        "seed": seed,
        "method": METHOD,
        "splits": SPLITS,
        "statuses": STATUSES,
        "audit": results.audit,
        "datasets": results.datasets,
        "language_model": model_name(results.model.get("language_model") or {}),
        "cells": len(results.cells),
        "cell_types": results.cells["true_cell_type_id"].nunique(),
        "accuracy": results.metric(METHOD, "cell_type", "accuracy"),
        "parsed": results.metric(METHOD, "text", "parsed"),
        "neighbour": best_neighbour(results),
        "map": map_data(results, seed),
        "most_cells": MOST_CELLS,
        "columns": list(COLUMNS),
        "methods": compare_methods(results),
        "resampled": results.resampled_unit(),
        "comparison": files.comparison,
        "slots": slots,
        "confusion": confusion_matrix(results),
        "classes": class_scores(results),
        "reliability": [
            chart for slot in dict.fromkeys(["cell_type", *judged]) if (chart := reliability(results, slot))
        ],
        "examples": choose_examples(results, seed),
        "curves": [
            curve for stage in ("align", "openings", "finetune") if (curve := training_curve(results.history, stage))
        ],
        "model": [fact for fact in _flatten(results.model) if not HASH.fullmatch(fact[1])],
        "qc": [study | {"limits": limit_ranges(study)} for study in results.qc],
        "costs": rule_costs(benchmarks),
        "trail": sort_facts(results.provenance),
        "limits": tell_limits(results, notes),
    }


def percent(value: float, digits: int = 1) -> str:
    """Return a share as a percentage without the sign.

    Examples
    --------
    >>> percent(0.7536), percent(float("nan"))
    ('75.4', '–')
    """
    return f"{100 * value:.{digits}f}" if value == value else "–"


def picture(path: str | Path) -> str:
    """Return an SVG file as a data URI: nothing in it can run, fetch, or clash with the page's ids."""
    return "data:image/svg+xml;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def model_name(source: dict[str, Any]) -> str:
    """Return a readable name of a model from where it came.

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
    """Return what a run's record holds as name and value: ``facts``, ``versions`` and ``hashes`` of files."""
    found: dict[str, list[tuple[str, str]]] = {"facts": [], "versions": [], "hashes": []}
    for name, value in _flatten(provenance):
        above, _, rest = name.partition(ABOVE)
        if above == "packages" and rest:
            found["versions"].append((rest, value))
        else:
            found["hashes" if HASH.fullmatch(value) else "facts"].append((name, value))
    return found


def _flatten(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield name and value of each fact, nested ones under the names above them."""
    for key, value in sorted(values.items()):
        name = f"{before}{key}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{name}{ABOVE}")
        elif isinstance(value, list):
            yield name, f"{len(value)} values" if len(value) > 8 else ", ".join(map(str, value))
        elif value is not None:
            yield name, f"{value:,.6g}" if isinstance(value, float) else str(value)
