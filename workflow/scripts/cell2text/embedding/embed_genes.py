"""Gene vectors of a dataset's cells, written in shards."""

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
    """Embed one shard of a dataset's cells: part ``shard`` of ``shards`` equal parts, in file order.

    Parameters
    ----------
    encoder
        Directory written by ``fit_encoder``.
    tokens
        File of ``contracts.TOKENS``, read in parts.
    embeddings
        Where to write ``contracts.EMBEDDINGS``.
    shard, shards
        Index of the shard, from 0, and number of shards.
    top_k
        Gene vectors to store per cell; 0 if they are computed on the fly.
    """
    loaded = load_encoder(encoder)
    cells = pq.read_metadata(tokens).num_rows
    first, last = (cells * edge // shards for edge in (shard, shard + 1))
    stored = (last - first) * bytes_per_cell(loaded.dimensions, top_k)
    log.info("embedding %d of %d cells, %.1f MB on disk", last - first, cells, stored / 1e6)
    progress = Progress(last - first, "cells")
    ids, tensors = [], {}
    for part in read_rows(tokens, first, last):
        rows = slice(len(ids), len(ids) + len(part))
        for name, values in loaded.embed(part, top_k, progress).items():
            # filled in place: parts and their concatenation would take twice the memory
            whole = tensors.setdefault(name, np.empty((last - first, *values.shape[1:]), values.dtype))
            whole[rows] = values
        ids += part.cell_ids.tolist()
    EMBEDDINGS.write(tensors, ids, embeddings)


def read_rows(tokens: str | Path, first: int, last: int) -> Iterator[RankedCells]:
    """Yield cells ``first`` to ``last`` of a file of ranked genes in parts; one empty part if there are none."""
    start = 0
    for table in TOKENS.read_arrow_parts(tokens):
        rows = slice(max(first - start, 0), max(last - start, 0))
        start += len(table)
        part = table.slice(rows.start, max(rows.stop - rows.start, 0))
        if len(part) or start == len(table):
            yield RankedCells.of(part)
    if not start:  # a dataset without cells in the corpus
        yield RankedCells.of(TOKENS.read_arrow(tokens))
