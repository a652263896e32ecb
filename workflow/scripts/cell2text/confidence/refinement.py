"""How much the cell types of a new file are refined among its similar cells, and from which probability on reported.

A new file has no labels, so nothing in it tells how much similar cells should agree. Studies held out of alignment do:
their cells are refined by each weight of the graph, and the one whose probabilities are nearest to the true types, by
the Brier score, is the model's. (The macro-F1 of exact types, by which ``refine_on_graph`` chooses, changes by chance
from one weight to the next there: for eight models of seven studies each, it chose from 0.03 to 3 where the Brier score
chose the same for all, and 0 or 0.03 with shuffled cells.) Refined probabilities are less extreme, so the threshold of
reported terms is chosen for them anew. Without studies to hold out, validation cells take their place.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from cell2text.confidence.back_off import TermsAbove, Threshold, choose_threshold
from cell2text.confidence.calibrate import (
    read_left_out,
    read_scores,
    read_validation_cells,
    true_terms,
    without_language_model,
)
from cell2text.confidence.decisions import FIX, Confidence, read_ancestors, report_terms
from cell2text.confidence.graph import WEIGHTS, join_neighbours, propagate, shuffle_cells
from cell2text.contracts import EMBEDDINGS, datasets_of
from cell2text.files import read_json, reading, write_json

log = logging.getLogger("cell2text.confidence")

SLOT = "cell_type"


@dataclass(frozen=True)
class Refinement:
    """How the cell types of a file are refined among its similar cells.

    Parameters
    ----------
    neighbours
        Number of nearest neighbours of a cell that it may be joined with.
    weight
        Weight of the graph; 0 changes no cell type.
    threshold
        Threshold of reported cell types; None if the model names no cell types.
    cells, studies
        Number of cells that weight and threshold rest on, and of their studies; None if these had training cells.
    accuracy, brier
        Share of right cell types, and Brier score, of these cells before, after, and with shuffled cells.
    """

    neighbours: int
    weight: float
    threshold: Threshold | None
    cells: int
    studies: int | None
    accuracy: tuple[float, float, float] | None = None
    brier: tuple[float, float, float] | None = None

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        write_json(asdict(self), path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises
        ------
        InputError
            If the file is damaged.
        """
        saved = read_json(path, FIX)
        with reading(path, FIX):
            threshold = Threshold.from_dict(saved["threshold"]) if saved["threshold"] else None
            return cls(**saved | {"threshold": threshold})

    def refine(self, probabilities: np.ndarray, vectors: np.ndarray, measured: np.ndarray) -> np.ndarray:
        """Return the refined probabilities of the cells of one file, float64 (cells, labels).

        Parameters
        ----------
        probabilities
            Of the cell types, (cells, labels).
        vectors
            Pooled vectors, (cells, dimensions).
        measured
            Whether a cell has a gene of the model, bool (cells,). The others are no neighbours.
        """
        refined = np.array(probabilities, dtype=float)
        if self.weight:
            graph = join_neighbours(vectors[measured], np.zeros(measured.sum()), self.neighbours)
            refined[measured] = propagate(refined[measured], np.zeros(measured.sum(), dtype=bool), graph, self.weight)
        return refined


