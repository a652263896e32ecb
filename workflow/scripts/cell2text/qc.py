"""Which cells are fit for use, and why the others are not.

Figures are scanpy's ``pp.calculate_qc_metrics``: counts, genes and the mitochondrial share of each cell.
"""

import logging
from pathlib import Path

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
import scanpy as sc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from cell2text.contracts import QC, whole_file, write_json
from cell2text.errors import InputError
from cell2text.genes import MITOCHONDRIAL

log = logging.getLogger("cell2text.qc")

KEPT, DROPPED = "#3b6fa0", "#d9822b"
PANELS = {
    "n_counts": ("Counts per cell", "min_counts", True),
    "n_genes": ("Genes per cell", "min_genes", True),
    "mitochondrial_percent": ("Mitochondrial counts, %", "max_mitochondrial_percent", False),
}


def filter_cells(
    cells_file: str | Path,
    kept_file: str | Path,
    table_file: str | Path,
    summary_file: str | Path,
    plot_file: str | Path,
    limits: dict[str, float],
) -> None:
    """Leave out poor and unlabelled cells; write the rest, every cell's figures, a summary and a plot.

    Parameters
    ----------
    cells_file
        Raw counts, as ``counts.fetch_dataset`` writes them.
    kept_file, table_file, summary_file, plot_file
        The four files to write: h5ad, Parquet (``contracts.QC``), JSON and SVG.
    limits
        ``min_genes``, ``min_counts`` and ``max_mitochondrial_percent``.

    Raises
    ------
    InputError
        If no cell is left.
    """
    cells = ad.read_h5ad(cells_file)
    dataset = str(cells.obs["dataset_id"].iloc[0])
    mitochondrial = cells.var["symbol"].str.upper().str.startswith(MITOCHONDRIAL)
    if not mitochondrial.any():
        log.info("%s: no mitochondrial gene measured, so their limit leaves out no cell", dataset)
    figures = measure_cells(cells, mitochondrial.to_numpy())
    kinds, reasons = judge_cells(figures, cells.obs["cell_type_ontology_term_id"] != "unknown", limits)
    kept = (kinds == "").to_numpy()
    dropped = kinds[~kept].value_counts().sort_index().to_dict()
    told = ", ".join(f"{reason}: {n}" for reason, n in dropped.items()) or "none"
    if not kept.any():
        raise InputError(f"{dataset}: qc", f"all {len(kept)} cells are left out ({told})", _mend(dropped))
    log.info("%s: %d of %d cells kept; left out: %s", dataset, kept.sum(), len(kept), told)

    table = figures.assign(dataset_id=dataset, kept=kept, reason=reasons).reset_index(names="cell_id")
    summary = {
        "dataset_id": dataset,
        "cells": len(kept),
        "kept": int(kept.sum()),
        "dropped": dropped,
        "limits": limits,
        "genes": cells.n_vars,
        "genes_with_symbol_MT": int(mitochondrial.sum()),
        "source": str(cells.uns.get("source", "")),
    }
    with whole_file(kept_file) as unfinished:
        cells[kept].write_h5ad(unfinished, compression="gzip")
    QC.write(table[list(QC.columns)], table_file)
    draw_figures(figures, kept, limits, dataset, plot_file)
    write_json(summary, summary_file)


def _mend(dropped: dict[str, int]) -> str:
    if max(dropped, key=dropped.get) == "no cell type label":
        return "Give labels through label_column and label_table in the datasets sheet"
    return "Lower the limits under `qc` in the config or in the dataset's row of the sheet"


def measure_cells(cells: ad.AnnData, mitochondrial: np.ndarray) -> pd.DataFrame:
    """Return ``n_counts``, ``n_genes`` and ``mitochondrial_percent`` of each cell.

    Parameters
    ----------
    cells
        Raw counts.
    mitochondrial
        True for each gene of the mitochondrial genome.
    """
    cells.var["mt"] = mitochondrial
    measured, _ = sc.pp.calculate_qc_metrics(cells, qc_vars=["mt"], percent_top=None, log1p=False)
    del cells.var["mt"]
    return pd.DataFrame(
        {
            "n_counts": measured["total_counts"].astype(float),
            "n_genes": measured["n_genes_by_counts"].astype("int32"),
            "mitochondrial_percent": measured["pct_counts_mt"].fillna(0).astype("float32"),
        }
    )


def judge_cells(figures: pd.DataFrame, labelled: pd.Series, limits: dict[str, float]) -> tuple[pd.Series, pd.Series]:
    """Return the kind of fault of each cell and the same with its figures; both empty for a good cell.

    The first fault in the order genes, counts, mitochondrial share, label is the one told. A cell without
    any count is always left out, for its counts cannot be scaled.

    Parameters
    ----------
    figures
        As ``measure_cells`` gives them.
    labelled
        Whether each cell has a cell type.
    limits
        ``min_genes``, ``min_counts`` and ``max_mitochondrial_percent``.
    """
    min_counts = max(limits["min_counts"], 1)
    faults = [
        ("too few genes", "n_genes", "<", limits["min_genes"]),
        ("too few counts", "n_counts", "<", min_counts),
        ("too many mitochondrial counts", "mitochondrial_percent", ">", limits["max_mitochondrial_percent"]),
    ]
    kinds = pd.Series("", index=figures.index, dtype=object)
    reasons = kinds.copy()
    for kind, column, sign, limit in faults:
        beyond = figures[column] < limit if sign == "<" else figures[column] > limit
        first = (kinds == "") & beyond
        reasons[first] = [f"{kind} ({value:.4g} {sign} {limit:g})" for value in figures.loc[first, column]]
        kinds[first] = kind
    unlabelled = (kinds == "") & ~labelled
    kinds[unlabelled] = reasons[unlabelled] = "no cell type label"
    return kinds, reasons


def draw_figures(
    figures: pd.DataFrame, kept: np.ndarray, limits: dict[str, float], dataset: str, path: str | Path
) -> None:
    """Draw a histogram of each figure, limits dashed, and write it as SVG, the same bytes each time."""
    with mpl.rc_context({"svg.hashsalt": "cell2text", "font.size": 9}):
        figure = Figure(figsize=(10, 2.8), layout="constrained")
        axes = figure.subplots(1, len(PANELS))
        for axis, (column, (title, limit, logarithmic)) in zip(axes, PANELS.items(), strict=True):
            _draw_histogram(axis, figures[column].to_numpy(), kept, limits[limit], logarithmic)
            axis.set_xlabel(title)
        axes[0].set_ylabel("Cells")
        figure.suptitle(f"{dataset}: {kept.sum():,} of {len(kept):,} cells kept", x=0.01, ha="left", fontsize=11)
        figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="upper right", ncols=2)
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, format="svg", metadata={"Date": None})


def _draw_histogram(axis: Axes, values: np.ndarray, kept: np.ndarray, limit: float, logarithmic: bool) -> None:
    low, high = min(values.min(), limit), max(values.max(), limit, 1)
    if logarithmic:
        values = np.maximum(values, 1)
        bins = np.geomspace(max(low, 1) / 1.1, high * 1.1, 41)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        bins = np.linspace(0, high * 1.05, 41)
    parts = [values[kept], values[~kept]]
    axis.hist(parts, bins=bins, stacked=True, color=[KEPT, DROPPED], label=["kept", "left out"])
    axis.axvline(limit, color="#444444", linestyle="--", linewidth=1)
    axis.spines[["top", "right"]].set_visible(False)
