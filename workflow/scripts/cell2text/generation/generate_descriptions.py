"""The description of each cell of one split and shard, from the scores of its names and their confidence."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from cell2text.confidence.decisions import FIX, Confidence, read_ancestors
from cell2text.confidence.novelty import Reference
from cell2text.contracts import EMBEDDINGS, SCORES, TERM_SLOTS, TERMS
from cell2text.files import read_json, write_jsonl
from cell2text.grammar import Terms, render_rows
from cell2text.weights import read_weights

log = logging.getLogger("cell2text.generation")


def generate_descriptions(
    model: str,
    scores: str,
    confidence: str,
    reference: str,
    terms: str,
    embeddings: Sequence[str],
    generations: str,
    split: str,
    new_study: bool = False,
    changes: Sequence[Callable[[pd.DataFrame, np.ndarray], pd.DataFrame]] = (),
) -> None:
    """Describe the cells of a file of scores.

    The text names the most specific guess of the cell type, and of the sample only what is probable enough to be
    reported: a tissue, disease, sex or stage that is not determined is omitted.

    Parameters
    ----------
    model
        Directory of the fine-tuned model.
    scores
        File of ``contracts.SCORES``.
    confidence, reference
        Files written by ``choose_thresholds`` and ``calibrate``.
    terms
        File of ``contracts.TERMS``.
    embeddings
        Files of ``contracts.EMBEDDINGS`` of the cells.
    generations
        Output file, JSONL with one object per cell and the fields of ``contracts.PREDICTIONS``.
    split
        Name of the split.
    new_study
        Whether the cells are of a study without training cells, whatever its name is.
    changes
        Functions of rows of ``contracts.PREDICTIONS`` and the vectors of their cells, (cells, dimensions), that return
        changed rows, from which the texts are then written.
    """
    labels = read_json(f"{model}/cell2text.json", FIX)["labels"]
    wanted = [*labels, *(f"projector_{slot}" for slot in labels)]
    found, cells = SCORES.read(scores, wanted)
    fitted, compared = Confidence.load(confidence), Reference(**read_weights(reference, FIX, "numpy"))
    vectors = EMBEDDINGS.read_cells(embeddings, cells, ["pooled"])["pooled"]
    novelty = compared.novelty(vectors)
    found["novelty"] = novelty if new_study else fitted.novelty_of_new(novelty, cells)
    if new_study:
        table = fitted.of_new_study.describe(found, labels, read_ancestors(terms))
    else:
        table = fitted.describe(found, labels, read_ancestors(terms), cells)
    table = table.assign(status="parsed", split=split)
    table["cell_id"] = cells
    table["novelty"] = novelty
    table["novel"] = None if fitted.limit is None else table["novelty"] > fitted.limit
    for change in changes:
        table = change(table, vectors)
    table["text"] = render_rows(_keep_determined(table), Terms(TERMS.read(terms)))
    log.info(
        "%d cells of %s: %d cell types reported, %d cells novel",
        len(table), split, table["cell_type_reported_id"].notna().sum(), table["novel"].eq(True).sum(),
    )  # fmt: skip
    write_jsonl(table.to_dict("records"), generations)


def _keep_determined(table: pd.DataFrame) -> pd.DataFrame:
    """Return the descriptions with the reported terms of the sample in the place of the guesses."""
    sample = [slot for slot in TERM_SLOTS if slot != "cell_type"]
    return table.assign(**{f"{slot}_id": table[f"{slot}_reported_id"] for slot in sample})
