"""Tiny random models of many families: trained on the fast path, on the plain one, or rejected."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cell2text.errors import InputError
from cell2text.generation.decode import write_texts
from cell2text.model import bundle, fast, language_model
from cell2text.models.check_language_model import check_language_model
from default_settings import finetune_settings, projector_settings

CPU = torch.device("cpu")
FEW_HEADS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
OLD_NAMES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# settings of each family besides the vocabulary, and the path on which it is trained
FAMILIES = {
    "gpt2": (OLD_NAMES, "fast"),
    "gpt_neox": (SMALL | {"intermediate_size": 64}, "fast"),
    "opt": (SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32}, "fast"),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, "plain"),
    "falcon": (SMALL, "plain"),
    "gptj": (OLD_NAMES | {"rotary_dim": 4}, "plain"),
    "gpt_neo": (
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        "plain",
    ),
    "stablelm": (FEW_HEADS, "plain"),
    "phi": (SMALL | {"intermediate_size": 64}, "fast"),
    "phi3": (FEW_HEADS, "fast"),
    "mistral": (FEW_HEADS, "fast"),
    "mixtral": (FEW_HEADS | {"num_local_experts": 2}, "fast"),
    "qwen2": (FEW_HEADS, "fast"),
    "qwen3": (FEW_HEADS | {"head_dim": 8}, "fast"),
    "gemma": (FEW_HEADS | {"head_dim": 8}, "fast"),
    "gemma2": (FEW_HEADS | {"head_dim": 8}, "plain"),
    "gemma3_text": (FEW_HEADS | {"head_dim": 8}, "fast"),
    "biogpt": (SMALL | {"intermediate_size": 64}, "fast"),
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "rejected"),
}
TEXT = torch.randint(5, 300, (4, 9), generator=torch.Generator().manual_seed(2))
MASK = torch.arange(9) < torch.tensor([9, 4, 7, 2])[:, None]


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    monkeypatch.setattr(language_model, "pick_precision", lambda device: torch.float32)


def write_model(folder, tiny_model, family, **settings):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    tokens |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **tokens | settings))
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.normal_(0, 0.3)  # large, so that the output depends on what a token attends to
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build(folder, **changes):
    torch.manual_seed(1)
    model = bundle.build(folder, projector_settings(soft_tokens=3, hidden=16), 5, finetune_settings(**changes), CPU)
    return model.eval()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_family_trains_and_generates_as_in_transformers(tmp_path, tiny_model, family, caplog):
    settings, path = FAMILIES[family]
    folder = write_model(tmp_path, tiny_model, family, **settings)
    if path == "rejected":
        for use in (build, check_language_model):
            with pytest.raises(InputError, match="Choose "):
                use(folder)
        return
    check_language_model(folder)
    model = build(folder)
    vectors, lengths = torch.randn(4, 5, generator=torch.Generator().manual_seed(3)), torch.full((4,), 7)
    soft, present = model.projector(vectors, lengths)
    with torch.no_grad():
        loss = float(model.text_loss(soft, present, TEXT, MASK)[0])
        prompt, _ = model.read_cells(vectors, lengths)
        one_by_one = 0.0
        for cell in range(4):
            words = TEXT[cell : cell + 1, MASK[cell]]
            labels = torch.cat([torch.full((1, prompt.shape[1]), -100), words], 1)
            embeddings = torch.cat([prompt[cell : cell + 1], model.embed_tokens(words)], 1)
            output = model.language_model(inputs_embeds=embeddings, labels=labels, use_cache=False)
            one_by_one += float(output.loss) * words.shape[1]
    assert loss == pytest.approx(one_by_one, rel=1e-4)
    written = [one.ids for one in write_texts(model, vectors, lengths, 8)]
    end = model.tokenizer.eos_token_id
    for cell, ids in enumerate(written):
        expected = model.language_model.generate(
            inputs_embeds=prompt[cell : cell + 1].detach(),
            attention_mask=torch.ones(1, prompt.shape[1], dtype=torch.long),
            do_sample=False,
            max_new_tokens=8,
        )[0].tolist()
        assert ids == (expected[: expected.index(end)] if end in expected else expected)
    with caplog.at_level("INFO", logger="cell2text.model"):
        assert fast.check(model, soft.detach(), present, TEXT, MASK) == (path == "fast")
    assert ("training with plain transformers and PEFT" in caplog.text) == (path == "plain")
    if path == "fast":
        found = float(model.text_loss(soft, present, TEXT, MASK)[0].detach())
        assert found == pytest.approx(loss, rel=1e-4)


def test_an_encoder_decoder_is_rejected_in_one_line(tmp_path, tiny_model):
    settings = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 64, "d_kv": 8}
    AutoConfig.for_model("t5", **settings).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="t5 is not a causal language model. Choose another model$"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma", {}),  # multiplies by the root of the width inside its embeddings
        ("gemma3_text", {}),
        ("biogpt", {}),
        ("granite", FEW_HEADS | {"embedding_multiplier": 12.0}),  # multiplies after them
        ("bloom", {}),  # normalises after them
        ("opt", {"word_embed_proj_dim": 16}),  # projects them to another width
        ("gpt2", {}),  # adds positions
        ("llama", FEW_HEADS),
    ],
)
def test_soft_tokens_start_with_the_norm_of_tokens_where_the_first_layer_receives_them(
    tmp_path, tiny_model, family, changes
):
    known = FAMILIES[family][0] if family in FAMILIES else {}
    model = build(write_model(tmp_path, tiny_model, family, **known | changes))
    received = []
    layers = next(part for part in model.base_model.modules() if isinstance(part, torch.nn.ModuleList))
    layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: received.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    soft, _ = model.projector(torch.randn(100, 5, generator=torch.Generator().manual_seed(3)), torch.full((100,), 7))
    with torch.no_grad():
        ids = torch.randperm(model.base_model.get_input_embeddings().weight.shape[0])[:300].view(100, 3)
        model.base_model(input_ids=ids, use_cache=False)
        model.base_model(inputs_embeds=soft, use_cache=False)
    of_tokens, of_soft = (float(states.norm(dim=-1).mean()) for states in received)
    assert of_soft == pytest.approx(of_tokens, rel=0.1)


def test_a_prompt_that_begins_with_the_cell_is_trained_on_the_plain_path(tmp_path, tiny_model, caplog):
    folder = write_model(tmp_path, tiny_model, "qwen2", **FEW_HEADS)
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }} {{ messages[0].content }}{# system #}")
    model = build(folder)
    assert len(model.prompt.before) == 0
    vectors, lengths = torch.randn(4, 5, generator=torch.Generator().manual_seed(3)), torch.full((4,), 7)
    soft, present = (part.detach() for part in model.projector(vectors, lengths))
    assert len(write_texts(model, vectors, lengths, 3)) == 4
    assert not fast.check(model, soft, present, TEXT, MASK)
