"""Similarity of two ontology terms, by diffusion over the graph of the ontology."""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
import scipy.sparse
from scipy.sparse.linalg import splu

from cell2text.ontology import live_terms

DAMPING = 0.9  # a in the formulas: probability that the random walk continues at each step
FLOOR = 1e-4  # kernel values well below this count as unrelated, as in the paper


def ontology_edges(ontology: str) -> list[tuple[str, str]]:
    """Return (child, parent) pairs of an ontology's live terms: is_a and, in UBERON, part_of."""
    terms = live_terms(ontology)
    return [
        (child, parent)
        for child, entry in terms.items()
        for parent, distance in sorted(entry["ancestors"].items())
        if distance == 1 and parent in terms
    ]


class TermGraph:
    """Undirected graph of an ontology's terms, and the similarity of terms in it.

    With the adjacency matrix A, the degrees D and a = 0.9, the kernel is
    K = (1 - a) (I - a D^-1/2 A D^-1/2)^-1. The sparse system is factorised once and solved for single columns,
    so the dense inverse is never in memory.

    Parameters
    ----------
    edges
        Pairs of term ids; direction and repeats do not matter. A term without edges has similarity 1 to itself
        and 0 to every other term. The same applies to ids outside the ontology, such as PATO:0000461 (normal)
        among the diseases.
    """

    def __init__(self, edges: Iterable[tuple[str, str]]):
        ends = np.array(list(edges), dtype=object).reshape(-1, 2)
        self.nodes = pd.Index(np.unique(ends.astype(str)))
        one, other = self.nodes.get_indexer(ends[:, 0]), self.nodes.get_indexer(ends[:, 1])
        size = len(self.nodes)
        adjacency = scipy.sparse.csr_array((np.ones(len(ends)), (one, other)), shape=(size, size))
        adjacency = ((adjacency + adjacency.T) > 0).astype(float)
        self.degree = adjacency.sum(axis=1)
        scale = scipy.sparse.diags_array(self.degree**-0.5)
        system = scipy.sparse.eye_array(size) - DAMPING * (scale @ adjacency @ scale)
        # Minimum degree ordering keeps the factors of these near-trees twelve times smaller than the default.
        self._solve = splu(
            system.tocsc(), "MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
        ).solve

    def kernel(self, columns: np.ndarray) -> np.ndarray:
        """Return the columns of K at the given positions in :attr:`nodes`, shape (nodes, columns)."""
        chosen = np.zeros((len(self.nodes), len(columns)))
        chosen[columns, np.arange(len(columns))] = 1 - DAMPING
        return np.maximum(self._solve(chosen), 0)

    def similarity(self, terms: list[str]) -> pd.DataFrame:
        """Return the pairwise similarity of the given terms: 0 to 1, symmetric, 1 on the diagonal.

        K is positive definite, so k = K_st / sqrt(K_ss K_tt) is a cosine. The similarity is
        log1p(k / 1e-4) / log1p(1e4).
        """
        return self._table(terms, self._scaled_cosine)

    def paper_similarity(self, terms: list[str]) -> pd.DataFrame:
        """Return the similarity of the Cell2Text paper (arXiv 2509.24840); rows are predicted, columns true terms.

        The personalised PageRank of the true term t, for a walk with damping 0.9 that restarts at the predicted
        term s, is PPR_st = K_st sqrt(d_t / d_s). Its logarithm ln(1 + PPR_st / 1e-4 + 1e-12) is min-max scaled
        to 0..1 over all pairs of a given term s and any term t of the graph, including t = s. Finally the
        diagonal is set to 1. The result is not symmetric and depends slightly on which terms are given; use it
        only for comparison with the paper.
        """
        return self._table(terms, self._scaled_pagerank)

    def _scaled_cosine(self, nodes: np.ndarray) -> np.ndarray:
        kernel = self.kernel(nodes)[nodes]
        norms = np.sqrt(kernel.diagonal())
        cosine = (kernel + kernel.T) / 2 / np.outer(norms, norms)
        return np.log1p(cosine / FLOOR) / np.log1p(1 / FLOOR)

    def _scaled_pagerank(self, nodes: np.ndarray) -> np.ndarray:
        ranks = self.kernel(nodes) * np.sqrt(self.degree[:, None] / self.degree[nodes])
        logs = np.log(1 + ranks.T / FLOOR + 1e-12)
        low, high = logs.min(), logs.max()
        return (logs[:, nodes] - low) / (high - low)

    def _table(self, terms: list[str], similarity: Callable[[np.ndarray], np.ndarray]) -> pd.DataFrame:
        """Return a similarity as a table of terms; a term outside the graph is similar only to itself."""
        nodes = self.nodes.get_indexer(terms)
        inside = np.flatnonzero(nodes >= 0)
        table = np.eye(len(terms))
        if len(inside):
            table[np.ix_(inside, inside)] = similarity(nodes[inside])
        np.fill_diagonal(table, 1)
        index = pd.Index(terms, dtype=object)
        return pd.DataFrame(table, index=index, columns=index)
