"""Probabilities of all candidate names: packed into one pass, or each name in a sequence of its own."""

import logging
import math

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from cell2text.embedding.vectors import InMemoryVectors
from cell2text.generation import packed
from cell2text.generation.attention import among_few_tokens, attend
from cell2text.generation.candidates import Candidates, find_candidates
from cell2text.generation.score import Packed, Plain, can_pack, leave_out_named, score_names
from cell2text.grammar import Terms
from cell2text.model import bundle
from cell2text.model.prompt import Prompt
from default_settings import finetune_settings, projector_settings
from tests_terms import two_names_per_slot
from tiny_architectures import CPU, FAMILIES, FEW_HEADS, build, write_model

pytestmark = pytest.mark.usefixtures("in_float32")

TABLE = two_names_per_slot()
LABELS = {slot: sorted(rows["id"]) for slot, rows in TABLE.groupby("slot")}
VECTORS = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
LENGTHS = torch.full((6,), 7)
# bloom derives positions from the mask (ALiBi), gpt_neo lets each token read only those before it in its row
PLAIN = {"bloom", "gpt_neo"}


@pytest.fixture
def steps(tiny_model):
    return find_candidates(LABELS, 2, Terms(TABLE), AutoTokenizer.from_pretrained(tiny_model))


def draft(steps, cells=6):
    """Names at random, so that contexts of all lengths occur."""
    random = torch.Generator().manual_seed(4)
    return torch.stack([torch.randint(len(step.ids), (cells,), generator=random) for step in steps], 1)


def score(model, steps, cells=6, drafts=None, batch=4):
    drafts = (draft(steps, cells) if drafts is None else drafts).numpy()
    vectors = InMemoryVectors(VECTORS[:cells, None], LENGTHS[:cells, None])
    return list(score_names(model, vectors, np.arange(cells), steps, drafts, batch))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"mamba"}))
def test_a_packed_tree_scores_as_each_name_in_a_sequence_of_its_own(tmp_path, tiny_model, steps, family, caplog):
    model = build(write_model(tmp_path, tiny_model, family, **FAMILIES[family][0]))
    with caplog.at_level(logging.INFO, logger="cell2text.generation"):
        packs = can_pack(model, VECTORS[:2], LENGTHS[:2], draft(steps, 2), steps)
    assert packs == (family not in PLAIN), caplog.text
    assert caplog.text.count("cannot be computed in one pass") == (family in PLAIN)
    if packs:
        found, expected = (
            method.score(VECTORS, LENGTHS, draft(steps))
            for method in (Packed(model, steps, negligible=0), Plain(model, steps))
        )
        assert torch.allclose(found, expected, atol=1e-3)
        assert float(expected.std(0).max()) > 0.01  # the cells differ


