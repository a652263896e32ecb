"""CELLxGENE Census as a source: cells chosen from its table of cells, then their counts fetched in shards.

Source: the package cellxgene-census, which reads SOMA arrays kept by TileDB; the data are CC-BY-4.0.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from cellxgene_ontology_guide.supported_versions import CXGSchema
from scipy import sparse

from cell2text.cell_files import CELLS_AT_ONCE, write_cells
from cell2text.cell_labels import CELLXGENE
from cell2text.config import CENSUS
from cell2text.contracts import CENSUS_CELLS
from cell2text.errors import InputError
from cell2text.genes import GeneMap, map_genes
from cell2text.ontology import UNKNOWN, live_id, name_of
from cell2text.progress import Progress
from cell2text.sampling import draw_sample

log = logging.getLogger("cell2text.census")

RELEASE = r"\d{4}-\d{2}-\d{2}"
IDS = {slot: f"{column}_ontology_term_id" for slot, column in CELLXGENE.items()}
ASSAY, ORGAN = "assay_ontology_term_id", "tissue_general_ontology_term_id"
NEEDED = ("cell_type", "tissue", "disease")  # a cell of which one of these is not known is of no use
# Bytes of a column that are read at once, and of all that TileDB holds; by default one gigabyte and ten.
BUFFER, BUDGET = 64 << 20, 3 << 30


def choose_cells(
    source: str, wanted: dict[str, list[str]], sample: dict[str, Any], seed: int, path: str | Path
) -> None:
    """Choose the cells of the Census to work on; no counts are read.

    Of the primary human cells those pass whose study and assay are wanted and whose cell type, tissue and
    disease are known. The sample is drawn from them by ``sampling.draw_sample``, organs standing for tissues.

    Parameters
    ----------
    source
        As in the sheet of datasets: ``census://2025-01-30``, or ``census://`` and the place of a copy.
    wanted
        The section ``census`` of the config.
    sample
        The section ``sample`` of the config.
    seed
        Seed of the draw.
    path
        Where to write the table (``contracts.CENSUS_CELLS``), in the order of the Census.

    Raises
    ------
    InputError
        If the Census cannot be read or no cell passes.
    """
    with open_census(source) as human:
        cells, faults = read_obs(human, wanted)
    told = ", ".join(f"{fault}: {n}" for fault, n in sorted(faults.items())) or "none"
    if cells.empty:
        raise InputError(f"{source}: obs", f"no cell is left (left out: {told})", "Change `census` in the config")
    log.info("%s: %d primary cells pass; left out: %s", source, len(cells), told)
    rng = np.random.default_rng(seed)
    rows = draw_sample(group_cells(cells), sample["cells"], sample["shares"], sample["caps"], rng)
    cells = cells.iloc[rows][list(CENSUS_CELLS.columns)]
    log.info("%s: %d cells of %d studies chosen", source, len(cells), cells["dataset_id"].nunique())
    CENSUS_CELLS.write(cells, path)


@contextmanager
def open_census(source: str) -> Iterator[Any]:
    """Open a Census and give the SOMA experiment of its human cells.

    Raises
    ------
    InputError
        If there is no such Census, or reading it fails in here or later, as when the network does.
    """
    try:
        import cellxgene_census
        from requests import RequestException
        from tiledbsoma import SOMAError
    except ImportError:
        raise InputError(
            source,
            "the package cellxgene-census is not installed",
            "Run with --sdm conda, or install what envs/census.yaml names",
        ) from None
    place = source.removeprefix(CENSUS)
    if released := re.fullmatch(RELEASE, place):
        fix = "Check the release and the network of the machine that runs this, then run again: finished shards stay"
    else:
        fix = f"Give a release as {CENSUS}2025-01-30, or a whole copy as {CENSUS}/path/to/soma"
    try:
        census = cellxgene_census.open_soma(
            **({"census_version": place} if released else {"uri": place}),
            tiledb_config={"soma.init_buffer_bytes": BUFFER, "sm.mem.total_budget": BUDGET},
        )
        with census:
            yield census["census_data"]["homo_sapiens"]
    except (RequestException, SOMAError) as error:
        raise InputError(source, f"cannot be read ({str(error).strip().rstrip('.')})", fix) from error


def read_obs(human: Any, wanted: dict[str, list[str]]) -> tuple[pd.DataFrame, dict[str, int]]:
    """Return the primary cells that pass, and how many do not for which fault.

    Parameters
    ----------
    human
        SOMA experiment of the human cells. Its table is read in batches; of a batch only what passes stays.
    wanted
        As in ``choose_cells``.

    Returns
    -------
    tuple of DataFrame and dict
        ``soma_joinid``, ascending, and the ids of study, donor, assay, organ and slots as categories.
    """
    columns = ["soma_joinid", "dataset_id", "donor_id", ASSAY, ORGAN, *IDS.values()]
    assays = kinds_of(wanted["leave_out_assays"])
    faults: Counter = Counter()
    passed = []
    for batch in human.obs.read(column_names=columns, value_filter="is_primary_data == True"):
        batch = pa.table({name: _encode(batch[name]) for name in columns})
        told = find_faults(batch.to_pandas(), wanted, assays)
        faults.update(told.value_counts().to_dict())
        passed.append(batch.filter(pa.array(told.isna())))
    table = pa.concat_tables(passed).unify_dictionaries()
    del passed, batch
    cells = table.to_pandas(split_blocks=True, self_destruct=True)
    if not cells["soma_joinid"].is_monotonic_increasing:
        cells = cells.sort_values("soma_joinid", ignore_index=True)
    return cells, {fault: n for fault, n in faults.items() if n}


def _encode(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of text as codes; the Census keeps most such columns so, but not in every release."""
    if not pa.types.is_integer(column.type) and not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    if pa.types.is_dictionary(column.type):
        # batches may come with codes and texts of different width
        column = column.cast(pa.dictionary(pa.int32(), pa.string()))
    return column


