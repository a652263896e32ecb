"""Labelled cells of a file, whose cell types are added to a model: their counts and the ids of their types."""

import logging
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from cell2text.annotation.fetch_query import fetch_query
from cell2text.cells.studies import open_study
from cell2text.confidence.added_types import LEAST_EXAMPLES
from cell2text.contracts import EXAMPLES
from cell2text.errors import InputError
from cell2text.ontology import UNKNOWN, live_id

log = logging.getLogger("cell2text.annotation")

LABEL = "cell_type_ontology_term_id"


def fetch_examples(
    row: dict[str, str],
    path: str | Path,
    examples: str | Path,
    gene_table: str | None,
    min_counts_kept: float,
    orthologues: str | Path | Callable[[], str] | None = None,
    **genes: int,
) -> None:
    """Write the counts of a study as ``fetch_query`` does, and its labelled cells (``contracts.EXAMPLES``).

    Parameters
    ----------
    row, path, gene_table, min_counts_kept, orthologues, genes
        See ``fetch_query``.
    examples
        Where to write the ids of the labelled cells and of their types.

    Raises
    ------
    InputError
        If the file has no labels, one is no live term of the Cell Ontology, there is only one type, or a type has fewer
        than ``LEAST_EXAMPLES`` cells.
    """
    with open_study(row["source"], [LABEL]) as study:
        where = f"{study.where}: obs"
        if LABEL not in study.obs:
            raise InputError(where, f"no column {LABEL}", "Add it, with ids such as CL:0000236 and unknown elsewhere")
        labels = study.obs[LABEL].astype(object).reset_index(drop=True)
    labels = labels[labels.notna() & ~labels.astype(str).str.strip().str.lower().isin(UNKNOWN)].astype(str)
    if not len(labels):
        raise InputError(f"{where}: {LABEL}", "no cell has a label", "Label a few cells of each type to add")
    types = labels.map({label: live_id("cell_type", label, f"{where}: {LABEL}") for label in labels.unique()})
    counts = types.value_counts().sort_index()
    for cell_type, cells in counts[counts < LEAST_EXAMPLES].items():
        problem = f"{cells} labelled cell{'s' * (cells > 1)} of {cell_type} are too few"
        raise InputError(f"{where}: {LABEL}", problem, f"Label {LEAST_EXAMPLES} or more, better 5 to 10")
    if len(counts) < 2:
        problem = f"all labelled cells are of one type, {counts.index[0]}"
        raise InputError(f"{where}: {LABEL}", problem, "Label cells of the types that it may be mistaken for as well")
    fetch_query(row, path, gene_table, min_counts_kept, orthologues=orthologues, **genes)
    ids = [f"{row['dataset']}|{number}" for number in types.index]
    EXAMPLES.write(pd.DataFrame({"cell_id": ids, "cell_type_id": types.to_numpy()}), examples)
    log.info("%s: %d examples of %d cell types", row["dataset"], len(types), len(counts))