@pytest.mark.parametrize(
    ("family", "changes"),
    [("mistral", FEW_HEADS | {"sliding_window": 8}), ("falcon", FAMILIES["falcon"][0] | {"alibi": True})],
)
def test_names_are_scored_one_by_one_where_packing_would_change_them(
    tmp_path, tiny_model, steps, caplog, family, changes
):
    model = build(write_model(tmp_path, tiny_model, family, **changes))
    with caplog.at_level(logging.INFO, logger="cell2text.generation"):
        (found,) = score(model, steps, 2)
    assert caplog.text.count("cannot be computed in one pass") == 1
    expected = leave_out_named(
        Plain(model, steps).score(VECTORS[:2], LENGTHS[:2], draft(steps, 2)), steps, draft(steps, 2)
    )
    assert all(one.equal(other) for one, other in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def model(tiny_model):
    torch.manual_seed(1)
    return bundle.build(tiny_model, projector_settings(soft_tokens=3, hidden=16), 5, finetune_settings(), CPU).eval()


def test_probabilities_sum_to_one_and_the_second_programme_is_never_the_first(model, steps):
    first = draft(steps)[:, 5]
    for number, found in enumerate(score(model, steps)):
        for scores in found:
            assert scores.dtype == torch.float32
            assert torch.allclose(scores.exp().sum(1), torch.ones(len(scores)), atol=1e-5)
        named = first[4 * number :][: len(found[6]), None]
        assert bool((found[6].gather(1, named) == -math.inf).all())
        assert int(found[6].isneginf().sum()) == len(named) and not found[5].isneginf().any()


def test_a_name_is_scored_in_the_context_of_the_drafted_names_before_it(model, steps):
    drafts = draft(steps)
    (found,) = score(model, steps, batch=6)
    for changed in (0, 3):
        others = drafts.clone()
        others[:, changed] = (others[:, changed] + 1) % len(steps[changed].ids)
        (again,) = score(model, steps, drafts=others, batch=6)
        for number, (one, other) in enumerate(zip(found, again, strict=True)):
            assert torch.allclose(one.exp(), other.exp(), atol=1e-5) == (number <= changed)


@pytest.mark.parametrize("method", [Packed, Plain])
def test_padding_and_the_other_cells_of_a_batch_change_nothing(tiny_model, steps, method):
    torch.manual_seed(1)
    settings = projector_settings(kind="mlp", hidden=16)  # one soft token per gene, so that cells need padding
    model = bundle.build(tiny_model, settings, 5, finetune_settings(), CPU).eval()
    vectors = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(3))
    lengths, drafts, scorer = torch.tensor([6, 2, 4, 1]), draft(steps, 4), method(model, steps)
    together = scorer.score(vectors, lengths, drafts)
    for cell, length in enumerate(lengths.tolist()):
        one = slice(cell, cell + 1)
        assert torch.allclose(
            scorer.score(vectors[one, :length], lengths[one], drafts[one])[0], together[cell], atol=1e-4
        )


def test_few_cells_read_together_get_the_same_scores(model, steps, monkeypatch):
    (together,) = score(model, steps, batch=64)
    monkeypatch.setattr(packed, "CELLS_TOGETHER", 2)
    batches = score(model, steps)
    assert [len(batch[0]) for batch in batches] == [4, 2]
    for number, scores in enumerate(together):
        apart = torch.cat([batch[number] for batch in batches])
        assert torch.allclose(apart.exp(), scores.exp(), atol=1e-4)


def test_a_head_for_some_tokens_computes_their_logits_alone_and_leaves_no_trace(model):
    words, before = torch.tensor([7, 3, 250]), model.base_model.get_output_embeddings()
    inputs = model.embed_tokens(torch.arange(5))[None]
    whole = model.language_model(inputs_embeds=inputs).logits
    with pytest.raises(KeyError), model.head_for(words):
        assert torch.allclose(model.language_model(inputs_embeds=inputs).logits, whole[..., words], atol=1e-5)
        raise KeyError
    assert model.base_model.get_output_embeddings() is before
    before.bias = torch.nn.Parameter(torch.arange(float(model.vocabulary)))
    with model.head_for(words):
        biased = model.language_model(inputs_embeds=inputs).logits
    assert torch.allclose(biased, whole[..., words] + words, atol=1e-4)


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_attention_among_few_tokens_is_that_of_torch(model, scaling):
    random = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(3, heads, n, 8, generator=random) for heads, n in ((6, 4), (2, 7), (2, 7)))
    mask = torch.zeros(3, 1, 4, 7).masked_fill(torch.rand(3, 1, 4, 7, generator=random) < 0.3, -1e9)
    expected = functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
    found, _ = attend(model, query, key, value, mask, scaling=scaling)
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-5)
    without, _ = attend(model, query, key.repeat(1, 3, 1, 1), value.repeat(1, 3, 1, 1), None, scaling=scaling)
    assert without.shape == found.shape


def test_a_language_model_gets_its_own_attention_back(model):
    assert model.base_model.config._attn_implementation == "sdpa"
    with pytest.raises(KeyError), among_few_tokens(model.base_model):
        assert model.base_model.config._attn_implementation != "sdpa"
        raise KeyError
    assert model.base_model.config._attn_implementation == "sdpa"


