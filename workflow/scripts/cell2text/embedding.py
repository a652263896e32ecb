"""Encoders fitted on the training cells, and their vectors written shard by shard."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from cell2text.contracts import EMBEDDINGS, TOKENS
from cell2text.encoders import encoder_class, load_encoder
from cell2text.progress import Progress
from cell2text.rank_lists import RankedCells, RankedSplit

log = logging.getLogger("cell2text.embedding")


def fit_encoder(corpus: str, genes: str, tokens: list[str], directory: str, settings: dict, seed: int) -> None:
    """Fit the encoder that the config names on the training cells and save it.

    Parameters
    ----------
    corpus, genes, tokens
        Files of ``contracts.CELLS``, ``contracts.GENES`` and ``contracts.TOKENS``.
    directory
        Where the encoder goes. What a killed run goes on from lies beside it, in ``{directory}.checkpoints``.
    settings
        The config's ``encoder`` section; for a fetched encoder with its ``directory``.
    seed
        Of anything random in the fit.
    """
    vocabulary = int(pd.read_csv(genes, sep="\t", usecols=["token"])["token"].max()) + 1
    train, validation = (RankedSplit(tokens, corpus, split, vocabulary) for split in ("train", "validation"))
    kind = encoder_class(settings["kind"])
    encoder = kind.fit(train, validation, settings, seed, Path(f"{directory}.checkpoints"))
    Path(directory).mkdir(parents=True, exist_ok=True)
    encoder.save(Path(directory))
    cells = sum(pq.read_metadata(path).num_rows for path in tokens)
    stored = cells * bytes_a_cell(encoder.dimensions, settings["top_k"] if settings["cache"] else 0)
    log.info("%s encoder of %d dimensions", settings["kind"], encoder.dimensions)
    log.info("the vectors of %d cells will take %.3g GB on disk", cells, stored / 1e9)


def bytes_a_cell(dimensions: int, top_k: int) -> int:
    """Return what the vectors of a cell take on disk: fp16 for its genes, float32 for itself."""
    return (2 * top_k + 4) * dimensions


def embed_shard(encoder: str, tokens: str, embeddings: str, shard: int, shards: int, top_k: int) -> None:
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
    stored = (last - first) * bytes_a_cell(loaded.dimensions, top_k)
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
