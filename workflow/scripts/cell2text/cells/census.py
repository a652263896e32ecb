"""CELLxGENE Census as a source: cells are chosen by their metadata, then their counts are fetched in shards.

Source: the package cellxgene-census, which reads SOMA arrays stored in TileDB; the data are CC-BY-4.0.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from cell2text.cells.labels import CELLXGENE
from cell2text.config import CENSUS
from cell2text.errors import InputError
from cell2text.ontology import live_id

log = logging.getLogger("cell2text.census")

RELEASE = r"\d{4}-\d{2}-\d{2}"
IDS = {slot: f"{column}_ontology_term_id" for slot, column in CELLXGENE.items()}
ASSAY, ORGAN = "assay_ontology_term_id", "tissue_general_ontology_term_id"
# Bytes read at once per column, and TileDB's total memory budget; the defaults are 1 GB and 10 GB.
BUFFER, BUDGET = 64 << 20, 3 << 30


@contextmanager
def open_census(source: str) -> Iterator[Any]:
    """Open a Census and yield it, a SOMA collection.

    Raises
    ------
    InputError
        If the Census does not exist, or reading it fails inside the ``with`` block, for example in a network error.
    """
    try:
        import cellxgene_census
        from requests import RequestException
        from tiledbsoma import SOMAError
    except ImportError:
        raise InputError(
            source,
            "the package cellxgene-census is not installed",
            "Run with --sdm conda, or install the packages listed in envs/census.yaml",
        ) from None
    place = source.removeprefix(CENSUS)
    if released := re.fullmatch(RELEASE, place):
        fix = "Check the release and this machine's network, then run again; finished shards are kept"
    else:
        fix = f"Give a release as {CENSUS}2025-01-30, or a complete copy as {CENSUS}/path/to/soma"
    try:
        census = cellxgene_census.open_soma(
            **({"census_version": place} if released else {"uri": place}),
            tiledb_config={"soma.init_buffer_bytes": BUFFER, "sm.mem.total_budget": BUDGET},
        )
        with census:
            yield census
    except (RequestException, SOMAError) as error:
        raise InputError(source, f"cannot be read ({str(error).strip().rstrip('.')})", fix) from error


def human_cells(census: Any) -> Any:
    """Return the SOMA experiment of the human cells."""
    return census["census_data"]["homo_sapiens"]


def read_collections(census: Any) -> dict[str, str]:
    """Return dataset id -> id of its collection, within which donor ids are unique to a person.

    Source: CELLxGENE schema 5, donor_id. Empty if a copy of the Census lacks its table of datasets.
    """
    if "census_info" not in census or "datasets" not in census["census_info"]:
        log.warning("the Census has no table of datasets: a person in two of its datasets will count as two donors")
        return {}
    columns = ["dataset_id", "collection_id"]
    table = census["census_info"]["datasets"].read(column_names=columns).concat().to_pandas().astype(object).dropna()
    return {dataset: collection for dataset, collection in table[columns].itertuples(index=False) if collection}


@cache
def read_term(slot: str, term: str) -> str:
    """Resolve an id of the Census to a live term; ``"unknown"`` if there is none.

    A Census release is older than the ontologies used here and its ids cannot be corrected, so this is no error.
    """
    try:
        return live_id(slot, term, f"Census: {IDS[slot]}")
    except InputError as error:
        log.warning("%s (these cells are treated as having no %s)", error, slot.replace("_", " "))
        return "unknown"
