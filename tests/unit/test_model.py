"""The path from vectors to text, on a tiny real language model."""

import copy
import sys
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from cell2text.errors import InputError
from cell2text.generation.decode import Written, write_texts
from cell2text.generation.describe import decode, read_text
from cell2text.model import bundle, fast, language_model
from cell2text.model.alignment import DescriptionTargets, LabelTargets, number_labels
from cell2text.model.cell2text import INSTRUCTION
from cell2text.model.fast import layers as fused
from cell2text.model.fast.attention import CELLS_IN_CACHE, Row, SharedPromptAttention
from cell2text.model.fast.layers import FusedGate, FusedLora, FusedNorm, Rotation, fuse_norms, fuse_rotations, rotate
from cell2text.model.fast.loss import TextLoss
from cell2text.model.projectors import PROJECTORS
from default_settings import finetune_settings, projector_settings

CPU = torch.device("cpu")
LORA = finetune_settings(lora_rank=4, lora_alpha=8)


@pytest.fixture
def build(tiny_model, monkeypatch):
    monkeypatch.setattr(language_model, "pick_precision", lambda device: torch.float32)

    def make(kind="pooled", seed=0, speed_up=True):
        torch.manual_seed(seed)
        model = bundle.build(tiny_model, projector_settings(kind=kind, soft_tokens=3, hidden=16), 5, LORA, CPU)
        if speed_up:
            fast.speed_up(model)
        with torch.no_grad():  # an adapter that has no effect would hide mistakes
            for name, value in model.trainable().items():
                if "lora_B" in name:
                    value.normal_(0, 0.05)
        return model.eval()

    return make


def cells(kind, count=4, seed=1):
    torch.manual_seed(seed)
    if kind == "pooled":
        return torch.randn(count, 5), torch.full((count,), 7)
    vectors, lengths = torch.randn(count, 6, 5), torch.tensor([6, 2, 4, 1, 5, 3][:count])
    return vectors * (torch.arange(6) < lengths[:, None])[..., None], lengths


def stock_rotation():
    """Return transformers' own function, whether or not a model has been built that replaces it."""
    function = modeling_llama.apply_rotary_pos_emb
    return function.args[0] if isinstance(function, partial) else function


@pytest.mark.parametrize("kind", sorted(PROJECTORS))
def test_soft_tokens_have_the_length_of_the_models_own(build, kind):
    model = build(kind)
    soft, there = model.projector(*cells(kind))
    typical = model.language_model.get_input_embeddings().weight.norm(dim=-1).mean()
    assert torch.allclose(soft[there].norm(dim=-1), typical.expand(int(there.sum())), rtol=1e-5)


@pytest.mark.parametrize("kind", sorted(PROJECTORS))
def test_batch_mates_change_nothing(build, kind):
    model, (vectors, lengths) = build(kind), cells(kind)
    text = torch.randint(5, 300, (4, 9))
    there = torch.arange(9) < torch.tensor([9, 4, 7, 2])[:, None]
    together = [
        model.text_loss(*model.projector(vectors, lengths), text, there & (torch.arange(4) == i)[:, None])[0]
        for i in range(4)
    ]
    for i in range(4):
        row = slice(i, i + 1)
        width = int(there[i].sum())
        # alone, and without any padding at all
        short = vectors[row] if kind == "pooled" else vectors[row, : lengths[i]]
        alone, tokens = model.text_loss(*model.projector(short, lengths[row]), text[row, :width], there[row, :width])
        assert int(tokens) == width
        assert torch.allclose(alone, together[i], rtol=1e-4), kind


