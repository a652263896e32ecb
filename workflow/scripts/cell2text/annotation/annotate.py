"""Cells described in one call or one command, by the same steps as the rules of the workflow.

This module alone joins the two halves of the package: it needs both the single-cell and the language packages.
"""

import argparse
import logging
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import anndata as ad

from cell2text.annotation.annotate_query import annotate_query, annotation_columns, facts_of, replace
from cell2text.annotation.cluster_query import cluster_query
from cell2text.annotation.describe_query import describe_query
from cell2text.annotation.embed_query import embed_query
from cell2text.annotation.explain_query import explain_query
from cell2text.annotation.fetch_examples import fetch_examples
from cell2text.annotation.fetch_model import fetch_model
from cell2text.annotation.fetch_query import fetch_query
from cell2text.annotation.find_queries import check_refinement, name_examples, name_query, split_searched
from cell2text.annotation.language_models import locate_language_model
from cell2text.annotation.pack_model import read_model
from cell2text.annotation.predictions import read_predictions
from cell2text.annotation.rank_query import rank_query
from cell2text.annotation.refine_query import refine_query
from cell2text.annotation.render_query import render_query
from cell2text.annotation.score_query import score_query
from cell2text.cells.counts import TOTALS
from cell2text.cells.filter_cells import flag_cells
from cell2text.cells.studies import SPECIES
from cell2text.contracts import TERMS
from cell2text.errors import InputError
from cell2text.files import whole_file
from cell2text.models.fetch_language_model import fetch_language_model
from cell2text.models.fetch_resource import ORTHOLOGUES, ORTHOLOGUES_KEY, fetch_resource, locate_resource
from cell2text.retrieval.search_cells import search_cells
from cell2text.settings import QcSettings

log = logging.getLogger("cell2text.annotation")

OUTPUTS = ("annotate.html", "clusters.tsv", "evidence.tsv", "annotated.h5ad", "cells.tsv.gz", "descriptions.jsonl")
SEARCH = "search/results.tsv"  # only if something is searched for
SEED = 42  # the default of the workflow


def annotate(
    adata: ad.AnnData,
    model: str | Path,
    models: str | Path | None = None,
    gene_table: str | Path | None = None,
    clusters: str | None = None,
    own_labels: str | None = None,
    evidence: bool = False,
    species: str | None = None,
    examples: str | Path | None = None,
    graph: bool = False,
) -> ad.AnnData:
    """Describe the cells of an object in memory.

    Parameters
    ----------
    adata
        Cells with raw counts in ``X``, ``raw.X`` or ``layers["counts"]``, and Ensembl ids or symbols of human genes. No
        labels are needed. Columns that begin with ``cell2text_`` are added to its ``obs``, and facts to its ``uns``;
        those of an earlier annotation are replaced. Nothing else changes.
    model
        The folder ``model`` of a finished run, or ``hf://organisation/name@revision``.
    models
        Folder of fetched models; by default ``resources/models`` if it exists, else a folder in the user's cache.
    gene_table
        Ensembl ids and symbols, see ``genes.table`` in the config; None to match genes by the names they have.
    clusters
        Column of ``obs`` with the clusters to describe; None to find clusters.
    own_labels
        Column of ``obs`` with labels to compare the clusters with; None if there are none.
    evidence
        Whether to list the genes that argue for and against the cell type of each cell, not only of each cluster.
    species
        ``"human"`` or ``"mouse"``, whose genes are mapped to human orthologues; None to take it from
        ``organism_ontology_term_id`` in ``obs`` or ``uns``, or else for human.
    examples
        A file with a few labelled cells of each cell type to add to the model, see docs/few_labels.md; None to add
        none.
    graph
        Whether to refine cell types among similar cells, see docs/neighbours.md. The model must have been trained for
        it.

    Returns
    -------
    AnnData
        ``adata`` itself.

    Raises
    ------
    InputError
        If the model is damaged, its language model cannot be found, or counts or genes are invalid.

    Examples
    --------
    >>> from cell2text import annotate
    >>> annotate(adata, model="results/pbmc68k/model").obs["cell2text_cell_type"]  # doctest: +SKIP
    """
    with tempfile.TemporaryDirectory(prefix="cell2text-") as folder:
        query = Path(folder, "query.h5ad")
        wanted = ("donor_id", "organism_ontology_term_id", *TOTALS, clusters, own_labels)
        columns = adata.obs[[name for name in adata.obs if name in wanted]]
        facts = {name: adata.uns[name] for name in wanted if name in adata.uns}
        slim = ad.AnnData(adata.X, columns, adata.var, facts, layers=dict(adata.layers))
        if adata.raw is not None:
            slim.raw = ad.AnnData(adata.raw.X, columns, adata.raw.var)
        slim.write_h5ad(query)
        del slim
        given = (clusters, own_labels, evidence, species, examples, graph)
        steps = _run_steps(str(query), "query", Path(folder, "steps"), model, models, gene_table, *given)
        cells = read_predictions([steps["descriptions"]], steps["tokens"], steps["qc"], TERMS.read(steps["terms"]))
        facts = facts_of(steps["model"], steps["fit"], steps["cluster_table"], "an object in memory", graph)
        added = annotation_columns(cells, steps["clusters"], steps["evidence"])
    adata.obs = replace(adata.obs, added.set_axis(adata.obs_names))
    adata.uns["cell2text"] = facts
    return adata


