"""The product of annotation: the user's object with columns added, a table of cells, and one text per cell."""

import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse

from cell2text.annotation.pack_model import REFINEMENT, read_facts
from cell2text.annotation.predictions import read_predictions
from cell2text.cells.formats import BUNDLED, find_kind
from cell2text.cells.studies import open_study
from cell2text.confidence.refinement import Refinement
from cell2text.contracts import CLUSTERS, EVIDENCE, TERM_SLOTS, TERMS
from cell2text.files import read_json, whole_file, write_jsonl
from cell2text.provenance import versions
from cell2text.spreadsheet import read_tsv, write_tsv

log = logging.getLogger("cell2text.annotation")

PREFIX = "cell2text_"
NOT_DETERMINED = "not determined"


def annotate_query(
    source: str,
    descriptions: Sequence[str],
    tokens: str,
    qc: str,
    fit: str,
    clusters: str,
    cluster_table: str,
    evidence: str,
    model: str,
    annotated: str,
    table: str,
    texts: str,
    graph: bool = False,
) -> None:
    """Write the user's object with the columns of :func:`annotation_columns`, the same as a table, and the texts.

    Parameters
    ----------
    source
        The user's file, which is only read.
    descriptions
        JSONL files of ``contracts.PREDICTIONS``.
    tokens, qc, fit
        Files written by ``rank_query`` and ``flag_query``.
    clusters, cluster_table
        Files written by ``cluster_query``.
    evidence
        File written by ``explain_query``, with the genes of each cell if they were asked for.
    model
        Folder of a packed model.
    annotated, table, texts
        The h5ad, the gzipped TSV and the JSONL file to write. Each has one row per cell of the source, in its order.
    graph
        Whether cell types were refined among similar cells.
    """
    cells = read_predictions(descriptions, tokens, qc, TERMS.read(Path(model) / "terms.parquet"))
    columns = annotation_columns(cells, clusters, evidence)
    names = add_columns(source, columns, facts_of(model, fit, cluster_table, source, graph), annotated)
    listed = pd.concat([pd.Series(names, name="cell"), columns], axis=1)
    write_tsv(listed, table, compression={"method": "gzip", "mtime": 0})
    rows = cells.drop(columns=["split"]).assign(cell=np.asarray(names))
    write_jsonl(({"cell": row.pop("cell")} | row for row in rows.to_dict("records")), texts)
    log.info("%d cells: %d with a reported cell type", len(cells), cells["cell_type_reported_id"].notna().sum())


def facts_of(model: str, fit: str, cluster_table: str, source: str, graph: bool = False) -> dict[str, Any]:
    """Return what ``uns["cell2text"]`` holds: model, source, how well they fit, a text per cluster, and versions.

    If cell types were refined among similar cells, it also holds how, and what that did to cells with known labels.
    """
    seal = read_facts(model)["seal"]
    table = read_tsv(cluster_table)
    texts = {name: table[name].to_numpy(dtype=object) for name in ("cluster", "text")}
    facts = {"model": seal, "source": Path(source).name, "fit": read_json(fit), "clusters": texts}
    if graph:
        refinement = Refinement.load(Path(model) / REFINEMENT)
        facts["graph"] = {name: getattr(refinement, name) for name in ("neighbours", "weight", "cells")}
        if refinement.accuracy:
            facts["graph"]["accuracy"] = dict(zip(("before", "after", "shuffled"), refinement.accuracy, strict=True))
    return facts | {"versions": versions("cell2text", "anndata")}


def annotation_columns(cells: pd.DataFrame, clusters: str, evidence: str) -> pd.DataFrame:
    """Return the columns that are added to the user's ``obs``, all with the prefix ``cell2text_``.

    Parameters
    ----------
    cells
        From ``read_predictions``.
    clusters, evidence
        Files of ``contracts.CLUSTERS`` and ``contracts.EVIDENCE``.

    Returns
    -------
    DataFrame
        For each slot the reported term (``cell_type``, ``_id``, ``_confidence``; "not determined" where none is
        probable enough) and the most specific guess (``_guess``, ``_guess_id``, ``_guess_confidence``), then
        ``programmes``, ``novelty``, ``novel``, ``flag`` (QC's reason, or empty), ``cluster``, ``description`` and, if
        cells were explained, ``evidence_for`` and ``evidence_against``.
    """
    columns: dict[str, Any] = {}
    for slot in TERM_SLOTS:
        columns[slot] = _text(cells[f"{slot}_reported_name"], NOT_DETERMINED)
        columns[f"{slot}_id"] = _text(cells[f"{slot}_reported_id"])
        columns[f"{slot}_confidence"] = cells[f"{slot}_reported_confidence"].astype(np.float32)
        columns[f"{slot}_guess"] = _text(cells[f"{slot}_name"])
        columns[f"{slot}_guess_id"] = _text(cells[f"{slot}_id"])
        columns[f"{slot}_guess_confidence"] = cells[f"{slot}_confidence"].astype(np.float32)
    columns["programmes"] = pd.Categorical(cells["programmes"].map("; ".join))
    columns["novelty"] = cells["novelty"].astype(np.float32)
    columns["novel"] = cells["novel"].eq(True).to_numpy(dtype=bool)
    columns["flag"] = _text(cells["flag"])
    columns["cluster"] = pd.Categorical(CLUSTERS.read(clusters)["cluster"])
    columns["description"] = _text(cells["text"])
    explained = EVIDENCE.read(evidence).set_index("cell_id").reindex(cells["cell_id"])
    if explained["for_genes"].notna().any():
        for side in ("for", "against"):
            genes = [
                ", ".join(one) if isinstance(one, Sequence | np.ndarray) else "" for one in explained[f"{side}_genes"]
            ]
            columns[f"evidence_{side}"] = np.array(genes, dtype=object)
    return pd.DataFrame(columns).add_prefix(PREFIX)


