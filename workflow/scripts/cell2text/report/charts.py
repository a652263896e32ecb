"""Geometry of the charts in the report; the template draws and colours them."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, MaxNLocator
from scipy.stats import binomtest

from cell2text.report.results import METHOD, Results

MOST_POINTS = 600


@dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Parameters
    ----------
    low, high
        Ends of the axis in data units.
    start, end
        Ends of the axis in drawing units.
    logarithmic
        Whether the scale is logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, values: np.ndarray | float) -> np.ndarray:
        """Return the positions of values in drawing units."""
        low, high, values = (np.log(v) if self.logarithmic else v for v in (self.low, self.high, values))
        return np.round(self.start + (values - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, most: int = 6) -> list[dict[str, Any]]:
        """Return position and label of each tick."""
        if self.logarithmic:
            wide = self.high / self.low > 1000
            found = LogLocator(subs=(1,) if wide else (1, 2, 5)).tick_values(self.low, self.high)
        else:
            found = MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(self.low, self.high)
        inside = [t for t in found if self.low * (1 - 1e-9) <= t <= self.high * (1 + 1e-9)]
        return [{"at": float(self.place(t)), "label": f"{t:,.6g}"} for t in inside]


def reliability(results: Results, slot: str) -> dict[str, Any] | None:
    """Return the reliability diagram of a slot: accuracy against confidence, one point per bin of confidence.

    Whiskers are Wilson's 95% score interval of the accuracy.
    """
    table = results.calibration
    table = table[(table["method"] == METHOD) & (table["slot"] == slot) & (table["n"] > 0)]
    if table.empty:
        return None
    x, y = Axis(0, 1, 46, 326), Axis(0, 1, 290, 10)
    intervals = [
        binomtest(round(row.accuracy * row.n), int(row.n)).proportion_ci(0.95, "wilson") for row in table.itertuples()
    ]
    height = np.round(40 * table["n"].to_numpy() / table["n"].max(), 1)
    bins = [
        {
            "x": float(x.place(row.confidence)),
            "y": float(y.place(row.accuracy)),
            "low": float(y.place(intervals[i].low)),
            "high": float(y.place(intervals[i].high)),
            "left": float(x.place(row.bin_low)),
            "width": float(x.place(row.bin_high) - x.place(row.bin_low)),
            "height": float(height[i]),
            "n": int(row.n),
            "confidence": row.confidence,
            "accuracy": row.accuracy,
        }
        for i, row in enumerate(table.itertuples())
    ]
    return {
        "slot": slot,
        "unit": "programmes" if slot == "pathways" else "cells",
        "bins": bins,
        "x": x.ticks(),
        "y": y.ticks(),
        "n": int(table["n"].sum()),
        "error": results.metric(METHOD, slot, "calibration_error"),
    }


def training_curve(history: pd.DataFrame, stage: str) -> dict[str, Any] | None:
    """Return the loss curve of a stage, averaged over adjacent steps if there are many, and its validation losses.

    Parameters
    ----------
    history
        Rows of ``contracts.HISTORY``.
    stage
        The stage to draw.
    """
    steps = history[(history["stage"] == stage) & (history["loss"] > 0)].sort_values("step")
    if steps.empty:
        return None
    validated = steps[steps["validation_loss"].notna()]
    values = np.concatenate([steps["loss"], validated["validation_loss"]])
    # Steps and seconds of "finetune" continue those of "openings"; every other stage counts from zero.
    first, last = int(steps["step"].min()) if stage == "finetune" else 0, int(steps["step"].max())
    before = history.loc[history["stage"] == "openings", "seconds"].max() if first else 0
    spacing = round((last - first + 1) / len(steps))  # pre-training writes one row for several steps
    x = Axis(first, max(last, first + 1), 54, 560)
    y = Axis(*_padded_range(values), 240, 10, logarithmic=True)
    every = math.ceil(len(steps) / MOST_POINTS)
    thinned = steps.groupby(np.arange(len(steps)) // every)[["step", "loss"]].mean()
    smooth = thinned.rolling(max(len(thinned) // 25, 1), center=True, min_periods=1).median()
    return {
        "stage": stage,
        "line": _path(x, y, thinned["step"], thinned["loss"]),
        "smooth": _path(x, y, smooth["step"], smooth["loss"]),
        "validation": [
            {
                "x": float(x.place(row.step)),
                "y": float(y.place(row.validation_loss)),
                "loss": row.validation_loss,
                "epoch": int(row.epoch) + 1,
            }
            for row in validated.itertuples()
        ],
        "x": x.ticks(),
        "y": y.ticks(),
        "steps": last - first + 1,
        "first": float(steps["loss"].iloc[0]),
        "last": float(steps["loss"].iloc[-1]),
        "seconds": float(steps["seconds"].max() - before),
        "tokens": int(steps["tokens"].sum()),
        "averaged": every * spacing,
    }


def _padded_range(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of a logarithmic axis around the values, at least one order of magnitude apart."""
    low, high = values.min() / 1.2, values.max() * 1.2
    widen = max(math.sqrt(10 * low / high), 1)
    return low / widen, high * widen


def _path(x: Axis, y: Axis, steps: pd.Series, losses: pd.Series) -> str:
    return "M" + "L".join(f"{px:g} {py:g}" for px, py in zip(x.place(steps), y.place(losses), strict=True))
