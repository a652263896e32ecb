"""Training modes: an adapter and its variants, or all weights, compared with plain transformers and PEFT."""

import copy
import sys
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from cell2text.errors import InputError
from cell2text.files import read_json, write_json
from cell2text.generation.decode import write_texts
from cell2text.model import bundle, fast
from cell2text.model.fast import attention as shared_prompt
from cell2text.model.fast.layers import FusedLora, FusedNorm
from cell2text.model.fast.loss import TextLoss
from default_settings import finetune_settings, projector_settings

pytestmark = pytest.mark.usefixtures("in_float32")

CPU = torch.device("cpu")
SIZE = {"lora_rank": 4, "lora_alpha": 8}
PROJECTOR = projector_settings(soft_tokens=3, hidden=16)
FULL = {"mode": "full"}
DORA, DROPOUT = SIZE | {"dora": True}, SIZE | {"lora_dropout": 0.4}
TEXT = torch.randint(5, 300, (4, 9), generator=torch.Generator().manual_seed(2))
MASK = torch.arange(9) < torch.tensor([9, 4, 7, 2])[:, None]


@pytest.fixture(scope="session")
def models(tiny_model, tmp_path_factory):
    """Directories of models with an untied head, a tied head, and biases in the head and all layers."""
    tokenizer, found = AutoTokenizer.from_pretrained(tiny_model), {"untied": tiny_model}
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(5)
    tied = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    biased = PhiForCausalLM(PhiConfig(**shape))
    for name, model in (("tied", tied), ("biased", biased)):
        with torch.no_grad():  # norms and biases that are 1 and 0 would hide mistakes
            for value in model.parameters():
                if value.dim() == 1:
                    value.add_(0.3 * torch.randn(value.shape))
        found[name] = tmp_path_factory.mktemp("modes") / name
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


def build(directory, changes, seed=0, speed_up=True):
    torch.manual_seed(seed)
    model = bundle.build(directory, PROJECTOR, 5, finetune_settings(**changes), CPU)
    with torch.no_grad():  # an adapter that has no effect would hide mistakes
        for name, value in model.trainable().items():
            if "lora_B" in name:
                value.normal_(0, 0.05)
            if "magnitude" in name:
                value.mul_(1 + 0.1 * torch.rand_like(value))
    model.eval()
    if speed_up:
        fast.speed_up(model)
    return model


def cells(count=4):
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(1)), torch.full((count,), 7)


def gradients(model):
    found = {name: value.grad for name, value in model.trainable().items()}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("kind", "tuning", "trained", "fused"),
    [
        ("untied", FULL, 21, 0),  # 9 weights per layer, the last norm, embeddings and head
        ("tied", FULL, 20, 0),
        ("biased", FULL, 33, 0),  # 14 per layer, 2 of the last norm, embeddings, 2 of the head
        ("untied", SIZE | {"rslora": True}, 28, 14),
        ("untied", SIZE | {"lora_targets": ["q_proj", "mlp.up_proj"]}, 8, 4),
        ("untied", DORA, 42, 0),
        ("untied", DORA | {"rslora": True, "lora_targets": ["v_proj"]}, 6, 0),
        ("biased", SIZE, 24, 12),
    ],
)
def test_loss_and_gradients_equal_those_of_transformers_and_peft(models, kind, tuning, trained, fused):
    model, plain = build(models[kind], tuning), build(models[kind], tuning, speed_up=False)
    assert sum(name.startswith("language_model.") for name in model.trainable()) == trained
    assert sum(type(part) is FusedLora and part.is_plain(torch.float32) for part in model.modules()) == fused
    assert sum(type(part) is FusedNorm for part in model.modules()) == (0 if kind == "biased" else 5)
    assert not [part for part in plain.modules() if isinstance(part, FusedLora | FusedNorm)]
    ours, _ = model.text_loss(*model.projector(*cells()), TEXT, MASK)
    theirs, _ = plain.text_loss(*plain.projector(*cells()), TEXT, MASK)
    assert torch.allclose(ours, theirs, rtol=1e-5)
    ours.backward()
    theirs.backward()
    found = gradients(model)
    for name, expected in gradients(plain).items():
        scale = float(expected.abs().max())
        assert scale > 0 or "k_proj.bias" in name, name
        assert torch.allclose(found[name], expected, rtol=1e-3, atol=max(1e-4, 1e-4 * scale)), name


