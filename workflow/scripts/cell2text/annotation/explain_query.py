"""Evidence for the cell types of clusters and, on request, of single cells: the genes that argue for and against."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch

from cell2text.annotation.evidence import attribute, explain_cells
from cell2text.annotation.order import natural
from cell2text.annotation.pack_model import read_facts
from cell2text.contracts import CLUSTERS, EVIDENCE, GENES, TERMS
from cell2text.embedding.embed_genes import read_rows
from cell2text.embedding.encoders import load_encoder
from cell2text.embedding.ranked_cells import RankedCells, read_measured
from cell2text.errors import InputError
from cell2text.files import read_jsonl
from cell2text.model.alignment import LabelTargets, order_slots
from cell2text.model.bundle import load_projector
from cell2text.spreadsheet import write_tsv

log = logging.getLogger("cell2text.annotation")

GENES_LISTED = 10  # for a cell type, and against it
# cells drawn at random from each cluster: at most, at least, and so many that they sum to about this number
MOST_CELLS, FEWEST_CELLS, ALL_CELLS = 100, 10, 3000


def explain_query(
    model: str,
    language_model: str,
    tokens: str,
    genes: str,
    descriptions: Sequence[str],
    clusters: str,
    table: str,
    cells: str,
    each_cell: bool,
    seed: int,
) -> None:
    """Write which genes argue for and against the most frequent guess of each cluster.

    The weights of a cluster are the means over up to 100 of its cells, fewer if there are many clusters, so they tell
    what its cells have in common. Without evidence, because the pooled vectors of the encoder cannot be traced back to
    genes, the tables are empty.

    Parameters
    ----------
    model, language_model
        Folders of the packed and of the original language model.
    tokens, genes
        Files written by ``rank_query``.
    descriptions, clusters
        Files written by ``describe_query`` and ``cluster_query``.
    table
        TSV to write, one row per cluster and gene: ``share`` is the gene's part of all weights on its side.
    cells
        Where to write the genes of each cell (``contracts.EVIDENCE``); without rows unless ``each_cell``.
    each_cell
        Whether to explain the guess of each cell, at about a hundred cells per second.
    seed
        Seed of the draw of cells.
    """
    about, folder = read_facts(model), Path(model)
    labels, terms = order_slots(about["labels"]), TERMS.read(folder / "terms.parquet")
    loaded = load_projector(model, language_model, torch.device("cpu"))
    given = loaded, LabelTargets.of_model(labels, terms, loaded), load_encoder(folder / "encoder")
    top_k = about["settings"]["top_k"]
    found = pd.DataFrame([(row["cell_id"], row["cell_type_id"]) for path in descriptions for row in read_jsonl(path)])
    guess = found.set_index(0)[1] if len(found) else pd.Series(dtype=object)
    of_cells = CLUSTERS.read(clusters).assign(guess=lambda rows: rows["cell_id"].map(guess))
    named = of_cells.groupby("cluster", sort=False)["guess"].agg(lambda ids: ids.mode().iloc[0])
    drawn = of_cells.sample(frac=1, random_state=seed).groupby("cluster").head(cells_per_cluster(len(named)))
    cluster_of = drawn.set_index("cell_id")["cluster"]
    symbols = _symbols(genes)
    ids = pd.Index(labels["cell_type"])
    targets = cluster_of.map(named)
    targets = targets[targets.isin(ids)]  # the model has no reason for a type that was added to it
    sums, rows = [], []
    try:
        for part in _read(tokens, genes):
            some = part.take(np.flatnonzero(np.isin(part.cell_ids, targets.index)))
            weights = attribute(*given, some, ids.get_indexer(targets.loc[some.cell_ids]), top_k)
            cluster = np.repeat(cluster_of.loc[some.cell_ids].to_numpy(), some.lengths)
            rows_of_part = pd.DataFrame({"cluster": cluster, "gene": symbols[some.tokens], "weight": weights})
            sums.append(rows_of_part.groupby(["cluster", "gene"])["weight"].sum())
            if each_cell:
                part = part.take(np.flatnonzero(guess.loc[part.cell_ids].isin(ids)))
                rows += _explain_each(given, part, ids.get_indexer(guess.loc[part.cell_ids]), top_k, symbols)
    except InputError as error:
        log.warning("no evidence: %s", error)
        sums = rows = []
    write_tsv(_list_genes(sums, named, terms), table, float_format="%.4f")
    EVIDENCE.write(pd.DataFrame(rows, columns=list(EVIDENCE.columns)), cells)


def cells_per_cluster(clusters: int) -> int:
    """Return how many cells of each cluster are explained at most."""
    return max(FEWEST_CELLS, min(MOST_CELLS, ALL_CELLS // max(clusters, 1)))


def _read(tokens: str, genes: str) -> Iterator[RankedCells]:
    (measured,) = read_measured(genes, [tokens])
    return read_rows(tokens, measured, 0, pq.read_metadata(tokens).num_rows)


def _symbols(genes: str) -> np.ndarray:
    """Return the symbol of each token, or its id; measured names come first."""
    table = GENES.read(genes)
    table = table.iloc[np.argsort(-table["datasets"].map(len).to_numpy(), kind="stable")].drop_duplicates("token")
    names = np.full(table["token"].max() + 1, "", dtype=object)
    names[table["token"]] = table["symbol"].where(table["symbol"] != "", table["gene_id"])
    return names


def _explain_each(
    given: tuple, cells: RankedCells, named: np.ndarray, top_k: int, symbols: np.ndarray
) -> list[tuple[str, list[str], list[str]]]:
    """Return id, genes for and genes against the guess of each cell."""
    found = explain_cells(*given, cells, named, GENES_LISTED, top_k)
    return [
        (cell, symbols[one.for_genes].tolist(), symbols[one.against_genes].tolist())
        for cell, one in zip(cells.cell_ids, found, strict=True)
    ]


def _list_genes(sums: Sequence[pd.Series], named: pd.Series, terms: pd.DataFrame) -> pd.DataFrame:
    """Return the weightiest genes of each cluster on each side, with their share of all weights on that side.

    Parameters
    ----------
    sums
        Weight of each gene in each cluster, summed over some of the cells.
    named, terms
        Cell type of each cluster, and the names of the types.
    """
    columns = ["cluster", "cell_type", "side", "rank", "gene", "share"]
    if not sums:
        return pd.DataFrame(columns=columns)
    weights = pd.concat(sums).groupby(["cluster", "gene"]).sum()
    parts = []
    for side, values in (("for", weights[weights > 0]), ("against", -weights[weights < 0])):
        share = values / values.groupby("cluster").transform("sum")
        most = share.sort_values(ascending=False, kind="stable").groupby("cluster").head(GENES_LISTED)
        part = most.rename("share").reset_index().assign(side=side)
        parts.append(part.assign(rank=part.groupby("cluster").cumcount() + 1))
    table = pd.concat(parts)
    names = terms[terms["slot"] == "cell_type"].set_index("id")["name"]
    table["cell_type"] = table["cluster"].map(named).map(names)
    order = pd.Categorical(table["cluster"], sorted(named.index, key=natural)).codes
    return table.iloc[np.lexsort((table["rank"], table["side"] == "against", order))][columns]
