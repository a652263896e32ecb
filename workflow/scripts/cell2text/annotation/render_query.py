"""The page of an annotated file: map, clusters, confidence and search, in one HTML file that opens offline."""

import base64
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from sklearn.neighbors import NearestNeighbors

from cell2text.annotation.annotate_query import NOT_DETERMINED, PREFIX, read_names
from cell2text.confidence.decisions import Confidence
from cell2text.contracts import EMBEDDINGS, QC
from cell2text.files import read_json
from cell2text.report.cell_map import COLOURS, lay_out, on_grid, sample_cells
from cell2text.report.charts import Axis
from cell2text.report.page import write_page
from cell2text.spreadsheet import read_tsv

log = logging.getLogger("cell2text.annotation")

MOST_CELLS = 50_000  # in map and search
MOST_LAID_OUT = 5_000  # by t-SNE, which takes a minute; the others are placed among them
NEIGHBOURS = 5
RAMP = ("#3f78c1", "#2ba3ad", "#a58a2c", "#e08a2e", "#c9504b")  # from near to far
LEVELS = (0.5, 0.7, 0.9, 0.95)
PREFERRED = ("X_umap", "X_tsne")
FLOAT_COLUMNS = ("cell_type_confidence", "cell_type_guess_confidence", "novelty")
TEXT_COLUMNS = (
    "cell_type",
    "cell_type_guess",
    "tissue",
    "tissue_guess",
    "programmes",
    "flag",
    "cluster",
    "description",
)


def render_query(
    source: str,
    annotated: str,
    qc: str,
    fit: str,
    cluster_table: str,
    evidence_table: str,
    embeddings: Sequence[str],
    model: str,
    page: str,
    seed: int,
) -> None:
    """Write the page of an annotated file.

    Parameters
    ----------
    source
        The user's file, for its name.
    annotated
        Its copy written by ``annotate_query``, for the cells and the user's own map.
    qc, fit, cluster_table, evidence_table, embeddings
        Files written by ``flag_query``, ``rank_query``, ``cluster_query``, ``explain_query`` and ``embed_query``.
    model
        Folder of a packed model.
    page
        The HTML file to write.
    seed
        Seed of the map, if the file has none, and of the choice of cells if there are more than ``MOST_CELLS``.
    """
    cells, own, places = read_annotated(annotated)
    rows = sample_cells(len(cells), seed, MOST_CELLS)
    if own:
        places = on_grid(places[rows].astype(np.float64))
    else:
        shown = QC.read(qc, ["cell_id"])["cell_id"].iloc[rows]
        places = lay_out_sample(EMBEDDINGS.read_cells(embeddings, shown, ["pooled"])["pooled"], seed)
    table = read_tsv(cluster_table)
    evidence = read_evidence(evidence_table)
    columns = colour_columns(cells, rows)
    number = {name: i for i, name in enumerate(columns["cluster"]["names"])}
    markers = dict(zip(table["cluster"], table["markers"], strict=True))
    folder = Path(model)
    confidence = Confidence.load(folder / "confidence.json")
    threshold = confidence.of_new_study.thresholds.get("cell_type")  # none without cell types
    judged = cells["novelty"].notna()
    variables = {
        "file": Path(source).name,
        "model": name_model(folder),
        "about": read_json(folder / "cell2text.json"),
        "fit": read_json(fit),
        "cells": len(cells),
        "shown": len(rows),
        "seed": seed,
        "own": own,
        "reported": (cells["cell_type"] != NOT_DETERMINED).mean(),
        "novel": cells["novel"][judged].mean(),
        "judged": int(judged.sum()),
        "flagged": (cells["flag"] != "").mean(),
        "reasons": count_reasons(cells),
        "chart": confidence_chart(cells),
        "graph": read_graph(annotated),
        "requested": threshold and threshold.confidence,
        "for_new_studies": confidence.new_studies is not None,
        "held_out": threshold.studies if threshold and threshold.guaranteed else None,
        "clusters": [
            row | {"number": number.get(row["cluster"], -1), "evidence": evidence.get(row["cluster"])}
            for row in table.to_dict("records")
        ],
        "modes": {name: column["title"] for name, column in columns.items() if column["title"]},
        "data": {
            "cells": list(cells.index[rows]),
            "total": len(cells),
            "width": int(places[:, 0].max()) or 1,
            "height": int(places[:, 1].max()) or 1,
            "x": pack(places[:, 0]),
            "y": pack(places[:, 1]),
            "columns": columns,
            "confidence": pack_percent(cells["cell_type_confidence"].iloc[rows]),
            "guess_confidence": pack_percent(cells["cell_type_guess_confidence"].iloc[rows]),
            "markers": [markers.get(name, "").split(", ") for name in columns["cluster"]["names"]],
            **pack_texts(cells["description"].iloc[rows]),
        },
    }
    write_page(page, "annotation.html.j2", ["page.css", "annotation.css"], ["map.js", "annotation.js"], variables)


