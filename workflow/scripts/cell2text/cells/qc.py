"""QC metrics of cells, the limits on them, and which cells are excluded for what."""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from cell2text.cells.genes import MITOCHONDRIAL

log = logging.getLogger("cell2text.qc")

# Proteins of the ribosome: not RPS6KA1 and other kinases, RPS19BP1, or pseudogenes such as RPL7P9.
RIBOSOMAL = re.compile(r"RP[SL](\d+(A|L|X|AL|L1|Y[12])?|P[0-2]|A2?)", re.IGNORECASE)
WHOLE_TRANSCRIPTOME = 15_000  # genes with a count: fewer make a panel
CELLS_OF_A_SAMPLE = 50  # fewer say too little of what is usual in a sample
SD_PER_MAD = 1.4826  # of a normal distribution
USUAL_MITOCHONDRIAL = 5.0  # percent: no cell is left out for less, however alike the others are
# What may be wrong with a cell, in the order in which it is told: its figure, and the limit beyond which it is.
FAULTS = {
    "too few genes": ("n_genes", "<", "min_genes"),
    "too few counts": ("n_counts", "<", "min_counts"),
    "too many mitochondrial counts": ("mitochondrial_percent", ">", "max_mitochondrial_percent"),
    "likely a doublet": ("doublet_score", ">", "max_doublet_score"),
}
LIMITS = [limit for _, _, limit in FAULTS.values()]
UNLABELLED = "no cell type label"


def is_mitochondrial(symbols: pd.Series) -> np.ndarray:
    """Return which symbols are of genes of the mitochondrial genome."""
    return symbols.str.upper().str.startswith(MITOCHONDRIAL).to_numpy(dtype=bool)


def is_ribosomal(symbols: pd.Series) -> np.ndarray:
    """Return which symbols are of proteins of the ribosome."""
    return symbols.str.fullmatch(RIBOSOMAL).to_numpy(dtype=bool)


def measure_cells(blocks: Iterable[sparse.csr_matrix], cells: int, symbols: pd.Series) -> tuple[pd.DataFrame, int]:
    """Return the figures of each cell, and how many genes have a count in any.

    The figures are those of scanpy's ``pp.calculate_qc_metrics``: ``n_counts``, ``n_genes``,
    ``mitochondrial_percent`` and ``ribosomal_percent`` (0 in an empty cell). ``doublet_score`` is NaN as yet.

    Parameters
    ----------
    blocks
        Raw counts, cells by genes, some cells at a time.
    cells
        Number of all cells.
    symbols
        Symbols of the genes.
    """
    counted = np.column_stack([np.ones(len(symbols)), is_mitochondrial(symbols), is_ribosomal(symbols)])
    if not counted[:, 1].any():
        log.info("No mitochondrial gene measured, so the limit on them leaves out no cell")
    sums, expressed, detected = (
        np.empty((3, cells)),
        np.empty(cells, dtype=np.int32),
        np.zeros(len(symbols), dtype=bool),
    )
    start = 0
    for counts in blocks:
        counts.eliminate_zeros()
        stop = start + counts.shape[0]
        sums[:, start:stop] = (counts @ counted).T
        expressed[start:stop] = np.diff(counts.indptr)
        detected |= np.bincount(counts.indices, minlength=len(symbols)) > 0
        start = stop
    total, *parts = sums
    mitochondrial, ribosomal = (np.float32(100 * part / np.maximum(total, 1)) for part in parts)
    figures = {
        "n_counts": total.copy(),
        "n_genes": expressed,
        "mitochondrial_percent": mitochondrial,
        "ribosomal_percent": ribosomal,
        "doublet_score": np.full(len(total), np.nan, dtype=np.float32),
    }
    return pd.DataFrame(figures), int(detected.sum())


def scale_limits(limits: Mapping[str, Any], detected: int) -> dict[str, float]:
    """Return the limits of a file that may measure a panel of genes, from those of a whole transcriptome.

    A panel holds a part f of the genes of a whole transcriptome (15,000 detected ones and more), f < 1. A good
    cell's genes and counts shrink with it, so ``min_genes`` and ``min_counts`` are multiplied by f. Its share of
    mitochondrial counts grows, for they are seldom left out: a share p of all counts becomes p / (p + f (1 - p)).
    A limit on doublets, if any, stays.

    Parameters
    ----------
    limits
        Of a whole transcriptome; those that are None or absent are left out.
    detected
        Genes with a count in any cell.

    Examples
    --------
    >>> scale_limits({"min_genes": 200, "min_counts": 300, "max_mitochondrial_percent": 20}, 1500)
    {'min_genes': 20, 'min_counts': 30, 'max_mitochondrial_percent': 71.43}
    """
    part = min(detected / WHOLE_TRANSCRIPTOME, 1)
    scaled = {limit: limits[limit] for limit in LIMITS if limits.get(limit) is not None}
    for limit in ("min_genes", "min_counts"):
        if limit in scaled:
            scaled[limit] = math.ceil(part * scaled[limit])
    if (share := scaled.get("max_mitochondrial_percent")) and part:
        scaled["max_mitochondrial_percent"] = round(100 * share / (share + part * (100 - share)), 2)
    return scaled


