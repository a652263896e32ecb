"""Gene vectors of the cells of a dataset, written shard by shard."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from cell2text.contracts import EMBEDDINGS, TOKENS
from cell2text.embedding.encoders import load_encoder
from cell2text.embedding.fit_encoder import bytes_per_cell
from cell2text.embedding.ranked_cells import RankedCells
from cell2text.progress import Progress

log = logging.getLogger("cell2text.embedding")


def embed_genes(encoder: str, tokens: str, embeddings: str, shard: int, shards: int, top_k: int) -> None:
    """Embed one shard of a dataset's cells: the ``shard``-th of ``shards`` runs of cells, in file order.

    Parameters
    ----------
    encoder
        Directory that ``fit_encoder`` wrote.
    tokens
        File of ``contracts.TOKENS``; a part of it is held at a time.
    embeddings
        Where to write ``contracts.EMBEDDINGS``.
    shard, shards
        Which run of cells, from 0, of how many.
    top_k
        Gene vectors to keep of a cell; none where they are made on the fly.
    """
    loaded = load_encoder(encoder)
    cells = pq.read_metadata(tokens).num_rows
    first, last = (cells * edge // shards for edge in (shard, shard + 1))
    stored = (last - first) * bytes_per_cell(loaded.dimensions, top_k)
    log.info("%d of %d cells, %.1f MB on disk", last - first, cells, stored / 1e6)
    progress = Progress(last - first, "cells")
    ids, parts = [], []
    for part in read_rows(tokens, first, last):
        ids += part.cell_ids.tolist()
        parts.append(loaded.embed(part, top_k, progress))
    EMBEDDINGS.write(
        {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}, ids, embeddings
    )


def read_rows(tokens: str | Path, first: int, last: int) -> Iterator[RankedCells]:
    """Yield a run of the cells of a file of ranked genes, a part at a time; an empty part where there is none."""
    start = 0
    for table in TOKENS.read_arrow_parts(tokens):
        rows = slice(max(first - start, 0), max(last - start, 0))
        start += len(table)
        part = table.slice(rows.start, max(rows.stop - rows.start, 0))
        if len(part) or start == len(table):
            yield RankedCells.of(part)
