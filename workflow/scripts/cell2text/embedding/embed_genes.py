"""Gene vectors of a dataset's cells, written in shards."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from cell2text.contracts import EMBEDDINGS, TOKENS
from cell2text.embedding.encoders import Encoder, load_encoder
from cell2text.embedding.fit_encoder import bytes_per_cell
from cell2text.embedding.ranked_cells import RankedCells, read_measured, read_medians
from cell2text.embedding.views import draw_view
from cell2text.progress import Progress

log = logging.getLogger("cell2text.embedding")


def embed_genes(
    encoder: str,
    tokens: str,
    genes: str,
    embeddings: str,
    shard: int,
    shards: int,
    top_k: int,
    views: int,
    seed: int,
) -> None:
    """Embed one shard of a dataset's cells: part ``shard`` of ``shards`` equal parts, in file order.

    Parameters
    ----------
    encoder
        Directory written by ``fit_encoder``.
    tokens, genes
        Files of ``contracts.TOKENS``, read in parts, and ``contracts.GENES``.
    embeddings
        Where to write ``contracts.EMBEDDINGS``.
    shard, shards
        Index of the shard, from 0, and number of shards.
    top_k
        Gene vectors to store per cell; 0 if they are computed on the fly.
    views
        How often each cell is embedded again, through random gene panels at reduced depth (see ``views.draw_view``).
    seed
        Seed of the views.
    """
    loaded, (measured,), median = load_encoder(encoder), read_measured(genes, [tokens]), read_medians(genes)
    cells = pq.read_metadata(tokens).num_rows
    first, last = (cells * edge // shards for edge in (shard, shard + 1))
    stored = (last - first) * bytes_per_cell(loaded, top_k, views)
    log.info("embedding %d of %d cells, %.1f MB on disk", last - first, cells, stored / 1e6)
    progress = Progress((last - first) * (1 + views), "cells and views")
    ids, tensors = [], {}
    parts = read_rows(tokens, measured, first, last)
    for part, found in embed_parts(loaded, parts, median, top_k, views, seed, first, progress):
        for name, values in found.items():
            # filled in place: parts and their concatenation would take twice the memory
            whole = tensors.setdefault(name, np.empty((last - first, *values.shape[1:]), values.dtype))
            whole[len(ids) : len(ids) + len(part)] = values
        ids += part.cell_ids.tolist()
    EMBEDDINGS.write(tensors, ids, embeddings)


def embed_parts(
    encoder: Encoder,
    parts: Iterable[RankedCells],
    median: np.ndarray,
    top_k: int,
    views: int,
    seed: int,
    first: int = 0,
    progress: Progress | None = None,
) -> Iterator[tuple[RankedCells, dict[str, np.ndarray]]]:
    """Yield cells and their tensors of ``contracts.EMBEDDINGS``, with views, part by part.

    Parameters
    ----------
    encoder, parts
        The encoder, and the cells.
    median
        From ``read_medians``, for the views.
    top_k, views, seed
        As for :func:`embed_genes`.
    first
        Number of the first cell, which seeds the views.
    progress
        Advanced by the number of embedded cells and views.
    """
    for part in parts:
        found = encoder.embed(part, top_k, progress)
        drawn = [draw_view(part, median, [seed, view, first]) for view in range(views)]
        seen = [encoder.embed(view, top_k, progress) for view in drawn]
        if seen:
            found |= {f"view_{name}": np.stack([view[name] for view in seen], axis=1) for name in found}
        yield part, found
        first += len(part)


def read_rows(tokens: str | Path, measured: np.ndarray, first: int, last: int) -> Iterator[RankedCells]:
    """Yield cells ``first`` to ``last`` of a file of ranked genes in parts; one empty part if there are none."""
    start = 0
    for table in TOKENS.read_arrow_parts(tokens):
        rows = slice(max(first - start, 0), max(last - start, 0))
        start += len(table)
        part = table.slice(rows.start, max(rows.stop - rows.start, 0))
        if len(part) or start == len(table):
            yield RankedCells.of(part, measured)
    if not start:  # a dataset without cells in the corpus
        yield RankedCells.of(TOKENS.read_arrow(tokens), measured)
