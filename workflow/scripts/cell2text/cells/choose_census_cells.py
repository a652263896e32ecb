"""Choose cells of CELLxGENE Census by their labels; no counts are read."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from cellxgene_ontology_guide.supported_versions import CXGSchema

from cell2text.cells.census import ASSAY, IDS, ORGAN, human_cells, open_census, read_collections, read_term
from cell2text.cells.sampling import draw_sample
from cell2text.contracts import CENSUS_CELLS
from cell2text.errors import InputError
from cell2text.ontology import UNKNOWN
from cell2text.settings import CensusSettings, SampleSettings

log = logging.getLogger("cell2text.census")

REQUIRED = ("cell_type", "tissue", "disease")  # a cell must have all of these labels


def choose_census_cells(
    source: str, wanted: CensusSettings, sample: SampleSettings, seed: int, path: str | Path
) -> None:
    """Choose the cells of the Census to work on; no counts are read.

    A primary human cell passes if the settings include its study, organ and assay and its cell type, tissue and disease
    are known. The sample is drawn from these cells by ``sampling.draw_sample``, balanced by organ instead of tissue.

    Parameters
    ----------
    source
        As in the datasets sheet: ``census://2025-01-30``, or ``census://`` and the path of a copy.
    wanted
        Which studies, organs and assays to include.
    sample
        How many cells to draw, and how.
    seed
        Seed of the draw.
    path
        Where to write the table (``contracts.CENSUS_CELLS``), in the order of the Census.

    Raises
    ------
    InputError
        If the Census cannot be read or no cell passes.
    """
    with open_census(source) as census:
        cells, excluded = read_census_obs(human_cells(census), wanted)
        collections = read_collections(census)
    listed = ", ".join(f"{reason}: {n}" for reason, n in sorted(excluded.items())) or "none"
    if cells.empty:
        raise InputError(f"{source}: obs", f"no cell passes (excluded: {listed})", "Change `census` in the config")
    log.info("%s: %d primary cells pass; excluded: %s", source, len(cells), listed)
    cells["collection_id"] = find_collections(cells["dataset_id"], collections)
    rng = np.random.default_rng(seed)
    rows = draw_sample(group_cells(cells), sample.cells, sample.shares, sample.caps, rng)
    cells = cells.iloc[rows][list(CENSUS_CELLS.columns)]
    log.info("%s: chose %d cells of %d studies", source, len(cells), cells["dataset_id"].nunique())
    CENSUS_CELLS.write(cells, path)


def read_census_obs(human: Any, wanted: CensusSettings) -> tuple[pd.DataFrame, dict[str, int]]:
    """Return the primary cells that pass, and the number of excluded cells by reason.

    Parameters
    ----------
    human
        SOMA experiment of the human cells. Its ``obs`` is read in batches; only the cells that pass stay in memory.
    wanted
        As in ``choose_census_cells``.

    Returns
    -------
    tuple of DataFrame and dict
        ``soma_joinid``, ascending, and the ids of study, donor, assay, organ and slots as categories; cells by reason.
    """
    columns = ["soma_joinid", "dataset_id", "donor_id", ASSAY, ORGAN, *IDS.values()]
    assays = with_descendants(wanted.leave_out_assays)
    excluded: Counter = Counter()
    passed = []
    for batch in human.obs.read(column_names=columns, value_filter="is_primary_data == True"):
        batch = pa.table({name: _encode(batch[name]) for name in columns})
        reasons = find_exclusions(batch.to_pandas(), wanted, assays)
        excluded.update(reasons.value_counts().to_dict())
        passed.append(batch.filter(pa.array(reasons.isna())))
    table = pa.concat_tables(passed).unify_dictionaries()
    del passed, batch
    cells = table.to_pandas(split_blocks=True, self_destruct=True)
    if not cells["soma_joinid"].is_monotonic_increasing:
        cells = cells.sort_values("soma_joinid", ignore_index=True)
    return cells, {reason: n for reason, n in excluded.items() if n}


def _encode(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Dictionary-encode a text column; most releases of the Census store them encoded, but not all."""
    if not pa.types.is_integer(column.type) and not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    if pa.types.is_dictionary(column.type):
        # the types of codes and strings may differ between batches
        column = column.cast(pa.dictionary(pa.int32(), pa.string()))
    return column


def find_exclusions(cells: pd.DataFrame, wanted: CensusSettings, assays: set[str]) -> pd.Series:
    """Return the reason why each cell is excluded, as categories; missing for a cell that passes.

    Parameters
    ----------
    cells
        A batch of cells, ids as categories.
    wanted
        As in ``choose_census_cells``.
    assays
        Assays to exclude, with their descendants in EFO.
    """
    exclusions = {
        "study not selected": cells["dataset_id"].isin(wanted.leave_out_datasets),
        "assay not selected": cells[ASSAY].isin(assays),
    }
    if wanted.tissues:
        exclusions["tissue not selected"] = ~cells[ORGAN].isin(wanted.tissues)
    for slot in REQUIRED:
        terms = cells[IDS[slot]].cat.categories
        known = [term for term in terms if read_term(slot, term) != "unknown"]
        exclusions[f"no {slot.replace('_', ' ')}"] = ~cells[IDS[slot]].isin(known)
    if wanted.datasets:
        exclusions["study not selected"] |= ~cells["dataset_id"].isin(wanted.datasets)
    codes = np.select(list(exclusions.values()), range(len(exclusions)), default=-1)
    return pd.Series(pd.Categorical.from_codes(codes, list(exclusions)))


def with_descendants(assays: list[str]) -> set[str]:
    """Return assays and all their descendants in EFO.

    Raises
    ------
    InputError
        If an assay is not a term of EFO.
    """
    terms = CXGSchema().ontology("EFO")
    unknown = sorted(set(assays) - set(terms))
    if unknown:
        raise InputError(
            "config: census.leave_out_assays", f"not in EFO: {', '.join(unknown)}", "Correct or remove the id"
        )
    return {term for term, entry in terms.items() if not set(assays).isdisjoint({term, *entry.get("ancestors", {})})}


def find_collections(datasets: pd.Series, collections: dict[str, str]) -> pd.Categorical:
    """Return the collection of each cell's dataset, or the dataset itself if it has none; both as categories."""
    codes, names = pd.factorize(np.array([collections.get(name, name) for name in datasets.cat.categories], object))
    return pd.Categorical.from_codes(codes[datasets.cat.codes], names)


def group_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the columns by which ``sampling.draw_sample`` balances cells, as categories; missing if unknown.

    A donor is ``{collection}|{donor}``, as in the corpus; cells of unknown donors of a collection count as one donor.
    """
    collections, donors = cells["collection_id"].cat, cells["donor_id"].cat
    known = np.array([False, *(name.lower() not in UNKNOWN for name in donors.categories)])
    donor = np.where(known[donors.codes + 1], donors.codes + 1, 0)
    codes, unique = pd.factorize(collections.codes.to_numpy(dtype=np.int64) * len(known) + donor)
    pairs = zip(*np.divmod(unique, len(known)), strict=True)
    names = [f"{(place := collections.categories[i])}|{donors.categories[j - 1] if j else place}" for i, j in pairs]
    return pd.DataFrame(
        {
            "cell_type_id": cells[IDS["cell_type"]],
            "tissue_id": cells[ORGAN].cat.remove_categories(cells[ORGAN].cat.categories.intersection(UNKNOWN)),
            "disease_id": cells[IDS["disease"]],
            "donor": pd.Categorical.from_codes(codes, names),
        }
    )
