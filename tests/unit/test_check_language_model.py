"""A fetched language model is checked before any other work: it can be used, or one line says why not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel, MambaConfig

from cell2text.errors import InputError
from cell2text.model.language_model import load_language_model, load_tokenizer
from cell2text.model.prompt import INSTRUCTION, Prompt
from cell2text.models import check_language_model as checks
from cell2text.models.check_language_model import check_language_model
from cell2text.models.fetch_language_model import fetch_language_model

CPU = torch.device("cpu")
BODY = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}<|start|>assistant\n"
REST = "<|end|>\n<|start|>assistant"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
ATTACK = "{{ ''.__class__.__mro__[1].__subclasses__() }}"


@pytest.fixture
def folder(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def edit(path, **changes):
    about = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in about.items() if value is not None}))


def set_template(folder, template):
    (folder / "chat_template.jinja").write_text(template)


def prompt_of(folder):
    tokenizer = load_tokenizer(folder)
    prompt = Prompt.of(tokenizer)
    return tokenizer, [tokenizer.decode(half) for half in (prompt.before, prompt.after)]


def refused(folder, reason):
    with pytest.raises(InputError) as error:
        check_language_model(folder)
    line = str(error.value)
    assert reason in line and line.startswith("config: language_model.source: ") and len(line) < 400
    assert "\n" not in line


def test_a_fetched_model_is_checked_before_it_gets_its_name(folder, tmp_path):
    set_template(folder, "{% for %}")
    with pytest.raises(InputError, match="its chat template fails"):
        fetch_language_model(str(folder), tmp_path / "models/tiny")
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        (NO_SYSTEM + BODY, f"<|start|>user\n{INSTRUCTION} ", REST),
        ("{# system #}" + BODY, f"<|start|>system\n{INSTRUCTION}<|end|>\n<|start|>user\n", REST),
        ("{# system #}" + BODY.replace("messages", "messages[-1:]"), f"<|start|>user\n{INSTRUCTION} ", REST),
        ("{{ strftime_now('%d %b %Y') }}" + BODY, f"26 Jul 2024<|start|>user\n{INSTRUCTION} ", REST),
        (BODY.replace("m['content']", "m['content'] | trim"), f"<|start|>user\n{INSTRUCTION} ", REST),
        ("{{ messages[0]['content'] }}", f"{INSTRUCTION} ", ""),
    ],
)  # fmt: skip
def test_the_cell_stands_once_in_whatever_the_template_makes_of_the_message(folder, template, before, after):
    set_template(folder, template)
    check_language_model(folder)
    assert prompt_of(folder)[1] == [before, after]


def test_without_a_template_the_prompt_is_plain(folder):
    (folder / "chat_template.jinja").unlink()
    check_language_model(folder)
    assert prompt_of(folder)[1] == [f"{INSTRUCTION} ", "\n"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", "its chat template fails"),
        ("{{ raise_exception('Only tools') }}", "its chat template fails (Only tools)"),
        ("{{ messages[7].content.x }}", "its chat template fails"),
        ("Hello", "shows a message 0 times"),
        ("{{ messages[0].content[:9] }}", "shows a message 0 times"),
        ("{{ messages[0].content * 2 }}", "shows a message 2 times"),
        (ATTACK, "its chat template fails"),
        ("{% for a in range(10 ** 6) %}{% endfor %}", "its chat template fails (Range too big"),
        ("{% for a in range(10 ** 5) %}{% for b in range(10 ** 5) %}{% endfor %}{% endfor %}", "more than 2 s or"),
        ("{{ ('a' * 10 ** 10) | length }}", "more than 2 s or 4 GB of memory"),
    ],
)
def test_a_template_that_does_not_work_is_reported(folder, template, reason, monkeypatch):
    monkeypatch.setattr(checks, "SECONDS", 2)
    set_template(folder, template)
    refused(folder, reason)


def test_without_an_end_token_a_text_ends_like_a_turn_of_the_template(folder):
    edit(folder / "tokenizer_config.json", eos_token=None)
    edit(folder / "config.json", eos_token_id=0)
    check_language_model(folder)
    assert load_tokenizer(folder).eos_token == "<|end|>"
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(folder).eos_token == "<|start|>"  # the config's
    edit(folder / "config.json", eos_token_id=None)
    refused(folder, "its tokenizer has no end token. Set eos_token")


def test_tokens_without_embedding_are_reported_if_a_text_may_contain_them(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    check_language_model(folder)
    tokenizer.add_tokens(["CD4", "CD8"])
    tokenizer.save_pretrained(folder)
    number = len(tokenizer)
    refused(folder, f"tokens up to number {number - 1}, but there are only {number - 3} embeddings")


def test_a_tokenizer_that_changes_texts_is_reported(folder):
    edit(folder / "tokenizer.json", normalizer={"type": "Lowercase"})
    refused(folder, "its tokenizer turns 'This is a CD4-positive, '... into 'this is a cd4-positive, '...")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "t5"}, "t5 is not a causal language model"),
        ({"model_type": "mystery"}, "transformers has no model of type mystery."),
        ({"model_type": "mystery", "auto_map": {"AutoConfig": "evil.Config"}}, "code that comes with a model"),
        ({"model_type": None}, "transformers has no model of type None"),
        ({"hidden_size": "wide"}, "its config.json cannot be read"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "its weights are quantised"),
        ({"max_position_embeddings": 8}, "it has 8 positions, and the prompt alone needs"),
        ({"num_hidden_layers": 3}, "its weights lack model.layers.2.input_layernorm.weight"),
        ({"intermediate_size": 48}, "its weights have other shapes than config.json for model.layers.0.mlp"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_is_reported(folder, changes, reason):
    edit(folder / "config.json", **changes)
    refused(folder, reason)


def test_files_that_lead_elsewhere_are_reported(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "other.safetensors")
    for name, reason in (
        ("../other.safetensors", "names ../other.safetensors, which is outside"),
        (str(tmp_path / "other.safetensors"), "which is outside the model's folder"),
        ("part.safetensors", "names part.safetensors, which does not exist"),
    ):
        weights = {"metadata": {}, "weight_map": dict.fromkeys(load_file(tmp_path / "other.safetensors"), name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(weights))
        refused(folder, reason)
    (folder / "model.safetensors.index.json").write_text("{")
    refused(folder, "model.safetensors.index.json cannot be read")


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("config.json", "its config.json cannot be read"),
        ("tokenizer.json", "its tokenizer cannot be loaded"),
        ("model.safetensors", "its weights cannot be loaded"),
    ],
)
def test_a_damaged_file_is_reported(folder, file, reason):
    whole = (folder / file).read_bytes()
    for part in (whole[: len(whole) // 2], b"", b"\xff" * 99):
        (folder / file).write_bytes(part)
        refused(folder, reason)


def test_an_adapter_beside_the_weights_is_reported(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "organisation/name"}')
    refused(folder, "Merge the adapter into the model")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_never_runs(folder, monkeypatch, file):
    names = {"config.json": ["AutoConfig", "AutoModelForCausalLM"], "tokenizer_config.json": ["AutoTokenizer"]}[file]
    (folder / "evil.py").write_text("raise SystemExit('code of the model ran')")
    edit(folder / file, auto_map={name: ["evil.It", "evil.It"] if "Token" in name else "evil.It" for name in names})
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text("raise SystemExit('code of the model ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    check_language_model(folder)
    load_language_model(folder, CPU, "lora")


def test_weights_that_are_not_numbers_are_reported(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, "LlamaForCausalLM computes values that are not finite")


def write(folder, model):
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)


def test_a_model_that_is_not_causal_is_reported(folder):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    write(folder, BertLMHeadModel(BertConfig(vocab_size=600, initializer_range=0.5, pad_token_id=1, **sizes)))
    refused(folder, "BertLMHeadModel is not causal here")


def test_a_model_without_a_cache_of_keys_is_reported(folder):
    config = MambaConfig(vocab_size=600, hidden_size=32, num_hidden_layers=2, state_size=4)
    write(folder, AutoModelForCausalLM.from_config(config))
    refused(folder, "MambaForCausalLM has no keys and values to cache")


def test_a_model_that_scales_tokens_but_not_embeddings_is_reported(folder):
    config = AutoConfig.for_model(
        "falcon_h1", vocab_size=600, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8,
        embedding_multiplier=5.0,
    )  # fmt: skip
    torch.manual_seed(0)
    write(folder, AutoModelForCausalLM.from_config(config))
    refused(folder, "computes something else from embeddings than from tokens")


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mixtral"])
def test_a_large_model_is_tried_on_a_small_copy_of_bounded_size(family):
    large = {"gemma3_text": {"hidden_size": 5376, "num_attention_heads": 32, "num_hidden_layers": 62}}
    config = AutoConfig.for_model(family, **large.get(family, {}))
    with torch.device("meta"):
        assert checks._count_weights(AutoModelForCausalLM.from_config(config)) > 1e8
    small = checks._small_copy(config)
    assert checks._count_weights(small) < checks.WEIGHTS
    assert small.config.num_hidden_layers == 2 and config.num_hidden_layers > 2
    if family == "gemma3_text":
        assert set(small.config.layer_types) == set(config.layer_types)
        assert small.get_input_embeddings().embed_scale == pytest.approx(5376**0.5, rel=1e-3)


def test_a_large_model_is_compared_on_its_copy(folder, monkeypatch, caplog):
    monkeypatch.setattr(checks, "WEIGHTS", 40_000)  # fewer than the model has, more than the copy
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level("INFO", logger="cell2text.models"):
        check_language_model(folder)
    assert caplog.messages == ["LlamaForCausalLM can be trained on the fast path"]
