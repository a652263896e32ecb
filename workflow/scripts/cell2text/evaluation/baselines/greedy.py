"""Comparison: the fine-tuned model writes freely, word by word, instead of choosing among candidate names."""

import pandas as pd

from cell2text.contracts import PREDICTIONS, TERMS
from cell2text.embedding.vectors import Embeddings
from cell2text.generation.describe import cells_in, describe_cells
from cell2text.generation.drafts import Drafts
from cell2text.generation.score_candidates import Scorer, nobody
from cell2text.grammar import Terms


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

    The projector's names are a draft of the text, of which the model reads many words at once.

    The parameters are those of :func:`score_candidates` and the config's ``generate.max_new_tokens``, except
    ``predictions``: the file of ``contracts.PREDICTIONS`` to write.
    """
    scorer, known = Scorer(model, language_model, terms), Terms(TERMS.read(terms))
    loaded = scorer.model
    tables = []
    for split in splits:
        cells = cells_in(embeddings.files, corpus, split)["cell_id"].to_list()
        vectors = embeddings.vectors(cells, loaded.projector.reads)
        scores = scorer.score(vectors, batch_cells, nobody)
        drafts = Drafts(scorer.labels, loaded.about["programmes_per_cell"], known, loaded.tokenizer, scores)
        described = pd.DataFrame(describe_cells(loaded, vectors, known, batch_cells, max_new_tokens, drafts))
        tables.append(described.assign(cell_id=cells, split=split))
    PREDICTIONS.write(pd.concat(tables, ignore_index=True).reindex(columns=list(PREDICTIONS.columns)), predictions)