def test_dropout_equals_that_of_peft(models, monkeypatch):
    """With one cell and no filling, the row is the plain model's sequence: the same seed drops the same values."""
    monkeypatch.setattr(shared_prompt, "TOKENS", 1)
    model, plain = build(models["untied"], DROPOUT), build(models["untied"], DROPOUT, speed_up=False)
    without = model.text_loss(*model.projector(*cells(1)), TEXT[:1], MASK[:1])[0].detach()
    losses = []
    for one in (model, plain):
        one.train()
        torch.manual_seed(3)
        losses.append(one.text_loss(*one.projector(*cells(1)), TEXT[:1], MASK[:1])[0])
        losses[-1].backward()
    ours, theirs = losses
    found = gradients(model)
    assert not torch.allclose(ours, without, rtol=1e-3)
    assert torch.allclose(ours, theirs, rtol=1e-5)
    for name, expected in gradients(plain).items():
        assert torch.allclose(found[name], expected, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize(
    ("kind", "tuning"),
    [
        ("untied", SIZE),
        ("untied", SIZE | {"lora_targets": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]}),
        ("untied", DROPOUT),
        ("untied", FULL),
        ("tied", FULL),
        ("biased", FULL),
    ],
)
def test_checkpointed_activations_give_the_same_gradients(models, kind, tuning):
    model, computed, found, sizes = build(models[kind], tuning).train(), [], [], []
    layers, (vectors, lengths) = model.base_model.get_decoder().layers, cells()
    for number, layer in enumerate(layers):
        layer.input_layernorm.register_forward_hook(lambda *_, number=number: computed.append(number))
    vectors.requires_grad_()
    for checkpointed in (False, True):
        if checkpointed:
            model.checkpoint_activations()
        saved = []
        torch.manual_seed(3)  # for dropout
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.nbytes) or x, lambda x: x):
            loss, _ = model.text_loss(*model.projector(vectors, lengths), TEXT, MASK)
        sizes.append(sum(saved))
        loss.backward()
        found.append({"loss": loss.detach(), "vectors": vectors.grad} | gradients(model))
        vectors.grad = None
    assert computed == [0, 1, 0, 1, 1, 0]
    assert sizes[1] < 0.2 * sizes[0]
    stored, recomputed = found
    assert stored["vectors"].abs().max() > 0
    for name, expected in stored.items():
        assert torch.allclose(recomputed[name], expected, rtol=1e-5, atol=1e-6), name


def test_only_training_recomputes_activations(models):
    model, computed = build(models["untied"], SIZE), []
    model.checkpoint_activations()
    model.base_model.get_decoder().layers[0].mlp.register_forward_hook(lambda *_: computed.append(0))
    model.text_loss(*model.projector(*cells()), TEXT, MASK)[0].backward()
    assert computed == [0]
    merged = copy.deepcopy(model).ready_to_write()
    assert write_texts(merged, *cells(), 8) == write_texts(build(models["untied"], SIZE).ready_to_write(), *cells(), 8)


def test_a_model_without_activation_checkpointing_is_reported(models):
    model = build(models["untied"], SIZE)
    model.base_model.supports_gradient_checkpointing = False
    with pytest.raises(InputError, match=r"checkpoint_activations: LlamaForCausalLM cannot .* Set it to false$"):
        model.checkpoint_activations()


def test_rslora_divides_by_the_square_root_of_the_rank(models):
    plain, stabilised = (build(models["untied"], SIZE | {"rslora": use}) for use in (False, True))
    scalings = [
        {part.scaling["default"] for part in model.modules() if type(part) is FusedLora}
        for model in (plain, stabilised)
    ]
    assert scalings == [{2.0}, {4.0}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_loss_gives_the_gradients_of_the_head(dtype):
    torch.manual_seed(0)
    targets = torch.randint(0, 50, (300,))  # more tokens than are scored at once
    states, weight, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((300, 8), (50, 8), (50,)))
    ours = torch.autograd.grad(3 * TextLoss.apply(states, weight, bias, targets), (states, weight, bias))
    exact = [part.detach().float().requires_grad_() for part in (states, weight, bias)]
    loss = functional.cross_entropy(functional.linear(*exact), targets, reduction="sum")
    for our, their in zip(ours, torch.autograd.grad(3 * loss, exact), strict=True):
        assert our.dtype == dtype
        assert (our.float() - their).norm() < (1e-5 if dtype == torch.float32 else 0.01) * their.norm()