def limit_samples(
    figures: pd.DataFrame, samples: pd.Categorical, fixed: Mapping[str, float], mads: float | None
) -> pd.DataFrame:
    """Return the limits that hold in each sample: the stricter of the fixed and the adaptive ones.

    An adaptive limit lies ``mads`` median absolute deviations, in units of a normal distribution's standard
    deviation, from the sample's median: below that of log counts and log genes, above that of the mitochondrial
    share (McCarthy et al., Bioinformatics 2017). There is none above counts and genes, for large cells are not
    poor ones; none where half of the cells are alike; none in a sample of fewer than 50 cells. Only cells within
    the fixed limits count, so empty droplets do not set what is usual.

    Parameters
    ----------
    figures
        As ``measure_cells`` gives them.
    samples
        Sample of each cell.
    fixed
        As ``scale_limits`` gives them.
    mads
        How many deviations; None for fixed limits alone.

    Returns
    -------
    DataFrame
        A row a sample, a column for each of ``LIMITS``; NaN where there is no limit.
    """
    bounds = pd.DataFrame(
        {limit: float(fixed.get(limit, np.nan)) for limit in LIMITS}, index=samples.categories, dtype=float
    )
    # without a count there is nothing to scale by
    bounds["min_counts"] = bounds["min_counts"].fillna(1).clip(lower=1)
    if mads is None:
        return bounds
    good = judge_cells(figures, samples, bounds)[0] == ""
    usual, codes = figures[good], samples.codes[good]
    for limit, column in (("min_counts", "n_counts"), ("min_genes", "n_genes")):
        low = np.ceil(np.expm1(_beyond_median(np.log1p(usual[column]), codes, len(bounds), -mads)))
        bounds[limit] = np.fmax(bounds[limit], low)
    high = _beyond_median(usual["mitochondrial_percent"].astype(float), codes, len(bounds), mads).round(2)
    column = "max_mitochondrial_percent"
    bounds[column] = np.fmin(bounds[column], np.maximum(high, USUAL_MITOCHONDRIAL))
    return bounds


def _beyond_median(values: pd.Series, codes: np.ndarray, samples: int, mads: float) -> np.ndarray:
    """Return what lies so many deviations from each sample's median; NaN where nothing can be said."""
    grouped = values.groupby(codes)
    median, cells = (table.reindex(range(samples)).to_numpy() for table in (grouped.median(), grouped.size()))
    deviation = (values - median[codes]).abs().groupby(codes).median().reindex(range(samples)).to_numpy()
    known = (cells >= CELLS_OF_A_SAMPLE) & (deviation > 0)
    return np.where(known, median + mads * SD_PER_MAD * deviation, np.nan)


def judge_cells(
    figures: pd.DataFrame, samples: pd.Categorical, bounds: pd.DataFrame, labelled: np.ndarray | None = None
) -> tuple[pd.Categorical, pd.Categorical]:
    """Return the kind of fault of each cell and the same with its figures; both empty for a good cell.

    The first fault in the order of ``FAULTS`` is the one told, and a missing label the last. A cell without
    any count is always left out, for its counts cannot be scaled.

    Parameters
    ----------
    figures
        As ``measure_cells`` gives them.
    samples
        Sample of each cell.
    bounds
        As ``limit_samples`` gives them.
    labelled
        Whether each cell has a cell type; None where that does not matter.
    """
    kinds = np.zeros(len(figures), dtype=np.int8)
    which, reasons = np.zeros(len(figures), dtype=np.int32), [""]
    for number, (kind, (figure, sign, limit)) in enumerate(FAULTS.items(), start=1):
        values, bound = figures[figure].to_numpy(), bounds[limit].to_numpy()[samples.codes]
        beyond = values < bound if sign == "<" else values > bound
        first = np.flatnonzero((kinds == 0) & beyond)
        kinds[first] = number
        # few pairs of figure and limit differ, so few texts are made however many the cells
        pairs = np.column_stack([values[first].astype(float).round(2), bound[first]])
        pairs, position = np.unique(pairs, axis=0, return_inverse=True)
        which[first] = len(reasons) + position
        reasons += [f"{kind} ({value:.10g} {sign} {end:.10g})" for value, end in pairs]
    if labelled is not None:
        unlabelled = (kinds == 0) & ~labelled
        kinds[unlabelled], which[unlabelled] = len(FAULTS) + 1, len(reasons)
    return (
        pd.Categorical.from_codes(kinds, ["", *FAULTS, UNLABELLED]),
        pd.Categorical.from_codes(which, [*reasons, UNLABELLED]),
    )
