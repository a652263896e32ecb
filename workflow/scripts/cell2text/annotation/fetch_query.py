"""The counts of a file to annotate, in the common format: all of its cells, whatever their labels and names."""

import logging
from pathlib import Path

import pandas as pd

from cell2text.cells.fetch_dataset import check_species, write_counts
from cell2text.cells.studies import open_study

log = logging.getLogger("cell2text.annotation")


def fetch_query(row: dict[str, str], path: str | Path, gene_table: str | None, min_counts_kept: float) -> None:
    """Write the counts of all cells of a study as ``fetch_dataset`` does.

    The labels of the file are not read, so they may be missing or anything. Cells get the ids ``{dataset}|{number}``,
    with numbers from 0 in the order of the file, because names of cells may repeat.

    Parameters
    ----------
    row
        ``dataset``, ``source`` and other fields of a row of the datasets sheet.
    path
        The h5ad file to write.
    gene_table, min_counts_kept
        See ``fetch_dataset``.

    Raises
    ------
    InputError
        If the file, its counts or its genes are invalid, or they are not human.
    """
    with open_study(row["source"], ["donor_id"]) as study:
        check_species(study)
        obs = _name_cells(study.obs, row["dataset"])
        write_counts(study, obs, row, path, gene_table, min_counts_kept)


def _name_cells(obs: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """Return dataset and donor of each cell, indexed by its id."""
    donors = obs["donor_id"].astype(str) if "donor_id" in obs else dataset
    named = pd.DataFrame({"dataset_id": dataset, "donor_id": donors}, index=obs.index)
    named.index = pd.Index([f"{dataset}|{number}" for number in range(len(obs))], name="cell_id")
    return named.astype("category")