def find_faults(cells: pd.DataFrame, wanted: dict[str, list[str]], assays: set[str]) -> pd.Series:
    """Return why each cell does not pass, as categories; missing for a cell that does.

    Parameters
    ----------
    cells
        A batch of cells, ids as categories.
    wanted
        As in ``choose_cells``.
    assays
        Assays to leave out.
    """
    faults = {
        "study not wanted": cells["dataset_id"].isin(wanted["leave_out_datasets"]),
        "assay left out": cells[ASSAY].isin(assays),
    }
    for slot in NEEDED:
        terms = cells[IDS[slot]].cat.categories
        known = [term for term in terms if read_term(slot, term) != "unknown"]
        faults[f"no {slot.replace('_', ' ')}"] = ~cells[IDS[slot]].isin(known)
    if wanted["datasets"]:
        faults["study not wanted"] |= ~cells["dataset_id"].isin(wanted["datasets"])
    codes = np.select(list(faults.values()), range(len(faults)), default=-1)
    return pd.Series(pd.Categorical.from_codes(codes, list(faults)))


def kinds_of(assays: list[str]) -> set[str]:
    """Return assays and all kinds of them that EFO knows.

    Raises
    ------
    InputError
        If EFO has no such assay.
    """
    terms = CXGSchema().ontology("EFO")
    unknown = sorted(set(assays) - set(terms))
    if unknown:
        raise InputError("config: census.leave_out_assays", f"{', '.join(unknown)} is no term of EFO", "Correct the id")
    return {term for term, entry in terms.items() if not set(assays).isdisjoint({term, *entry.get("ancestors", {})})}


@cache
def read_term(slot: str, term: str) -> str:
    """Return the live term that an id of the Census stands for; ``"unknown"`` where there is none.

    A release of the Census is older than the ontologies here, and nobody can correct its ids.
    """
    try:
        return live_id(slot, term, f"Census: {IDS[slot]}")
    except InputError as error:
        log.warning("%s: cells without %s", error, slot.replace("_", " "))
        return "unknown"


def group_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """Return what ``sampling.draw_sample`` balances cells by, as categories; missing where not known."""
    studies, donors = cells["dataset_id"].cat, cells["donor_id"].cat
    every = np.array(["unknown", *donors.categories], dtype=object)
    pairs = studies.codes.to_numpy(dtype=np.int64) * len(every) + donors.codes.to_numpy() + 1
    codes, found = pd.factorize(pairs)
    study, donor = np.divmod(found, len(every))
    names = studies.categories.to_numpy(dtype=object)[study] + "|" + every[donor]
    return pd.DataFrame(
        {
            "cell_type_id": cells[IDS["cell_type"]],
            "tissue_id": cells[ORGAN].cat.remove_categories(cells[ORGAN].cat.categories.intersection(UNKNOWN)),
            "disease_id": cells[IDS["disease"]],
            "donor": pd.Categorical.from_codes(codes, names),
        }
    )


