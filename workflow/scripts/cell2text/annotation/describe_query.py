"""The descriptions of the cells to annotate, with the confidences of a new study."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cell2text.annotation.pack_model import REFINEMENT, read_facts
from cell2text.confidence.added_types import LEAST_EXAMPLES, AddedTypes
from cell2text.confidence.decisions import FIX, Confidence, read_ancestors
from cell2text.confidence.novelty import Reference
from cell2text.confidence.refinement import SLOT, Refinement, report_refined
from cell2text.contracts import EMBEDDINGS, EXAMPLES, REFINED
from cell2text.errors import InputError
from cell2text.generation.generate_descriptions import generate_descriptions
from cell2text.weights import read_weights

log = logging.getLogger("cell2text.annotation")


def describe_query(
    model: str,
    scores: str,
    embeddings: str,
    descriptions: str,
    examples: str | None = None,
    example_embeddings: Sequence[str] = (),
    refined: str | None = None,
) -> None:
    """Describe the cells of a file of scores.

    Parameters
    ----------
    model
        Folder of a packed model.
    scores, embeddings
        Files of ``contracts.SCORES`` and ``contracts.EMBEDDINGS`` of the cells.
    descriptions
        Output file, JSONL with the fields of ``contracts.PREDICTIONS``.
    examples
        File of ``contracts.EXAMPLES``, whose types are added to the model; None to add none.
    example_embeddings
        Files of ``contracts.EMBEDDINGS`` of these examples.
    refined
        File of ``contracts.REFINED`` of the cells; None to take their cell types as they are scored.

    Raises
    ------
    InputError
        If types cannot be added to the model.
    """
    folder, changes = Path(model), []
    if refined:
        changes.append(lambda table, _: _take_refined(table, folder, refined))
    if examples:
        changes.append(_add_types(folder, examples, example_embeddings).apply)
    generate_descriptions(
        model,
        scores,
        str(folder / "confidence.json"),
        str(folder / "reference.safetensors"),
        str(folder / "terms.parquet"),
        [embeddings],
        descriptions,
        split="query",
        new_study=True,
        changes=changes,
    )


def _take_refined(table: pd.DataFrame, model: Path, refined: str) -> pd.DataFrame:
    """Return descriptions with the cell types of a file of ``contracts.REFINED``."""
    probabilities = REFINED.read_cells([refined], table["cell_id"], [SLOT])[SLOT].astype(np.float64)
    refinement = Refinement.load(model / REFINEMENT)
    labels, ancestors = read_facts(model)["labels"][SLOT], read_ancestors(model / "terms.parquet")[SLOT]
    return report_refined(table, probabilities, refinement, labels, ancestors)


def _add_types(model: Path, examples: str, embeddings: Sequence[str]) -> AddedTypes:
    """Return the types of examples, to be added to a packed model."""
    labels = read_facts(model)["labels"].get("cell_type", [])
    reference = Reference(**read_weights(model / "reference.safetensors", FIX, "numpy"))
    labelled = EXAMPLES.read(examples)
    tensors = EMBEDDINGS.read_cells(embeddings, labelled["cell_id"], ["pooled", "lengths"])
    read = tensors["lengths"] > 0  # a cell without a gene of the model is like no cell of its type
    counts = labelled.assign(read=read).groupby("cell_type_id")["read"].sum()
    for cell_type in counts.index[counts < LEAST_EXAMPLES]:
        problem = f"fewer than {LEAST_EXAMPLES} labelled cells of {cell_type} have a gene of the model"
        raise InputError("examples", problem, f"Label {LEAST_EXAMPLES} or more that have some, or leave out this type")
    labelled, vectors = labelled[read], tensors["pooled"][read]
    threshold = Confidence.load(model / "confidence.json").of_new_study.thresholds.get("cell_type")
    least = threshold.confidence if threshold else 1.0
    ancestors = read_ancestors(model / "terms.parquet")["cell_type"]
    try:
        added = AddedTypes.fit(reference, labels, vectors, labelled["cell_type_id"], ancestors, least)
    except ValueError as error:
        raise InputError(model, f"{error}, so this model takes no others", "Do not set examples") from None
    known = sorted({*labelled["cell_type_id"]} & {*labels})
    log.info(
        "%d examples of %d cell types, %d of which the model knows",
        len(labelled), labelled["cell_type_id"].nunique(), len(known),
    )  # fmt: skip
    return added
