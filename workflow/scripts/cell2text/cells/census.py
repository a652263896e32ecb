"""CELLxGENE Census as a source: cells chosen from its table of cells, then their counts fetched in shards.

Source: the package cellxgene-census, which reads SOMA arrays kept by TileDB; the data are CC-BY-4.0.
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
# Bytes of a column that are read at once, and of all that TileDB holds; by default one gigabyte and ten.
BUFFER, BUDGET = 64 << 20, 3 << 30


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