def annotate_file(
    source: str | Path,
    model: str | Path,
    out: str | Path,
    models: str | Path | None = None,
    gene_table: str | Path | None = None,
    clusters: str | None = None,
    own_labels: str | None = None,
    evidence: bool = False,
    species: str | None = None,
    examples: str | Path | None = None,
    graph: bool = False,
    overwrite: bool = False,
    search: str | None = None,
) -> None:
    """Describe the cells of a file and write ``OUTPUTS`` to a folder.

    Parameters
    ----------
    source
        An h5ad file, an AnnData Zarr folder, a 10x HDF5 file or a 10x folder. It is only read.
    model, models, gene_table, clusters, own_labels, evidence, species, examples, graph
        See :func:`annotate`.
    out
        Folder to write.
    overwrite
        Whether to replace earlier outputs in it.
    search
        What to search for, several separated by semicolons: the cells in this order are written to ``SEARCH``.

    Raises
    ------
    InputError
        If there are outputs already, or something is wrong with source or model.
    """
    out = Path(out)
    present = [name for name in (*OUTPUTS, SEARCH) if (out / name).exists()]
    if present and not overwrite:
        raise InputError(out / present[0], "exists already", "Choose another folder, or add --overwrite")
    with tempfile.TemporaryDirectory(prefix="cell2text-") as folder:
        folder_of_models = Path(models) if models else _models_folder()
        searched = [] if search is None else split_searched(search, fetch_model(str(model), folder_of_models))
        given = (model, models, gene_table, clusters, own_labels, evidence, species, examples, graph)
        steps = _run_steps(str(source), name_query(str(source)), Path(folder), *given)
        for name, table in zip(OUTPUTS[1:3], ("cluster_table", "evidence_table"), strict=True):
            with whole_file(out / name) as unfinished:
                shutil.copyfile(steps[table], unfinished)
        inputs = [steps[name] for name in ("tokens", "qc", "fit", "clusters", "cluster_table", "evidence", "model")]
        written = [str(out / name) for name in OUTPUTS[3:]]
        annotate_query(str(source), [steps["descriptions"]], *inputs, *written, graph)
        inputs = [steps[name] for name in ("qc", "fit", "cluster_table", "evidence_table")]
        page = str(out / OUTPUTS[0])
        if searched:
            cells = [[steps["embeddings"]], written[1], str(out / SEARCH)]
            search_cells(searched, steps["model"], steps["language_model"], *cells)
        render_query(str(source), written[0], *inputs, [steps["embeddings"]], steps["model"], page, SEED)