@pytest.mark.parametrize("kind", sorted(PROJECTORS))
def test_the_fast_path_gives_the_loss_and_gradients_of_the_plain_one(build, kind):
    (vectors, lengths), model, plain = cells(kind), build(kind), build(kind, speed_up=False)
    text = torch.randint(5, 300, (4, 9))
    there = torch.arange(9) < torch.tensor([9, 4, 7, 2])[:, None]
    assert sum(type(part) is FusedLora for part in model.modules()) == 14
    assert sum(type(part) is FusedNorm for part in model.modules()) == 5
    assert sum(type(part) is FusedGate for part in model.modules()) == 2
    losses = []
    for one in (model, plain):
        loss, tokens = one.text_loss(*one.projector(vectors, lengths), text, there)
        loss.backward()
        losses.append(loss)
        assert int(tokens) == 22
    assert torch.allclose(*losses, rtol=1e-5)
    gradients = {name: value.grad for name, value in model.trainable().items()}
    for name, value in plain.trainable().items():
        assert torch.allclose(gradients[name], value.grad, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("kind", sorted(PROJECTORS))
def test_the_plain_path_gives_the_loss_of_transformers_one_cell_at_a_time(build, kind):
    (vectors, lengths), model = cells(kind), build(kind, speed_up=False)
    text = torch.randint(5, 300, (4, 9))
    there = torch.arange(9) < torch.tensor([9, 4, 7, 2])[:, None]
    ours, _ = model.text_loss(*model.projector(vectors, lengths), text, there)
    theirs = 0
    for i in range(4):
        prompt, mask = model.read_cells(vectors[i : i + 1], lengths[i : i + 1])
        prompt, words = prompt[:, mask[0]], text[i : i + 1][:, there[i]]
        labels = torch.cat([torch.full((1, prompt.shape[1]), -100), words], 1)
        embeddings = torch.cat([prompt, model.embed_tokens(words)], 1)
        theirs = theirs + model.language_model(inputs_embeds=embeddings, labels=labels).loss * words.shape[1]
    assert torch.allclose(ours, theirs, rtol=1e-5)


def test_both_paths_judge_the_same_tokens(build):
    (vectors, lengths), judged = cells("pooled"), torch.arange(9) < torch.tensor([3, 0, 5, 2])[:, None]
    text, there = torch.randint(5, 300, (4, 9)), torch.arange(9) < torch.tensor([9, 4, 7, 2])[:, None]
    plain, found = build(speed_up=False), []
    text[0, :3] = torch.tensor(write_texts(plain, vectors[:1], lengths[:1], 3)[0].ids)
    for model in (build(), plain):
        soft = model.projector(vectors, lengths)
        loss, chosen = model.judge_text(*soft, text, there, judged)
        assert torch.allclose(loss, model.text_loss(*soft, text, there)[0], rtol=1e-5)
        assert chosen[0, :3].all() and chosen[~judged].all() and not chosen.all()
        found.append(chosen)
    assert torch.equal(*found)


def test_a_model_that_differs_is_reported_and_not_sped_up(build, monkeypatch, caplog):
    model, (vectors, lengths) = build(speed_up=False), cells("pooled")
    text, there = torch.randint(5, 300, (4, 9)), torch.ones(4, 9, dtype=torch.bool)
    soft, present = (part.detach() for part in model.projector(vectors, lengths))
    monkeypatch.setattr(fast, "fuse_norms", lambda model: model.get_decoder().norm.weight.data.mul_(1.01))
    with caplog.at_level("INFO", logger="cell2text.model"):
        assert not fast.check(model, soft, present, text, there)
    assert len(caplog.messages) == 1 and "nats per token, not" in caplog.text


@pytest.mark.parametrize("biased", [False, True])
def test_text_loss_is_cross_entropy(biased):
    torch.manual_seed(0)
    weight, targets = torch.randn(50, 8), torch.randint(0, 50, (300,))  # more tokens than are scored at once
    bias = torch.randn(50) if biased else None
    states = (10 * torch.randn(300, 8)).requires_grad_()
    ours = TextLoss.apply(states, weight, bias, targets)
    (gradient,) = torch.autograd.grad(3 * ours, states)
    theirs = functional.cross_entropy(functional.linear(states, weight, bias), targets, reduction="sum")
    assert torch.allclose(ours, theirs, rtol=1e-5)
    assert torch.allclose(gradient, torch.autograd.grad(3 * theirs, states)[0], atol=1e-3, rtol=1e-4)


def test_fused_norm_takes_the_place_of_its_equals_alone():
    class OtherRMSNorm(LlamaRMSNorm):  # Gemma's adds 1 to the weight
        def forward(self, x):
            return super().forward(x) + x / x.pow(2).mean(-1, keepdim=True).add(self.variance_epsilon).sqrt()

    model = torch.nn.ModuleDict({"same": LlamaRMSNorm(16), "other": OtherRMSNorm(16)}).requires_grad_(False)
    model["same"].weight.copy_(torch.randn(16))
    names, stock = set(model.state_dict()), copy.deepcopy(model["same"])
    fuse_norms(model)
    assert (type(model["same"]), type(model["other"])) == (FusedNorm, OtherRMSNorm)
    assert set(model.state_dict()) == names
    x, direction = torch.randn(2, 3, 16, requires_grad=True), torch.randn(2, 3, 16)
    assert torch.allclose(model["same"](x), stock(x), atol=1e-6)
    ours, theirs = (torch.autograd.grad((norm(x) * direction).sum(), x)[0] for norm in (model["same"], stock))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_fused_gates_take_the_place_of_their_equals_alone():
    torch.manual_seed(0)
    settings = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "mlp_bias": True,
    }
    stock = modeling_llama.LlamaMLP(modeling_llama.LlamaConfig(**settings))
    other = modeling_llama.LlamaMLP(modeling_llama.LlamaConfig(**settings, hidden_act="gelu"))
    packed = copy.deepcopy(stock)
    packed.gate_proj = torch.nn.Identity()
    model = torch.nn.ModuleDict({"same": copy.deepcopy(stock), "other": other, "packed": packed})
    names = set(model.state_dict())
    fused.fuse_gates(model)
    assert [type(model[name]) for name in model] == [FusedGate, modeling_llama.LlamaMLP, modeling_llama.LlamaMLP]
    assert set(model.state_dict()) == names
    x = torch.randn(5, 8, requires_grad=True)
    for ours, theirs in zip(
        *([y, *torch.autograd.grad(y.sum(), x)] for y in (model["same"](x), stock(x))), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_what_is_compiled_computes_the_same(monkeypatch):
    torch.manual_seed(0)
    x, weight, d = torch.randn(3, 70, 64).bfloat16(), torch.randn(64).bfloat16(), torch.randn(3, 70, 64).bfloat16()
    inverse = fused.normalise(x, weight, 1e-5)[1]
    functions = [
        (fused.normalise, (x, weight, 1e-5)),
        (fused.differentiate_norm, (d, x, weight, inverse)),
        (fused.gate_by_silu, (x, d)),
        (fused.differentiate_gate, (d, x, weight.expand_as(x))),
    ]
    compiled = [function(*arguments) for function, arguments in functions]
    monkeypatch.setattr(fused, "can_compile", lambda: False)
    for (function, arguments), found in zip(functions, compiled, strict=True):
        exact = function(*(part.float() if torch.is_tensor(part) else part for part in arguments))
        plain = function(*arguments)
        for a, b, c in zip(
            *(parts if isinstance(parts, tuple) else [parts] for parts in (found, plain, exact)), strict=True
        ):
            assert torch.allclose(a.float(), c, rtol=0.02, atol=0.02), function
            assert (a.float() - c).abs().mean() <= 1.01 * (b.float() - c).abs().mean(), function


def test_without_a_compiler_a_step_is_as_it_is_written(monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no g++\nand a long story")

    fused.can_compile.cache_clear()
    monkeypatch.setattr(torch, "compile", fail)
    with caplog.at_level("INFO", logger="cell2text.model"):
        assert not fused.can_compile()
    fused.can_compile.cache_clear()
    assert caplog.messages == ["torch cannot compile here, so a step takes a little longer (no g++)"]


def test_rotation_is_that_of_transformers():
    torch.manual_seed(0)
    q, k = (torch.randn(1, heads, 5, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2))
    cos, sin = torch.randn(2, 1, 5, 8, dtype=torch.float64)  # no angles: every number has to be at its own place
    general = stock_rotation()
    for ours, theirs in zip(rotate(None, q, k, cos, sin), general(q, k, cos, sin), strict=True):
        assert torch.allclose(ours, theirs)
    assert torch.autograd.gradcheck(lambda q, k: Rotation.apply(cos[:, None], sin[:, None], q, k), (q, k))


def test_rotations_that_differ_are_left_alone(monkeypatch):
    home = ModuleType("home")
    monkeypatch.setitem(sys.modules, "home", home)
    layer = type("Layer", (torch.nn.Module,), {"__module__": "home"})()
    general = stock_rotation()

    def other(q, k, cos, sin, unsqueeze_dim=1):
        return [-x for x in general(q, k, cos, sin, unsqueeze_dim)]

    def further(q, k, cos, sin, positions, unsqueeze_dim=1):
        return general(q, k, cos, sin, unsqueeze_dim)

    for function in (other, further, general):
        home.apply_rotary_pos_emb = function
        fuse_rotations(layer)
        assert isinstance(home.apply_rotary_pos_emb, partial) == (function is general)
    fused = home.apply_rotary_pos_emb
    fuse_rotations(layer)
    assert home.apply_rotary_pos_emb is fused
    # of a head that turns in part the general function is asked
    home.apply_rotary_pos_emb = partial(rotate, lambda *arguments: arguments)
    arguments = (torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), torch.ones(1, 3, 4), torch.ones(1, 3, 4), 1)
    assert home.apply_rotary_pos_emb(*arguments) == arguments


def test_attention_of_a_row_is_that_of_one_large_mask():
    torch.manual_seed(0)
    prompt, cells, length, heads, groups = 3, 2 * CELLS_IN_CACHE + 3, 40, 4, 2
    there = torch.arange(length) < torch.randint(2, length + 1, (cells,))[:, None]
    there[:, 1] = False  # as a projector leaves it that has fewer soft tokens for a cell
    row = Row.of(prompt, there, torch.float64)
    assert [part.cells for part in row.parts] == [CELLS_IN_CACHE, CELLS_IN_CACHE, 3]
    tokens = prompt + int(there.sum())
    filled = row.positions().shape[1]
    assert (filled % 32, filled - tokens) == (0, row.filling) and row.filling
    q, k, v = (
        torch.randn(1, filled, count, 6, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for count in (heads, groups, groups)
    )
    # of which cell each token is; the prompt is of all
    owner = torch.cat([torch.full((prompt,), -1), torch.arange(cells)[:, None].expand(-1, length)[there]])
    seen = ((owner[None] == owner[:, None]) | (owner == -1)).tril()
    ours = SharedPromptAttention.apply(q, k, v, row, 0.3)
    without = (part[:, :, :tokens] for part in (q, k, v))
    theirs = functional.scaled_dot_product_attention(*without, seen, scale=0.3, enable_gqa=True).transpose(1, 2)
    assert torch.allclose(ours[:, :tokens], theirs) and not ours[:, tokens:].any()
    direction = torch.randn_like(ours)
    of_ours = torch.autograd.grad(ours, (q, k, v), direction)
    of_theirs = torch.autograd.grad(theirs, (q, k, v), direction[:, :tokens])
    for mine, other in zip(of_ours, of_theirs, strict=True):
        assert torch.allclose(mine, other) and not mine[:, :, tokens:].any()


def test_prompt_is_the_chat_template_with_the_cell_in_it(build):
    model = build()
    before, after = (model.tokenizer.decode(half) for half in (model.prompt.before, model.prompt.after))
    assert before + after == f"<|start|>user\n{INSTRUCTION} <|end|>\n<|start|>assistant\n"


def test_only_adapter_and_projector_learn(build):
    model = build()
    assert model.trainable()
    assert all("lora_" in name or name.startswith("projector.") for name in model.trainable())


@pytest.mark.parametrize("kind", sorted(PROJECTORS))
def test_greedy_decoding_equals_transformers_generate(build, kind):
    model, (vectors, lengths) = build(kind), cells(kind)
    model.ready_to_write()
    written = write_texts(model, vectors, lengths, 12)
    for i in range(4):
        embeddings, mask = model.read_cells(vectors[i : i + 1], lengths[i : i + 1])
        expected = model.language_model.generate(
            inputs_embeds=embeddings, attention_mask=mask.long(), do_sample=False, max_new_tokens=12
        )[0].tolist()
        end = model.tokenizer.eos_token_id
        expected = expected[: expected.index(end)] if end in expected else expected
        assert written[i].ids == expected


def test_log_probabilities_are_those_of_a_forward_pass(build):
    model, (vectors, lengths) = build(), cells("pooled", 1)
    merged = copy.deepcopy(model).ready_to_write()
    written = write_texts(merged, vectors, lengths, 6)[0]
    soft = model.projector(vectors, lengths)
    there = torch.ones(1, len(written.ids), dtype=torch.bool)
    with torch.no_grad():
        sums = [
            float(model.text_loss(*soft, torch.tensor([written.ids[:n]]), there[:, :n])[0])
            for n in range(1, len(written.ids) + 1)
        ]
    assert -np.cumsum(written.log_probabilities) == pytest.approx(np.array(sums), abs=1e-4)


def test_saved_and_loaded_model_writes_the_same(build, tiny_model, tmp_path):
    model, (vectors, lengths) = build(), cells("pooled")
    bundle.save(model, tmp_path, {"seed": 1})
    again = bundle.load(tmp_path, tiny_model, CPU)
    model.language_model.set_attn_implementation("sdpa")
    ours, theirs = (write_texts(one, vectors, lengths, 8) for one in (again, model))
    assert [one.ids for one in ours] == [one.ids for one in theirs]
    weights = again.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.trainable().items())
    assert not [path for path in tmp_path.rglob("*") if path.suffix in {".bin", ".pt", ".pkl"}]


def test_load_refuses_missing_weights(build, tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    bundle.save(build(), tmp_path, {})
    file = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(sorted(weights)[0])
    save_file(weights, file)
    with pytest.raises(InputError, match="weights missing"):
        bundle.load(tmp_path, tiny_model, CPU)


def test_alignment_scores_are_cosines_over_the_temperature():
    targets = LabelTargets([torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, -1.0]])])
    soft = torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
    there = torch.tensor([[True, False], [True, True]])
    half = 2**-0.5
    first, second = targets.scores(soft, there)
    assert torch.allclose(first, torch.tensor([[1.0, 0.0], [half, half]]) / 0.05)
    assert torch.allclose(second, torch.tensor([[0.0], [-half]]) / 0.05)
    assert float(targets.loss(soft, there, torch.tensor([[-1, -1], [-1, -1]]))) == 0
    # the second cell is as near to both labels of the first slot; a slot with one label costs nothing
    assert float(targets.loss(soft, there, torch.tensor([[-1, 0], [1, -1]]))) == pytest.approx(np.log(2))
    labels = {"cell_type": ["b", None, "a"], "sex": ["x", "x", "y"]}
    numbers = number_labels(labels, {"cell_type": ["a", "b"], "sex": ["x"]})
    assert numbers.tolist() == [[1, 0], [-1, 0], [0, -1]]


