"""The counts of a file to annotate, in the common format: all of its cells, whatever their labels and names."""

import logging
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from cell2text.annotation.clusters import check_clusters
from cell2text.cells.counts import TOTALS
from cell2text.cells.fetch_dataset import choose_orthologues, write_counts
from cell2text.cells.orthologues import MIN_SOURCES
from cell2text.cells.studies import Study, open_study
from cell2text.errors import InputError

log = logging.getLogger("cell2text.annotation")

CLUSTER, OWN_LABEL = "cluster", "own_label"  # columns of the written obs


def fetch_query(
    row: dict[str, str],
    path: str | Path,
    gene_table: str | None,
    min_counts_kept: float,
    clusters: str | None = None,
    own_labels: str | None = None,
    orthologues: str | Path | Callable[[], str] | None = None,
    orthologue_sources: int = MIN_SOURCES,
) -> None:
    """Write the counts of all cells of a study as ``fetch_dataset`` does.

    The file's labels of cells are not needed. Cells get the ids ``{dataset}|{number}``, with numbers from 0 in the
    order of the file, because names of cells may repeat.

    Parameters
    ----------
    row
        ``dataset``, ``source`` and other fields of a row of the datasets sheet.
    path
        The h5ad file to write.
    gene_table, min_counts_kept, orthologues, orthologue_sources
        See ``fetch_dataset``.
    clusters, own_labels
        Columns of ``obs`` with the cluster of each cell and its label, which are kept; None if there are none.

    Raises
    ------
    InputError
        If the file, its counts, genes or clusters are invalid, or they are neither of humans nor of mice.
    """
    wanted = [name for name in ("donor_id", *TOTALS, clusters, own_labels) if name]
    with open_study(row["source"], wanted) as study:
        pairs = choose_orthologues(study, row, orthologues, orthologue_sources)
        obs = _name_cells(study.obs, row["dataset"])
        for key, new, name in (("clusters", CLUSTER, clusters), ("own_labels", OWN_LABEL, own_labels)):
            if name:
                obs[new] = _read_column(study, name, key).to_numpy()
        if clusters:
            check_clusters(obs[CLUSTER], f"{study.where}: obs: {clusters}")
        write_counts(study, obs, row, path, gene_table, min_counts_kept, pairs)


def _read_column(study: Study, name: str, key: str) -> pd.Series:
    if name not in study.obs:
        columns = ", ".join(study.obs_columns) or "none: the file has no columns"
        raise InputError(f"{study.where}: obs", f"no column {name}", f"Set {key} to one of {columns}")
    return study.obs[name].astype("category")


def _name_cells(obs: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """Return dataset and donor of each cell, indexed by its id."""
    donors = obs["donor_id"].astype(str) if "donor_id" in obs else dataset
    named = pd.DataFrame({"dataset_id": dataset, "donor_id": donors}, index=obs.index)
    named.index = pd.Index([f"{dataset}|{number}" for number in range(len(obs))], name="cell_id")
    return named.astype("category")
