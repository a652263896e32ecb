"""Raw counts of a study, checked value by value or recovered from log1p values.

No matrix is assumed to hold counts: every stored value is checked. log1p values are converted back only where they
prove what the counts were. A study is read and written one block of cells at a time.
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
LARGEST = 2**24  # float32 cannot represent every whole number above it
NOISE = 1e-4  # rounding error allowed in counts that someone else recovered from log1p values
# log1p values rounded to three decimals give the counts of pbmc68k_reduced within 0.09 of a whole number.
TOLERANCE = 0.1
# Counts of this many genes are unlikely to share a divisor, so the smallest value of the cell was one count.
MIN_GENES = 20
MAX_UNPROVEN = 0.05  # share of cells that may have fewer genes


class NotCountsError(Exception):
    """A matrix does not hold counts; the message says what was found and where.

    Parameters
    ----------
    problem
        What was found.
    maybe_logs
        Whether the matrix could hold log1p of counts.
    """

    def __init__(self, problem: str, maybe_logs: bool = False):
        super().__init__(problem)
        self.maybe_logs = maybe_logs


def check_counts(study: Study, place: str, scratch: Path) -> Iterator[sparse.csr_matrix]:
    """Yield the counts of a matrix that holds counts: float32, no explicit zeros.

    Raises
    ------
    NotCountsError
        If a stored value is not a count.
    """
    matrix, _ = study.matrices[place]
    _check_first(matrix)
    start, empty = 0, 0
    for block in matrix.blocks(scratch):
        invalid = find_invalid_value(block.data)
        if invalid is not None:
            position, problem, maybe_logs = invalid
            raise NotCountsError(f"{problem}{_name_value(study, place, start, block, position)}", maybe_logs)
        counts = (np.rint(block) if block.dtype.kind == "f" else block).astype(np.float32, copy=False)
        counts.eliminate_zeros()
        empty += int((np.diff(counts.indptr) == 0).sum())
        yield counts
        start += block.shape[0]
    if 2 * empty > start:
        log.warning(
            "%s: %d of %d barcodes have no counts: this seems to be the unfiltered (raw) matrix. QC excludes them; "
            "better give the filtered one",
            study.where, empty, start,
        )  # fmt: skip


def _check_first(matrix: Matrix) -> None:
    """Check the first values, so that a matrix without counts is not sorted by cell in vain."""
    values = matrix.first_values()
    if values.dtype.kind not in "fiu":
        raise NotCountsError(f"values of type {values.dtype}")
    invalid = find_invalid_value(values)
    if invalid is not None and isinstance(matrix, GeneMatrix):
        raise NotCountsError(*invalid[1:])


def find_invalid_value(values: np.ndarray) -> tuple[int, str, bool] | None:
    """Return position and description of a value that is not a count, and whether it could be a log1p value.

    A value that cannot be a log1p value either (negative, NaN, infinite) is reported first. None if all are counts.
    """
    values = values.astype(float, copy=False)  # small types cannot represent LARGEST
    rounded = np.rint(values)
    with np.errstate(invalid="ignore"):  # inf - inf
        valid = (
            (values >= 0) & (values <= LARGEST) & (np.abs(values - rounded) <= NOISE) & ((rounded > 0) | (values == 0))
        )
    if valid.all():
        return None
    impossible = ~(np.isfinite(values) & (values >= 0))
    position = int(np.argmax(impossible)) if impossible.any() else int(np.argmin(valid))
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
    """Yield the counts of a matrix that holds ``log1p`` of counts, scaled or not: float32, no explicit zeros.

    With y = expm1(value), the counts of a cell are y divided by its unit: the value of y for one count. Two units
    are tried; the first that fits the first cells must fit all cells:

    - 10,000 / the cell's total in ``obs``;
    - the cell's smallest positive y, which does not depend on the scaling.

    Every count must be a whole number. Totals are independent evidence, so log1p values that come with totals may be
    rounded, within ``TOLERANCE``. Without totals, the rounding error of the stored type gives an error bound for each
    count; a count outside its bound, or with a bound of half a count or more, is rejected. The counts of a cell with
    fewer than ``MIN_GENES`` genes could be multiples of the true counts: the cell is left without counts, so that QC
    excludes it, and a matrix with more than ``MAX_UNPROVEN`` of such cells is rejected.

    Raises
    ------
    NotCountsError
        If the values are not provably log1p of counts.
    """
    matrix, _ = study.matrices[place]
    # many files were computed in float32 and stored as float64
    rounding = max(np.finfo(matrix.first_values().dtype).eps, np.finfo(np.float32).eps)
    units, start, unproven = _list_units(study), 0, 0
    for block in matrix.blocks(scratch):
        block.eliminate_zeros()
        filled = np.diff(block.indptr) > 0
        if filled.any():
            units, block = _try_units(study, place, start, block, rounding, units)
            unproven += int((filled & (np.diff(block.indptr) == 0)).sum())
        yield block.astype(np.float32)
        start += block.shape[0]
    if unproven > MAX_UNPROVEN * start:
        raise NotCountsError(f"log1p values, but {unproven} of {start} cells have too few genes to prove their counts")
    if unproven:
        log.warning(
            "%s: %d cells have too few genes to prove their counts; their counts are set to zero", study.where, unproven
        )
    log.info("%s: recovered counts from %s, interpreted as %s", study.where, place, next(iter(units)))


def _try_units(
    study: Study, place: str, start: int, block: sparse.csr_matrix, rounding: float, units: dict[str, Any]
) -> tuple[dict[str, Any], sparse.csr_matrix]:
    """Return the first entry of ``units`` that fits, as a dictionary, and the counts that it gives."""
    errors = []
    for name, unit in units.items():
        try:
            counts = _divide_by_unit(study, place, start, block, rounding, name, unit)
        except NotCountsError as error:
            errors.append(error)
            continue
        if counts.nnz or len(units) == 1:
            return {name: unit}, counts
    raise errors[0]  # if there are totals, the error that they gave


def _list_units(study: Study) -> dict[str, np.ndarray | None]:
    """Return the possible units of each cell by description; None for the cell's smallest value."""
    units: dict[str, np.ndarray | None] = {}
    column = next((column for column in TOTALS if column in study.obs), None)
    if column:
        totals = pd.to_numeric(study.obs[column], errors="coerce").to_numpy(dtype=float)
        units[f"log1p of counts per 10,000 with the totals in obs[{column!r}]"] = 1e4 / np.where(
            totals > 0, totals, np.nan
        )
    units["log1p of scaled counts, with each cell's smallest value as one count"] = None
    return units


