"""What simple methods say of the same cells, so that every figure of the language model has a neighbour.

Each learns from the training cells alone and writes ``contracts.PREDICTIONS`` for the validation and test
cells, text included.
"""

import logging
from collections.abc import Callable
from functools import cache

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors

from cell2text.contracts import DESCRIPTIONS, EMBEDDINGS, PREDICTIONS, TERM_SLOTS, TERMS
from cell2text.descriptions import Slots, Terms, describe, render
from cell2text.errors import InputError

log = logging.getLogger("cell2text.baselines")

DIMENSIONS = 50  # of the principal components
NEIGHBOURS = 15
# From the rows of the training cells with a known label, and the code of each label, to the probability of
# each code in each cell to be described. A row of zeros abstains.
Classifier = Callable[[np.ndarray, np.ndarray], np.ndarray]


def predict_majority(descriptions: str, terms: str, predictions: str) -> None:
    """Call every cell by the most frequent training label; its share of the training cells is its confidence.

    Of gene sets it says the most frequent combination. Of equally frequent ones it says the first by id.
    """
    cells = DESCRIPTIONS.read(descriptions)
    training, told = _training(cells), _to_describe(cells)
    for slot in TERM_SLOTS:
        shares = training[f"{slot}_id"].value_counts(normalize=True)
        likely = min(shares.index[shares == shares.max()], default=None)
        told[f"{slot}_id"] = likely
        told[f"{slot}_confidence"] = shares.get(likely, np.nan)
    combinations = pd.Series([tuple(sorted(sets)) for sets in training["pathway_ids"]]).value_counts()
    told["pathway_ids"] = [list(min(combinations.index[combinations == combinations.max()]))] * len(told)
    _write(told, terms, predictions)


