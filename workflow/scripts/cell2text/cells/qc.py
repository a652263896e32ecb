"""QC metrics of cells, the limits on them, and which cells are excluded for which reason."""

import logging
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from scipy import sparse

from cell2text.cells.genes import MITOCHONDRIAL
from cell2text.settings import QcSettings

log = logging.getLogger("cell2text.qc")

# Ribosomal proteins; excludes kinases such as RPS6KA1, RPS19BP1, and pseudogenes such as RPL7P9.
RIBOSOMAL = re.compile(r"RP[SL](\d+(A|L|X|AL|L1|Y[12])?|P[0-2]|A2?)", re.IGNORECASE)
WHOLE_TRANSCRIPTOME = 15_000  # measured genes; a file with fewer may be a panel
# A file of detected genes has nearly all 88 of them, and 81 or more in real studies with 11,000 to 21,000 genes. Panels
# and highly variable genes (up to 4,000) have at most 15.
MOST_RIBOSOMAL = 60
HALF = 50.0  # percent; the largest limit on the mitochondrial share in a panel
MIN_SAMPLE_CELLS = 50  # a smaller sample gives no reliable median
SD_PER_MAD = 1.4826  # of a normal distribution
USUAL_MITOCHONDRIAL = 5.0  # percent; the adaptive limit is never stricter, however little the cells vary
# The filters in the order in which they are applied: reason, metric, sign and limit.
FILTERS = {
    "too few genes": ("n_genes", "<", "min_genes"),
    "too few counts": ("n_counts", "<", "min_counts"),
    "too many mitochondrial counts": ("mitochondrial_percent", ">", "max_mitochondrial_percent"),
    "likely a doublet": ("doublet_score", ">", "max_doublet_score"),
}
LIMITS = [limit for _, _, limit in FILTERS.values()]
UNLABELLED = "no cell type label"


def is_mitochondrial(symbols: pd.Series) -> np.ndarray:
    """Return which symbols are mitochondrially encoded genes: bool."""
    return symbols.str.upper().str.startswith(MITOCHONDRIAL).to_numpy(dtype=bool)


def is_ribosomal(symbols: pd.Series) -> np.ndarray:
    """Return which symbols are ribosomal proteins: bool."""
    return symbols.str.fullmatch(RIBOSOMAL).to_numpy(dtype=bool)


def measure_cells(blocks: Iterable[sparse.csr_matrix], cells: int, symbols: pd.Series) -> tuple[pd.DataFrame, int]:
    """Return the QC metrics of each cell, and the number of genes with a count in any cell.

    The metrics are those of scanpy's ``pp.calculate_qc_metrics``: ``n_counts``, ``n_genes``,
    ``mitochondrial_percent`` and ``ribosomal_percent`` (0 in an empty cell). ``doublet_score`` is NaN at this stage.

    Parameters
    ----------
    blocks
        Raw counts, cells by genes, in blocks of cells.
    cells
        Total number of cells.
    symbols
        Symbols of the genes.
    """
    counted = np.column_stack([np.ones(len(symbols)), is_mitochondrial(symbols), is_ribosomal(symbols)])
    if not counted[:, 1].any():
        log.info("No mitochondrial genes measured, so the limit on mitochondrial counts excludes no cell")
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
    metrics = {
        "n_counts": total.copy(),
        "n_genes": expressed,
        "mitochondrial_percent": mitochondrial,
        "ribosomal_percent": ribosomal,
        "doublet_score": np.full(len(total), np.nan, dtype=np.float32),
    }
    return pd.DataFrame(metrics), int(detected.sum())


def scale_limits(limits: QcSettings, symbols: pd.Series) -> dict[str, float]:
    """Scale the limits of a whole transcriptome to the genes that a study measures, whatever its cells express.

    A whole transcriptome has 15,000 or more genes, or at least 60 of the 88 ribosomal proteins: every cell expresses
    these, so they are in any file from which only undetected genes were removed, and no panel contains them all. Its
    limits are unchanged.

    Anything else is a panel with a fraction f < 1 of 15,000 genes. The genes and counts of a cell decrease with f, so
    ``min_genes`` and ``min_counts`` are multiplied by f. The share of mitochondrial counts increases, because the
    other genes are fewer: a share p of all counts becomes at most p / (p + f (1 - p)). As chosen genes have more counts
    than others, that is a generous limit, which is therefore never above half of the counts. There is no limit if no
    mitochondrial gene is measured. The limit on the doublet score, if any, is not scaled.

    Parameters
    ----------
    limits
        Limits of a whole transcriptome; those that are None are omitted from the result.
    symbols
        Symbols of the measured genes.

    Examples
    --------
    >>> limits = QcSettings(200, 300, 20, mads=5, score_doublets=True, max_doublet_score=None)
    >>> scale_limits(limits, pd.Series(["MT-ND1", "RPS6", *["GENE"] * 4998]))
    {'min_genes': 67, 'min_counts': 100, 'max_mitochondrial_percent': 42.86}
    """
    whole = is_ribosomal(symbols.drop_duplicates()).sum() >= MOST_RIBOSOMAL
    part = 1 if whole else min(len(symbols) / WHOLE_TRANSCRIPTOME, 1)
    scaled = {limit: getattr(limits, limit) for limit in LIMITS if getattr(limits, limit) is not None}
    for limit in ("min_genes", "min_counts"):
        if limit in scaled:
            scaled[limit] = math.ceil(part * scaled[limit])
    share = scaled.pop("max_mitochondrial_percent", None)
    if share is not None and is_mitochondrial(symbols).any():
        raised = 100 * share / (share + part * (100 - share)) if share else 0
        scaled["max_mitochondrial_percent"] = max(share, min(round(raised, 2), HALF))
    return scaled


