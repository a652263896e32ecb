"""Negative control: the fine-tuned model reads the embedding of another cell."""

import numpy as np
import pandas as pd

from cell2text.contracts import PREDICTIONS, TERMS
from cell2text.embedding.vectors import Embeddings
from cell2text.generation.describe import cells_in, describe_cells
from cell2text.grammar import Terms
from cell2text.model.bundle import load
from cell2text.settings import GenerateSettings


def predict_shuffled(
    model: str,
    language_model: str,
    corpus: str,
    terms: str,
    embeddings: Embeddings,
    predictions: str,
    splits: list[str],
    settings: GenerateSettings,
    seed: int,
) -> None:
    """Describe each cell from the embedding of another cell of its split, chosen at random.

    A cell alone in its split gets the embedding of a training cell.

    A model that uses its input drops to chance level; a model that ignores its input scores as before. The
    parameters are those of :func:`generate_descriptions`, except ``predictions``: the file of
    ``contracts.PREDICTIONS`` to write.
    """
    loaded, known = load(model, language_model).ready_to_write(), Terms(TERMS.read(terms))
    tables = []
    for split in splits:
        cells = cells_in(embeddings.files, corpus, split)["cell_id"].to_numpy()
        # A shift by one along a random order: no cell keeps its own embedding.
        order = np.random.default_rng(seed).permutation(len(cells))
        others = np.empty_like(cells)
        others[order] = cells[np.roll(order, 1)]
        if len(cells) == 1:
            others = cells_in(embeddings.files, corpus, "train")["cell_id"].to_numpy()[:1]
        vectors = embeddings.vectors(others.tolist(), loaded.projector.reads)
        described = pd.DataFrame(describe_cells(loaded, vectors, known, settings))
        tables.append(described.assign(cell_id=cells, split=split))
    PREDICTIONS.write(pd.concat(tables, ignore_index=True).reindex(columns=list(PREDICTIONS.columns)), predictions)
