"""Raw counts of a study in one form: whole numbers, CELLxGENE's columns, one id a cell.

Counts are found by looking at every stored value, and never taken on trust; logs are turned back into counts
where their values prove what the counts were. A study is read and written a block of cells at a time.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from cell2text.cells.matrices import GeneMatrix, Matrix
from cell2text.cells.studies import Study

log = logging.getLogger("cell2text.counts")

TOTALS = ("n_counts", "total_counts", "nCount_RNA")
LARGEST = 2**24  # beyond it float32 does not hold every whole number
NOISE = 1e-4  # of counts that others have turned back from logs
# Logs rounded to three decimals give the counts of pbmc68k_reduced back within 0.09 of a whole number.
TOLERANCE = 0.1
# So many counts have no common divisor, hence the smallest of the values that they became was one count.
MIN_GENES = 20
MAX_POOR = 0.05  # share of cells that may have fewer


class NotCountsError(Exception):
    """A matrix holds something else than counts; the message says what and where.

    Parameters
    ----------
    problem
        What it holds.
    logs
        Whether it could hold logs of counts.
    """

    def __init__(self, problem: str, logs: bool = False):
        super().__init__(problem)
        self.logs = logs


def check_counts(study: Study, place: str, scratch: Path) -> Iterator[sparse.csr_matrix]:
    """Yield the counts of a matrix that holds counts: float32, no zeros stored.

    Raises
    ------
    NotCountsError
        If a stored value is no count.
    """
    matrix, _ = study.matrices[place]
    _check_first(matrix)
    start = 0
    for block in matrix.blocks(scratch):
        fault = find_fault(block.data)
        if fault is not None:
            position, problem, logs = fault
            raise NotCountsError(f"{problem}{_name_value(study, place, start, block, position)}", logs)
        counts = (np.rint(block) if block.dtype.kind == "f" else block).astype(np.float32, copy=False)
        counts.eliminate_zeros()
        yield counts
        start += block.shape[0]


def _check_first(matrix: Matrix) -> None:
    """Look at the first values, before the entries of a matrix are sorted by cell for nothing."""
    values = matrix.first_values()
    if values.dtype.kind not in "fiu":
        raise NotCountsError(f"values of type {values.dtype}")
    fault = find_fault(values)
    if fault is not None and isinstance(matrix, GeneMatrix):
        raise NotCountsError(*fault[1:])


def find_fault(values: np.ndarray) -> tuple[int, str, bool] | None:
    """Return position and kind of a value that is no count and whether it could be a log, or None.

    Logs hold fractions nearly everywhere, so a value that no log could be is told in their place.
    """
    whole = np.rint(values)
    with np.errstate(invalid="ignore"):  # infinite less infinite
        right = (values >= 0) & (values <= LARGEST) & (np.abs(values - whole) <= NOISE) & ((whole > 0) | (values == 0))
    if right.all():
        return None
    impossible = ~(np.isfinite(values) & (values >= 0))
    position = int(np.argmax(impossible)) if impossible.any() else int(np.argmin(right))
    value = values[position]
    if np.isnan(value):
        return position, "missing value (NaN)", False
    if not np.isfinite(value):
        return position, "infinite value", False
    if value < 0:
        return position, f"negative value {value:g}", False
    if value > LARGEST:
        return position, f"too large for a count: {value:g}", False
    return position, f"not a whole number: {value:g}", True


def recover_counts(study: Study, place: str, scratch: Path) -> Iterator[sparse.csr_matrix]:
    """Yield the counts of a matrix that holds ``log1p`` of counts, scaled or not: float32, no zeros stored.

    With y = expm1(value), the counts of a cell are y divided by what one count became, its unit. The first of
    these that fits the first cells must fit all of them:

    - the unit is 10,000 / the cell's total in ``obs``;
    - it is the cell's smallest y above nought, whatever the counts were scaled to, if at all.

    Every value must come out whole. Totals are independent evidence: beside them logs may be rounded, and
    ``TOLERANCE`` is enough. Without them the rounding error of the stored type bounds how far a count may be off:
    a count that is not within its bound, or whose bound reaches half a count, proves nothing and is refused. The
    counts of a cell of fewer than ``MIN_GENES`` genes could all be multiples of another number: it is left without
    counts, so that QC leaves it out, and more than ``MAX_POOR`` of such cells are refused.

    Raises
    ------
    NotCountsError
        If the values do not prove to be logs of counts.
    """
    matrix, _ = study.matrices[place]
    # many a file was computed in float32 and stored in float64
    rounding = max(np.finfo(matrix.first_values().dtype).eps, np.finfo(np.float32).eps)
    ways, start, poor = _list_ways(study), 0, 0
    for block in matrix.blocks(scratch):
        block.eliminate_zeros()
        filled = np.diff(block.indptr) > 0
        if filled.any():
            ways, block = _try_ways(study, place, start, block, rounding, ways)
            poor += int((filled & (np.diff(block.indptr) == 0)).sum())
        yield block.astype(np.float32)
        start += block.shape[0]
    if poor > MAX_POOR * start:
        raise NotCountsError(f"logs of {poor} of {start} cells with too few genes to prove their counts")
    if poor:
        log.warning("%s: %d cells have too few genes to prove their counts and are left without", study.where, poor)
    log.info("%s: counts recovered from %s, read as %s", study.where, place, next(iter(ways)))


def _try_ways(
    study: Study, place: str, start: int, block: sparse.csr_matrix, rounding: float, ways: dict[str, Any]
) -> tuple[dict[str, Any], sparse.csr_matrix]:
    """Return the first way that fits, by itself, and the counts that it gives."""
    faults = []
    for way, unit in ways.items():
        try:
            counts = _divide_by_unit(study, place, start, block, rounding, way, unit)
        except NotCountsError as fault:
            faults.append(fault)
            continue
        if counts.nnz or len(ways) == 1:
            return {way: unit}, counts
    raise faults[0]  # that of the totals, if there are any


def _list_ways(study: Study) -> dict[str, np.ndarray | None]:
    """Return what one count of each cell may have become; None for a cell's smallest value."""
    ways: dict[str, np.ndarray | None] = {}
    column = next((column for column in TOTALS if column in study.obs), None)
    if column:
        totals = pd.to_numeric(study.obs[column], errors="coerce").to_numpy(dtype=float)
        ways[f"log1p of counts per 10,000 with the totals in obs[{column!r}]"] = 1e4 / np.where(
            totals > 0, totals, np.nan
        )
    ways["log1p of scaled counts, a cell's smallest value being one count"] = None
    return ways


