"""The parts of the fast path, each against what it replaces."""

import copy

import pytest
import torch
from torch.nn import functional
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from cell2text.model.fast import layers as fused
from cell2text.model.fast.attention import CELLS_IN_CACHE, Row, SharedPromptAttention
from cell2text.model.fast.layers import FusedGate, FusedNorm, fuse_norms
from cell2text.model.fast.loss import TextLoss
from default_settings import finetune_settings

CPU = torch.device("cpu")
LORA = finetune_settings(lora_rank=4, lora_alpha=8)


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


def test_fused_norm_replaces_only_equivalent_layers():
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


def test_fused_gate_replaces_only_equivalent_layers():
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


def test_compiled_functions_compute_the_same(monkeypatch):
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


def test_a_missing_compiler_is_reported(monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no g++\nand a long story")

    fused.can_compile.cache_clear()
    monkeypatch.setattr(torch, "compile", fail)
    with caplog.at_level("INFO", logger="cell2text.model"):
        assert not fused.can_compile()
    fused.can_compile.cache_clear()
    assert caplog.messages == ["torch.compile does not work here, so training is slightly slower (no g++)"]


def test_attention_in_a_row_equals_attention_with_one_large_mask():
    torch.manual_seed(0)
    prompt, cells, length, heads, groups = 3, 2 * CELLS_IN_CACHE + 3, 40, 4, 2
    mask = torch.arange(length) < torch.randint(2, length + 1, (cells,))[:, None]
    mask[:, 1] = False  # a gap, as between the soft tokens and the text of a cell with few genes
    row = Row.of(prompt, mask, torch.float64)
    assert [part.cells for part in row.parts] == [CELLS_IN_CACHE, CELLS_IN_CACHE, 3]
    tokens = prompt + int(mask.sum())
    filled = row.positions().shape[1]
    assert (filled % 32, filled - tokens) == (0, row.filling) and row.filling
    q, k, v = (
        torch.randn(1, filled, count, 6, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for count in (heads, groups, groups)
    )
    # index of the cell of each token; -1 is the prompt, which all cells see
    owner = torch.cat([torch.full((prompt,), -1), torch.arange(cells)[:, None].expand(-1, length)[mask]])
    seen = ((owner[None] == owner[:, None]) | (owner == -1)).tril()
    ours = SharedPromptAttention.apply(q, k, v, row, 0.3)
    without = (part[:, :, :tokens] for part in (q, k, v))
    theirs = functional.scaled_dot_product_attention(*without, seen, scale=0.3, enable_gqa=True).transpose(1, 2)
    assert torch.allclose(ours[:, :tokens], theirs) and not ours[:, tokens:].any()
    direction = torch.randn_like(ours)
    our_gradients = torch.autograd.grad(ours, (q, k, v), direction)
    their_gradients = torch.autograd.grad(theirs, (q, k, v), direction[:, :tokens])
    for our, their in zip(our_gradients, their_gradients, strict=True):
        assert torch.allclose(our, their) and not our[:, :, tokens:].any()