def read_evidence(path: str) -> dict[str, dict[str, str]]:
    """Return for each cluster the cell type that its evidence is about, and its genes on both sides."""
    table = read_tsv(path)
    return {
        cluster: {"cell_type": rows["cell_type"].iloc[0]}
        | {side: ", ".join(rows.loc[rows["side"] == side, "gene"]) for side in ("for", "against")}
        for cluster, rows in table.groupby("cluster")
    }


def read_annotated(path: str) -> tuple[pd.DataFrame, str | None, np.ndarray | None]:
    """Return the columns of annotation, and name and coordinates of the user's own map, if there is one.

    Columns have no prefix, text is categorical, and the index holds the cells' names.
    """
    with h5py.File(path, "r") as file:
        obs = file["obs"]
        names = read_names(obs)
        wanted = (*TEXT_COLUMNS, *FLOAT_COLUMNS, "novel")
        cells = pd.DataFrame({name: ad.io.read_elem(obs[PREFIX + name]) for name in wanted}, index=names)
        own, places = find_map(file.get("obsm", {}))
    cells = cells.astype(dict.fromkeys(TEXT_COLUMNS, "category"))
    # reasons name the values of each cell, which are too many to count
    cells["flag"] = cells["flag"].map(lambda reason: re.sub(r" \([^()]*\)$", "", reason)).astype("category")
    return cells, own, places


def read_graph(path: str) -> dict[str, Any] | None:
    """Return how cell types were refined among similar cells, see ``facts_of``; None if they were not."""
    with h5py.File(path, "r") as file:
        facts = f"uns/{PREFIX.rstrip('_')}/graph"
        return ad.io.read_elem(file[facts]) if facts in file else None


def find_map(obsm: Any) -> tuple[str | None, np.ndarray | None]:
    """Return the best embedding for a map: UMAP, t-SNE, another with two dimensions, or the first two of a PCA.

    Tables, sparse matrices, and embeddings that lack a cell are no maps.
    """
    plain = {name: value for name, value in obsm.items() if isinstance(value, h5py.Dataset) and value.ndim == 2}
    flat = [name for name, value in plain.items() if value.shape[1] == 2]
    for name in dict.fromkeys([*(name for name in PREFERRED if name in plain), *flat, "X_pca"]):
        if name in plain and plain[name].shape[1] >= 2 and plain[name].dtype.kind in "fiu":
            places = plain[name][:, :2]
            if np.isfinite(places).all():
                return name, places
    return None, None


def lay_out_sample(pooled: np.ndarray, seed: int) -> np.ndarray:
    """Return coordinates as ``lay_out`` does; beyond ``MOST_LAID_OUT``, a cell is placed amid its neighbours."""
    some = sample_cells(len(pooled), seed, MOST_LAID_OUT)
    log.info("laying out the map of %d cells", len(some))
    places = lay_out(pooled[some], seed)
    if len(some) == len(pooled):
        return places
    near = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(pooled[some]).kneighbors(pooled, return_distance=False)
    found = np.median(places[near], axis=1)  # the mean would lie between groups
    # cells with the same neighbours would hide each other
    spread = np.median(np.abs(places[near] - found[:, None]), axis=1)
    found += spread * np.random.default_rng(seed).normal(size=found.shape)
    found[some] = places
    return on_grid(found)