def test_slots_have_soft_tokens_of_their_own_where_there_are_enough():
    directions = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0]])]
    soft = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [1.0, 2.0], [9.0, 9.0]]])
    there = torch.tensor([[True, True, True, False]])
    soft = soft * there[..., None]
    first, second = LabelTargets(directions, apart=True).scores(soft, there)  # of tokens 0 and 2, of 1 and 3
    assert torch.allclose(first, torch.tensor([[1.0, 1.0]]) * 2**-0.5 / 0.05)
    assert torch.allclose(second, torch.tensor([[1.0]]) / 0.05)
    shared = LabelTargets(directions).scores(soft, there)
    for mean, one in zip(shared, LabelTargets(directions, apart=True).scores(soft[:, 1:2], there[:, 1:2]), strict=True):
        assert mean.shape == one.shape
    assert torch.allclose(shared[0], torch.tensor([[2.0, 4.0]]) / 20**0.5 / 0.05)
    assert torch.allclose(one, torch.tensor([[1.0]]) / 0.05)  # too few tokens: both slots read the one there is


def test_cells_and_descriptions_are_told_apart_both_ways_and_duplicates_are_all_right():
    targets = DescriptionTargets(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    soft = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 3.0]], [[0.6, 0.8], [0.6, 0.8]]])
    there = torch.tensor([[True, False], [True, True], [True, True]])
    # cosines over 0.05 of the cells with the texts of the cells, the first and the last of which are the same
    scores = np.array([[20, 0, 20], [0, 20, 0], [12, 16, 12]])
    shares = np.array([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])
    to_text = [np.log(np.exp(row).sum()) - share @ row for row, share in zip(scores, shares, strict=True)]
    to_cell = [np.log(np.exp(row).sum()) - share @ row for row, share in zip(scores.T, shares, strict=True)]
    assert to_text == pytest.approx([np.log(2), 0, np.log(2 + np.exp(4))], abs=1e-8)
    assert to_cell == pytest.approx([4 + np.log1p(np.exp(-8)), np.log1p(np.exp(-4)), 4 + np.log1p(np.exp(-8))])
    loss = targets.loss(soft, there, torch.tensor([0, 1, 0]))
    assert float(loss) == pytest.approx((np.mean(to_text) + np.mean(to_cell)) / 2, rel=1e-5)