A, B, STOP, COMMA, X, Y = range(300, 306)  # tokens


@pytest.fixture
def names():
    tokens = ((A, B, STOP), (A, STOP), (A, B, COMMA, B, STOP), (B, STOP))
    return Candidates("cell_type", ("ab", "a", "ab, b", "b"), tokens)


@pytest.fixture
def follows(tiny_model):
    """The probability of each token after another."""
    return {
        int(Prompt.of(AutoTokenizer.from_pretrained(tiny_model)).after[-1]): {A: 0.8, B: 0.1, X: 0.1},
        A: {B: 0.5, STOP: 0.25, X: 0.25},
        B: {STOP: 0.4, COMMA: 0.6},
        COMMA: {A: 0.5, B: 0.5},
        STOP: {X: 0.3, Y: 0.2, A: 0.5},
        X: {STOP: 0.5, COMMA: 0.5},
        Y: {STOP: 1.0},
    }


def test_what_stays_unread_changes_no_probability_by_more_than_is_negligible(tmp_path, tiny_model, names, follows):
    model = build(write_bigrams(tmp_path, tiny_model, follows))
    passed = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: passed.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    tokens, probabilities = [], []
    for negligible in (0, 1e-3, 0.2, 0.6, 0.9):
        scorer = Packed(model, [names], negligible)
        passed.clear()
        probabilities.append(scorer.score(VECTORS[:1], LENGTHS[:1], torch.tensor([[3]])).exp())  # the draft is "b"
        tokens.append(sum(passed))
        assert float((probabilities[-1] - probabilities[0]).abs().max()) <= negligible + 1e-5
        assert bool((probabilities[-1] > 0).all()) and float(probabilities[-1].sum()) == pytest.approx(1, abs=1e-4)
    assert tokens[0] == tokens[1] == tokens[2] > tokens[3] > tokens[4]


def write_bigrams(folder, tiny_model, follows):
    """A model whose next token depends on the last one alone, with the given probabilities."""
    write_model(folder, tiny_model, "llama", **FEW_HEADS)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:  # no layer adds anything to the embedding of a token
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
        embeddings.fill_(1.0), head.zero_()
        for place, (token, probabilities) in enumerate(follows.items()):
            embeddings[token] = functional.one_hot(torch.tensor(place), 32).float()
            head[:, place] = -40 / 32**0.5  # the final norm makes a one-hot vector of length sqrt(32)
            for after, probability in probabilities.items():
                head[after, place] = math.log(probability) / 32**0.5
    model.save_pretrained(folder)
    return folder


def test_probabilities_are_those_computed_by_hand(tmp_path, tiny_model, names, follows):
    model = build(write_bigrams(tmp_path, tiny_model, follows))
    programmes = ("x", "y"), ((X, STOP), (Y, STOP))
    steps = [names, Candidates("pathway", *programmes), Candidates("pathway", *programmes)]
    # after the prompt A and B part, 0.8 to 0.1; after A B and STOP, 0.5 to 0.25; after A B, STOP and COMMA, 0.4 to 0.6
    a, b = 8 / 9, 1 / 9
    expected = [a * 2 / 3 * 0.4, a / 3, a * 2 / 3 * 0.6, b]
    for best in range(4):
        (found,) = score(model, steps, 1, torch.tensor([[best, 1, 0]]))
        assert found[0].exp()[0].tolist() == pytest.approx(expected, abs=1e-4)
        assert found[1].exp()[0].tolist() == pytest.approx([0.6, 0.4], abs=1e-4)  # X and Y after STOP, 0.3 to 0.2
        assert found[2].exp()[0].tolist() == pytest.approx([1, 0], abs=1e-4)
    # the names after A share its probability if the draft does not read them
    rough = Packed(model, steps[:1], negligible=0.9).score(VECTORS[:1], LENGTHS[:1], torch.tensor([[3]])).exp()
    assert rough[0].tolist() == pytest.approx([a / 3] * 3 + [b], abs=1e-4)
