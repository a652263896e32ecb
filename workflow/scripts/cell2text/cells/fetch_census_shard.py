"""Counts of one shard of the cells chosen from CELLxGENE Census, in the same format as every other dataset."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from cell2text.cells.census import ASSAY, IDS, human_cells, open_census, read_term
from cell2text.cells.genes import GeneMap, map_genes
from cell2text.cells.h5ad import CELLS_AT_ONCE, write_cells
from cell2text.cells.labels import CELLXGENE
from cell2text.contracts import CENSUS_CELLS
from cell2text.errors import InputError
from cell2text.ontology import UNKNOWN, name_of
from cell2text.progress import Progress

log = logging.getLogger("cell2text.census")

PRESENCE = "feature_dataset_presence_matrix"


def fetch_census_shard(cells_file: str | Path, source: str, shard: int, shards: int, path: str | Path) -> None:
    """Fetch the counts of one shard of the chosen cells and write them in the format of ``fetch_dataset``.

    A shard is a contiguous range of the Census, so no part of its arrays is read for two shards. ``dataset_id`` is
    that of the Census, and the id of a cell is ``{dataset_id}|{soma_joinid}``.

    Parameters
    ----------
    cells_file
        The chosen cells (``contracts.CENSUS_CELLS``).
    source
        As in ``choose_census_cells``.
    shard, shards
        Number of this shard, from 0, and number of shards.
    path
        Where to write.

    Raises
    ------
    InputError
        If the Census cannot be read, the shard is empty, or a count is not a whole number.
    """
    cells = CENSUS_CELLS.read(cells_file, categories=list(CENSUS_CELLS.columns)[1:])
    first, last = (len(cells) * edge // shards for edge in (shard, shard + 1))
    cells = cells.iloc[first:last].reset_index(drop=True)
    if cells.empty:
        raise InputError(
            "config: shards", f"{shards} shards, but fewer cells were chosen from {source}", "Lower `shards`"
        )
    obs = label_census_cells(cells)
    with open_census(source) as census:
        human = human_cells(census)
        genes = read_census_genes(human, source)
        uns = {"source": source, "measured": read_measured_genes(census, genes, cells["dataset_id"].unique())}
        blocks = read_census_counts(human, cells["soma_joinid"].to_numpy(), obs.index, genes, source)
        write_cells(path, blocks, [obs.index], obs, genes.genes, uns)
    log.info("%s: shard %d, %d cells, %d genes", source, shard, len(obs), len(genes.genes))


def label_census_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the chosen cells in the columns of the CELLxGENE schema, each a categorical; names come from the ids.

    A cell without a donor gets its collection as donor.

    Parameters
    ----------
    cells
        Rows of ``contracts.CENSUS_CELLS``.
    """
    cells = cells.astype(dict.fromkeys(cells.columns[1:], object)).fillna("unknown")
    known = cells[["dataset_id", "collection_id"]].copy()
    unnamed = cells["donor_id"].str.lower().isin(UNKNOWN)
    known["donor_id"] = cells["donor_id"].mask(unnamed, cells["collection_id"])
    known[ASSAY] = cells[ASSAY]
    for slot, column in IDS.items():
        known[column] = cells[column].map({term: read_term(slot, term) for term in cells[column].unique()})
        known[CELLXGENE[slot]] = known[column].map({term: name_of(slot, term) for term in known[column].unique()})
    known.index = pd.Index(cells["dataset_id"] + "|" + cells["soma_joinid"].astype(str), name="cell_id")
    return known.astype("category")


def read_census_genes(human: Any, source: str) -> GeneMap:
    """Return the mapping of the Census's genes, in the order of its count matrix."""
    columns = ["soma_joinid", "feature_id", "feature_name"]
    genes = human.ms["RNA"].var.read(column_names=columns).concat().to_pandas().sort_values("soma_joinid")
    return map_genes(genes.set_index("feature_id"), source)


def read_measured_genes(census: Any, genes: GeneMap, datasets: Iterable[str]) -> dict[str, np.ndarray]:
    """Return which genes each dataset measures, bool, from the Census's presence matrix; {} if it has none.

    Parameters
    ----------
    census
        The SOMA collection.
    genes
        From ``read_census_genes``.
    datasets
        Ids of the datasets.
    """
    presence = census["census_data"]["homo_sapiens"].ms["RNA"]
    if PRESENCE not in presence or "census_info" not in census or "datasets" not in census["census_info"]:
        return {}
    info = census["census_info"]["datasets"].read(column_names=["soma_joinid", "dataset_id"]).concat().to_pandas()
    rows = info.set_index("dataset_id")["soma_joinid"].reindex(list(datasets)).dropna().astype(np.int64)
    if rows.empty:
        return {}
    stored = presence[PRESENCE].read((np.sort(rows.to_numpy()),)).tables().concat().to_pandas()
    stored = stored[(stored["soma_data"] > 0) & (stored["soma_dim_1"] < len(genes.column))]
    measured = {}
    for dataset, row in rows.items():
        columns = genes.column[stored["soma_dim_1"][stored["soma_dim_0"] == row]]
        measured[dataset] = np.isin(np.arange(len(genes.genes)), columns[columns >= 0])
    return measured


def read_census_counts(
    human: Any, joinids: np.ndarray, cell_ids: pd.Index, genes: GeneMap, source: str
) -> Iterator[sparse.csr_matrix]:
    """Yield the counts of cells, float32, one block at a time.

    Parameters
    ----------
    human
        SOMA experiment of the human cells.
    joinids
        ``soma_joinid`` of the cells, ascending.
    cell_ids
        Ids of the same cells, for messages.
    genes
        From ``read_census_genes``.
    source
        The source, for messages.

    Raises
    ------
    InputError
        If a count is not a whole number.
    """
    counts = human.ms["RNA"].X["raw"].read((joinids,))
    progress = Progress(len(joinids), "cells")
    done = 0
    for stored, _ in counts.blockwise(axis=0, size=CELLS_AT_ONCE, reindex_disable_on_axis=[1]).scipy():
        # some releases declare more columns than they have genes
        shape = stored.shape[0], len(genes.column)
        block = sparse.csr_matrix((stored.data, stored.indices, stored.indptr), shape, np.float32)
        block.eliminate_zeros()
        invalid = (block.data < 0) | (block.data != np.rint(block.data))
        if invalid.any():
            position = int(np.argmax(invalid))
            cell = cell_ids[done + np.searchsorted(block.indptr, position, side="right") - 1]
            raise InputError(
                f"{source}: X/raw",
                f"not a whole number: {block.data[position]:g} in cell {cell}",
                "Exclude the study or its assay under `census` in the config",
            )
        block.sort_indices()
        yield genes.gather(block)
        done += block.shape[0]
        progress.advance(block.shape[0])
