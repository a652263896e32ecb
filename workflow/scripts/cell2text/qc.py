"""Which cells are fit for use, and why the others are not.

Counts are read a block at a time and never held: one pass measures the cells, one sorts those that look good
into files for the search of doublets, one writes the cells that are kept.
"""

import logging
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import matplotlib as mpl
import numpy as np
import pandas as pd
import scanpy as sc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from scipy import sparse
from threadpoolctl import threadpool_limits

from cell2text.cell_files import id_parts, kept_ids, read_blocks, read_obs, write_cells
from cell2text.contracts import QC, whole_file, write_json
from cell2text.errors import InputError
from cell2text.genes import MITOCHONDRIAL
from cell2text.progress import Progress

log = logging.getLogger("cell2text.qc")

# Proteins of the ribosome: not RPS6KA1 and other kinases, RPS19BP1, or pseudogenes such as RPL7P9.
RIBOSOMAL = re.compile(r"RP[SL](\d+(A|L|X|AL|L1|Y[12])?|P[0-2]|A2?)", re.IGNORECASE)
WHOLE_TRANSCRIPTOME = 15_000  # genes with a count: fewer make a panel
CELLS_OF_A_SAMPLE = 50  # fewer say too little of what is usual in a sample
CELLS_A_RUN = 1_000  # of Scrublet, whose memory grows with them
SD_PER_MAD = 1.4826  # of a normal distribution
USUAL_MITOCHONDRIAL = 5.0  # percent: no cell is left out for less, however alike the others are
COLUMNS = ("dataset_id", "donor_id", "cell_type_ontology_term_id")

# What may be wrong with a cell, in the order in which it is told: its figure, and the limit beyond which it is.
FAULTS = {
    "too few genes": ("n_genes", "<", "min_genes"),
    "too few counts": ("n_counts", "<", "min_counts"),
    "too many mitochondrial counts": ("mitochondrial_percent", ">", "max_mitochondrial_percent"),
    "likely a doublet": ("doublet_score", ">", "max_doublet_score"),
}
LIMITS = [limit for _, _, limit in FAULTS.values()]
UNLABELLED = "no cell type label"

KEPT, DROPPED, LIMIT = "#3b6fa0", "#d9822b", "#444444"
PANELS = {
    "n_counts": ("Counts per cell", "min_counts", True),
    "n_genes": ("Genes per cell", "min_genes", True),
    "mitochondrial_percent": ("Mitochondrial counts, %", "max_mitochondrial_percent", False),
    "ribosomal_percent": ("Ribosomal counts, %", None, False),
    "doublet_score": ("Doublet score", "max_doublet_score", False),
}


def filter_cells(
    cells_file: str | Path,
    kept_file: str | Path,
    table_file: str | Path,
    summary_file: str | Path,
    plot_file: str | Path,
    limits: Mapping[str, Any],
    own_limits: Mapping[str, float] | None = None,
    seed: int = 0,
) -> None:
    """Leave out poor and unlabelled cells; write the rest, every cell's figures, a summary and a plot.

    Parameters
    ----------
    cells_file
        Raw counts, as ``counts.fetch_dataset`` writes them.
    kept_file, table_file, summary_file, plot_file
        The four files to write: h5ad, Parquet (``contracts.QC``), JSON and SVG.
    limits
        The section ``qc`` of the config: ``min_genes``, ``min_counts`` and ``max_mitochondrial_percent`` of a
        whole transcriptome, ``mads``, ``score_doublets`` and ``max_doublet_score``.
    own_limits
        Limits that the user set for this dataset; they hold as they are, see ``scale_limits``.
    seed
        Seed of the search for doublets.

    Raises
    ------
    InputError
        If no cell is left.
    """
    kept = _judge_file(Path(cells_file), table_file, summary_file, plot_file, limits, own_limits or {}, seed)
    with h5py.File(cells_file, "r") as file:
        var, uns = (ad.io.read_elem(file[part]) for part in ("var", "uns"))
    obs = _drop_unused_categories(read_obs(cells_file)[kept])
    write_cells(
        kept_file, (block for _, block in read_blocks(cells_file, kept)), kept_ids(cells_file, kept), obs, var, uns
    )