def _divide_by_unit(
    study: Study, place: str, start: int, block: sparse.csr_matrix, rounding: float, name: str, unit: Any
) -> sparse.csr_matrix:
    """Return the counts of a block of log1p values, see ``recover_counts``."""
    if unit is None:
        few = np.repeat(np.diff(block.indptr) < MIN_GENES, np.diff(block.indptr))
        block = sparse.csr_matrix((np.where(few, 0, block.data), block.indices, block.indptr), shape=block.shape)
        block.eliminate_zeros()
    logs = block.data.astype(float)
    with np.errstate(over="ignore", invalid="ignore"):  # such values are reported below
        scaled = np.expm1(logs)
        # relative error of y: a few roundings in the stored type, one of them of the log1p value
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
    rounded = np.rint(counts)
    allowed = counts * error if unit is None else np.full(len(counts), TOLERANCE)
    valid = (np.abs(counts - rounded) <= allowed) & (allowed < 0.5) & (rounded >= 1) & (rounded <= LARGEST)
    if not valid.all():
        position = int(np.argmin(valid))
        value = _name_value(study, place, start, block, position)
        raise NotCountsError(f"interpreted as {name}, it gives {counts[position]:.3f}{value}")
    return sparse.csr_matrix((rounded, block.indices, block.indptr), shape=block.shape)


def _name_value(study: Study, place: str, start: int, block: sparse.csr_matrix, position: int) -> str:
    cell = study.obs.index[start + int(np.searchsorted(block.indptr, position, side="right")) - 1]
    return f" in cell {cell}, gene {study.matrices[place][1].index[block.indices[position]]}"
