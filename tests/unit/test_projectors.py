"""Projectors: what they read, what they ignore, and their number of weights."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from cell2text.model.projectors import PROJECTORS, build_projector, embed_ranks
from default_settings import projector_settings

DIMENSIONS, WIDTH, TOKENS, GENES = 5, 7, 3, 6
LENGTHS = torch.tensor([6, 2, 0, 1, 5])
KINDS = sorted(PROJECTORS)
READ_GENES = [kind for kind in KINDS if PROJECTORS[kind].reads == "gene_vectors"]
OF_QUERIES = ["perceiver", "qformer"]

close = {"rtol": 0, "atol": 1e-5}


def projector(kind, seed=0, **settings):
    torch.manual_seed(seed)
    settings = projector_settings(**{"kind": kind, "soft_tokens": TOKENS, "hidden": 8, "layers": 2} | settings)
    model = build_projector(settings, DIMENSIONS, WIDTH)
    if kind == "qformer":
        # Its initial weights are meant for 768 units; with 8 units genes would hardly change the output.
        for value in model.reader.parameters():
            value.data.mul_(15 if value.ndim == 2 else 1)
    return model


def cells(kind, seed=1):
    """Five cells, one of them without genes, with zeros after their last gene."""
    random = torch.Generator().manual_seed(seed)
    if kind == "pooled":
        return torch.randn(len(LENGTHS), DIMENSIONS, generator=random), LENGTHS
    vectors = torch.randn(len(LENGTHS), GENES, DIMENSIONS, generator=random)
    return vectors * (torch.arange(GENES) < LENGTHS[:, None])[..., None], LENGTHS


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind):
    soft, present = projector(kind)(*cells(kind))
    assert soft.shape == (5, GENES if kind == "mlp" else TOKENS, WIDTH)
    assert present.shape == soft.shape[:2]
    assert present.dtype == torch.bool
    assert present.sum(1).tolist() == (LENGTHS.tolist() if kind == "mlp" else [TOKENS] * 5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_of_soft_tokens_is_the_scale(kind):
    model = projector(kind)
    model.start_at(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))  # with norms 5 and 1
    soft, present = model(*cells(kind))
    assert torch.allclose(soft[present].norm(dim=-1), torch.tensor(3.0), **close)
    assert bool((soft[~present] == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_gets_the_same_tokens_alone_shuffled_and_in_training(kind):
    model, (vectors, lengths) = projector(kind).eval(), cells(kind)
    together = model(vectors, lengths)[0]
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.allclose(model(vectors[order], lengths[order])[0], together[order], **close)
    for i in range(5):
        assert torch.allclose(model(vectors[[i]], lengths[[i]])[0], together[[i]], **close)
    assert torch.allclose(model.train()(vectors, lengths)[0], together, **close)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


@pytest.mark.parametrize("padding", ["zeros", "garbage"])
@pytest.mark.parametrize("kind", READ_GENES)
def test_values_after_the_last_gene_are_ignored(kind, padding):
    model, (vectors, lengths) = projector(kind), cells(kind)
    longer = torch.cat([vectors, torch.zeros(5, 4, DIMENSIONS)], dim=1)
    if padding == "garbage":
        gene = torch.arange(GENES + 4) < lengths[:, None]
        longer = torch.where(gene[..., None], longer, 1000 * torch.randn(longer.shape))
    (before, _), (after, present) = model(vectors, lengths), model(longer, lengths)
    assert torch.allclose(after[:, : before.shape[1]], before, **close)
    assert not present[:, before.shape[1] :].any()
    assert bool((after[:, before.shape[1] :] == 0).all())


@pytest.mark.parametrize("kind", READ_GENES)
def test_soft_tokens_depend_on_every_gene_and_on_the_length(kind):
    model, (vectors, lengths) = projector(kind), cells(kind)
    before = model(vectors, lengths)[0]
    for gene in range(GENES):
        other = vectors.clone()
        other[0, gene] += 1
        changed = (model(other, lengths)[0] - before).abs().amax((1, 2))
        assert changed[0] > 1e-3
        assert changed[1:].max() < 1e-5
    shorter = lengths - torch.tensor([1, 0, 0, 0, 0])
    assert (model(vectors, shorter)[0] - before)[0].abs().max() > 1e-3


@pytest.mark.parametrize("kind", OF_QUERIES)
def test_soft_tokens_depend_on_the_order_of_genes(kind):
    model, (vectors, lengths) = projector(kind), cells(kind)
    swapped = vectors[:, [1, 0, 2, 3, 4, 5]]
    assert (model(swapped, lengths)[0] - model(vectors, lengths)[0])[0].abs().max() > 1e-3


@pytest.mark.parametrize("kind", OF_QUERIES)
def test_soft_tokens_of_a_cell_differ(kind):
    soft = projector(kind)(*cells(kind))[0]
    assert torch.pdist(soft[0]).min() > 1e-2


@pytest.mark.parametrize("kind", READ_GENES)
def test_a_cell_without_genes_gives_finite_tokens_and_gradients(kind):
    model, (vectors, _) = projector(kind), cells(kind)
    soft, _ = model(vectors, torch.zeros(5, dtype=torch.long))
    assert bool(soft.isfinite().all())
    soft.sum().backward()
    assert all(bool(value.grad.isfinite().all()) for value in model.parameters())


@pytest.mark.parametrize("kind", OF_QUERIES)
def test_a_cell_without_genes_reads_one_average_gene(kind):
    model, (vectors, lengths) = projector(kind), cells(kind)
    model.fit_inputs(torch.randn(20, DIMENSIONS) + 4)
    without = model(vectors, lengths)[0][2]
    average = model(model.centre.expand(1, 1, -1), torch.tensor([1]))[0][0]
    assert torch.allclose(without, average, **close)


def test_pooled_does_not_read_the_length():
    model, (vectors, lengths) = projector("pooled"), cells("pooled")
    assert torch.equal(model(vectors, lengths)[0], model(vectors)[0])


def test_a_soft_token_of_mlp_depends_only_on_its_gene():
    model, (vectors, lengths) = projector("mlp"), cells("mlp")
    soft = model(vectors, lengths)[0]
    alone = model(vectors[0][:, None], torch.ones(GENES, dtype=torch.long))[0]
    assert torch.allclose(soft[0], alone[:, 0], **close)
    other = vectors.clone()
    other[0, 2] += 1
    changed = (model(other, lengths)[0] - soft)[0].abs().amax(1) > 1e-4
    assert changed.tolist() == [False, False, True, False, False, False]


def test_all_dimensions_of_the_inputs_share_one_spread():
    model = build_projector(projector_settings(kind="mlp", soft_tokens=1, hidden=4), 2, WIDTH)
    model.fit_inputs(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
    assert model.centre.tolist() == [1, 2]
    assert model.spread.tolist() == pytest.approx([math.sqrt(2.5)] * 2)


@pytest.mark.parametrize("kind", KINDS)
def test_shift_and_scale_of_the_inputs_do_not_matter(kind):
    model, (vectors, lengths) = projector(kind), cells(kind)
    seen = vectors.reshape(-1, DIMENSIONS)
    model.fit_inputs(seen)
    before = model(vectors, lengths)[0]
    model.fit_inputs(50 * seen + 20)
    assert torch.allclose(model(50 * vectors + 20, lengths)[0], before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_gets_a_gradient(kind):
    model, (vectors, lengths) = projector(kind), cells(kind)
    soft, _ = model(vectors, lengths)
    (soft * torch.randn(soft.shape)).sum().backward()
    for name, value in model.named_parameters():
        # The bias of keys adds the same value to all scores of a query, which the softmax cancels.
        if not name.endswith("key.bias"):
            assert value.grad.abs().max() > 1e-6, name


# 5 dimensions, width 7, 8 hidden units, 3 soft tokens and 2 layers; + 1 is the scale.
TWO_LAYERS = (5 + 1) * 8
AROUND_QUERIES = (5 + 1) * 8 + 3 * 8 + (8 + 1) * 7 + 1
ATTENTION = 4 * (8 + 1) * 8  # projections to queries, keys and values, and of the output
FEED_FORWARD = (8 + 1) * 32 + (32 + 1) * 8
NORM = 2 * 8


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("pooled", TWO_LAYERS + (8 + 1) * 3 * 7 + 1),  # 238
        ("mlp", TWO_LAYERS + (8 + 1) * 7 + 1),  # 112
        ("perceiver", AROUND_QUERIES + 2 * (2 * ATTENTION + FEED_FORWARD + 4 * NORM) + NORM),
        ("qformer", AROUND_QUERIES + NORM + 2 * (2 * ATTENTION + FEED_FORWARD + 3 * NORM)),
    ],
)
def test_number_of_weights(kind, number):
    assert sum(value.numel() for value in projector(kind).parameters()) == number


@pytest.mark.parametrize("kind", OF_QUERIES)
def test_the_number_of_layers_is_a_setting_with_two_as_the_default(kind):
    def size(model):
        return sum(value.numel() for value in model.parameters())

    one, two, three = (projector(kind, layers=layers) for layers in (1, 2, 3))
    assert size(three) - size(two) == size(two) - size(one) > 0
    default = build_projector(projector_settings(kind=kind, soft_tokens=TOKENS, hidden=8), DIMENSIONS, WIDTH)
    assert size(default) == size(two)


@pytest.mark.parametrize("kind", OF_QUERIES)
@pytest.mark.parametrize(("asked", "heads", "hidden"), [(1, 1, 1), (65, 1, 65), (128, 2, 128), (200, 3, 198)])
def test_hidden_units_are_rounded_to_whole_heads(kind, asked, heads, hidden):
    model = projector(kind, hidden=asked, layers=1)
    assert (model.heads, model.hidden) == (heads, hidden)
    assert model(*cells(kind))[0].shape == (5, TOKENS, WIDTH)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_and_loaded_projector_gives_the_same_tokens(kind, tmp_path):
    model, (vectors, lengths) = projector(kind), cells(kind)
    model.fit_inputs(torch.randn(20, DIMENSIONS) + 4)
    model.start_at(torch.randn(9, WIDTH))
    save_file(model.state_dict(), tmp_path / "projector.safetensors")
    again = projector(kind, seed=1)
    assert not torch.allclose(again(vectors, lengths)[0], model(vectors, lengths)[0], atol=1e-2)
    again.load_state_dict(load_file(tmp_path / "projector.safetensors"), strict=True)
    assert torch.equal(again(vectors, lengths)[0], model(vectors, lengths)[0])


@pytest.mark.parametrize("kind", ["pooled", "mlp"])
def test_names_of_weights_match_saved_models(kind):
    linear = {f"layers.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}
    assert set(projector(kind).state_dict()) == {"scale", "centre", "spread"} | linear


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_projector(kind):
    one, same, other = projector(kind), projector(kind), projector(kind, seed=2)
    vectors, lengths = cells(kind)
    assert torch.equal(one(vectors, lengths)[0], same(vectors, lengths)[0])
    assert not torch.allclose(one(vectors, lengths)[0], other(vectors, lengths)[0], atol=1e-2)


def test_ranks_are_embedded_by_their_logarithm():
    embedded = embed_ranks(100, 4, torch.device("cpu"))
    assert embedded[0].tolist() == [0, 0, 1, 1]  # rank 1, with logarithm 0
    slow, fast = 0.1 * math.log(100), 10 * math.log(100)
    expected = [math.sin(slow), math.sin(fast), math.cos(slow), math.cos(fast)]
    assert embedded[99].tolist() == pytest.approx(expected, abs=1e-4)
    assert torch.equal(embed_ranks(7, 4, torch.device("cpu")), embedded[:7])
    assert embed_ranks(7, 5, torch.device("cpu")).shape == (7, 5)
