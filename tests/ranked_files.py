"""Ranked genes, their table and a corpus, from matrices of expression; NaN marks genes that are not measured."""

import numpy as np
import pandas as pd

from cell2text.contracts import CELLS, GENES, TOKENS
from cell2text.embedding.axes import Axes
from cell2text.embedding.encoders.coexpression import Coexpression
from cell2text.embedding.encoders.gene_text import GeneText
from cell2text.embedding.ranked_cells import RankedCells, RankedSplit, read_measured


def rank(expression, dataset="a", start=0, n_counts=1000.0):
    """Return rows of ``contracts.TOKENS``: the genes above 0 of each cell, highest first."""
    expression = np.nan_to_num(np.asarray(expression, dtype=np.float32))
    tokens = [np.argsort(-row, kind="stable")[: np.count_nonzero(row)].astype(np.int32) for row in expression]
    return pd.DataFrame(
        {
            "cell_id": [f"{dataset}|{start + i}" for i in range(len(expression))],
            "tokens": tokens,
            "expression": [row[order] for row, order in zip(expression, tokens, strict=True)],
            "n_counts": n_counts,
        }
    )


def ranked_cells(lists, expression, genes, n_counts=None, panels=None, panel=None):
    """Return cells with the given tokens and expression; by default, all genes are measured."""
    cells = len(lists)
    return RankedCells(
        np.array([f"c{i}" for i in range(cells)], dtype=object),
        np.concatenate([np.empty(0), *lists]).astype(np.int32),
        np.concatenate([np.empty(0), *expression]).astype(np.float32),
        np.concatenate([[0], np.cumsum([len(tokens) for tokens in lists])]).astype(np.int64),
        np.full(cells, 1000.0) if n_counts is None else np.asarray(n_counts, dtype=float),
        np.ones((1, genes), dtype=bool) if panels is None else np.asarray(panels),
        np.zeros(cells, dtype=np.int64) if panel is None else np.asarray(panel),
    )


def random_encoder(genes, dimensions, seed=0):
    """Return a coexpression encoder with random axes."""
    random = np.random.default_rng(seed)
    vectors, _ = np.linalg.qr(random.normal(size=(genes, dimensions)))
    axes = vectors, random.random(genes), np.full(genes, 1 / genes), np.full(dimensions, 9), np.full(genes, 0.5)
    return Coexpression(Axes(*(part.astype(np.float32) for part in axes)), np.ones(dimensions, dtype=np.float32))


def random_gene_text(genes, dimensions, seed=0):
    """Return an encoder of texts with random vectors."""
    random = np.random.default_rng(seed)
    parts = random.random((genes, dimensions)), *random.random((2, genes)), *random.random((2, dimensions))
    return GeneText(*(part.astype(np.float32) for part in parts))


def write_genes(path, measured, median=1.0):
    """Write the table of genes of datasets, given as name -> which genes they measure."""
    genes = len(next(iter(measured.values())))
    table = pd.DataFrame({"token": range(genes), "gene_id": [f"G{i:05d}" for i in range(genes)]})
    table = table.assign(symbol=table["gene_id"], median=median)
    table["datasets"] = [[name for name, own in measured.items() if own[gene]] for gene in range(genes)]
    GENES.write(table, path)
    return path


def write_corpus(path, ids, splits="train", types=None):
    table = pd.DataFrame({"cell_id": ids, "split": splits})
    table["cell_type_id"] = types
    CELLS.write(table.reindex(columns=list(CELLS.columns)).astype(object), path)
    return path


def write_studies(directory, studies, splits="train", types=None, ends=(), n_counts=1000.0):
    """Write studies, name -> expression, in parts that end at ``ends``; return their training and validation splits."""
    directory.mkdir(parents=True, exist_ok=True)
    files, measured = [], {}
    for name, values in studies.items():
        expression = np.asarray(values, dtype=np.float32)
        edges = [0, *ends, len(expression)]
        parts = (
            rank(expression[first:last], name, first, n_counts)
            for first, last in zip(edges[:-1], edges[1:], strict=True)
        )
        files.append(directory / f"{name}.parquet")
        TOKENS.write_parts(parts, files[-1])
        measured[name] = ~np.isnan(expression).all(axis=0)
    genes = write_genes(directory / "genes.parquet", measured)
    ids = [f"{name}|{i}" for name, values in studies.items() for i in range(len(values))]
    corpus = write_corpus(directory / "corpus.parquet", ids, splits, types)
    return [RankedSplit(files, corpus, split, read_measured(genes, files)) for split in ("train", "validation")]
