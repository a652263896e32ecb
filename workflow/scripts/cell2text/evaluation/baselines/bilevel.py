"""Baseline after scBiGNN (arXiv 2312.10310): a classifier of genes and one of cells that teach each other.

The first names a cell's type from its pooled vector and the mean of its gene vectors by attention. The second names it
from what the first made of the cell and of similar cells of its study: the means over two steps on a graph, and
logistic regression (SGC, Wu et al., ICML 2019). They are trained in turn, each on the training cells with their true
types and on all other cells with the types that the other classifier gives them, weighted by its confidence, as in GLEM
(Zhao et al., ICLR 2023). The labels of validation and test cells are not read.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

from cell2text.confidence.graph import join_neighbours, shuffle_cells
from cell2text.contracts import datasets_of
from cell2text.embedding.vectors import Embeddings, Vectors
from cell2text.evaluation.baselines.contrast import by_lda
from cell2text.evaluation.baselines.slots import is_training, predict_slots, read_pooled, read_slots, write_predictions

ROUNDS = 3
HIDDEN, BATCH_CELLS, STEPS, LEARNING_RATE, DROPOUT = 128, 128, 600, 3e-3, 0.2
CELLS_AT_ONCE = 1024


def predict_bilevel(
    descriptions: str,
    terms: str,
    embeddings: Embeddings,
    predictions: str,
    control: str,
    neighbours: int,
    seed: int,
) -> None:
    """Predict the cell type by two classifiers trained in turn, and the other slots by shrinkage LDA.

    Parameters
    ----------
    descriptions, terms
        Files of ``contracts.DESCRIPTIONS`` and ``contracts.TERMS``.
    embeddings
        Embeddings of the cells.
    predictions, control
        Files of ``contracts.PREDICTIONS`` to write. For the control, the cells of each study are shuffled on the graph.
    neighbours
        Number of nearest neighbours of a cell that it may be joined with.
    seed
        Seed of weights, batches, dropout and shuffled cells.

    Raises
    ------
    InputError
        If a described cell has no embedding.
    """
    described = read_slots(descriptions)
    training = is_training(described)
    pooled = read_pooled(embeddings.files, described["cell_id"])
    others = predict_slots(described, by_lda(pooled[training], pooled[~training]))
    codes, ids = pd.factorize(described["cell_type_id"].where(training), sort=True)
    cells = Cells.of(embeddings.vectors(described["cell_id"], "gene_vectors"), pooled, training)
    studies = datasets_of(described["cell_id"]).to_numpy()
    for path, shuffled in ((predictions, False), (control, True)):
        predicted = others.copy()
        if len(ids) > 1:
            found = teach_in_turn(cells, codes, studies, neighbours, seed, shuffled)[~training]
            predicted["cell_type_id"] = np.array(ids, dtype=object)[found.argmax(axis=1)]
            predicted["cell_type_confidence"] = found.max(axis=1)
        write_predictions(predicted, terms, path)


@dataclass(frozen=True, eq=False)
class Cells:
    """What the classifier of genes reads.

    Parameters
    ----------
    genes
        Gene vectors.
    pooled
        Pooled vectors, (cells, inputs).
    scale
        By which gene vectors are divided.
    """

    genes: Vectors
    pooled: Tensor
    scale: float

    @classmethod
    def of(cls, genes: Vectors, pooled: np.ndarray, training: np.ndarray) -> Self:
        """Centre pooled vectors, and divide either kind of vector by one number, both as training cells say.

        Parameters
        ----------
        genes, pooled
            Vectors of all cells.
        training
            Which of the cells are training cells, bool (cells,).
        """
        centred = pooled - pooled[training].mean(axis=0)
        some, _ = genes[np.flatnonzero(training)[:CELLS_AT_ONCE]]
        return cls(genes, torch.from_numpy(centred / _spread(centred[training])), _spread(some.numpy()))

    def take(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Return gene vectors and pooled vectors of some cells, and which genes there are, bool (cells, genes)."""
        vectors, lengths = self.genes[rows]
        return vectors / self.scale, self.pooled[rows], torch.arange(vectors.shape[1]) < lengths[:, None]


def _spread(vectors: np.ndarray) -> float:
    return float(np.sqrt(np.square(vectors).mean())) or 1.0


