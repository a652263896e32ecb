"""Comparison: the fine-tuned model writes freely, word by word, instead of choosing among candidate names."""

import pandas as pd

from cell2text.contracts import PREDICTIONS, TERMS
from cell2text.embedding.vectors import Embeddings
from cell2text.generation.describe import cells_in, describe_cells
from cell2text.grammar import Terms
from cell2text.model.bundle import load


def predict_greedy(
    model: str,
    language_model: str,
    corpus: str,
    terms: str,
    embeddings: Embeddings,
    predictions: str,
    splits: list[str],
    batch_cells: int,
    max_new_tokens: int | None,
) -> None:
    """Let the model append the most likely token until its text ends, and parse the text.

    The parameters are those of :func:`score_candidates` and the config's ``generate.max_new_tokens``, except
    ``predictions``: the file of ``contracts.PREDICTIONS`` to write.
    """
    loaded, known = load(model, language_model).ready_to_write(), Terms(TERMS.read(terms))
    tables = []
    for split in splits:
        cells = cells_in(embeddings.files, corpus, split)["cell_id"].to_list()
        vectors = embeddings.vectors(cells, loaded.projector.reads)
        described = pd.DataFrame(describe_cells(loaded, vectors, known, batch_cells, max_new_tokens))
        tables.append(described.assign(cell_id=cells, split=split))
    PREDICTIONS.write(pd.concat(tables, ignore_index=True).reindex(columns=list(PREDICTIONS.columns)), predictions)