def colour_columns(cells: pd.DataFrame, rows: np.ndarray) -> dict[str, dict[str, Any]]:
    """Return the columns by which the page colours and searches cells, see :func:`encode`."""
    guesses = cells["cell_type_guess"]
    programmes = cells["programmes"]
    reported, guessed = cells["cell_type_confidence"], cells["cell_type_guess_confidence"]
    return {
        "cell_type": encode("Reported cell type", cells["cell_type"], rows, NOT_DETERMINED),
        "guess": encode("Guess of the cell type", guesses, rows, "", "no description"),
        "cluster": encode("Cluster", cells["cluster"], rows),
        "confidence": encode("Confidence of the reported type", levels(reported), rows, "", NOT_DETERMINED, RAMP[::-1]),
        "sureness": encode("Confidence of the guess", levels(guessed), rows, "", "no description", RAMP[::-1]),
        "novelty": encode("Novelty", novelty_bins(cells), rows, "", "not judged", RAMP),
        "flag": encode("Flag of QC", cells["flag"], rows, "", "not flagged"),
        "programme": encode("Top programme", programmes.str.split("; ").str[0], rows, "", "none"),
        "tissue": encode("Reported tissue", cells["tissue"], rows, NOT_DETERMINED),
        "tissue_guess": encode("Guess of the tissue", cells["tissue_guess"], rows, "", "none"),
        "programmes": encode("", programmes, rows, "", "none"),  # only for the search
    }


def encode(
    title: str,
    values: pd.Series,
    rows: np.ndarray,
    missing: str = "",
    none: str | None = None,
    ramp: Sequence[str] = (),
) -> dict[str, Any]:
    """Return a column as numbers of names, with the number of all cells of each name.

    Parameters
    ----------
    title
        Title in the choice of colours; empty if it is not there.
    values
        Text of all cells; categories in their order if there is a ramp.
    rows
        Numbers of the cells that are shown.
    missing
        The text that stands for no value; its number is that after the last name.
    none
        Name of no value in the legend; by default ``missing``.
    ramp
        Colours of the categories; without it, names are sorted by frequency, and the first ones get colours.
    """
    sizes = values.astype("category").value_counts(sort=False)
    sizes.index = sizes.index.astype(object)
    empty = int(sizes.get(missing, 0))
    sizes = sizes[sizes.index != missing]
    if not ramp:
        sizes = sizes[sizes > 0].sort_values(ascending=False, kind="stable")
        shown = values.iloc[rows].unique()
        sizes = sizes[sizes.index.isin(shown) | (np.arange(len(sizes)) < len(COLOURS))]
    codes = sizes.index.get_indexer(values.iloc[rows])
    return {
        "title": title,
        "names": list(sizes.index),
        "sizes": sizes.iloc[: len(COLOURS)].tolist(),
        "colours": list(ramp or COLOURS),
        "none": none or missing,
        "empty": empty,
        "codes": pack(np.where(codes < 0, len(sizes), codes)),
    }


def levels(confidence: pd.Series) -> pd.Series:
    """Return the level of each confidence in words, categorical; empty where there is none."""
    bounds = [f"{100 * level:g}%" for level in LEVELS]
    between = [f"{low[:-1]}–{high}" for low, high in zip(bounds, [*bounds[1:], "100%"], strict=True)]
    return _bins(confidence, LEVELS, [f"below {bounds[0]}", *between])


