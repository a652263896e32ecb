"""Map of the test cells: the layout, and the data shown for each cell."""

import colorsys

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from cell2text.report.results import Results

MOST_CELLS = 20_000
MOST_COMPONENTS = 30
FEW_CELLS = 10
GRID = 4095  # coordinates are integers, 0 to GRID along the longer side
# Distinct on white and on black; further classes get hues by the golden angle.
COLOURS = (
    "#3f78c1", "#e08a2e", "#3fa06a", "#c9504b", "#8e6bbf", "#2ba3ad",
    "#d472a8", "#a58a2c", "#8a5f45", "#6674d9", "#7fa83a", "#b0579a",
)  # fmt: skip


def sample_cells(cells: int, seed: int, most: int = MOST_CELLS) -> np.ndarray:
    """Return the sorted row numbers of the cells to show: all cells, or a random sample of ``most``."""
    if cells <= most:
        return np.arange(cells)
    return np.sort(np.random.default_rng(seed).choice(cells, size=most, replace=False))


def lay_out(pooled: np.ndarray, seed: int) -> np.ndarray:
    """Return two-dimensional coordinates of each cell, by t-SNE on the first principal components.

    With fewer than ``FEW_CELLS`` cells, the first two dimensions of the embedding are used instead.

    Parameters
    ----------
    pooled
        Pooled embeddings, float (cells, dimensions).
    seed
        Seed of the layout.

    Returns
    -------
    numpy.ndarray
        Integers from 0, int64 (cells, 2); the longer side has length ``GRID``.

    Notes
    -----
    t-SNE runs in one thread. With several, the order of floating-point sums, and so the map, differs between runs.
    """
    cells, dimensions = pooled.shape
    if cells < FEW_CELLS:
        places = pooled[:, :2].astype(np.float64)
    else:
        with threadpool_limits(1):
            components = min(MOST_COMPONENTS, dimensions, cells)
            reduced = PCA(components, svd_solver="full").fit_transform(pooled.astype(np.float64))
            neighbours = min(30, (cells - 1) / 3)
            places = TSNE(perplexity=neighbours, init="pca", random_state=seed).fit_transform(reduced)
    return on_grid(places)


def on_grid(places: np.ndarray) -> np.ndarray:
    """Return coordinates as integers from 0, int64 (cells, 2); the longer side has length ``GRID``."""
    places = places - places.min(axis=0)
    return np.rint(places / (places.max() or 1) * GRID).astype(np.int64)


def map_data(results: Results, seed: int) -> dict:
    """Return the data that the page's script draws.

    ``classes`` lists the cell types, the most frequent first. ``truth`` and ``predicted`` are indices into it, -1 for
    none. ``text`` is an index into ``texts``, where each distinct text is stored once.
    """
    rows = sample_cells(len(results.cells), seed)
    cells = results.cells.iloc[rows]
    places = lay_out(results.pooled[rows], seed)
    frequency = cells["true_cell_type_id"].value_counts().sort_index()
    ids = list(frequency.sort_values(ascending=False, kind="stable").index)
    ids += sorted(set(cells["cell_type_id"].dropna()) - set(ids))
    number = {term: i for i, term in enumerate(ids)}
    text_numbers, texts = pd.factorize(cells["text"])
    confidence = pd.to_numeric(cells["cell_type_confidence"]).astype(float)
    return {
        "width": int(places[:, 0].max()) or 1,
        "height": int(places[:, 1].max()) or 1,
        "x": places[:, 0].tolist(),
        "y": places[:, 1].tolist(),
        "cell": cells["cell_id"].tolist(),
        "donor": cells["donor"].fillna("").tolist(),
        "truth": [number.get(term, -1) for term in cells["true_cell_type_id"]],
        "predicted": [number.get(term, -1) for term in cells["cell_type_id"]],
        "confidence": [None if np.isnan(value) else round(value, 4) for value in confidence],
        "text": text_numbers.tolist(),
        "texts": list(texts),
        "classes": [
            {"id": term, "name": results.name("cell_type", term), "colour": colour}
            for term, colour in zip(ids, colours(len(ids)), strict=True)
        ],
    }


def colours(classes: int) -> list[str]:
    """Return a colour for each class, as ``#rrggbb``."""
    further = range(classes - len(COLOURS))
    return [
        *COLOURS[:classes],
        *(_hex(colorsys.hls_to_rgb(i * 0.381966 % 1, (0.42, 0.55, 0.66)[i % 3], 0.5)) for i in further),
    ]


def _hex(rgb: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)
