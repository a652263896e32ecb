"""Negative control: the fine-tuned model reads the embedding of another cell."""

import numpy as np
import pandas as pd

from cell2text.confidence.decisions import Confidence, read_ancestors
from cell2text.embedding.vectors import Embeddings
from cell2text.evaluation.baselines.slots import write_predictions
from cell2text.generation.describe import cells_in
from cell2text.generation.score_candidates import Scorer


def predict_shuffled(
    model: str,
    language_model: str,
    corpus: str,
    terms: str,
    confidence: str,
    embeddings: Embeddings,
    predictions: str,
    splits: list[str],
    batch_cells: int,
    seed: int,
) -> None:
    """Describe each cell from the embedding of another cell of its split, chosen at random.

    A cell alone in its split gets the embedding of a training cell.

    A model that uses its input drops to chance level; a model that ignores its input scores as before. The
    parameters are those of :func:`score_candidates`, the file written by ``choose_thresholds``, and ``predictions``:
    the file of ``contracts.PREDICTIONS`` to write.
    """
    scorer, fitted, ancestors = (
        Scorer(model, language_model, terms),
        Confidence.load(confidence),
        read_ancestors(terms),
    )
    tables = []
    for split in splits:
        cells = cells_in(embeddings.files, corpus, split)["cell_id"].to_numpy()
        # A shift by one along a random order: no cell keeps its own embedding.
        order = np.random.default_rng(seed).permutation(len(cells))
        others = np.empty_like(cells)
        others[order] = cells[np.roll(order, 1)]
        if len(cells) == 1:
            others = cells_in(embeddings.files, corpus, "train")["cell_id"].to_numpy()[:1]
        vectors = embeddings.vectors(others.tolist(), scorer.model.projector.reads)
        described = fitted.describe(
            scorer.score(vectors, batch_cells, fitted.needs_language_model), scorer.labels, ancestors
        )
        tables.append(described.assign(cell_id=cells, split=split))
    write_predictions(pd.concat(tables, ignore_index=True), terms, predictions)