def novelty_bins(cells: pd.DataFrame) -> pd.Series:
    """Return the quarter of each cell by its novelty, and which cells are novel, categorical."""
    usual = cells["novelty"].where(~cells["novel"])
    edges = usual.quantile([0.25, 0.5, 0.75]).fillna(0).tolist()
    low, middle, high = (f"{edge:.2f}" for edge in edges)
    names = [f"below {low}", f"{low} to {middle}", f"{middle} to {high}", f"from {high}"]
    names = [
        f"{name} ({quarter} quarter)"
        for name, quarter in zip(names, ("nearest", "2nd", "3rd", "farthest"), strict=True)
    ]
    binned = _bins(usual, edges, names).cat.add_categories("novel")
    return binned.mask(cells["novel"] & cells["novelty"].notna(), "novel")


def _bins(values: pd.Series, edges: Sequence[float], names: Sequence[str]) -> pd.Series:
    codes = np.searchsorted(edges, values.to_numpy(np.float64), side="right")
    found = pd.Categorical.from_codes(np.where(values.isna(), len(names), codes), [*names, ""])
    return pd.Series(found, index=values.index)


def pack(numbers: np.ndarray) -> str:
    """Return numbers from 0 to 65,535 as base64 of two bytes each, the lower one first."""
    return base64.b64encode(np.asarray(numbers).astype("<u2").tobytes()).decode()


def pack_percent(confidence: pd.Series) -> str:
    """Return confidences as whole percentages, 101 for none; only a certain one is 100%."""
    percent = np.rint(100 * confidence.to_numpy(np.float64))
    percent = np.where((percent == 100) & (confidence < 0.9995), 99, percent)
    return pack(np.where(np.isnan(percent), 101, percent))


def pack_texts(texts: pd.Series) -> dict[str, Any]:
    """Return each distinct text once, as numbers of its sentences, because texts share most of them."""
    codes, distinct = pd.factorize(texts.astype(str))
    split = [re.split(r"(?<=\.) ", text) for text in distinct]
    numbers, sentences = pd.factorize(np.array([one for text in split for one in text], dtype=object))
    ends = np.cumsum([len(text) for text in split])[:-1]
    return {
        "text": pack(codes),
        "texts": [part.tolist() for part in np.split(numbers, ends)],
        "sentences": list(sentences),
    }


def count_reasons(cells: pd.DataFrame) -> list[dict[str, Any]]:
    """Return how many cells are novel, and how many QC flags for which reason."""
    judged = cells["novelty"].notna()
    counts = {"novel: far from the training cells": int((cells["novel"] & judged).sum())}
    counts |= {"novelty not judged": int((~judged).sum())} if not judged.all() else {}
    flags = cells["flag"].value_counts()
    counts |= {f"flagged: {reason}": int(count) for reason, count in flags.items() if reason and count}
    return [{"reason": reason, "cells": count} for reason, count in counts.items()]


def confidence_chart(cells: pd.DataFrame) -> dict[str, Any]:
    """Return the chart of how many cells reach which confidence, and the same at a few levels as a table."""
    x, y, grid = Axis(0, 1, 46, 326), Axis(0, 1, 210, 10), np.linspace(0, 1, 101)
    kinds = {"reported": "cell_type_confidence", "guess": "cell_type_guess_confidence"}
    values = {
        kind: cells[name].to_numpy(np.float64) + 1e-6 for kind, name in kinds.items()
    }  # float32: 0.7 is 0.69999999
    shares = {kind: [(value >= level).mean() for level in grid] for kind, value in values.items()}
    return {
        "lines": {
            kind: "M" + "L".join(f"{a:g} {b:g}" for a, b in zip(x.place(grid), y.place(np.array(share)), strict=True))
            for kind, share in shares.items()
        },
        "x": x.ticks(),
        "y": y.ticks(),
        "levels": [
            {"level": level} | {kind: int((value >= level).sum()) for kind, value in values.items()} for level in LEVELS
        ],
    }


def name_model(model: Path) -> str:
    """Return the title of the model card, or the name of the folder."""
    heading = re.search(r"^# +(.+)", (model / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    return heading[1].strip() if heading else model.resolve().name
