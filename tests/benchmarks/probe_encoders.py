"""Accuracy of a linear probe for cell types on the vectors of each encoder, on the same held-out donors.

    python tests/benchmarks/probe_encoders.py results/studies [--size small] [--epochs 6] [--geneformer DIRECTORY]

The corpus and ranked genes of a run are reused; encoders are refitted on its training cells. The probe is a multinomial
logistic regression on pooled vectors, which are centred and scaled by one common standard deviation; its
regularisation is chosen on the validation cells. The 50 principal components of the log-normalised counts are included
for comparison. 95% intervals come from resampling donors.
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "workflow/scripts"), str(ROOT / "tests")]
from cell2text.contracts import CELLS  # noqa: E402
from cell2text.embedding.encoders import load_encoder  # noqa: E402
from cell2text.embedding.fit_encoder import EncoderInputs, fit_encoder  # noqa: E402
from cell2text.embedding.ranked_cells import RankedSplit, read_measured  # noqa: E402
from cell2text.evaluation import statistics  # noqa: E402
from cell2text.evaluation.bootstrap import Bootstrap  # noqa: E402
from default_settings import encoder_settings  # noqa: E402

STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # C of scikit-learn
SPLITS = ("train", "validation", "test")


def probe(vectors, cells):
    """Return the predictions of a probe for the test cells, and the chosen regularisation strength."""
    train, validation, test = ((cells["split"] == split).to_numpy() for split in SPLITS)
    types = cells["cell_type_id"].to_numpy()
    vectors = vectors - vectors[train].mean(0)
    vectors /= vectors[train].std()
    validation &= np.isin(types, types[train])
    fitted = [LogisticRegression(C=strength, max_iter=3000).fit(vectors[train], types[train]) for strength in STRENGTHS]
    likelihood = []
    for model in fitted:
        column = np.searchsorted(model.classes_, types[validation])
        probability = model.predict_proba(vectors[validation])[np.arange(validation.sum()), column]
        likelihood.append(np.log(np.maximum(probability, 1e-12)).mean())
    best = int(np.argmax(likelihood))
    return fitted[best].predict(vectors[test]), STRENGTHS[best]


def read_splits(results):
    """Return the three splits of a run."""
    tokens = sorted(results.glob("tokens/*.parquet"))
    measured = read_measured(results / "genes.parquet", tokens)
    return [RankedSplit(tokens, results / "corpus/cells.parquet", split, measured) for split in SPLITS]


def embed(results, settings, seed, fetched=None):
    """Fit an encoder; return the pooled vectors of all cells by id, and the seconds to fit and to embed."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        files = [str(path) for path in sorted(results.glob("tokens/*.parquet"))]
        corpus, genes = str(results / "corpus/cells.parquet"), str(results / "genes.parquet")
        fit_encoder(EncoderInputs(corpus, genes, files, settings, seed, fetched), f"{folder}/encoder")
        fitted = time.perf_counter()
        encoder = load_encoder(f"{folder}/encoder")
        parts = [
            pd.DataFrame(encoder.embed(part, 0)["pooled"], index=part.cell_ids)
            for split in read_splits(results)
            for part in split
        ]
        return pd.concat(parts), (fitted - start, time.perf_counter() - fitted)


def principal_components(results):
    """Return the 50 principal components of all cells, fitted on the training cells; unmeasured genes are zero."""
    start = time.perf_counter()
    train, *others = read_splits(results)
    parts = [(part.cell_ids, part.matrix()) for split in (train, *others) for part in split]
    training = scipy.sparse.vstack([part.matrix() for part in train])
    fitted = PCA(50, svd_solver="arpack", random_state=0).fit(training)
    vectors = [pd.DataFrame(fitted.transform(matrix), index=ids) for ids, matrix in parts]
    return pd.concat(vectors), (time.perf_counter() - start, 0.0)


def main():
    """Print one line per encoder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--size", default="small")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=0.001)
    parser.add_argument("--geneformer", help="directory of a checkpoint written by `fetch_encoder`")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    cells = CELLS.read(options.results / "corpus/cells.parquet")
    cells = cells[cells["cell_type_id"].notna()]
    shared = {"top_k": 64, "cache": False, "layer": -2, "batch_cells": 16}
    coexpression = encoder_settings(kind="coexpression", dimensions=64, **shared)
    geneformer = encoder_settings(kind="geneformer", **shared)
    pretrain = encoder_settings(
        kind="pretrain", size=options.size, epochs=options.epochs, learning_rate=options.learning_rate, **shared
    )
    methods = {
        "PCA (50)": lambda: principal_components(options.results),
        "coexpression": lambda: embed(options.results, coexpression, options.seed),
        f"pretrain ({options.size}, {options.epochs} epochs)": lambda: embed(options.results, pretrain, options.seed),
    }
    if options.geneformer:
        methods["geneformer"] = lambda: embed(options.results, geneformer, options.seed, options.geneformer)
    test = cells[cells["split"] == "test"]
    resampled = Bootstrap(test["donor"], 1000, 0)
    print(
        f"{(cells['split'] == 'train').sum()} training cells, {len(test)} test cells from {test['donor'].nunique()} "
        f"donors with {test['cell_type_id'].nunique()} cell types"
    )
    classes = pd.Index(np.unique(test["cell_type_id"].astype(str)))
    truth = test["cell_type_id"].reset_index(drop=True)
    for name, method in methods.items():
        vectors, seconds = method()
        predicted, strength = probe(vectors.loc[cells["cell_id"]].to_numpy(dtype=float), cells)
        predicted = pd.Series(predicted, dtype=object)
        correct = statistics.mean_statistics((predicted == truth).to_numpy())
        scores = {
            "accuracy": resampled.estimate(correct, statistics.ratio),
            "macro-F1": resampled.estimate(statistics.class_statistics(truth, predicted, classes), statistics.macro_f1),
        }
        estimates = ", ".join(
            f"{what} {value:.3f} [{low:.3f}, {high:.3f}]" for what, (value, low, high) in scores.items()
        )
        print(
            f"{name:28s} {vectors.shape[1]:4d} dimensions: {estimates}; C {strength:g}; "
            f"fitted in {seconds[0]:.0f} s, embedded in {seconds[1]:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
