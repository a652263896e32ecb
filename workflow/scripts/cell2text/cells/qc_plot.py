"""The QC plot of a dataset: one histogram per metric, with its limits."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from cell2text.files import whole_file

KEPT, DROPPED, LIMIT = "#3b6fa0", "#d9822b", "#444444"
PANELS = {
    "n_counts": ("Counts per cell", "min_counts", True),
    "n_genes": ("Genes per cell", "min_genes", True),
    "mitochondrial_percent": ("Mitochondrial counts, %", "max_mitochondrial_percent", False),
    "ribosomal_percent": ("Ribosomal counts, %", None, False),
    "doublet_score": ("Doublet score", "max_doublet_score", False),
}


def draw_qc(metrics: pd.DataFrame, kept: np.ndarray, bounds: pd.DataFrame, name: str, path: str | Path) -> None:
    """Draw a histogram of each metric with its limits, and write it as SVG, reproducible to the byte.

    Limits are dashed lines. If they differ between samples, the lowest and the highest are drawn, with shading between.
    """
    drawn = {column: panel for column, panel in PANELS.items() if metrics[column].any()}
    with mpl.rc_context({"svg.hashsalt": "cell2text", "font.size": 9}):
        figure = Figure(figsize=(2.6 * len(drawn), 2.8), layout="constrained")
        axes = figure.subplots(1, len(drawn))
        for axis, (column, (title, limit, logarithmic)) in zip(axes, drawn.items(), strict=True):
            limits = bounds[limit].dropna().to_numpy() if limit else np.empty(0)
            _draw_histogram(axis, metrics[column].to_numpy(), kept, limits, logarithmic)
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
    axis.hist(parts, bins=bins, stacked=True, color=[KEPT, DROPPED], label=["kept", "excluded"])
    ends = np.unique([limits.min(), limits.max()]) if len(limits) else limits
    for limit in ends:
        axis.axvline(limit, color=LIMIT, linestyle="--", linewidth=1)
    if len(ends) > 1:
        axis.axvspan(*ends, color=LIMIT, alpha=0.12, linewidth=0)
    axis.spines[["top", "right"]].set_visible(False)
