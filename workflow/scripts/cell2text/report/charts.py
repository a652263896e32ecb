"""The geometry of the page's own charts; the template draws them in the page's colours."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, MaxNLocator

from cell2text.report.results import METHOD, Results

MOST_POINTS = 600
Z = 1.96  # of a 95% interval


@dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Parameters
    ----------
    low, high
        Ends of the axis in the data's unit.
    start, end
        The same on the drawing.
    logarithmic
        Whether equal ratios are equally long.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, values: np.ndarray | float) -> np.ndarray:
        """Return where values lie on the drawing."""
        low, high, values = (np.log(v) if self.logarithmic else v for v in (self.low, self.high, values))
        return np.round(self.start + (values - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, most: int = 6) -> list[dict[str, Any]]:
        """Return place and label of each tick."""
        if self.logarithmic:
            wide = self.high / self.low > 1000
            found = LogLocator(subs=(1,) if wide else (1, 2, 5)).tick_values(self.low, self.high)
        else:
            found = MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(self.low, self.high)
        inside = [t for t in found if self.low * (1 - 1e-9) <= t <= self.high * (1 + 1e-9)]
        return [{"at": float(self.place(t)), "label": f"{t:,.6g}"} for t in inside]


def reliability(results: Results, slot: str) -> dict[str, Any] | None:
    """Return the reliability diagram of a slot: accuracy against confidence, a point a bin of cells.

    Whiskers are Wilson's 95% interval of a share (Wilson, JASA 1927).
    """
    table = results.calibration
    table = table[(table["method"] == METHOD) & (table["slot"] == slot) & (table["n"] > 0)]
    if table.empty:
        return None
    x, y = Axis(0, 1, 46, 326), Axis(0, 1, 290, 10)
    low, high = wilson_interval(table["accuracy"].to_numpy(), table["n"].to_numpy())
    height = np.round(40 * table["n"].to_numpy() / table["n"].max(), 1)
    bins = [
        {
            "x": float(x.place(row.confidence)),
            "y": float(y.place(row.accuracy)),
            "low": float(y.place(low[i])),
            "high": float(y.place(high[i])),
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
        "bins": bins,
        "x": x.ticks(),
        "y": y.ticks(),
        "cells": int(table["n"].sum()),
        "error": results.metric(METHOD, slot, "calibration_error"),
    }


def wilson_interval(share: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95% interval of shares of n trials, by Wilson's score."""
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * np.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def training_curve(history: pd.DataFrame, stage: str) -> dict[str, Any] | None:
    """Return the losses of a stage: every step (means of neighbours where there are many), and validation."""
    steps = history[(history["stage"] == stage) & (history["loss"] > 0)].sort_values("step")
    if steps.empty:
        return None
    validated = steps[steps["validation_loss"].notna()]
    values = np.concatenate([steps["loss"], validated["validation_loss"]])
    first, last = int(steps["step"].min()), int(steps["step"].max())
    # seconds and steps of fine-tuning go on from the openings to the whole texts
    before = history.loc[history["stage"] == "openings", "seconds"].max() if first else 0
    x = Axis(first, max(last, first + 1), 54, 560)
    y = Axis(*_room_around(values), 240, 10, logarithmic=True)
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
        "averaged": every,
    }


def _room_around(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of a logarithmic axis, one order of magnitude at least."""
    low, high = values.min() / 1.2, values.max() * 1.2
    widen = max(math.sqrt(10 * low / high), 1)
    return low / widen, high * widen


def _path(x: Axis, y: Axis, steps: pd.Series, losses: pd.Series) -> str:
    return "M" + "L".join(f"{px:g} {py:g}" for px, py in zip(x.place(steps), y.place(losses), strict=True))
