"""Encoders fitted on the training cells, and their vectors written shard by shard."""

import logging
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from cell2text.embedding.encoders import encoder_class
from cell2text.embedding.ranked_cells import RankedSplit

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
    stored = cells * bytes_per_cell(encoder.dimensions, settings["top_k"] if settings["cache"] else 0)
    log.info("%s encoder of %d dimensions", settings["kind"], encoder.dimensions)
    log.info("the vectors of %d cells will take %.3g GB on disk", cells, stored / 1e9)


def bytes_per_cell(dimensions: int, top_k: int) -> int:
    """Return what the vectors of a cell take on disk: fp16 for its genes, float32 for itself."""
    return (2 * top_k + 4) * dimensions
