"""Cells of CELLxGENE Census chosen by their labels; no counts are read."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from cellxgene_ontology_guide.supported_versions import CXGSchema

from cell2text.cells.census import ASSAY, IDS, ORGAN, open_census, read_term
from cell2text.cells.sampling import draw_sample
from cell2text.contracts import CENSUS_CELLS
from cell2text.errors import InputError
from cell2text.ontology import UNKNOWN

log = logging.getLogger("cell2text.census")

NEEDED = ("cell_type", "tissue", "disease")  # a cell of which one of these is not known is of no use


def choose_census_cells(
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
        cells, faults = read_census_obs(human, wanted)
    told = ", ".join(f"{fault}: {n}" for fault, n in sorted(faults.items())) or "none"
    if cells.empty:
        raise InputError(f"{source}: obs", f"no cell is left (left out: {told})", "Change `census` in the config")
    log.info("%s: %d primary cells pass; left out: %s", source, len(cells), told)
    rng = np.random.default_rng(seed)
    rows = draw_sample(group_cells(cells), sample["cells"], sample["shares"], sample["caps"], rng)
    cells = cells.iloc[rows][list(CENSUS_CELLS.columns)]
    log.info("%s: %d cells of %d studies chosen", source, len(cells), cells["dataset_id"].nunique())
    CENSUS_CELLS.write(cells, path)


def read_census_obs(human: Any, wanted: dict[str, list[str]]) -> tuple[pd.DataFrame, dict[str, int]]:
    """Return the primary cells that pass, and how many do not for which fault.

    Parameters
    ----------
    human
        SOMA experiment of the human cells. Its table is read in batches; of a batch only what passes stays.
    wanted
        As in ``choose_census_cells``.

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
        As in ``choose_census_cells``.
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
