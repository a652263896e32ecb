"""Control of the language half: the fine-tuned model, each cell given another cell's embedding."""

import numpy as np
import pandas as pd

from cell2text.contracts import PREDICTIONS, TERMS
from cell2text.embedding.vectors import Embeddings
from cell2text.generation.describe import cells_in, describe_cells
from cell2text.grammar import Terms
from cell2text.model.bundle import load


def predict_shuffled(
    model: str,
    language_model: str,
    corpus: str,
    terms: str,
    embeddings: Embeddings,
    predictions: str,
    splits: list[str],
    settings: dict,
    seed: int,
) -> None:
    """Describe each cell from the embedding of another cell of its split, chosen at random.

    A model that reads its cells falls to chance; one that does not, betrays itself by staying. Parameters are
    those of :func:`generate_descriptions`, but for ``predictions``, a table of ``contracts.PREDICTIONS``.
    """
    loaded, known = load(model, language_model).ready_to_write(), Terms(TERMS.read(terms))
    tables = []
    for split in splits:
        cells = cells_in(embeddings.files, corpus, split)["cell_id"].to_numpy()
        # Moved on by one along a random order, no cell keeps its own embedding.
        order = np.random.default_rng(seed).permutation(len(cells))
        others = np.empty_like(cells)
        others[order] = cells[np.roll(order, 1)]
        vectors = embeddings.vectors(others.tolist(), loaded.projector.reads)
        said = pd.DataFrame(describe_cells(loaded, vectors, known, settings))
        tables.append(said.assign(cell_id=cells, split=split))
    PREDICTIONS.write(pd.concat(tables, ignore_index=True)[list(PREDICTIONS.columns)], predictions)