def _judge_file(
    cells_file: Path,
    table_file: str | Path,
    summary_file: str | Path,
    plot_file: str | Path,
    limits: Mapping[str, Any],
    own_limits: Mapping[str, float],
    seed: int,
) -> np.ndarray:
    """Write the figures of a file's cells, the summary and the plot; return which cells are kept."""
    with h5py.File(cells_file, "r") as file:
        symbols = ad.io.read_elem(file["var"])["symbol"]
        source = str(ad.io.read_elem(file["uns"]).get("source", ""))
    obs = read_obs(cells_file, COLUMNS)
    study, donor, label = (pd.Categorical(obs[column]) for column in COLUMNS)
    studies = study.remove_unused_categories().categories
    name = str(studies[0]) if len(studies) == 1 else Path(table_file).stem
    samples = name_samples(study, donor)

    blocks = (counts for _, counts in read_blocks(cells_file, np.ones(len(samples), dtype=bool)))
    figures, detected = measure_cells(blocks, len(samples), symbols)
    fixed = scale_limits(limits, detected) | dict(own_limits)
    bounds = limit_samples(figures, samples, fixed, limits.get("mads"))
    if limits.get("score_doublets"):
        good = judge_cells(figures, samples, bounds)[0] == ""
        scratch = Path(f"{table_file}.scratch")
        figures["doublet_score"] = score_doublets(cells_file, good, samples, len(symbols), seed, scratch)
    kinds, reasons = judge_cells(figures, samples, bounds, np.asarray(label != "unknown"))
    kept = kinds == ""
    summary = {
        "dataset_id": name,
        "cells": len(kept),
        "kept": int(kept.sum()),
        "dropped": _count_dropped(kinds, name),
        "limits": fixed,
        "mads": limits.get("mads"),
        "samples": list(_tell_samples(samples, kept, bounds)),
        "genes": len(symbols),
        "genes_detected": detected,
        "genes_mitochondrial": int(is_mitochondrial(symbols).sum()),
        "genes_ribosomal": int(is_ribosomal(symbols).sum()),
        "source": source,
    }
    table = {"dataset_id": study, "donor": samples, **figures, "kept": kept, "reason": reasons}
    QC.write_parts(_add_ids(cells_file, table), table_file)
    draw_figures(figures, kept, bounds, name, plot_file)
    write_json(summary, summary_file)
    return kept


def _count_dropped(kinds: pd.Categorical, name: str) -> dict[str, int]:
    dropped = {kind: int(number) for kind, number in kinds.value_counts().items() if kind and number}
    told = ", ".join(f"{kind}: {number}" for kind, number in dropped.items()) or "none"
    kept = len(kinds) - sum(dropped.values())
    if not kept:
        mend = "Lower the limits under `qc` in the config or in the dataset's row of the sheet"
        if max(dropped, key=dropped.get, default="") == UNLABELLED:
            mend = "Give labels through label_column and label_table in the datasets sheet"
        raise InputError(f"{name}: qc", f"all {len(kinds)} cells are left out ({told})", mend)
    log.info("%s: %d of %d cells kept; left out: %s", name, kept, len(kinds), told)
    return dropped


def _add_ids(cells_file: str | Path, table: dict[str, Any]) -> Iterator[pd.DataFrame]:
    start = 0
    for ids in id_parts(cells_file):
        rows = slice(start, start + len(ids))
        yield pd.DataFrame({"cell_id": ids} | {name: column[rows] for name, column in table.items()})
        start += len(ids)


def _drop_unused_categories(obs: pd.DataFrame) -> pd.DataFrame:
    return obs.assign(**{name: obs[name].cat.remove_unused_categories() for name in obs.select_dtypes("category")})


