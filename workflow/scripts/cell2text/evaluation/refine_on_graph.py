"""Cell types refined on a graph of similar cells of each study, and on the same graph with its cells shuffled.

Nothing is trained. The probabilities P0 of a method become P = (I + weight L)^-1 P0, where L is the Laplacian of the
graph, so that cells that are joined get similar probabilities; training cells keep their true labels. This is label
propagation with a prior (Zhou et al., NeurIPS 2003; Zhu et al., ICML 2003).
"""

import logging
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse

from cell2text.confidence.graph import WEIGHTS, join_neighbours, propagate, shuffle_cells
from cell2text.contracts import PREDICTIONS, TERM_SLOTS, datasets_of
from cell2text.evaluation.baselines.slots import (
    cells_to_describe,
    is_training,
    read_pooled,
    read_slots,
    refuse_missing,
    write_predictions,
)
from cell2text.evaluation.sums import class_terms, macro_f1
from cell2text.files import read_jsonl

log = logging.getLogger("cell2text.evaluation")

_KEPT = ["cell_id", "pathway_ids", "pathway_confidences"]
_KEPT += [f"{slot}{suffix}" for slot in TERM_SLOTS if slot != "cell_type" for suffix in ("_id", "_confidence")]


def refine_on_graph(
    descriptions: str,
    terms: str,
    embeddings: list[str],
    predictions: list[str],
    refined: str,
    control: str,
    neighbours: int,
    seed: int,
) -> None:
    """Refine the cell types that a method predicts on a graph of similar cells, and render the texts again.

    The weight of the graph is chosen by the macro-F1 of the validation cells; labels of test cells are not used. The
    other slots stay. Tissue, disease, sex and stage are the sample's, so that any graph within a study, even a random
    one, would take them from the study's training cells.

    Parameters
    ----------
    descriptions, terms
        Files of ``contracts.DESCRIPTIONS`` and ``contracts.TERMS``.
    embeddings
        Files of ``contracts.EMBEDDINGS``.
    predictions
        The method's file of ``contracts.PREDICTIONS``, or JSONL files with its columns as keys.
    refined, control
        Files of ``contracts.PREDICTIONS`` to write. For the control, the cells of each study are shuffled on the graph,
        and everything is repeated on it, the choice of the weight included.
    neighbours
        Number of nearest neighbours of a cell that it may be joined with.
    seed
        Seed of the shuffled cells.

    Raises
    ------
    InputError
        If a described cell has no embedding or no prediction.
    """
    described = read_slots(descriptions)
    given = read_predictions(predictions)
    refuse_missing(cells_to_describe(described)["cell_id"], pd.Index(given["cell_id"]), predictions)
    given = given.set_index("cell_id").reindex(described["cell_id"]).reset_index()
    studies, new = datasets_of(described["cell_id"]).to_numpy(), ~is_training(described)
    true = described["cell_type_id"].mask(described["split"] == "test", None)
    labels, start = initial_probabilities(given["cell_type_id"], given["cell_type_confidence"], true.mask(new, None))
    known = true.notna().to_numpy() & ~new
    named = given.loc[new, "cell_type_id"].notna()
    kept = given.loc[new, _KEPT].assign(split=described["split"])
    graph = join_neighbours(read_pooled(embeddings, described["cell_id"]), studies, neighbours)
    log.info("%d cells, joined with %.1f neighbours on average", len(described), graph.nnz / max(len(described), 1))
    for path, used in ((refined, graph), (control, shuffle_cells(graph, studies, seed))):
        weight = choose_weight(start, known, used, labels, true.where(new, None))
        log.info("%s: weight %g", Path(path).stem, weight)
        found = propagate(start, known, used, weight)[new]
        table = kept.assign(cell_type_id=None, cell_type_confidence=np.nan)
        if named.any():
            table["cell_type_id"] = np.where(named, labels[found.argmax(axis=1)], None)
            table["cell_type_confidence"] = np.where(named, found.max(axis=1), np.nan)
        write_predictions(table, terms, path)


def read_predictions(files: list[str]) -> pd.DataFrame:
    """Return predictions from a Parquet file or from JSONL files."""
    if Path(files[0]).suffix == ".parquet":
        return PREDICTIONS.read(files[0])
    rows = chain.from_iterable(read_jsonl(path) for path in files)
    return pd.DataFrame(rows).reindex(columns=list(PREDICTIONS.columns))


def initial_probabilities(
    ids: pd.Series, confidences: pd.Series, training_labels: pd.Series
) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels, sorted, and the probability of each before refinement, float64 (cells, labels).

    A training cell has its label. The label that a method predicts has its confidence; the rest is split among the
    others by their shares among the training cells, as far as none exceeds the predicted label. A cell with neither has
    these shares.

    Parameters
    ----------
    ids, confidences
        Prediction for each cell, missing for training cells.
    training_labels
        Label of each training cell, missing for others.
    """
    labels = pd.Index(sorted({*ids.dropna(), *training_labels.dropna()}), dtype=object)
    counts = training_labels.value_counts().reindex(labels, fill_value=0).to_numpy(dtype=float)
    start = np.tile(counts / max(counts.sum(), 1), (len(ids), 1))
    column, true = labels.get_indexer(ids), labels.get_indexer(training_labels)
    named = np.flatnonzero(column >= 0)
    confidence = confidences.to_numpy(dtype=float)[named, None]
    others = start[named]
    others[np.arange(len(named)), column[named]] = 0
    others *= (1 - confidence) / np.maximum(others.sum(axis=1, keepdims=True), np.finfo(float).tiny)
    start[named] = np.minimum(others, 0.99 * confidence)
    start[named, column[named]] = confidence[:, 0]
    known = np.flatnonzero(true >= 0)
    start[known] = 0
    start[known, true[known]] = 1
    return labels.to_numpy(), start


def choose_weight(
    start: np.ndarray, known: np.ndarray, graph: scipy.sparse.csr_array, labels: np.ndarray, truth: pd.Series
) -> float:
    """Return the weight of the graph with the highest macro-F1, the smallest of equals; 0 without labelled cells.

    Parameters
    ----------
    start, known, graph
        As for :func:`propagate`.
    labels
        Ids of the columns of ``start``.
    truth
        Label of each validation cell, missing for others.
    """
    labelled = truth.notna().to_numpy()
    if len(labels) < 2 or not labelled.any():
        return WEIGHTS[0]
    true = truth[labelled].reset_index(drop=True)
    classes = pd.Index(sorted(true.unique()))

    def score(weight: float) -> float:
        predicted = pd.Series(labels[propagate(start, known, graph, weight)[labelled].argmax(axis=1)])
        return macro_f1(class_terms(true, predicted, classes).sum(axis=0)[None])[0]

    return max(WEIGHTS, key=score)