def limit_samples(
    metrics: pd.DataFrame, samples: pd.Categorical, fixed: Mapping[str, float] | pd.DataFrame, mads: float | None
) -> pd.DataFrame:
    """Return the limits of each sample: the stricter of the fixed and the adaptive limits.

    An adaptive limit is ``mads`` median absolute deviations, in units of a normal distribution's standard deviation,
    away from the sample's median: below the median of log counts and log genes, above that of the mitochondrial
    share (McCarthy et al., Bioinformatics 2017). Counts and genes have no upper limit, because large cells are not
    low-quality cells. There is no adaptive limit if half of the cells have the same value or if the sample has fewer
    than 50 cells. Medians are taken over the cells within the fixed limits, so empty droplets do not shift them.

    Parameters
    ----------
    metrics
        From ``measure_cells``.
    samples
        Sample of each cell.
    fixed
        Limits by name, as in ``scale_limits``; or one row of them per sample, NaN where there is none.
    mads
        Number of deviations; None for fixed limits only.

    Returns
    -------
    DataFrame
        One row per sample, one column for each of ``LIMITS``; NaN if there is no limit.
    """
    bounds = pd.DataFrame({limit: fixed.get(limit, np.nan) for limit in LIMITS}, index=samples.categories, dtype=float)
    # an empty cell cannot be normalised
    bounds["min_counts"] = bounds["min_counts"].fillna(1).clip(lower=1)
    if mads is None:
        return bounds
    mask = judge_cells(metrics, samples, bounds)[0] == ""
    good, codes = metrics[mask], samples.codes[mask]
    for limit, column in (("min_counts", "n_counts"), ("min_genes", "n_genes")):
        low = np.ceil(np.expm1(_beyond_median(np.log1p(good[column]), codes, len(bounds), -mads)))
        bounds[limit] = np.fmax(bounds[limit], low)
    high = _beyond_median(good["mitochondrial_percent"].astype(float), codes, len(bounds), mads).round(2)
    column = "max_mitochondrial_percent"
    bounds[column] = np.fmin(bounds[column], np.maximum(high, USUAL_MITOCHONDRIAL))
    return bounds


def _beyond_median(values: pd.Series, codes: np.ndarray, samples: int, mads: float) -> np.ndarray:
    """Return the value ``mads`` deviations from each sample's median; NaN if the sample is small or has no spread."""
    grouped = values.groupby(codes)
    median, cells = (table.reindex(range(samples)).to_numpy() for table in (grouped.median(), grouped.size()))
    deviation = (values - median[codes]).abs().groupby(codes).median().reindex(range(samples)).to_numpy()
    known = (cells >= MIN_SAMPLE_CELLS) & (deviation > 0)
    return np.where(known, median + mads * SD_PER_MAD * deviation, np.nan)


def judge_cells(
    metrics: pd.DataFrame, samples: pd.Categorical, bounds: pd.DataFrame, labelled: np.ndarray | None = None
) -> tuple[pd.Categorical, pd.Categorical]:
    """Return the filter that each cell fails, and the full reason with its value; both empty for a good cell.

    Only the first failed filter in the order of ``FILTERS`` is reported, and a missing label last. A cell without
    counts is always excluded, because it cannot be normalised.

    Parameters
    ----------
    metrics
        From ``measure_cells``.
    samples
        Sample of each cell.
    bounds
        From ``limit_samples``.
    labelled
        Whether each cell has a cell type; None to ignore labels.
    """
    failed = np.zeros(len(metrics), dtype=np.int8)
    which, reasons = np.zeros(len(metrics), dtype=np.int32), [""]
    for number, (name, (metric, sign, limit)) in enumerate(FILTERS.items(), start=1):
        values, bound = metrics[metric].to_numpy(), bounds[limit].to_numpy()[samples.codes]
        beyond = values < bound if sign == "<" else values > bound
        first = np.flatnonzero((failed == 0) & beyond)
        failed[first] = number
        # few distinct pairs of value and limit, so few strings however many cells there are
        pairs = np.column_stack([values[first].astype(float).round(2), bound[first]])
        pairs, position = np.unique(pairs, axis=0, return_inverse=True)
        which[first] = len(reasons) + position
        reasons += [f"{name} ({value:.10g} {sign} {end:.10g})" for value, end in pairs]
    if labelled is not None:
        unlabelled = (failed == 0) & ~labelled
        failed[unlabelled], which[unlabelled] = len(FILTERS) + 1, len(reasons)
    return (
        pd.Categorical.from_codes(failed, ["", *FILTERS, UNLABELLED]),
        pd.Categorical.from_codes(which, [*reasons, UNLABELLED]),
    )
