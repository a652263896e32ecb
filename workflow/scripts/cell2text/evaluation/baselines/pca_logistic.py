"""Baseline: logistic regression on principal components of log-normalised counts."""

import logging

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from cell2text.contracts import DESCRIPTIONS
from cell2text.evaluation.baselines.slots import (
    cells_to_describe,
    predict_slots,
    refuse_missing,
    training_rows,
    write_predictions,
)

log = logging.getLogger("cell2text.baselines")

COMPONENTS = 50


def predict_pca_logistic(descriptions: str, terms: str, cells: list[str], predictions: str, seed: int) -> None:
    """Predict each slot by logistic regression on principal components of log-normalised counts.

    Counts are scaled to 10,000 per cell and log1p-transformed; the components are fitted on the training cells.

    Parameters
    ----------
    descriptions, terms
        Files of ``contracts.DESCRIPTIONS`` and ``contracts.TERMS``.
    cells
        h5ad files of raw counts; genes are matched by id, and genes that a study lacks get count 0.
    predictions
        The file of ``contracts.PREDICTIONS`` to write.
    seed
        Seed of the PCA solver.

    Raises
    ------
    InputError
        If a described cell is in none of the files.
    """
    described = DESCRIPTIONS.read(descriptions)
    counts = read_raw_counts(cells, described["cell_id"])
    sc.pp.normalize_total(counts, target_sum=1e4)
    sc.pp.log1p(counts)
    training = counts[training_rows(described)["cell_id"]].X
    components = PCA(min(COMPONENTS, *(np.array(training.shape) - 1)), svd_solver="arpack", random_state=seed)
    known = components.fit_transform(training)
    new = components.transform(counts[cells_to_describe(described)["cell_id"]].X)
    log.info("PCA: %d components of %d genes, fitted on %d training cells", known.shape[1], counts.n_vars, len(known))

    def classify(rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return LogisticRegression(max_iter=5000).fit(known[rows], codes).predict_proba(new)

    write_predictions(predict_slots(described, classify), terms, predictions)


def read_raw_counts(files: list[str], cell_ids: pd.Series) -> ad.AnnData:
    """Return the raw counts of the given cells, sparse, over the union of genes; absent genes get count 0.

    The cells stay in the order of the files, because sorting them would take twice the memory.

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
    refuse_missing(cell_ids, counts.obs_names, files)
    return counts
