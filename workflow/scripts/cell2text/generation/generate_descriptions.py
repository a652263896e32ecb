"""The cells of one split and shard, described by the fine-tuned model."""

import logging

import pandas as pd

from cell2text.contracts import TERMS
from cell2text.embedding.vectors import Embeddings
from cell2text.files import write_jsonl
from cell2text.generation.describe import cells_in, describe_cells
from cell2text.grammar import Terms
from cell2text.model.bundle import load
from cell2text.settings import GenerateSettings

log = logging.getLogger("cell2text.generation")


def generate_descriptions(
    model: str,
    language_model: str,
    corpus: str,
    terms: str,
    embeddings: Embeddings,
    generations: str,
    split: str,
    settings: GenerateSettings,
) -> None:
    """Describe the cells of a split in the given shards of embeddings.

    Parameters
    ----------
    model, language_model
        Directories of the fine-tuned and the original model.
    corpus, terms
        Files of ``contracts.CELLS`` and ``contracts.TERMS``.
    embeddings
        Embeddings of the cells.
    generations
        Output file, JSONL with one object per cell and the fields of ``contracts.PREDICTIONS``.
    split
        Name of the split.
    settings
        The config's ``generate`` section.
    """
    loaded = load(model, language_model).ready_to_write()
    cells = cells_in(embeddings.files, corpus, split)
    vectors = embeddings.vectors(cells["cell_id"].to_list(), loaded.projector.reads)
    described = describe_cells(loaded, vectors, Terms(TERMS.read(terms)), settings)
    rows = [{"cell_id": cell, "split": split, **row} for cell, row in zip(cells["cell_id"], described, strict=True)]
    counts = pd.Series([row["status"] for row in rows]).value_counts().sort_index().to_dict()
    log.info("%d cells of %s: %s", len(rows), split, counts)
    write_jsonl(rows, generations)