def test_descriptions_point_where_they_differ_from_their_mean():
    embeddings = torch.tensor([[3.0, 0.0], [0.0, 5.0], [4.0, -5.0]])
    targets = DescriptionTargets.of([torch.tensor([0]), torch.tensor([1]), torch.tensor([1, 2])], embeddings)
    # unit vectors (1, 0), (0, 1), (1, 0), less their mean (2/3, 1/3)
    half = 2**-0.5
    assert torch.allclose(targets.directions, half * torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]]))
    only = DescriptionTargets.of([torch.tensor([0])], embeddings)
    soft = torch.ones(4, 1, 2, requires_grad=True)
    loss = only.loss(soft, torch.ones(4, 1, dtype=torch.bool), torch.zeros(4, dtype=torch.long))
    loss.backward()
    assert loss.item() == pytest.approx(np.log(4)) and not soft.grad.any()


def test_labels_of_cells_aligned_to_descriptions_have_the_direction_of_their_sentence(build):
    from tests_terms import small_table

    model, labels = build(), {"cell_type": ["CL:0000236", "CL:0000623"], "tissue": ["UBERON:0000178"]}
    cell_types, tissues = LabelTargets.of_sentences(labels, small_table(), model).directions
    texts = [
        "This is a B cell. By definition: A lymphocyte of B lineage.",
        "This is a natural killer cell. By definition: A lymphocyte that can kill.",
    ]
    embeddings = model.language_model.get_input_embeddings().weight.detach().float()
    ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    first, second = (embeddings[text].mean(0) / embeddings[text].mean(0).norm() for text in ids)
    assert torch.allclose(cell_types[0], (first - second) / (first - second).norm(), atol=1e-5)
    assert torch.allclose(cell_types[1], -cell_types[0], atol=1e-5)
    assert not tissues.any()  # with one label there is nothing to tell apart


def test_confidence_is_the_product_over_the_names_tokens(build):
    from tests_terms import small_terms

    tokenizer, terms = build().tokenizer, small_terms()
    text = "This is a B cell. The sample is blood."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded, ends = decode(ids, tokenizer)
    assert decoded == text
    starts = np.concatenate([[0], ends[:-1]])
    in_name = (ends > text.index("B cell")) & (starts < text.index("B cell") + len("B cell"))
    row = read_text(Written(ids, [-0.25] * len(ids), True), terms, tokenizer)
    assert (row["cell_type_id"], row["tissue_id"], row["disease_id"]) == (
        "CL:0000236",
        "UBERON:0000178",
        None,
    )
    assert row["cell_type_confidence"] == pytest.approx(np.exp(-0.25 * in_name.sum()))
    assert row["disease_confidence"] is None
    assert read_text(Written(ids, [-0.25] * len(ids), False), terms, tokenizer)["status"] == "partial"
