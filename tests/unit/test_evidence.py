"""Evidence: weights of genes sum to what they explain, and the gene that makes a cell type comes first."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cell2text.annotation import evidence
from cell2text.annotation.evidence import attribute, explain_cells, integrate
from cell2text.embedding.encoders.coexpression import Coexpression, ProgrammeMeans
from cell2text.errors import InputError
from cell2text.model import bundle
from cell2text.model.alignment import LabelTargets
from default_settings import finetune_settings, projector_settings
from ranked_files import random_encoder, ranked_cells

GENES, DIMENSIONS, TOP_K = 40, 12, 8
MARKERS = [0, 1, 2]  # of three cell types


def draw_cells(count, panels=None, seed=0):
    """Return cells with 10 to 19 random genes of their panel; the panels take turns."""
    random = np.random.default_rng(seed)
    panels = np.ones((1, GENES), dtype=bool) if panels is None else panels
    panel = np.arange(count) % len(panels)
    lists = [random.permutation(np.flatnonzero(panels[number]))[: random.integers(10, 20)] for number in panel]
    expression = [np.sort(random.uniform(2, 6, len(genes)))[::-1] for genes in lists]
    return ranked_cells(lists, expression, GENES, panels=panels, panel=panel)


def two_panels():
    panels = np.ones((2, GENES), dtype=bool)
    panels[1, ::3] = False
    return panels


def whitened_encoder():
    encoder = random_encoder(GENES, DIMENSIONS)
    encoder.scale = np.linspace(0.5, 2, DIMENSIONS, dtype=np.float32)
    return encoder


def with_programmes(encoder):
    """Return the encoder with three gene programmes, one of which the second panel does not measure."""
    members = np.zeros((GENES, 3), dtype=np.uint8)
    members[:20, 0] = members[5:30, 1] = members[::3, 2] = 1
    programmes = ProgrammeMeans(members, np.array([1, 2, 3], dtype=np.float32))
    return Coexpression(encoder.axes, encoder.scale, programmes=programmes)


def new_model(tiny_model, kind="pooled", **changes):
    """Return a model with an untrained projector, and two slots of three and two labels to compare it with."""
    torch.manual_seed(0)
    settings = projector_settings(kind=kind, soft_tokens=4, hidden=32, **changes)
    dimensions = 2 * DIMENSIONS if kind == "pooled" else DIMENSIONS
    model = bundle.build(tiny_model, settings, dimensions, finetune_settings(), torch.device("cpu")).eval()
    names = [["B cell", "natural killer cell", "monocyte"], ["blood", "thymus"]]
    embeddings = model.language_model.get_input_embeddings().weight.detach()
    return model, LabelTargets.of(names, model.tokenizer, embeddings, apart=not model.projector.tokens_are_genes)


def log_probability(model, targets, vectors, lengths, named):
    with torch.no_grad():
        scores = targets.scores(*model.projector(torch.as_tensor(vectors).float(), torch.as_tensor(lengths)))[0]
    return scores.log_softmax(-1).numpy()[np.arange(len(named)), named]


def of_each_cell(cells, values):
    return np.bincount(cells.cell, values, minlength=len(cells))


def without_counts(cells):
    return replace(
        cells, tokens=cells.tokens[:0], expression=cells.expression[:0], offsets=np.zeros_like(cells.offsets)
    )


def test_the_mean_gradient_of_a_square_is_the_sum_of_the_ends():
    start, end = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[3.0, -2.0], [5.0, 0.5]])
    with torch.no_grad():  # as in annotation
        found = integrate(lambda points: points.square().sum(-1), start, end)
    torch.testing.assert_close(found, (start + end).double())


def test_gradients_are_shared_out_as_genes_move_the_pooled_vector():
    cells, encoder = draw_cells(6, two_panels()), with_programmes(whitened_encoder())
    gradients = np.random.default_rng(1).normal(size=(6, 2 * DIMENSIONS + 3))
    shares, whole = encoder.share_out(cells, gradients), encoder.embed(cells, 0)["pooled"].astype(float)
    for place in (0, 5, 40, len(cells.tokens) - 1):
        expression = cells.expression.copy()
        expression[place] = 0
        moved = whole - encoder.embed(replace(cells, expression=expression), 0)["pooled"].astype(float)
        assert shares[place] == pytest.approx((gradients * moved).sum(), rel=1e-3, abs=1e-6)
    empty = encoder.embed(without_counts(cells), 0)["pooled"]
    np.testing.assert_allclose(of_each_cell(cells, shares), (gradients * (whole - empty)).sum(axis=1), rtol=1e-4)


def test_weights_sum_to_the_difference_of_the_log_probability(tiny_model):
    (model, targets), encoder, cells = new_model(tiny_model), whitened_encoder(), draw_cells(50, two_panels())
    named = np.arange(50) % 3
    pooled, empty = (encoder.embed(part, 0)["pooled"] for part in (cells, without_counts(cells)))
    ends = [
        log_probability(model, targets, vectors, cells.lengths, named) for vectors in (pooled, (pooled + empty) / 2)
    ]
    weights = attribute(model, targets, encoder, cells, named)
    assert np.abs(ends[0] - ends[1]).max() > 0.3
    np.testing.assert_allclose(of_each_cell(cells, weights), ends[0] - ends[1], atol=2e-3)


@pytest.mark.parametrize("kind", ["mlp", "perceiver", "qformer"])
def test_weights_of_gene_vectors_are_complete_too(tiny_model, kind):
    (model, targets), encoder, cells = new_model(tiny_model, kind), whitened_encoder(), draw_cells(9)
    named = np.arange(9) % 3
    tensors = encoder.embed(cells, TOP_K)
    vectors = tensors["gene_vectors"].astype(np.float32)
    ends = [log_probability(model, targets, part, tensors["lengths"], named) for part in (vectors, 0 * vectors)]
    weights = attribute(model, targets, encoder, cells, named, TOP_K)
    np.testing.assert_allclose(of_each_cell(cells, weights), ends[0] - ends[1], atol=5e-3)
    rank = np.arange(len(weights)) - cells.offsets[cells.cell]
    assert weights[rank < TOP_K].all() and not weights[rank >= TOP_K].any()


def test_batches_do_not_matter(tiny_model, monkeypatch):
    for kind in ("pooled", "mlp"):
        (model, targets), encoder, cells = new_model(tiny_model, kind), whitened_encoder(), draw_cells(7, two_panels())
        named = np.arange(7) % 3
        weights, again = (attribute(model, targets, encoder, cells, named, TOP_K) for _ in range(2))
        np.testing.assert_array_equal(weights, again)
        with monkeypatch.context() as patch:
            patch.setattr(evidence, "POINTS", 1)
            alone = attribute(model, targets, encoder, cells, named, TOP_K)
        np.testing.assert_allclose(alone, weights, atol=1e-5)


def planted(count, seed):
    """Return cells, each with the marker of its type and no other marker, and their types."""
    cells, random = draw_cells(count, seed=seed), np.random.default_rng(seed)
    types = np.arange(count) % 3
    lists, expression = [], []
    for number, (first, last) in enumerate(zip(cells.offsets[:-1], cells.offsets[1:], strict=True)):
        others = cells.tokens[first:last][~np.isin(cells.tokens[first:last], MARKERS)]
        lists.append([MARKERS[types[number]], *others])
        expression.append([7, *random.uniform(2, 6, len(others))])
    return ranked_cells(lists, expression, GENES), types


@pytest.fixture(scope="module")
def trained(tiny_model):
    """Return a model whose projector has learnt the cell type from planted markers, its targets and its encoder."""
    (model, targets), encoder = new_model(tiny_model), random_encoder(GENES, DIMENSIONS)
    encoder.axes.vectors[:] = 0.02 * encoder.axes.vectors
    encoder.axes.vectors[MARKERS, MARKERS] = 0.9  # so that the markers are not lost among the axes
    cells, types = planted(300, seed=2)
    pooled = torch.from_numpy(encoder.embed(cells, 0)["pooled"])
    model.projector.fit_inputs(pooled)
    labels = torch.stack([torch.from_numpy(types), torch.full((300,), -1)], dim=1)
    optimiser = torch.optim.Adam(model.projector.parameters(), 0.003)
    for _ in range(80):
        optimiser.zero_grad()
        targets.loss(*model.projector(pooled), labels).backward()
        optimiser.step()
    return model, targets, encoder


def test_a_gene_that_alone_makes_the_type_comes_first(trained):
    cells, types = planted(60, seed=3)
    found = explain_cells(*trained, cells, types, most=4)
    assert [one.for_genes[0] for one in found] == [MARKERS[number] for number in types]
    for number, one in enumerate(found):
        assert one.for_genes.dtype == np.int32 and one.for_weights.dtype == np.float64
        assert len(one.for_genes) <= 4 and len(one.against_genes) <= 4
        assert (np.diff(one.for_weights) <= 0).all() and (one.for_weights > 0).all()
        assert (np.diff(one.against_weights) >= 0).all() and (one.against_weights < 0).all()
        own = cells.tokens[cells.offsets[number] : cells.offsets[number + 1]]
        assert np.isin(one.for_genes, own).all() and np.isin(one.against_genes, own).all()


def test_the_marker_of_another_type_argues_against(trained):
    lists = [[0, 1, 20, 21, 22], [2, 0, 20, 21, 22], [1, 20, 21, 22]]
    cells = ranked_cells(lists, [np.full(len(genes), 5.0) for genes in lists], GENES)
    found = explain_cells(*trained, cells, np.array([0, 2, 0]), most=3)
    assert [one.for_genes[0] for one in found[:2]] == [0, 2]
    assert [one.against_genes[0] for one in found] == [1, 0, 1]


def test_a_cell_without_genes_has_no_evidence(trained):
    empty = ranked_cells([[], [0, 20], []], [[], [5.0, 4.0], []], GENES)
    found = explain_cells(*trained, empty, np.array([0, 0, 1]))
    assert [len(one.for_genes) + len(one.against_genes) for one in found] == [0, 2, 0]
    assert explain_cells(*trained, empty.take(np.arange(0)), np.empty(0, dtype=np.int64)) == []
    assert len(explain_cells(*trained, empty.take(np.array([0])), np.zeros(1, dtype=np.int64))) == 1


def test_pooled_vectors_of_other_encoders_are_an_error(tiny_model):
    class Nonlinear:
        """An encoder of which nothing is known."""

    model, targets = new_model(tiny_model)
    with pytest.raises(InputError, match="no gene can be made out in the pooled vectors of Nonlinear"):
        explain_cells(model, targets, Nonlinear(), draw_cells(2), np.zeros(2, dtype=np.int64))