def test_text_loss_of_confident_tokens_still_trains_the_head():
    """In bfloat16, the gradient of a token with probability 0.999 would be rounded to zero."""
    states = torch.ones(1, 1, dtype=torch.bfloat16)
    weight = torch.tensor([[7.0], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    TextLoss.apply(states, weight, None, torch.tensor([0])).backward()
    left = 1 / (1 + torch.tensor(7.0).exp())
    assert torch.allclose(weight.grad[:, 0].float(), torch.stack([-left, left]), rtol=0.01)


def test_validation_computes_no_gradient_of_the_head(models, monkeypatch):
    model, requested = build(models["untied"], FULL), []
    apply = TextLoss.apply
    monkeypatch.setattr(TextLoss, "apply", lambda *parts: requested.append(parts[1].requires_grad) or apply(*parts))
    soft = model.projector(*cells())
    with torch.no_grad():
        without, _ = model.text_loss(*soft, TEXT, MASK)
    assert torch.equal(without, model.text_loss(*soft, TEXT, MASK)[0].detach())
    assert requested == [False, True]


def test_full_fine_tuning_changes_every_weight(models):
    model = build(models["tied"], FULL)
    before = {name: value.detach().clone() for name, value in model.trainable().items()}
    assert {name for name, _ in model.named_parameters()} == set(before)
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0), []
    for _ in range(8):
        optimiser.zero_grad()
        loss, _ = model.text_loss(*model.projector(*cells()), TEXT, MASK)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert not [name for name, value in model.trainable().items() if torch.equal(value, before[name])]
    assert model.language_model.get_output_embeddings().weight is model.language_model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("kind", "tuning"),
    [("untied", SIZE), ("untied", DORA), ("untied", DROPOUT), ("untied", FULL), ("tied", FULL), ("biased", FULL)],
)
def test_saved_and_loaded_model_writes_the_same(models, kind, tuning, tmp_path):
    model = build(models[kind], tuning)
    with torch.no_grad():  # weights that differ from those of the original
        for value in model.trainable().values():
            value.add_(0.02 * torch.randn_like(value))
    bundle.save(model, tmp_path, {"seed": 1})
    again = bundle.load(tmp_path, models[kind], CPU)
    saved = again.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.trainable().items())
    assert read_json(tmp_path / "cell2text.json")["finetune"] == asdict(finetune_settings(**tuning))
    folder = "language_model" if tuning == FULL else "adapter"
    assert {path.name for path in tmp_path.iterdir()} == {"cell2text.json", "projector.safetensors", folder}
    assert not [path for path in tmp_path.rglob("*.json") if str(models[kind]) in path.read_text()]
    model.language_model.set_attn_implementation("sdpa")
    before, after, merged = (
        write_texts(one, *cells(), 8) for one in (model, again, copy.deepcopy(again).ready_to_write())
    )
    original = write_texts(build(models[kind], FULL).ready_to_write(), *cells(), 8)
    assert [one.ids for one in before] == [one.ids for one in after] == [one.ids for one in merged]
    assert [one.ids for one in before] != [one.ids for one in original]


def test_saved_targets_are_sorted(models, tmp_path):
    bundle.save(build(models["untied"], SIZE), tmp_path, {})
    targets = read_json(tmp_path / "adapter/adapter_config.json")["target_modules"]
    assert len(targets) == 14
    assert targets == sorted(targets)


@pytest.mark.parametrize(("mode", "file"), [("full", "language_model/model"), ("lora", "adapter/adapter_model")])
@pytest.mark.parametrize("wrong", ["missing", "surplus"])
def test_load_refuses_missing_and_surplus_weights(models, tmp_path, mode, file, wrong):
    bundle.save(build(models["tied"], {"mode": mode} | (SIZE if mode == "lora" else {})), tmp_path, {})
    path = tmp_path / f"{file}.safetensors"
    weights = load_file(path)
    name = next(name for name in sorted(weights) if "q_proj" in name)
    weight = weights.pop(name) if wrong == "missing" else weights[name]
    if wrong == "surplus":
        name = name.replace("layers.0", "layers.9")
        weights[name] = weight.clone()
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{wrong} \['{name}"):
        bundle.load(tmp_path, models["tied"], CPU)


@pytest.mark.parametrize(
    ("targets", "named"),
    [(["q_proj", "qproj"], "qproj"), (["lm_head"], "lm_head"), (["norm"], "norm"), ([], r"\(empty list\)")],
)
def test_targets_that_are_not_layers_are_reported(models, targets, named):
    with pytest.raises(
        InputError, match=rf"finetune.lora_targets: .* is named {named}\. .* has down_proj, .*, v_proj$"
    ):
        build(models["untied"], SIZE | {"lora_targets": targets})


def test_modes_that_cannot_run_are_reported(models, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"^config: finetune.mode: lor is not one of lora, full, qlora\. "):
        build(models["untied"], SIZE | {"mode": "lor"})
    with pytest.raises(InputError, match=r"^config: finetune.mode: qlora needs a GPU\. Set `mode: lora`$"):
        build(models["untied"], SIZE | {"mode": "qlora"})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"^config: finetune.mode: qlora needs the package bitsandbytes, "):
        bundle.build(models["untied"], PROJECTOR, 5, finetune_settings(mode="qlora"), torch.device("cuda"))
    bundle.save(build(models["untied"], SIZE), tmp_path, {})
    about = read_json(tmp_path / "cell2text.json")
    write_json(about | {"finetune": about["finetune"] | {"mode": "qlora"}}, tmp_path / "cell2text.json")
    with pytest.raises(InputError, match="qlora needs a GPU"):
        bundle.load(tmp_path, models["untied"], CPU)
