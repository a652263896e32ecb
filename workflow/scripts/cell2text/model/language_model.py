"""The language model: loaded from a Hugging Face directory, frozen, and given an adapter."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from cell2text.device import pick_precision
from cell2text.errors import InputError
from cell2text.files import read_json
from cell2text.model.prompt import SOURCE, end_of_turn
from cell2text.settings import FinetuneSettings

# Which weights of the language model are trained: an adapter, all of them, or an adapter on top of 4-bit weights.
MODES = ("lora", "full", "qlora")
OTHER_MODEL = "Choose another model"
NEEDS_TOKENIZER = "Choose a model with a complete tokenizer.json"


def load_language_model(
    directory: str | Path, device: torch.device, mode: str, weights: str | Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal language model with frozen weights, and its tokenizer.

    Parameters
    ----------
    directory
        A Hugging Face directory.
    device
        Where to put the model.
    mode
        One of ``MODES``; ``qlora`` rounds the weights of its layers to 4 bits (arXiv 2305.14314).
    weights
        Directory of fine-tuned weights, where they replace those in ``directory``.

    Raises
    ------
    InputError
        If the mode is unknown or cannot run here, the kind of model cannot be used, or fine-tuned weights are missing
        or surplus.
    """
    if mode not in MODES:
        raise InputError("config: finetune.mode", f"{mode} is not one of {', '.join(MODES)}", "Set one of these")
    read_config(directory)
    tokenizer = load_tokenizer(directory)
    model, found = AutoModelForCausalLM.from_pretrained(
        weights or directory,
        dtype=pick_precision(device),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        quantization_config=_four_bits(device) if mode == "qlora" else None,
        output_loading_info=True,
    )
    if weights and (found["missing_keys"] or found["unexpected_keys"]):
        missing, surplus = (sorted(found[key])[:3] for key in ("missing_keys", "unexpected_keys"))
        raise InputError(weights, f"weights missing {missing}, surplus {surplus}", "Fine-tune again")
    if mode == "qlora":  # casts embeddings, norms and head to float32, for generation too, so that it equals training
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.requires_grad_(False)
    return model.to(device), tokenizer


def read_config(directory: str | Path) -> PreTrainedConfig:
    """Return the configuration of a causal language model.

    Raises
    ------
    InputError
        If it cannot be read, or the model is not causal, needs code of its own, or caches no keys and values, which
        generation needs.
    """
    with reported("its config.json cannot be read"):
        about = json.loads(Path(directory, "config.json").read_text())
        family = about.get("model_type")
        if family in CONFIG_MAPPING:
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if family not in CONFIG_MAPPING:
        own = ", and code that comes with a model is never run" if "auto_map" in about else ""
        raise InputError(SOURCE, f"transformers has no model of type {family}{own}", OTHER_MODEL)
    if "quantization_config" in about:
        raise InputError(SOURCE, "its weights are quantised", "Choose the model with its original weights")
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None or config.is_encoder_decoder:
        raise InputError(SOURCE, f"{config.model_type} is not a causal language model", OTHER_MODEL)
    if "past_key_values" not in signature(kind.forward).parameters:
        raise InputError(SOURCE, f"{kind.__name__} has no keys and values to cache", "Choose a transformer model")
    return config


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a language model, with an end token.

    If it has none of its own, the end token is what ends a message in its chat template, or else that of the config.

    Raises
    ------
    InputError
        If the tokenizer cannot be loaded, or there is no end token.
    """
    with reported("its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise InputError(SOURCE, "its tokenizer cannot say where a token stands in a text", NEEDS_TOKENIZER)
    if tokenizer.eos_token_id is None:
        of_config = read_json(Path(directory, "config.json")).get("eos_token_id")  # the class has a default of its own
        ends = [end_of_turn(tokenizer), *(of_config if isinstance(of_config, list) else [of_config])]
        # a token of ordinary text would end a description in the middle
        end = next((token for token in ends if token in tokenizer.added_tokens_decoder), None)
        if end is None:
            raise InputError(SOURCE, "its tokenizer has no end token", "Set eos_token in tokenizer_config.json")
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


@contextmanager
def reported(problem: str) -> Iterator[None]:
    """Report any exception of transformers in one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # transformers raises almost any exception about a model that it cannot use
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(SOURCE, f"{problem} ({reason})", OTHER_MODEL) from error


def _four_bits(device: torch.device) -> BitsAndBytesConfig:
    if device.type != "cuda":
        raise InputError("config: finetune.mode", "qlora needs a GPU", "Set `mode: lora`")
    if find_spec("bitsandbytes") is None:
        raise InputError(
            "config: finetune.mode",
            "qlora needs the package bitsandbytes, which is not installed",
            "Install it or set `mode: lora`",
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def add_adapter(model: PreTrainedModel, settings: FinetuneSettings) -> PeftModel:
    """Return the model wrapped by PEFT, with a new LoRA adapter that has no effect yet.

    DoRA: arXiv 2402.09353; rsLoRA: arXiv 2312.03732.

    Raises
    ------
    InputError
        If a target is not a layer of the language model.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=_check_targets(model, settings.lora_targets),
        lora_dropout=settings.lora_dropout,
        use_dora=settings.dora,
        use_rslora=settings.rslora,
    )
    return get_peft_model(model, config)


def _check_targets(model: PreTrainedModel, targets: str | list[str]) -> str | list[str]:
    head = model.get_output_embeddings()
    layers = [
        f".{name}"
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear | Conv1D) and part is not head  # the loss reads the head's own weight
    ]
    if targets == "all-linear":
        return targets
    wrong = [target for target in targets if not any(layer.endswith(f".{target}") for layer in layers)]
    if wrong or not targets:
        known = sorted({layer.rpartition(".")[2] for layer in layers})
        raise InputError(
            "config: finetune.lora_targets",
            f"no layer that can take an adapter is named {', '.join(wrong) or '(empty list)'}",
            f"This language model has {', '.join(known)}",
        )
    return targets
