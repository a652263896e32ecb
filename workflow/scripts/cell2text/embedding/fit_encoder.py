"""Fitting of the encoder on the training cells."""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from cell2text.contracts import GENES
from cell2text.corpus.gene_sets import find_members, read_gene_sets
from cell2text.embedding.encoders import Encoder, encoder_class
from cell2text.embedding.ranked_cells import RankedSplit, read_measured
from cell2text.files import read_json, whole_folder
from cell2text.settings import EncoderSettings

log = logging.getLogger("cell2text.embedding")


@dataclass(frozen=True)
class EncoderInputs:
    """What an encoder is fitted on.

    Parameters
    ----------
    corpus, genes, tokens
        Files of ``contracts.CELLS``, ``contracts.GENES`` and ``contracts.TOKENS``.
    settings
        The config's ``encoder`` section.
    seed
        Seed of the fit.
    fetched
        Directory of the fetched encoder if it is a pretrained checkpoint, or file of ``contracts.GENE_TEXTS``.
    pathways, gene_sets
        The gene programmes that descriptions name, and a GMT file that has their genes; None for no programmes.
    """

    corpus: str
    genes: str
    tokens: Sequence[str]
    settings: EncoderSettings
    seed: int
    fetched: str | None = None
    pathways: str | None = None
    gene_sets: str | None = None


def fit_encoder(inputs: EncoderInputs, directory: str) -> None:
    """Fit the configured encoder on the training cells and save it.

    Parameters
    ----------
    inputs
        What it is fitted on.
    directory
        Where to save the encoder, atomically. A killed run resumes from checkpoints in ``{directory}.checkpoints``.
    """
    checkpoints, settings = Path(f"{directory}.checkpoints"), inputs.settings
    encoder = fit_on_cells(inputs, checkpoints)
    with whole_folder(directory, "encoder.json") as folder:
        encoder.save(folder)
    shutil.rmtree(checkpoints, ignore_errors=True)
    cells = sum(pq.read_metadata(path).num_rows for path in inputs.tokens)
    stored = cells * bytes_per_cell(encoder, settings.top_k if settings.cache else 0, settings.views)
    log.info("%s encoder with %d dimensions", settings.kind, encoder.dimensions)
    log.info("the vectors of %d cells will take %.3g GB on disk", cells, stored / 1e9)


def fit_on_cells(inputs: EncoderInputs, checkpoints: Path) -> Encoder:
    """Return the encoder of these inputs; ``checkpoints`` is a folder for what a killed run resumes from."""
    measured = read_measured(inputs.genes, inputs.tokens)
    splits = [RankedSplit(inputs.tokens, inputs.corpus, split, measured) for split in ("train", "validation")]
    programmes = None
    if inputs.pathways:
        sets = read_gene_sets(inputs.gene_sets)
        named = [sets[one["id"]] for one in read_json(inputs.pathways)]
        programmes = find_members(named, GENES.read(inputs.genes, ["symbol"])["symbol"]).toarray() > 0
    kind, fetched = encoder_class(inputs.settings.kind), inputs.fetched and Path(inputs.fetched)
    return kind.fit(*splits, inputs.settings, inputs.seed, checkpoints, fetched, programmes)


def bytes_per_cell(encoder: Encoder, top_k: int, views: int) -> int:
    """Return the bytes per cell on disk: float16 gene vectors and a float32 pooled vector, also of each view."""
    return (1 + views) * (2 * top_k * encoder.dimensions + 4 * encoder.pooled_dimensions)
