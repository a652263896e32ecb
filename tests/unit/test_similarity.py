import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cell2text.evaluation.similarity import TermGraph, ontology_edges

PATH = [("b", "a"), ("c", "b")]


def scaled(k):
    return np.log1p(k / 1e-4) / np.log1p(1e4)


def test_path_of_three_by_hand():
    # c = 0.9 / sqrt(2); I - 0.9 S = [[1, -c, 0], [-c, 1, -c], [0, -c, 1]], whose inverse times its
    # determinant is [[1 - c^2, c, c^2], [c, 1, c], [c^2, c, 1 - c^2]], with c^2 = 0.405.
    table = TermGraph(PATH).similarity(["a", "b", "c"])
    assert table.loc["a", "c"] == pytest.approx(scaled(0.405 / 0.595), abs=1e-12)
    assert table.loc["a", "b"] == pytest.approx(scaled(np.sqrt(0.405 / 0.595)), abs=1e-12)
    assert table.loc["b", "c"] == table.loc["a", "b"]


def test_a_term_without_edges_is_similar_only_to_itself():
    graph = TermGraph(PATH)
    for table in (graph.similarity(["a", "x"]), graph.paper_similarity(["a", "x"])):
        assert table.to_numpy().tolist() == [[1, 0], [0, 1]]
    assert graph.similarity(["x", "y"]).to_numpy().tolist() == [[1, 0], [0, 1]]


def test_direction_and_repeats_of_edges_do_not_matter():
    one = TermGraph(PATH).similarity(["a", "b", "c"])
    other = TermGraph([("a", "b"), ("b", "c"), ("c", "b"), ("b", "a")]).similarity(["a", "b", "c"])
    assert np.array_equal(one, other)


nodes = st.integers(0, 15).map(str)
edges = st.lists(st.tuples(nodes, nodes).filter(lambda pair: pair[0] != pair[1]), min_size=1, max_size=40)


@settings(max_examples=50, deadline=None)
@given(edges)
def test_similarity_is_symmetric_and_between_0_and_1(pairs):
    terms = [str(node) for node in range(16)]
    table = TermGraph(pairs).similarity(terms)
    values = table.to_numpy()
    assert np.array_equal(values, values.T)
    assert (values >= 0).all() and (values <= 1).all()
    assert (np.diag(values) == 1).all()
    joined = nx.Graph(pairs)
    for s in joined:
        for t in joined:
            assert (table.loc[s, t] > 0) == nx.has_path(joined, s, t)


@settings(max_examples=20, deadline=None)
@given(edges)
def test_paper_similarity_equals_networkx_pagerank(pairs):
    undirected = nx.Graph(pairs)
    terms = sorted(undirected)[:5]
    ranks = [nx.pagerank(undirected, alpha=0.9, personalization={s: 1}, tol=1e-14, max_iter=10_000) for s in terms]
    near = np.log(1 + np.array([[rank[t] for t in sorted(undirected)] for rank in ranks]) / 1e-4 + 1e-12)
    near = (near - near.min()) / (near.max() - near.min())
    expected = near[:, : len(terms)]
    np.fill_diagonal(expected, 1)
    given = TermGraph(pairs).paper_similarity(terms)
    assert np.abs(given.to_numpy() - expected).max() < 1e-6


def test_rows_of_paper_similarity_are_predictions():
    # A walk that restarts at the end of the path is often in the middle; the reverse is less frequent.
    table = TermGraph(PATH).paper_similarity(["a", "b"])
    assert table.loc["a", "b"] > table.loc["b", "a"]


def test_similar_cell_types_score_higher_in_the_cell_ontology():
    naive_cd4, memory_cd4, b_cell, neuron = "CL:0000895", "CL:0000897", "CL:0000236", "CL:0000540"
    table = TermGraph(ontology_edges("CL")).similarity([naive_cd4, memory_cd4, b_cell, neuron])
    assert 1 > table.loc[naive_cd4, memory_cd4] > table.loc[naive_cd4, b_cell] > table.loc[naive_cd4, neuron]


def test_uberon_has_part_of_edges():
    spleen, immune_system = "UBERON:0002106", "UBERON:0002405"
    assert (spleen, immune_system) in ontology_edges("UBERON")


def test_mondo_is_solved_by_columns_and_normal_is_similar_only_to_itself():
    lung_adenocarcinoma, lung_squamous, normal = "MONDO:0005061", "MONDO:0005097", "PATO:0000461"
    graph = TermGraph(ontology_edges("MONDO"))
    table = graph.similarity([lung_adenocarcinoma, lung_squamous, normal])
    assert table.loc[lung_adenocarcinoma, lung_squamous] > 0.3
    assert table.loc[normal].tolist() == [0, 0, 1]
    positions = graph.nodes.get_indexer([lung_adenocarcinoma])
    assert graph.kernel(positions).shape == (len(graph.nodes), 1)
