"""Baselines for few labels: shrinkage LDA, and a small network trained by supervised contrast; with a control.

The network brings cells of one type together and others apart (Khosla et al., Supervised Contrastive Learning, NeurIPS
2020). A cell has the type of the nearest centroid.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import pairwise_distances_argmin
from torch import Tensor, nn
from torch.nn import functional

from cell2text.contracts import TERM_SLOTS
from cell2text.evaluation.baselines.slots import (
    Classifier,
    is_training,
    predict_slots,
    read_pooled,
    read_slots,
    write_predictions,
)
from cell2text.files import whole_file

HIDDEN, BATCH_CELLS, LEARNING_RATE = 256, 128, 1e-3
DROPOUT, NOISE = 0.1, 0.1  # by which the two views of a cell differ
_LABELS = [*(f"{slot}_id" for slot in TERM_SLOTS), "pathway_ids"]


def predict_contrast(
    descriptions: str,
    terms: str,
    embeddings: list[str],
    lda: str,
    contrast: str,
    permuted: str,
    head: str,
    dimensions: int,
    temperature: float,
    steps: int,
    seed: int,
) -> None:
    """Predict the slots by shrinkage LDA, and again with the cell type by a contrastive head.

    Parameters
    ----------
    descriptions, terms
        Files of ``contracts.DESCRIPTIONS`` and ``contracts.TERMS``.
    embeddings
        Files of ``contracts.EMBEDDINGS``.
    lda, contrast
        Files of ``contracts.PREDICTIONS`` to write. They differ in the cell type alone.
    permuted
        The control, like ``contrast``, but the labels of all training cells are permuted.
    head
        The safetensors file of the head to write, see :meth:`ContrastHead.save`.
    dimensions, temperature, steps, seed
        See :func:`fit_head`. The seed is also that of the permutation.

    Raises
    ------
    InputError
        If a described cell has no embedding.
    """
    described = read_slots(descriptions)
    training, pooled = is_training(described), read_pooled(embeddings, described["cell_id"])
    known, new = pooled[training], pooled[~training]
    order, own = np.arange(len(described)), np.flatnonzero(training)
    order[own] = np.random.default_rng(seed).permutation(own)
    shuffled = described.assign(**{name: described[name].to_numpy()[order] for name in _LABELS})
    for labelled, path in ((described, contrast), (shuffled, permuted)):
        predicted = predict_slots(labelled, by_lda(known, new))
        codes, ids = pd.factorize(labelled.loc[training, "cell_type_id"], sort=True)
        fitted = fit_head(known, codes, dimensions, temperature, steps, seed)
        if labelled is described:
            write_predictions(predicted, terms, lda)
            fitted.save(head, ids)
        if len(ids):
            probabilities = fitted.probabilities(new)
            predicted["cell_type_id"] = np.array(ids, dtype=object)[probabilities.argmax(axis=1)]
            predicted["cell_type_confidence"] = probabilities.max(axis=1)
        write_predictions(predicted, terms, path)


def by_lda(known: np.ndarray, new: np.ndarray) -> Classifier:
    """Return a classifier by linear discriminant analysis with a covariance shrunk as by Ledoit and Wolf.

    Parameters
    ----------
    known, new
        Vectors of the training cells and of those to describe, (cells, dimensions).
    """

    def classify(rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
        types = codes.max() + 1
        if types == 1 or len(rows) == types:  # a single cell per type says nothing about the variation within types
            return np.eye(types)[pairwise_distances_argmin(new, known[rows[np.argsort(codes)][:types]])]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Only one sample available")  # its covariance is zero, as it should be
            fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(known[rows], codes)
        return fitted.predict_proba(new)

    return classify


@dataclass(frozen=True, eq=False)
class ContrastHead:
    """A trained network, and the centroid of each type in its space.

    Parameters
    ----------
    network
        From centred and scaled vectors to the space of the contrast.
    centroids
        Mean unit vector of the training cells of each type, of length 1, float32 (types, dimensions).
    mean, scale
        Subtracted from pooled vectors, float32 (inputs,), and by which they are divided then, float32 ().
    temperature
        That of the loss.
    """

    network: nn.Sequential
    centroids: Tensor
    mean: Tensor
    scale: Tensor
    temperature: float

    @torch.inference_mode()
    def probabilities(self, vectors: np.ndarray) -> np.ndarray:
        """Return the probability of each type, float32 (cells, types); the nearest centroid has the greatest.

        Parameters
        ----------
        vectors
            Pooled vectors, (cells, inputs).
        """
        given = (torch.as_tensor(vectors, dtype=torch.float32) - self.mean) / self.scale
        placed = functional.normalize(self.network(given), dim=1)
        return torch.softmax(placed @ self.centroids.T / self.temperature, dim=1).numpy()

    def save(self, path: str | Path, types: Sequence[str]) -> None:
        """Write a safetensors file, with the temperature and the ids of the types in its metadata."""
        tensors = {name: tensor.detach() for name, tensor in self.network.state_dict(prefix="network.").items()}
        tensors |= {name: getattr(self, name) for name in ("centroids", "mean", "scale")}
        # a single key, because safetensors writes several in any order
        about = {"about": json.dumps({"types": list(types), "temperature": self.temperature})}
        with whole_file(path) as unfinished:
            save_file(tensors, unfinished, metadata=about)


def fit_head(
    vectors: np.ndarray, codes: np.ndarray, dimensions: int, temperature: float, steps: int, seed: int
) -> ContrastHead:
    """Return a head trained on labelled cells, on the CPU.

    Parameters
    ----------
    vectors
        Pooled vectors, (cells, inputs). Divided by a single number, not whitened: their shorter axes are mostly noise.
    codes
        Number of each cell's type from 0, (cells,); -1: not labelled, not used.
    dimensions
        Of the space of the contrast.
    temperature
        By which similarities are divided.
    steps
        Number of steps, each on at most ``BATCH_CELLS`` cells.
    seed
        Seed of weights, batches, dropout and noise.
    """
    labelled = codes >= 0
    vectors, codes = torch.as_tensor(vectors[labelled], dtype=torch.float32), torch.as_tensor(codes[labelled])
    types = int(codes.max()) + 1 if len(codes) else 0
    mean = vectors.mean(dim=0).nan_to_num()  # without cells
    scale = (vectors - mean).square().mean().sqrt()
    scale = scale if scale > 0 else torch.ones(())
    vectors = (vectors - mean) / scale
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(vectors.shape[1], HIDDEN), nn.GELU(), nn.Linear(HIDDEN, dimensions))
        optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
        for _ in range(steps if types > 1 else 0):
            rows = torch.randperm(len(vectors))[:BATCH_CELLS].repeat(2)
            views = functional.dropout(vectors[rows], DROPOUT)
            views = views + NOISE * torch.randn_like(views)
            loss = contrast_loss(functional.normalize(network(views), dim=1), codes[rows], temperature)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.inference_mode():
        placed = functional.normalize(network(vectors), dim=1)
        sums = torch.zeros(types, dimensions).index_add_(0, codes, placed)
        return ContrastHead(network, functional.normalize(sums, dim=1), mean, scale, temperature)


def contrast_loss(placed: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """Return the supervised contrastive loss, the mean over the vectors that share their label with another one.

    Of vector i it is the mean over the others p of its label of -log(exp(z_i z_p / t) / sum over a != i of
    exp(z_i z_a / t)). Without any pair it is 0.

    Parameters
    ----------
    placed
        Unit vectors z, (vectors, dimensions).
    codes
        Label of each, (vectors,).
    temperature
        t.
    """
    itself = torch.eye(len(placed), dtype=torch.bool)
    logits = (placed @ placed.T / temperature).masked_fill(itself, -torch.inf)
    pairs = (codes[:, None] == codes) & ~itself
    likelihoods = torch.where(pairs, torch.log_softmax(logits, dim=1), 0).sum(dim=1)
    others = pairs.sum(dim=1)
    return -(likelihoods / others.clamp(min=1)).sum() / (others > 0).sum().clamp(min=1)
