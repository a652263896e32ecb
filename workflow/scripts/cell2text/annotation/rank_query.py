"""Ranked genes of a file to annotate, in the genes that the model knows, and how well the file fits the model."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cell2text.annotation.pack_model import read_model
from cell2text.cells.h5ad import all_cells, read_blocks, read_genes
from cell2text.contracts import GENES, UNSEEN
from cell2text.embedding.measure_genes import write_genes
from cell2text.embedding.rank_genes import rank_genes
from cell2text.errors import InputError
from cell2text.files import read_json, write_json

log = logging.getLogger("cell2text.annotation")

LEAST_SHARE = 0.1  # of the counts in genes of the model: with less, descriptions mean nothing
USUAL_SHARE = 0.5  # of the counts: with less, a warning
FEW_COUNTS = 0.5  # of the shallow end of the training cells: with fewer counts, a warning


def rank_query(counts: str, model: str, source: str, genes: str, tokens: str, fit: str, threads: int = 1) -> None:
    """Rank the genes of all cells of a file, among those of the model.

    Parameters
    ----------
    counts
        File written by ``fetch_query``.
    model
        Folder of a packed model.
    source
        The user's file, for messages.
    genes
        Where to write the genes of the model under the file's names (``contracts.GENES``).
    tokens
        Where to write the ranked genes (``contracts.TOKENS``); its stem is the dataset.
    fit
        Where to write how well the file fits the model, as JSON.
    threads
        Number of threads.

    Raises
    ------
    InputError
        If the model is damaged, or less than 10% of the counts are in its genes.
    """
    about = read_model(model)
    matched = match_genes(read_known_genes(model), read_genes(counts), Path(tokens).stem)
    found = _measure_fit(counts, matched, about)
    if not read_json(Path(model) / "confidence.json").get("new_studies"):
        found["warnings"].append(
            "the model was trained on fewer than three studies, so its confidences are probably too high here"
        )
    if found["counts_in_model"] < LEAST_SHARE:
        raise InputError(
            f"{source}: var",
            f"only {found['counts_in_model']:.1%} of the counts are in genes of the model",
            "Check species and gene names, or use a model trained on these genes",
        )
    for warning in found["warnings"]:
        log.warning("%s: %s", source, warning)
    write_genes(matched, genes)
    rank_genes(None, counts, genes, tokens, threads)
    write_json(found, fit)


def read_known_genes(model: str | Path) -> pd.DataFrame:
    """Return the genes of a packed model: those of its training cells, and others that its encoder can read."""
    folder = Path(model)
    others = [path for path in [folder / "encoder" / UNSEEN] if path.exists()]
    return pd.concat([GENES.read(path) for path in [folder / "genes.parquet", *others]], ignore_index=True)


def match_genes(known: pd.DataFrame, measured: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """Return the genes of the model with the names of a file, and whether the file measures them.

    A gene of the file is matched by its id, or else by its symbol if only one gene of the model has it.

    Parameters
    ----------
    known
        The genes of the model, rows of ``contracts.GENES``.
    measured
        The genes of the file: ``symbol``, indexed by gene id.
    dataset
        Name of the dataset.

    Returns
    -------
    DataFrame
        Rows of ``contracts.GENES``: matched genes under the file's ids, and the other tokens of the model under its
        own, which no dataset measures.
    """
    by_id = known.drop_duplicates("gene_id").set_index("gene_id")["token"]
    # a symbol of several ids of the same token is clear, one of two tokens is not
    symbols = known.loc[known["symbol"] != "", ["symbol", "token"]].drop_duplicates()
    by_symbol = symbols.drop_duplicates("symbol", keep=False).set_index("symbol")["token"]
    names = measured.index.to_series()
    token = names.map(by_id).fillna(measured["symbol"].map(by_symbol)).fillna(names.map(by_symbol))
    token = token.dropna().astype(np.int32)
    first = known.drop_duplicates("token").set_index("token")
    matched = pd.DataFrame({"token": token.to_numpy(), "gene_id": token.index.to_numpy(dtype=object)})
    matched["symbol"] = measured["symbol"].loc[token.index].to_numpy()
    matched["datasets"] = [[dataset]] * len(matched)
    absent = first[~first.index.isin(matched["token"])].reset_index()
    absent["datasets"] = [[] for _ in range(len(absent))]
    genes = pd.concat([matched, absent[["token", "gene_id", "symbol", "datasets"]]], ignore_index=True)
    genes["median"] = genes["token"].map(first["median"])
    return genes.sort_values(["token", "gene_id"])[list(GENES.columns)]


def _measure_fit(counts: str, genes: pd.DataFrame, about: dict[str, Any]) -> dict[str, Any]:
    """Return shares of genes and counts that file and model have in common, the depth, and warnings."""
    measured = genes[genes["datasets"].map(len) > 0]
    names = read_genes(counts).index
    known = names.isin(measured["gene_id"])
    totals, inside = [np.zeros(0)], [np.zeros(0)]
    for _, block in read_blocks(counts, all_cells(counts)):
        totals.append(np.asarray(block.sum(axis=1, dtype=float)).ravel())
        inside.append(np.asarray(block @ known.astype(float)).ravel())
    total, within = np.concatenate(totals), np.concatenate(inside)
    shallow, typical, _ = about["training_counts"]
    found = {
        "cells": len(total),
        "cells_without_genes": int((within == 0).sum()),
        "genes": len(names),
        "genes_in_model": int(known.sum()),
        "model_genes": int(genes["token"].nunique()),
        "model_genes_measured": int(measured["token"].nunique()),
        "counts_in_model": float(within.sum() / max(total.sum(), 1)),
        "median_counts": float(np.median(total)) if len(total) else 0.0,
        "training_median_counts": typical,
    }
    warnings = []
    if found["counts_in_model"] < USUAL_SHARE:
        warnings.append(f"only {found['counts_in_model']:.0%} of the counts are in genes of the model")
    if found["median_counts"] < FEW_COUNTS * shallow:
        warnings.append(f"half of the cells have fewer than {found['median_counts']:.0f} counts; 95% of the training "
                        f"cells have more than {shallow:.0f}")  # fmt: skip
    return found | {"warnings": warnings}