def fit_refinement(
    calibration: str,
    model: str,
    scores: Sequence[str],
    left_out: str | None,
    descriptions: str,
    terms: str,
    embeddings: Sequence[str],
    left_out_vectors: str | None,
    output: str,
    confidence: float,
    neighbours: int,
    seed: int,
) -> None:
    """Choose weight and threshold on cells whose labels are known, and write them.

    Parameters
    ----------
    calibration, model, scores, left_out, descriptions
        As for ``choose_thresholds``.
    terms
        File of ``contracts.TERMS``.
    embeddings, left_out_vectors
        Files of ``contracts.EMBEDDINGS`` of all cells, and of those in ``left_out`` by encoders without their study.
    output
        JSON file to write.
    confidence
        The share of the reported terms that should be right.
    neighbours
        Number of nearest neighbours of a cell that it may be joined with.
    seed
        Seed of the shuffled cells of the control.
    """
    about, fitted = read_json(f"{model}/cell2text.json", FIX), Confidence.load(calibration)
    labels = about["labels"]
    if SLOT not in labels:
        log.info("the model names no cell types: nothing to refine")
        Refinement(neighbours, 0.0, None, 0, None).save(output)
        return
    if fitted.new_studies:
        found, cells = read_left_out(left_out, descriptions, labels)
        found, embeddings = without_language_model(found, about), [left_out_vectors]
    else:
        cells = read_validation_cells(descriptions)
        found = read_scores(scores, cells, labels)
    read = EMBEDDINGS.read_cells(embeddings, cells["cell_id"], ["pooled", "lengths"])
    rows = np.flatnonzero(read["lengths"])  # a cell without a gene of the model is like no cell of its type
    cells, found = cells.iloc[rows], {name: tensor[rows] for name, tensor in found.items()}
    probabilities = fitted.of_new_study.probabilities_of_each(SLOT, found)
    truth, studies = true_terms(cells, SLOT), datasets_of(cells["cell_id"]).to_numpy()
    graph = join_neighbours(read["pooled"][rows], studies, neighbours)
    free = np.zeros(len(cells), dtype=bool)
    column = pd.Index(labels[SLOT]).get_indexer(truth)
    labelled = np.array([one is not None for one in truth], dtype=bool)
    by_weight = {weight: propagate(probabilities, free, graph, weight) for weight in WEIGHTS}
    scored = {weight: score(refined[labelled], column[labelled]) for weight, refined in by_weight.items()}
    # without labelled cells all are equal, and nothing is refined
    weight = min(WEIGHTS, key=lambda weight: scored[weight][1]) if labelled.any() else 0.0
    shuffled = propagate(probabilities, free, shuffle_cells(graph, studies, seed), weight)
    compared = (scored[0.0], scored[weight], score(shuffled[labelled], column[labelled]))
    accuracy, brier = zip(*compared, strict=True) if labelled.any() else (None, None)
    above = TermsAbove(labels[SLOT], read_ancestors(terms)[SLOT])
    threshold = choose_threshold(
        above, by_weight[weight], truth, confidence, studies.tolist() if fitted.new_studies else None
    )
    held_out = len(set(studies)) if fitted.new_studies else None
    Refinement(neighbours, weight, threshold, int(labelled.sum()), held_out, accuracy, brier).save(output)
    log.info("weight %g, reported from probability %.2f (%s)", weight, threshold.value, threshold.note)
    if accuracy:
        line = "cell types of %d cells right before, after, and with shuffled cells: %.3f, %.3f and %.3f"
        log.info(line, labelled.sum(), *accuracy)


def score(probabilities: np.ndarray, column: np.ndarray) -> tuple[float, float]:
    """Return the share of right types and the Brier score.

    Parameters
    ----------
    probabilities
        (cells, labels).
    column
        Column of the true type of each cell; -1 if it is no label.
    """
    rows, known = np.arange(len(column)), column >= 0
    of_truth = np.where(known, probabilities[rows, np.maximum(column, 0)], 0)
    right = probabilities.argmax(axis=1) == column
    return float(right.mean()), float(((probabilities**2).sum(axis=1) - 2 * of_truth + 1).mean())


def report_refined(
    table: pd.DataFrame,
    refined: np.ndarray,
    refinement: Refinement,
    labels: Sequence[str],
    ancestors: Mapping[str, Sequence[str]],
) -> pd.DataFrame:
    """Return descriptions with refined cell types.

    Parameters
    ----------
    table
        Rows of ``contracts.PREDICTIONS``.
    refined
        Refined probabilities of their cell types, (cells, labels).
    refinement
        Its threshold is that of reported terms.
    labels
        Ids of the cell types.
    ancestors
        Ids above each cell type.
    """
    above = TermsAbove(labels, ancestors)
    columns = pd.DataFrame(report_terms(SLOT, labels, refined, above, refinement.threshold)).astype(object)
    return table.assign(**columns.where(columns.notna(), None))
