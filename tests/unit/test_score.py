"""Probabilities of all candidate names: packed into one pass, or each name in a sequence of its own."""

import logging
import math

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from cell2text.embedding.vectors import InMemoryVectors
from cell2text.generation import packed
from cell2text.generation.candidates import Candidates, find_candidates
from cell2text.generation.score import Packed, Plain, can_pack, choose_names, score_names
from cell2text.grammar import Terms
from cell2text.model import bundle, language_model
from cell2text.model.prompt import Prompt
from default_settings import finetune_settings, projector_settings
from tests_terms import two_names_per_slot
from tiny_architectures import CPU, FAMILIES, FEW_HEADS, build, write_model

TABLE = two_names_per_slot()
LABELS = {slot: sorted(rows["id"]) for slot, rows in TABLE.groupby("slot")}
VECTORS = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
LENGTHS = torch.full((6,), 7)
# derives positions from the mask (ALiBi)
PLAIN = {"bloom"}


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    monkeypatch.setattr(language_model, "pick_precision", lambda device: torch.float32)


@pytest.fixture
def steps(tiny_model):
    return find_candidates(LABELS, 2, Terms(TABLE), AutoTokenizer.from_pretrained(tiny_model))


def score_along(method, steps, chosen):
    """Return the scores of each step in a context of given names, so that contexts of all lengths occur."""
    scores = []
    for step, best in zip(steps, chosen.T, strict=True):
        scores.append(method.score(step))
        method.append(step, best)
    return scores


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"mamba"}))
def test_a_packed_tree_scores_as_each_name_in_a_sequence_of_its_own(tmp_path, tiny_model, steps, family, caplog):
    model = build(write_model(tmp_path, tiny_model, family, **FAMILIES[family][0]))
    with caplog.at_level(logging.INFO, logger="cell2text.generation"):
        packs = can_pack(model, VECTORS[:2], LENGTHS[:2], steps)
    assert packs == (family not in PLAIN), caplog.text
    assert caplog.text.count("cannot be computed in one pass") == (family in PLAIN)
    if packs:
        random = torch.Generator().manual_seed(4)
        chosen = torch.stack([torch.randint(len(step.ids), (6,), generator=random) for step in steps], 1)
        with torch.no_grad():
            methods = Packed(model, VECTORS, LENGTHS, negligible=0), Plain(model, VECTORS, LENGTHS)
            found, expected = (score_along(method, steps, chosen) for method in methods)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, atol=1e-3)
            assert float(other.std(0).max()) > 0.01  # the cells differ


@pytest.mark.parametrize(
    ("family", "changes"),
    [("mistral", FEW_HEADS | {"sliding_window": 8}), ("falcon", FAMILIES["falcon"][0] | {"alibi": True})],
)
def test_names_are_scored_one_by_one_where_packing_would_change_them(
    tmp_path, tiny_model, steps, caplog, family, changes
):
    model = build(write_model(tmp_path, tiny_model, family, **changes))
    with caplog.at_level(logging.INFO, logger="cell2text.generation"):
        (found,) = score_names(model, InMemoryVectors(VECTORS[:2, None], LENGTHS[:2, None]), steps, 4)
    assert caplog.text.count("cannot be computed in one pass") == 1
    expected = choose_names(Plain(model, VECTORS[:2], LENGTHS[:2]), steps)
    assert all(one.equal(other) for one, other in zip(found.log_probabilities, expected.log_probabilities, strict=True))


@pytest.fixture(scope="module")
def model(tiny_model):
    torch.manual_seed(1)
    return bundle.build(tiny_model, projector_settings(soft_tokens=3, hidden=16), 5, finetune_settings(), CPU).eval()


