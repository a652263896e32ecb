"""Plot that compares the methods."""

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cell2text.contracts import METRICS
from cell2text.errors import InputError
from cell2text.evaluation.methods import FINE_TUNED, title_of
from cell2text.files import check_hashes, whole_file

_PANELS = {
    ("cell_type", "accuracy"): "Cell type\naccuracy",
    ("cell_type", "macro_f1"): "Cell type\nmacro-F1",
    ("cell_type", "similarity"): "Cell type\nontology similarity",
    ("pathways", "jaccard"): "Gene programmes\nJaccard index",
}
# Blue and grey also differ in lightness, so they are distinct for every kind of colour vision.
_OURS, _OTHERS, _INK, _FAINT = "#0072B2", "#666666", "#222222", "#E3E3E3"


def compare(metrics: str, provenance: str, plot: str) -> None:
    """Plot the main metrics of every method on the test cells, with 95% confidence intervals, as SVG.

    Methods are sorted by cell type accuracy; metrics that a run lacks are skipped. A baseline's point is filled if the
    interval of its paired difference to the fine-tuned model excludes zero.

    Parameters
    ----------
    metrics
        Table of ``contracts.METRICS``, TSV.
    provenance
        The file that ``evaluate`` wrote with it, which has its hash.
    plot
        The SVG file to write.

    Raises
    ------
    InputError
        If the table is damaged, or has none of the main metrics for the test cells.
    """
    check_hashes([metrics], provenance)
    table = pd.read_csv(metrics, sep="\t", usecols=list(METRICS))
    table = table[table["split"] == "test"].set_index(["slot", "metric", "method"]).sort_index()
    panels = [panel for panel in _PANELS if panel in table.index.droplevel("method")]
    if not panels:
        raise InputError(metrics, "no score for the test cells", "Put labelled cells into the test split")
    methods = table.loc[panels[0]].sort_values("value", kind="stable").index.to_list()
    # A fixed salt and no date: the same table gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "cell2text", "font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(2.2 + 2.1 * len(panels), 1.15 + 0.36 * len(methods)), layout="constrained")
        figure.get_layout_engine().set(wspace=0.06)
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            _plot_panel(axis, table.loc[panel].reindex(methods), _PANELS[panel])
        axes[0].set_yticks(range(len(methods)), [title_of(method) for method in methods])
        for label, method in zip(axes[0].get_yticklabels(), methods, strict=True):
            label.set(color=_colour(method), weight=_weight(method))
        cells = int(table.loc[panels[0]]["n"].max())
        legend = f"{cells:,} test cells; bars: {_describe_intervals(table)}\nhollow point: no clear difference to "
        legend += f"{title_of(FINE_TUNED)} (the 95% interval of the paired difference includes zero)"
        figure.supxlabel(legend, fontsize=8, color=_OTHERS)
        with whole_file(plot) as unfinished:
            figure.savefig(unfinished, format="svg", metadata={"Date": None, "Title": "Methods compared"})


def _describe_intervals(table: pd.DataFrame) -> str:
    units = " or ".join(f"{unit}s" for unit in sorted(set(table["resampled"].dropna())))
    return f"95% intervals from resampling {units}" if units else "no intervals, because there are too few cells"


def _plot_panel(axis: Axes, rows: pd.DataFrame, title: str) -> None:
    """Draw value and interval of each method; the first row is at the bottom."""
    heights, colours = range(len(rows)), [_colour(method) for method in rows.index]
    axis.hlines(heights, rows["low"], rows["high"], colors=colours, linewidth=2, alpha=0.55)
    clear = (rows["difference_low"] > 0) | (rows["difference_high"] < 0) | (rows.index == FINE_TUNED)
    faces = [colour if filled else "white" for colour, filled in zip(colours, clear, strict=True)]
    axis.scatter(rows["value"], heights, s=32, c=faces, edgecolors=colours, linewidths=1.4, zorder=3)
    for height, (method, value) in enumerate(rows["value"].items()):
        if pd.notna(value):
            style = {"color": _colour(method), "weight": _weight(method), "fontsize": 7.5}
            axis.text(value, height + 0.2, f"{value:.2f}", ha="center", va="bottom", **style)
        if method == FINE_TUNED:
            axis.axhspan(height - 0.35, height + 0.6, color=_OURS, alpha=0.07, linewidth=0)
    axis.set_title(title, fontsize=9.5, color=_INK, loc="left")
    axis.set(xlim=(-0.04, 1.04), ylim=(-0.6, len(rows) - 0.3))
    axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axis.grid(axis="x", color=_FAINT, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelcolor=_OTHERS)
    axis.spines[:].set_visible(False)


def _colour(method: str) -> str:
    return _OURS if method == FINE_TUNED else _OTHERS


def _weight(method: str) -> str:
    return "bold" if method == FINE_TUNED else "normal"