def fetch_shard(cells_file: str | Path, source: str, shard: int, shards: int, path: str | Path) -> None:
    """Fetch the counts of one shard of the chosen cells and write them in the form of ``counts.fetch_dataset``.

    A shard is a stretch of the Census, so no part of its arrays is read for two shards. ``dataset_id`` is the
    Census's own, and a cell's id ``{dataset_id}|{soma_joinid}``.

    Parameters
    ----------
    cells_file
        The chosen cells (``contracts.CENSUS_CELLS``).
    source
        As in ``choose_cells``.
    shard, shards
        Which piece, from 0, of how many.
    path
        Where to write.

    Raises
    ------
    InputError
        If the Census cannot be read, there is no cell for the shard, or a count is no whole number.
    """
    cells = CENSUS_CELLS.read(cells_file, categories=list(CENSUS_CELLS.columns)[1:])
    first, last = (len(cells) * edge // shards for edge in (shard, shard + 1))
    cells = cells.iloc[first:last].reset_index(drop=True)
    if cells.empty:
        raise InputError("config: shards", f"{shards} shards, fewer cells chosen from {source}", "Lower `shards`")
    obs = describe_cells(cells)
    with open_census(source) as human:
        genes = read_genes(human, source)
        blocks = read_counts(human, cells["soma_joinid"].to_numpy(), obs.index, genes, source)
        write_cells(path, blocks, [obs.index], obs, genes.genes, {"source": source})
    log.info("%s: shard %d, %d cells, %d genes", source, shard, len(obs), len(genes.genes))


def describe_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the chosen cells in CELLxGENE's columns, each a categorical, with names looked up from the ids.

    The study stands in for a donor that it does not name.

    Parameters
    ----------
    cells
        Rows of ``contracts.CENSUS_CELLS``.
    """
    cells = cells.astype(dict.fromkeys(cells.columns[1:], object)).fillna("unknown")
    known = pd.DataFrame({"dataset_id": cells["dataset_id"]})
    unnamed = cells["donor_id"].str.lower().isin(UNKNOWN)
    known["donor_id"] = cells["donor_id"].mask(unnamed, cells["dataset_id"])
    known[ASSAY] = cells[ASSAY]
    for slot, column in IDS.items():
        known[column] = cells[column].map({term: read_term(slot, term) for term in cells[column].unique()})
        known[CELLXGENE[slot]] = known[column].map({term: name_of(slot, term) for term in known[column].unique()})
    known.index = pd.Index(cells["dataset_id"] + "|" + cells["soma_joinid"].astype(str), name="cell_id")
    return known.astype("category")


def read_genes(human: Any, source: str) -> GeneMap:
    """Return what becomes of the genes of the Census, in the order of its counts."""
    columns = ["soma_joinid", "feature_id", "feature_name"]
    genes = human.ms["RNA"].var.read(column_names=columns).concat().to_pandas().sort_values("soma_joinid")
    return map_genes(genes.set_index("feature_id"), source)


def read_counts(
    human: Any, joinids: np.ndarray, cell_ids: pd.Index, genes: GeneMap, source: str
) -> Iterator[sparse.csr_matrix]:
    """Yield the counts of cells, float32, a block at a time.

    Parameters
    ----------
    human
        SOMA experiment of the human cells.
    joinids
        ``soma_joinid`` of the cells, ascending.
    cell_ids
        Ids of the same cells, for messages.
    genes
        As ``read_genes`` gives them.
    source
        The source, for messages.

    Raises
    ------
    InputError
        If a count is no whole number.
    """
    counts = human.ms["RNA"].X["raw"].read((joinids,))
    progress = Progress(len(joinids), "cells")
    done = 0
    for stored, _ in counts.blockwise(axis=0, size=CELLS_AT_ONCE, reindex_disable_on_axis=[1]).scipy():
        # some releases declare room for more genes than they have
        shape = stored.shape[0], len(genes.column)
        block = sparse.csr_matrix((stored.data, stored.indices, stored.indptr), shape, np.float32)
        block.eliminate_zeros()
        wrong = (block.data < 0) | (block.data != np.rint(block.data))
        if wrong.any():
            position = int(np.argmax(wrong))
            cell = cell_ids[done + np.searchsorted(block.indptr, position, side="right") - 1]
            raise InputError(
                f"{source}: X/raw",
                f"not a whole number: {block.data[position]:g} in cell {cell}",
                "Leave the study or its assay out under `census` in the config",
            )
        block.sort_indices()
        yield genes.gather(block)
        done += block.shape[0]
        progress.advance(block.shape[0])