class GeneClassifier(nn.Module):
    """Attention over the genes of a cell, and a classifier of their mean and of the pooled vector.

    Parameters
    ----------
    dimensions, inputs, types
        Of a gene vector, of a pooled vector, and number of cell types.
    """

    def __init__(self, dimensions: int, inputs: int, types: int):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dimensions, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
        self.body = nn.Sequential(nn.Linear(dimensions + inputs, HIDDEN), nn.GELU(), nn.Dropout(DROPOUT))
        self.head = nn.Linear(HIDDEN, types)

    def embed(self, vectors: Tensor, pooled: Tensor, is_gene: Tensor) -> Tensor:
        """Return a vector of each cell, (cells, ``HIDDEN``)."""
        attention = self.gate(vectors)[..., 0].masked_fill(~is_gene, -1e9).softmax(dim=1) * is_gene
        return self.body(torch.cat([(attention[..., None] * vectors).sum(dim=1), pooled], dim=1))


def teach_in_turn(
    cells: Cells, codes: np.ndarray, studies: np.ndarray, neighbours: int, seed: int, shuffled: bool = False
) -> np.ndarray:
    """Return the probabilities of the classifier of cells after the last round, float64 (cells, types).

    Parameters
    ----------
    cells
        All cells.
    codes
        Number of the type of each training cell, -1 for other cells, (cells,).
    studies
        Study of each cell.
    neighbours
        Number of nearest neighbours of a cell that it may be joined with.
    seed
        See :func:`predict_bilevel`.
    shuffled
        Whether the cells of each study are shuffled on the graph.
    """
    found = np.eye(codes.max() + 1)[codes] * (codes >= 0)[:, None]  # nobody has taught the other cells yet
    for _ in range(ROUNDS):
        vectors, by_genes = classify_genes(cells, *targets(found, codes), seed)
        graph = join_neighbours(vectors, studies, neighbours)
        if shuffled:
            graph = shuffle_cells(graph, studies, seed)
        found = classify_cells(average_twice(graph) @ vectors, *targets(by_genes, codes))
    return found


def targets(probabilities: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the type that each cell is taught as, and the weight of that.

    Training cells have their true type and weight 1; other cells their most probable type, weighted by its probability.
    """
    known = codes >= 0
    return np.where(known, codes, probabilities.argmax(axis=1)), np.where(known, 1.0, probabilities.max(axis=1))


def classify_genes(cells: Cells, codes: np.ndarray, weights: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Train a classifier of genes, and return its vector and its probabilities for each cell, (cells, ...).

    Parameters
    ----------
    cells
        The cells.
    codes, weights
        From :func:`targets`; cells with weight 0 are not trained on.
    seed
        Seed of weights, batches and dropout.
    """
    taught, rng = np.flatnonzero(weights), np.random.default_rng(seed)
    labels, shares = torch.from_numpy(codes), torch.from_numpy(weights).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dimensions = cells.take(taught[:1])[0].shape[2]
        model = GeneClassifier(dimensions, cells.pooled.shape[1], int(codes.max()) + 1)
        optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        for _ in range(STEPS):
            rows = rng.choice(taught, BATCH_CELLS)
            logits = model.head(model.embed(*cells.take(rows)))
            losses = functional.cross_entropy(logits, labels[rows], reduction="none")
            optimiser.zero_grad()
            (shares[rows] * losses).mean().backward()
            optimiser.step()
    with torch.inference_mode():
        model.eval()
        parts = np.array_split(np.arange(len(codes)), -(-len(codes) // CELLS_AT_ONCE))
        vectors = torch.cat([model.embed(*cells.take(rows)) for rows in parts])
        return vectors.numpy(), model.head(vectors).softmax(dim=1).numpy()


def average_twice(graph: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """Return the matrix that averages over a cell and its neighbours, twice (normalised by the roots of degrees)."""
    looped = graph + scipy.sparse.eye_array(graph.shape[0])
    roots = scipy.sparse.diags_array(1 / np.sqrt(looped.sum(axis=1)))
    step = roots @ looped @ roots
    return scipy.sparse.csr_array(step @ step)


def classify_cells(vectors: np.ndarray, codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the probabilities of a logistic regression on all cells, float64 (cells, types).

    Parameters
    ----------
    vectors
        (cells, dimensions).
    codes, weights
        From :func:`targets`.
    """
    scaled = StandardScaler().fit_transform(vectors)
    return LogisticRegression(max_iter=500).fit(scaled, codes, sample_weight=weights).predict_proba(scaled)
