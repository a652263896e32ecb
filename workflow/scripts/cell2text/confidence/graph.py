"""The graph of similar cells of each study, probabilities refined on it, and the same graph with its cells shuffled."""

import numpy as np
import pandas as pd
import scipy.sparse
from scipy.sparse.csgraph import laplacian
from scipy.sparse.linalg import cg
from sklearn.neighbors import NearestNeighbors

WEIGHTS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of the graph, to choose from
SCALE_NEIGHBOUR = 7  # its distance is a cell's scale (Zelnik-Manor and Perona, NeurIPS 2004)


def join_neighbours(
    vectors: np.ndarray, studies: np.ndarray, neighbours: int, mutual: bool = True
) -> scipy.sparse.csr_array:
    """Return the graph of similar cells: symmetric weights from 0 to 1, float64 (cells, cells).

    Two cells of a study are joined if each is among the nearest of the other, so that a common cell type does not
    absorb a rare one near it. The weight falls with the squared distance, relative to the scales of both cells.

    Parameters
    ----------
    vectors
        Vectors of cells, (cells, dimensions).
    studies
        Study of each cell.
    neighbours
        Number of nearest neighbours.
    mutual
        False: two cells are joined if one is among the nearest of the other.
    """
    rows, columns, weights = [np.empty(0, int)], [np.empty(0, int)], [np.empty(0)]
    for study in pd.unique(studies):
        own = np.flatnonzero(studies == study)
        most = min(neighbours, len(own) - 1)
        if not most:
            continue
        distances, nearest = NearestNeighbors(n_neighbors=most).fit(vectors[own]).kneighbors()
        scale = np.maximum(distances[:, min(SCALE_NEIGHBOUR, most) - 1], 1e-30)  # identical cells
        rows.append(np.repeat(own, most))
        columns.append(own[nearest].ravel())
        weights.append(np.exp(-(distances**2) / (scale[:, None] * scale[nearest])).ravel())
    indices = np.concatenate(rows), np.concatenate(columns)
    joined = scipy.sparse.csr_array((np.concatenate(weights), indices), shape=(len(vectors), len(vectors)))
    return joined.minimum(joined.T) if mutual else joined.maximum(joined.T)


def shuffle_cells(graph: scipy.sparse.csr_array, studies: np.ndarray, seed: int) -> scipy.sparse.csr_array:
    """Return the graph with the cells of each study in random places: the same degrees, but unrelated neighbours."""
    rng, places = np.random.default_rng(seed), np.arange(len(studies))
    for study in pd.unique(studies):
        own = np.flatnonzero(studies == study)
        places[own] = rng.permutation(own)
    return graph[places][:, places]


def propagate(start: np.ndarray, known: np.ndarray, graph: scipy.sparse.csr_array, weight: float) -> np.ndarray:
    """Return the probabilities P that solve (I + weight L) P = P0, float64 (cells, labels).

    They minimise ||P - P0||^2 + weight x the sum over pairs of cells of their weight in the graph x ||P_i - P_j||^2.
    Solved by conjugate gradients, label by label.

    Parameters
    ----------
    start
        P0, (cells, labels).
    known
        Cells that keep P0, bool (cells,).
    graph
        Symmetric weights, (cells, cells).
    weight
        Weight of the graph; 0 returns P0.
    """
    new = np.flatnonzero(~known)
    refined = start.copy()
    if not len(new):
        return refined
    system = (scipy.sparse.eye_array(len(start)) + weight * scipy.sparse.csr_array(laplacian(graph))).tocsr()[new]
    target = start[new] - system[:, known] @ start[known]
    system = system[:, new]
    for label in range(start.shape[1]):
        refined[new, label], failed = cg(system, target[:, label], x0=start[new, label], rtol=1e-8)
        if failed:
            raise ArithmeticError(f"no convergence in {failed} steps at weight {weight}")
    return refined
