"""Tiny random models of many families, built from their configuration. No download."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cell2text.model import bundle
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