def predict_pca_logistic(descriptions: str, terms: str, cells: list[str], predictions: str, seed: int) -> None:
    """Predict each slot by logistic regression on the principal components of log-normalised counts.

    Counts are scaled to 10,000 a cell and log1p is taken; the components are fitted on the training cells.

    Parameters
    ----------
    descriptions, terms
        Files of ``contracts.DESCRIPTIONS`` and ``contracts.TERMS``.
    cells
        h5ad files of raw counts; genes are matched by id and a gene that a study lacks counts 0.
    predictions
        Where the predictions go.
    seed
        Of the principal components' solver.

    Raises
    ------
    InputError
        If a described cell is in none of the files.
    """
    described = DESCRIPTIONS.read(descriptions)
    counts = read_counts(cells, described["cell_id"])
    sc.pp.normalize_total(counts, target_sum=1e4)
    sc.pp.log1p(counts)
    training = counts[_training(described)["cell_id"]].X
    components = PCA(min(DIMENSIONS, *(np.array(training.shape) - 1)), svd_solver="arpack", random_state=seed)
    known = components.fit_transform(training)
    new = components.transform(counts[_to_describe(described)["cell_id"]].X)
    log.info("%d components of %d genes, from %d cells", known.shape[1], counts.n_vars, len(known))

    def classify(rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return LogisticRegression(max_iter=5000).fit(known[rows], codes).predict_proba(new)

    _write(predict_slots(described, classify), terms, predictions)


def predict_knn(descriptions: str, terms: str, embeddings: list[str], predictions: str) -> None:
    """Predict each slot by the vote of the 15 training cells with the nearest pooled embeddings.

    The confidence is the share of the votes; a neighbour without a known label has none.
    """
    described = DESCRIPTIONS.read(descriptions)
    pooled = read_pooled(embeddings, described["cell_id"])
    known, new = pooled[_is_training(described)], pooled[~_is_training(described)]
    nearest = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(known))).fit(known)
    neighbours = scipy.sparse.csr_array(nearest.kneighbors_graph(new))

    def classify(rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
        labels = scipy.sparse.csr_array((np.ones(len(rows)), (rows, codes)), shape=(len(known), codes.max() + 1))
        votes = (neighbours @ labels).toarray()
        return votes / np.maximum(votes.sum(axis=1, keepdims=True), 1)

    _write(predict_slots(described, classify), terms, predictions)


def predict_nearest_text(descriptions: str, embeddings: list[str], predictions: str) -> None:
    """Say of each cell what the reference says of the training cell with the nearest pooled embedding.

    Nearest by cosine; there is no confidence.
    """
    described = DESCRIPTIONS.read(descriptions)
    pooled = read_pooled(embeddings, described["cell_id"])
    training, told = _training(described), _to_describe(described)
    nearest = NearestNeighbors(n_neighbors=1, metric="cosine").fit(pooled[_is_training(described)])
    chosen = nearest.kneighbors(pooled[~_is_training(described)], return_distance=False)[:, 0]
    copied = [*(f"{slot}_id" for slot in TERM_SLOTS), "pathway_ids", "text"]
    told[copied] = training[copied].iloc[chosen].to_numpy()
    told = told.assign(status="parsed").reindex(columns=list(PREDICTIONS.columns))
    PREDICTIONS.write(told, predictions)


def predict_slots(described: pd.DataFrame, classify: Classifier) -> pd.DataFrame:
    """Return ids, confidences and gene sets of the cells to be described.

    A slot with one label in training gets that label with confidence 1, a slot with none gets nothing. Gene
    sets are predicted one against the rest, and as many told as a training cell has at most.
    """
    training, told = _training(described), _to_describe(described)
    for slot in TERM_SLOTS:
        probabilities, labels = _predict(training[f"{slot}_id"], len(told), classify)
        confidence, best = probabilities.max(axis=1, initial=0), probabilities.argmax(axis=1)
        told[f"{slot}_id"] = np.where(confidence > 0, labels[best], None)
        told[f"{slot}_confidence"] = np.where(confidence > 0, confidence, np.nan)
    told["pathway_ids"] = _predict_pathways(training["pathway_ids"], len(told), classify)
    return told


def _predict(labels: pd.Series, cells: int, classify: Classifier) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability of each label in each cell, (cells, labels), and the labels, sorted."""
    codes, names = pd.factorize(labels, sort=True)
    names = np.array(names, dtype=object)
    if len(names) == 0:
        return np.zeros((cells, 1)), np.array([None], dtype=object)
    if len(names) == 1:
        return np.ones((cells, 1)), names
    rows = np.flatnonzero(codes >= 0)
    return classify(rows, codes[rows]), names


def _predict_pathways(sets: pd.Series, cells: int, classify: Classifier) -> list[list[str]]:
    """Return the most probable gene sets of each cell, most probable first."""
    sets = sets.reset_index(drop=True)
    members = sets.explode().dropna()
    most, names = int(sets.map(len).max()), np.array(sorted(members.unique()), dtype=object)
    probability = np.zeros((cells, len(names)))
    for column, name in enumerate(names):
        active = pd.Series(sets.index.isin(members.index[members == name]))
        probabilities, _ = _predict(active, cells, classify)
        probability[:, column] = probabilities[:, -1]
    order = np.argsort(-probability, axis=1, kind="stable")[:, :most]
    likely = np.take_along_axis(probability, order, axis=1) > 0
    return [names[chosen[kept]].tolist() for chosen, kept in zip(order, likely, strict=True)]


def read_counts(files: list[str], cell_ids: pd.Series) -> ad.AnnData:
    """Return the raw counts of the given cells, sparse, over the genes of all files; absent genes count 0.

    The cells keep the order of the files: to sort them would hold the matrix twice.

    Raises
    ------
    InputError
        If a cell is in none of the files.
    """
    parts = []
    for path in sorted(files):
        study = ad.read_h5ad(path)
        kept = study.obs_names.isin(cell_ids)
        parts.append(ad.AnnData(study.X[kept], obs=study.obs.loc[kept, []], var=study.var[[]]))
    counts = ad.concat(parts, join="outer", fill_value=0)
    _refuse_missing(cell_ids, counts.obs_names, files)
    return counts


def read_pooled(files: list[str], cell_ids: pd.Series) -> np.ndarray:
    """Return the pooled embedding of the given cells, in their order, shape (cells, dimensions).

    Raises
    ------
    InputError
        If a cell is in none of the files.
    """
    return EMBEDDINGS.read_cells(files, cell_ids, ["pooled"])["pooled"]


def _refuse_missing(wanted: pd.Series, given: pd.Index, files: list[str]) -> None:
    missing = pd.Index(wanted).difference(given)
    if len(missing):
        raise InputError(
            ", ".join(map(str, files)),
            f"{len(missing)} described cells are missing, such as {missing[0]}",
            "Delete the files and run the workflow again",
        )


def _is_training(described: pd.DataFrame) -> np.ndarray:
    return (described["split"] == "train").to_numpy()


def _training(described: pd.DataFrame) -> pd.DataFrame:
    return described[_is_training(described)]


def _to_describe(described: pd.DataFrame) -> pd.DataFrame:
    return described.loc[~_is_training(described), ["cell_id", "split"]].reset_index(drop=True)


def _write(told: pd.DataFrame, terms: str, predictions: str) -> None:
    """Render the text of each cell from its slots and write the predictions."""
    names = Terms(TERMS.read(terms))

    @cache
    def text(*slots: str | None, pathways: tuple[str, ...]) -> str:
        return render(describe(Slots(**dict(zip(TERM_SLOTS, slots, strict=True)), pathways=pathways), names), names)

    ids = told[[f"{slot}_id" for slot in TERM_SLOTS]].itertuples(index=False, name=None)
    told["text"] = [text(*row, pathways=tuple(sets)) for row, sets in zip(ids, told["pathway_ids"], strict=True)]
    PREDICTIONS.write(told.assign(status="parsed")[list(PREDICTIONS.columns)], predictions)