def test_probabilities_sum_to_one_and_the_second_programme_is_never_the_first(model, steps):
    vectors = InMemoryVectors(VECTORS[:, None], LENGTHS[:, None])
    for found in score_names(model, vectors, steps, 4):
        for scores in found.log_probabilities:
            assert scores.dtype == torch.float32
            assert torch.allclose(scores.exp().sum(1), torch.ones(len(scores)), atol=1e-5)
        assert bool(((found.mass >= 0) & (found.mass < 1)).all())
        first, second = found.chosen[:, 5], found.chosen[:, 6]
        assert not bool((first == second).any())
        assert bool((found.log_probabilities[6].gather(1, first[:, None]) == -math.inf).all())
        for number, scores in enumerate(found.log_probabilities):
            assert scores.argmax(1).equal(found.chosen[:, number])


@pytest.mark.parametrize("method", [Packed, Plain])
def test_padding_and_the_other_cells_of_a_batch_change_nothing(tiny_model, steps, method):
    torch.manual_seed(1)
    settings = projector_settings(kind="mlp", hidden=16)  # one soft token per gene, so that cells need padding
    model = bundle.build(tiny_model, settings, 5, finetune_settings(), CPU).eval()
    vectors = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([6, 2, 4, 1])
    together = choose_names(method(model, vectors, lengths), steps)
    for cell, length in enumerate(lengths.tolist()):
        alone = choose_names(method(model, vectors[cell : cell + 1, :length], lengths[cell : cell + 1]), steps)
        for one, many in zip(alone.log_probabilities, together.log_probabilities, strict=True):
            assert torch.allclose(one[0], many[cell], atol=1e-4)
        assert alone.chosen[0].equal(together.chosen[cell])


def test_little_memory_for_logits_changes_nothing(model, steps, monkeypatch):
    vectors = InMemoryVectors(VECTORS[:, None], LENGTHS[:, None])
    (together,) = score_names(model, vectors, steps, 64)
    monkeypatch.setattr(packed, "LOGITS", 0)  # one run per cell and pass
    monkeypatch.setattr(packed, "LOGITS_IN_FLOAT32", 0)
    monkeypatch.setattr(packed, "CELLS_TOGETHER", 2)
    batches = list(score_names(model, vectors, steps, 4))
    assert [len(batch.chosen) for batch in batches] == [4, 2]
    for number, scores in enumerate(together.log_probabilities):
        apart = torch.cat([batch.log_probabilities[number] for batch in batches])
        assert torch.allclose(apart.exp(), scores.exp(), atol=1e-4)


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
    for negligible in (0, 1e-4, 0.3, 0.5):
        passed.clear()
        found = choose_names(Packed(model, VECTORS[:1], LENGTHS[:1], negligible), [names])
        probabilities.append(found.log_probabilities[0].exp())
        tokens.append(sum(passed))
        assert float((probabilities[-1] - probabilities[0]).abs().max()) <= negligible + 1e-5
        assert bool((probabilities[-1] > 0).all())
    assert tokens[0] == tokens[1] > tokens[2] > tokens[3]


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
    (found,) = score_names(model, InMemoryVectors(VECTORS[:1, None], LENGTHS[:1, None]), steps, 1)
    raw = [0.8 * 0.5 * 0.4, 0.8 * 0.25, 0.8 * 0.5 * 0.6 * 0.5 * 0.4, 0.1 * 0.4]  # 0.16, 0.2, 0.048, 0.04
    assert found.log_probabilities[0].exp()[0].tolist() == pytest.approx([value / sum(raw) for value in raw], abs=1e-4)
    assert found.log_probabilities[1].exp()[0].tolist() == pytest.approx([0.15 / 0.35, 0.2 / 0.35], abs=1e-4)
    assert found.log_probabilities[2].exp()[0].tolist() == pytest.approx([1, 0], abs=1e-4)
    assert found.mass[0].tolist() == pytest.approx([sum(raw), 0.35, 0.15], abs=1e-4)
    assert found.chosen.tolist() == [[1, 1, 0]]
    # the run "b ." that starts with 0.1 of 0.8 + 0.1 stays unread, the others do not
    rough = choose_names(Packed(model, VECTORS[:1], LENGTHS[:1], negligible=0.3), steps[:1])
    assert rough.mass[0].tolist() == pytest.approx([sum(raw) + 0.1 - 0.04], abs=1e-4)