def _divide_by_unit(
    study: Study, place: str, start: int, block: sparse.csr_matrix, rounding: float, way: str, unit: Any
) -> sparse.csr_matrix:
    """Return the counts of a block of logs, see ``recover_counts``."""
    if unit is None:
        few = np.repeat(np.diff(block.indptr) < MIN_GENES, np.diff(block.indptr))
        block = sparse.csr_matrix((np.where(few, 0, block.data), block.indices, block.indptr), shape=block.shape)
        block.eliminate_zeros()
    logs = block.data.astype(float)
    with np.errstate(over="ignore", invalid="ignore"):  # such values are told below
        scaled = np.expm1(logs)
        # a few roundings in the stored type on the way to y, its log among them
        error = 2 * rounding * (1 + logs * (1 + scaled) / scaled)
    lengths = np.diff(block.indptr)
    filled = lengths > 0
    if unit is None:
        starts = block.indptr[:-1][filled]
        unit_of_cell = np.minimum.reduceat(scaled, starts)
        error += np.repeat(np.maximum.reduceat(error, starts), lengths[filled])
    else:
        unit_of_cell = unit[start : start + block.shape[0]][filled]
    counts = scaled / np.repeat(unit_of_cell, lengths[filled])
    whole = np.rint(counts)
    allowed = counts * error if unit is None else np.full(len(counts), TOLERANCE)
    right = (np.abs(counts - whole) <= allowed) & (allowed < 0.5) & (whole >= 1) & (whole <= LARGEST)
    if not right.all():
        position = int(np.argmin(right))
        value = _name_value(study, place, start, block, position)
        raise NotCountsError(f"read as {way}, it holds {counts[position]:.3f}{value}")
    return sparse.csr_matrix((whole, block.indices, block.indptr), shape=block.shape)


def _name_value(study: Study, place: str, start: int, block: sparse.csr_matrix, position: int) -> str:
    cell = study.obs.index[start + int(np.searchsorted(block.indptr, position, side="right")) - 1]
    return f" in cell {cell}, gene {study.matrices[place][1].index[block.indices[position]]}"
