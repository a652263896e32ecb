"""The language model: loaded from a Hugging Face directory, frozen, and given an adapter."""

from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from cell2text.device import pick_precision
from cell2text.errors import InputError
from cell2text.settings import FinetuneSettings

# Which weights of the language model are trained: an adapter, all of them, or an adapter on top of 4-bit weights.
MODES = ("lora", "full", "qlora")


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
    _check_kind(directory)
    model, found = AutoModelForCausalLM.from_pretrained(
        weights or directory,
        dtype=pick_precision(device),
        local_files_only=True,
        trust_remote_code=False,
        quantization_config=_four_bits(device) if mode == "qlora" else None,
        output_loading_info=True,
    )
    if weights and (found["missing_keys"] or found["unexpected_keys"]):
        missing, surplus = (sorted(found[key])[:3] for key in ("missing_keys", "unexpected_keys"))
        raise InputError(weights, f"weights missing {missing}, surplus {surplus}", "Fine-tune again")
    if mode == "qlora":  # casts embeddings, norms and head to float32, for generation too, so that it equals training
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.requires_grad_(False)
    return model.to(device), AutoTokenizer.from_pretrained(directory, local_files_only=True)


def _check_kind(directory: str | Path) -> None:
    """Raise an error if the model is not causal, or caches no keys and values, which generation needs."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        raise InputError(directory, f"{config.model_type} is not a causal language model", "Choose another model")
    if "past_key_values" not in signature(kind.forward).parameters:
        raise InputError(directory, f"{kind.__name__} has no keys and values to cache", "Choose a transformer model")


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
