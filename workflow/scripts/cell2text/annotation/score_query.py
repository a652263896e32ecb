"""The candidate names of each cell to annotate, scored by the projector and, where it counts, the language model."""

import logging
from pathlib import Path

from cell2text.annotation.pack_model import read_facts
from cell2text.confidence.decisions import Confidence
from cell2text.contracts import EMBEDDINGS, SCORES
from cell2text.embedding.vectors import Embeddings
from cell2text.generation.score_candidates import Scorer

log = logging.getLogger("cell2text.annotation")


def score_query(model: str, language_model: str, embeddings: str, scores: str) -> None:
    """Score the candidate names of all cells in a file of embeddings.

    Where the confidences of new studies rest on the projector alone, the language model is not run: the same names are
    found many times faster.

    Parameters
    ----------
    model, language_model
        Folders of the packed and of the original language model.
    embeddings
        File of ``contracts.EMBEDDINGS``.
    scores
        Output file (``contracts.SCORES``).
    """
    about, folder = read_facts(model), Path(model)
    confidence = Confidence.load(folder / "confidence.json").of_new_study
    scorer = Scorer(model, language_model, str(folder / "terms.parquet"))
    cells = EMBEDDINGS.read(embeddings, [])[1]
    vectors = Embeddings([embeddings]).vectors(cells, scorer.model.projector.reads)
    SCORES.write(
        scorer.score(vectors, about["settings"]["batch_cells"], confidence.needs_language_model), cells, scores
    )
    log.info("scored the names of %d cells", len(cells))