def _tell_samples(samples: pd.Categorical, kept: np.ndarray, bounds: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield for each sample its name, numbers of cells and the limits that hold in it."""
    cells = np.bincount(samples.codes, minlength=len(bounds))
    left = np.bincount(samples.codes[kept], minlength=len(bounds))
    for name, row, n, n_kept in zip(bounds.index, bounds.to_dict("records"), cells, left, strict=True):
        limits = {limit: value for limit, value in row.items() if not math.isnan(value)}
        yield {"donor": name, "cells": int(n), "kept": int(n_kept), **limits}


def name_samples(study: pd.Categorical, donor: pd.Categorical) -> pd.Categorical:
    """Return the sample of each cell: what came from one donor in one study, ``{dataset}|{donor}``."""
    codes = study.codes.astype(np.int64) * len(donor.categories) + donor.codes
    pairs, codes = np.unique(codes, return_inverse=True)
    pairs = [divmod(pair, len(donor.categories)) for pair in pairs]
    return pd.Categorical.from_codes(codes, [f"{study.categories[i]}|{donor.categories[j]}" for i, j in pairs])


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


def score_doublets(
    cells_file: str | Path, good: np.ndarray, samples: pd.Categorical, genes: int, seed: int, scratch: Path
) -> np.ndarray:
    """Return the doublet score of each good cell among the good cells of its sample.

    This is Scrublet (Wolock et al., Cell Systems 2019) as in scanpy's ``pp.scrublet``, but for two settings:
    genes are scaled and not centred, so that matrices stay sparse, and neighbours are exact. A sample of more
    than 1,000 cells is cut at random into equal parts of at most so many. A sample of fewer than 50, or one in
    which too few genes vary, gets NaN.

    Parameters
    ----------
    cells_file
        Raw counts.
    good
        Which cells of the file to score; the others get NaN.
    samples
        Sample of each cell of the file.
    genes
        Genes of the file.
    seed
        Seed of the parts and of the simulated doublets.
    scratch
        Folder to sort the cells in, at 6 bytes a stored count; removed in the end.

    Returns
    -------
    array of float32, shape (cells,)
    """
    scores = np.full(len(good), np.nan, dtype=np.float32)
    parts = np.full(len(good), -1, dtype=np.int32)
    parts[good] = cut_samples(samples.codes[good], np.random.default_rng(seed))
    scored = parts >= 0
    by_part = np.flatnonzero(scored)[np.argsort(parts[scored], kind="stable")]
    sizes = np.bincount(parts[scored])
    firsts = np.cumsum(sizes) - sizes
    progress = Progress(len(by_part), "cells scored")
    shutil.rmtree(scratch, ignore_errors=True)  # a killed run may have left one
    scratch.mkdir(parents=True)
    try:
        blocks = (counts for _, counts in read_blocks(cells_file, scored))
        lengths = np.zeros(len(good), dtype=np.int32)
        lengths[scored] = _sort_into_files(blocks, parts[scored], scratch)
        for part, (first, size) in enumerate(zip(firsts, sizes, strict=True)):
            cells = by_part[first : first + size]
            scores[cells] = _score_part(_read_part(scratch / str(part), lengths[cells], genes), seed)
            (scratch / str(part)).unlink()
            progress.advance(len(cells))
    finally:
        shutil.rmtree(scratch)
    return scores


def cut_samples(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the number of each cell's part: its sample, or an equal random piece of a large one.

    Parameters
    ----------
    samples
        Number of each cell's sample.
    rng
        Source of chance.

    Returns
    -------
    array of int, shape (cells,)
        Parts count from 0; -1 in a sample of too few cells.
    """
    cells = np.bincount(samples)
    pieces = np.where(cells < CELLS_OF_A_SAMPLE, 0, -(-cells // CELLS_A_RUN))
    order = np.lexsort((rng.permutation(len(samples)), samples))
    place = np.empty(len(samples), dtype=np.int64)  # of a cell among those of its sample, in random order
    place[order] = np.arange(len(samples)) - (np.cumsum(cells) - cells)[samples[order]]
    parts = (np.cumsum(pieces) - pieces)[samples] + place % np.maximum(pieces, 1)[samples]
    return np.where(pieces[samples] > 0, parts, -1)


def _sort_into_files(blocks: Iterable[sparse.csr_matrix], parts: np.ndarray, folder: Path) -> np.ndarray:
    """Write the counts of each part's cells to a file of its own; return how many counts each cell has."""
    lengths, start = np.empty(len(parts), dtype=np.int32), 0
    for counts in blocks:
        counts.eliminate_zeros()
        stop = start + counts.shape[0]
        lengths[start:stop] = np.diff(counts.indptr)
        part = parts[start:stop]
        start = stop
        order = np.argsort(part, kind="stable")
        counts = counts[order]
        held = np.empty(counts.nnz, dtype=_entry(counts.shape[1]))
        held["gene"], held["count"] = counts.indices, counts.data
        numbers, firsts = np.unique(part[order], return_index=True)
        for number, some in zip(numbers, np.split(held, counts.indptr[firsts[1:]]), strict=True):
            with (folder / str(number)).open("ab") as file:
                some.tofile(file)
    return lengths


def _entry(genes: int) -> np.dtype:
    return np.dtype([("gene", np.min_scalar_type(genes)), ("count", np.float32)])


def _read_part(path: Path, lengths: np.ndarray, genes: int) -> sparse.csr_matrix:
    held = np.fromfile(path, dtype=_entry(genes))
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return sparse.csr_matrix((held["count"], held["gene"], ends), shape=(len(lengths), genes))


def _score_part(counts: sparse.csr_matrix, seed: int) -> np.ndarray:
    cells = ad.AnnData(counts)
    try:
        # one thread, for sums in another order may change a neighbour
        with threadpool_limits(1):
            sc.pp.scrublet(
                cells,
                mean_center=False,
                use_approx_neighbors=False,
                threshold=0.0,  # only its scores are used, and to find a threshold it needs scikit-image
                verbose=False,
                random_state=seed,
            )
    except ValueError as error:
        log.info("%d cells get no doublet score: %s", cells.n_obs, error)
        return np.full(cells.n_obs, np.nan)
    return cells.obs["doublet_score"].to_numpy()


def draw_figures(figures: pd.DataFrame, kept: np.ndarray, bounds: pd.DataFrame, name: str, path: str | Path) -> None:
    """Draw a histogram of each figure and its limits, and write it as SVG, the same bytes each time.

    Limits are dashed lines; where those of the samples differ, the least and the greatest, shaded between.
    """
    drawn = {column: panel for column, panel in PANELS.items() if figures[column].any()}
    with mpl.rc_context({"svg.hashsalt": "cell2text", "font.size": 9}):
        figure = Figure(figsize=(2.6 * len(drawn), 2.8), layout="constrained")
        axes = figure.subplots(1, len(drawn))
        for axis, (column, (title, limit, logarithmic)) in zip(axes, drawn.items(), strict=True):
            limits = bounds[limit].dropna().to_numpy() if limit else np.empty(0)
            _draw_histogram(axis, figures[column].to_numpy(), kept, limits, logarithmic)
            axis.set_xlabel(title)
        axes[0].set_ylabel("Cells")
        figure.suptitle(f"{name}: {kept.sum():,} of {len(kept):,} cells kept", x=0.01, ha="left", fontsize=11)
        figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="upper right", ncols=2)
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, format="svg", metadata={"Date": None})


def _draw_histogram(axis: Axes, values: np.ndarray, kept: np.ndarray, limits: np.ndarray, logarithmic: bool) -> None:
    measured = ~np.isnan(values)
    values, kept = values[measured], kept[measured]
    shown = np.concatenate([[values.min(), values.max()], limits])
    low, high = shown.min(), shown.max()
    if logarithmic:
        values = np.maximum(values, 1)
        bins = np.geomspace(max(low, 1) / 1.1, max(high, 1) * 1.1, 41)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        bins = np.linspace(0, (high or 1) * 1.05, 41)
    parts = [values[kept], values[~kept]]
    axis.hist(parts, bins=bins, stacked=True, color=[KEPT, DROPPED], label=["kept", "left out"])
    ends = np.unique([limits.min(), limits.max()]) if len(limits) else limits
    for limit in ends:
        axis.axvline(limit, color=LIMIT, linestyle="--", linewidth=1)
    if len(ends) > 1:
        axis.axvspan(*ends, color=LIMIT, alpha=0.12, linewidth=0)
    axis.spines[["top", "right"]].set_visible(False)