def _text(column: pd.Series, missing: str = "") -> pd.Categorical:
    """Return a column as a categorical: few texts are shared by many cells."""
    return pd.Categorical(column.astype(object).where(column.notna(), missing).astype(str))


def add_columns(source: str, columns: pd.DataFrame, facts: Mapping[str, Any], path: str) -> pd.Index:
    """Write a copy of the user's object with columns added to ``obs`` and facts to ``uns``; return the cells' names.

    An h5ad file is copied byte for byte and the columns are written into the copy, so everything else in it stays as
    it is. Other formats are read and written as h5ad. Columns of an earlier annotation are replaced.
    """
    with whole_file(path) as unfinished:
        if source != BUNDLED and find_kind(Path(source)) == "hdf5" and _is_current(source):
            shutil.copyfile(source, unfinished)
            names = _add_in_place(unfinished, columns, facts)
        else:
            cells = read_any(source)
            names = cells.obs_names
            cells.obs = replace(cells.obs, columns.set_axis(names))
            cells.uns[PREFIX.rstrip("_")] = dict(facts)
            cells.write_h5ad(unfinished)
    return names


def _is_current(source: str) -> bool:
    """Return whether an HDF5 file is an AnnData whose tables are groups, as since anndata 0.7."""
    with h5py.File(source, "r") as file:
        return "obs" in file and isinstance(file["obs"], h5py.Group) and "encoding-type" in file["obs"].attrs


def _add_in_place(path: Path, columns: pd.DataFrame, facts: Mapping[str, Any]) -> pd.Index:
    with h5py.File(path, "r+") as file:
        obs = file["obs"]
        order = [name for name in obs.attrs["column-order"] if not name.startswith(PREFIX)]
        earlier = [name for name in obs if name.startswith(PREFIX)]
        if earlier:
            log.info("%d columns of an earlier annotation are replaced", len(earlier))
        for name in earlier:
            del obs[name]
        for name, values in columns.items():
            ad.io.write_elem(obs, name, values.to_numpy() if values.dtype != "category" else values.array)
        obs.attrs["column-order"] = np.array([*order, *columns], dtype=h5py.string_dtype())
        key = PREFIX.rstrip("_")
        if "uns" in file and key in file["uns"]:
            del file["uns"][key]
        if "uns" not in file:
            ad.io.write_elem(file, "uns", {})
        ad.io.write_elem(file["uns"], key, dict(facts))
        return read_names(obs)


def read_names(obs: h5py.Group) -> pd.Index:
    """Return the names of the cells in ``obs`` of an open file, which may be stored as bytes."""
    names = ad.io.read_elem(obs[obs.attrs["_index"]])
    return pd.Index([name.decode() if isinstance(name, bytes) else str(name) for name in names])


def replace(obs: pd.DataFrame, columns: pd.DataFrame) -> pd.DataFrame:
    """Return a table with columns added, instead of those of an earlier annotation."""
    earlier = [name for name in obs if str(name).startswith(PREFIX)]
    if earlier:
        log.info("%d columns of an earlier annotation are replaced", len(earlier))
    return pd.concat([obs.drop(columns=earlier), columns], axis=1)


def read_any(source: str) -> ad.AnnData:
    """Return a study in any supported format but h5ad as an object in memory."""
    if source == BUNDLED:
        return sc.datasets.pbmc68k_reduced()
    path, kind = Path(source), find_kind(Path(source))
    if kind == "zarr":
        return ad.read_zarr(path)
    if kind == "hdf5":
        with h5py.File(path, "r") as file:
            if "obs" in file:
                return ad.read_h5ad(path)
    with open_study(source) as study, tempfile.TemporaryDirectory() as scratch:
        matrix, genes = study.matrices["X"]
        counts = sparse.vstack(list(matrix.blocks(Path(scratch, "entries"))), format="csr")
        return ad.AnnData(
            counts, study.obs.rename_axis(None), genes.set_axis(genes.index.astype(str)).rename_axis(None)
        )