def _run_steps(
    source: str,
    name: str,
    folder: Path,
    model: str | Path,
    models: str | Path | None,
    gene_table: str | Path | None,
    clusters: str | None,
    own_labels: str | None,
    evidence: bool,
    species: str | None,
    examples: str | Path | None,
    graph: bool,
) -> dict[str, str]:
    """Run the steps from counts to descriptions and return the paths of their files."""
    models = Path(models) if models else _models_folder()
    packed = str(fetch_model(str(model), models))
    about = read_model(packed)
    if graph:
        check_refinement(packed)
    found = locate_language_model(about, models)
    language_model = models / found["name"]
    if not (language_model / "source.json").exists():
        log.info("fetching %s", found["source"])
        fetch_language_model(found["source"], language_model)
    names = ("counts.h5ad", "qc.parquet", "genes.parquet", f"{name}.parquet", "fit.json")
    names += ("embeddings.safetensors", "scores.safetensors", "descriptions.jsonl", "clusters.parquet", "clusters.tsv")
    names += ("evidence.tsv", "evidence.parquet")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / one) for one in names]
    counts, qc, genes, tokens, fit, embeddings, scores, descriptions, of_cells, cluster_table, *explained = paths
    constants = {"species": species} if species else {}
    added = _embed_examples(str(examples), folder, packed, models, gene_table, constants) if examples else ()
    row = {"dataset": name, "source": source} | constants
    fetch_query(row, counts, gene_table, 0.5, clusters, own_labels, partial(_fetch_orthologues, models))
    rank_query(counts, packed, source, genes, tokens, fit, threads=os.cpu_count() or 1)
    flag_cells(counts, qc, QcSettings(**about["settings"]["qc"]), SEED)
    embed_query(packed, tokens, genes, embeddings)
    score_query(packed, str(language_model), embeddings, scores)
    refined = str(folder / "refined.safetensors") if graph else None
    if refined:
        refine_query(packed, [scores], [embeddings], [refined])
    describe_query(packed, scores, embeddings, descriptions, *added, refined=refined)
    cluster_query(counts, [descriptions], tokens, qc, [embeddings], packed, of_cells, cluster_table, SEED)
    explain_query(
        packed, str(language_model), tokens, genes, [descriptions], of_cells, *explained, each_cell=evidence, seed=SEED
    )
    found = {"descriptions": descriptions, "tokens": tokens, "qc": qc, "fit": fit, "model": packed}
    return found | {
        "clusters": of_cells,
        "cluster_table": cluster_table,
        "evidence_table": explained[0],
        "evidence": explained[1],
        "embeddings": embeddings,
        "language_model": str(language_model),
        "terms": str(Path(packed) / "terms.parquet"),
    }


def _embed_examples(
    source: str, folder: Path, model: str, models: Path, gene_table: str | Path | None, constants: dict[str, str]
) -> tuple[str, list[str]]:
    """Return the files of the labelled cells and of their embeddings."""
    name = name_examples(source)
    names = ("counts.h5ad", "genes.parquet", f"{name}.parquet", "fit.json", "embeddings.safetensors", "types.parquet")
    (folder / "examples").mkdir()
    counts, genes, tokens, fit, embeddings, examples = (str(folder / "examples" / one) for one in names)
    row = {"dataset": name, "source": source} | constants
    fetch_examples(row, counts, examples, gene_table, 0.5, partial(_fetch_orthologues, models))
    rank_query(counts, model, source, genes, tokens, fit, threads=os.cpu_count() or 1)
    embed_query(model, tokens, genes, embeddings)
    return examples, [embeddings]


def _fetch_orthologues(models: Path) -> str:
    """Return the path of the table of orthologues, which is fetched unless it is there."""
    path = locate_resource(ORTHOLOGUES, str(models), ORTHOLOGUES_KEY)
    if not Path(path).exists():
        fetch_resource(ORTHOLOGUES, path, ORTHOLOGUES_KEY)
    return path


def _models_folder() -> Path:
    """Return the folder of fetched models: that of the project one is in, or one in the user's cache."""
    here = Path("resources/models")
    if here.is_dir():
        return here
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cell2text/models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main(arguments: list[str] | None = None) -> int:
    """Run the command ``cell2text``."""
    parser = argparse.ArgumentParser(prog="cell2text", description="Describe single cells in words.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser(
        "annotate", help="describe the cells of a file", description="Describe the cells of a file."
    )
    one.add_argument("source", help="h5ad file, AnnData Zarr folder, 10x HDF5 file or 10x folder")
    one.add_argument("--model", required=True, help="folder `model` of a run, or hf://organisation/name@revision")
    one.add_argument("--out", required=True, help="folder to write")
    one.add_argument("--models", help="folder of fetched models")
    one.add_argument("--gene-table", help="Ensembl ids and symbols, to match genes by either")
    one.add_argument("--clusters", help="column of obs with the clusters to describe; without it, clusters are found")
    one.add_argument("--own-labels", help="column of obs with labels to compare the clusters with")
    one.add_argument("--examples", help="file with a few labelled cells of each cell type to add to the model")
    one.add_argument("--graph", action="store_true", help="refine cell types among similar cells of the file")
    one.add_argument("--evidence", action="store_true", help="list the genes behind the cell type of each cell")
    one.add_argument("--species", choices=SPECIES.values(), help="species of the cells, if the file does not name it")
    one.add_argument(
        "--search", help="rank the cells by how well they fit these words; several queries between semicolons"
    )
    one.add_argument("--overwrite", action="store_true", help="replace earlier outputs")
    given = vars(parser.parse_args(arguments))
    given.pop("command")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    try:
        annotate_file(**given)
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
