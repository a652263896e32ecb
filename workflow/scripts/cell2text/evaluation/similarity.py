"""How near two ontology terms are, by diffusion over the graph of the ontology's terms."""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
import scipy.sparse
from scipy.sparse.linalg import splu

from cell2text.ontology import live_terms

RESTART = 0.9  # a: the share of the walk that goes on at each step
FLOOR = 1e-4  # what counts as no nearness at all, in the paper and here


def ontology_edges(ontology: str) -> list[tuple[str, str]]:
    """Return (child, parent) of the live terms of an ontology: is_a, and part_of where UBERON has it."""
    terms = live_terms(ontology)
    return [
        (child, parent)
        for child, entry in terms.items()
        for parent, distance in sorted(entry["ancestors"].items())
        if distance == 1 and parent in terms
    ]


class TermGraph:
    """The undirected graph of an ontology's terms, and how near they are in it.

    With A the adjacency, D the degrees and a = 0.9, the kernel is
    K = (1 - a) (I - a D^-1/2 A D^-1/2)^-1. It is factorised once, sparse, and solved for single columns, so
    no dense inverse is ever held.

    Parameters
    ----------
    edges
        Pairs of term ids; direction and repeats do not matter. A term in no edge has similarity 1 to itself
        and 0 to every other term. So has an id that the ontology does not know, such as PATO:0000461
        (normal) among the diseases.
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
        system = scipy.sparse.eye_array(size) - RESTART * (scale @ adjacency @ scale)
        # Minimum degree ordering keeps the factors of these near-trees twelve times smaller than the default.
        self._solve = splu(
            system.tocsc(), "MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
        ).solve

    def kernel(self, columns: np.ndarray) -> np.ndarray:
        """Return the columns of K at the given positions of :attr:`nodes`, shape (nodes, columns)."""
        chosen = np.zeros((len(self.nodes), len(columns)))
        chosen[columns, np.arange(len(columns))] = 1 - RESTART
        return np.maximum(self._solve(chosen), 0)

    def similarity(self, terms: list[str]) -> pd.DataFrame:
        """Return the similarity of every two of the given terms: 0 to 1, symmetric, 1 on the diagonal.

        k = K_st / sqrt(K_ss K_tt) is a cosine, since K is positive definite; the similarity is
        log1p(k / 1e-4) / log1p(1e4).
        """
        return self._table(terms, self._nearness)

    def paper_similarity(self, terms: list[str]) -> pd.DataFrame:
        """Return the measure of the Cell2Text paper (arXiv 2509.24840), rows predicted, columns true.

        The personalised PageRank of the true term t with the walk restarting at the predicted term s,
        damping 0.9, is PPR_st = K_st sqrt(d_t / d_s), and its nearness ln(1 + PPR_st / 1e-4 + 1e-12). That
        is brought to 0..1 by the smallest and the largest value over all pairs of a given term, as s, and any
        term of the graph, as t, s itself included; then the diagonal is set to 1. So the figure depends a
        little on which terms are given, and it is not symmetric: it is here only to compare with the paper.
        """
        return self._table(terms, self._paper_nearness)

    def _nearness(self, nodes: np.ndarray) -> np.ndarray:
        kernel = self.kernel(nodes)[nodes]
        length = np.sqrt(kernel.diagonal())
        cosine = (kernel + kernel.T) / 2 / np.outer(length, length)
        return np.log1p(cosine / FLOOR) / np.log1p(1 / FLOOR)

    def _paper_nearness(self, nodes: np.ndarray) -> np.ndarray:
        ranks = self.kernel(nodes) * np.sqrt(self.degree[:, None] / self.degree[nodes])
        nearness = np.log(1 + ranks.T / FLOOR + 1e-12)
        low, high = nearness.min(), nearness.max()
        return (nearness[:, nodes] - low) / (high - low)

    def _table(self, terms: list[str], nearness: Callable[[np.ndarray], np.ndarray]) -> pd.DataFrame:
        """Return the nearness of the terms that are nodes; any other term is near itself alone."""
        nodes = self.nodes.get_indexer(terms)
        inside = np.flatnonzero(nodes >= 0)
        table = np.eye(len(terms))
        if len(inside):
            table[np.ix_(inside, inside)] = nearness(nodes[inside])
        np.fill_diagonal(table, 1)
        index = pd.Index(terms, dtype=object)
        return pd.DataFrame(table, index=index, columns=index)
