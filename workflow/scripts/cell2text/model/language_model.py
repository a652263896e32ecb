"""The language model itself: loaded from a Hugging Face directory, and given an adapter."""

from importlib.util import find_spec
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from cell2text.device import pick_precision
from cell2text.errors import InputError
from cell2text.model.fast.layers import FusedLora, join_siblings

# What of the language model learns: an adapter, everything, or an adapter beside weights of 4 bits.
MODES = ("lora", "full", "qlora")
TUNING = {"mode": "lora", "targets": "all-linear", "lora_dropout": 0.0, "use_dora": False, "use_rslora": False}


def load_language_model(
    directory: str | Path,
    device: torch.device,
    attention: str,
    four_bits: bool = False,
    weights: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal language model with frozen weights, and its tokenizer.

    Parameters
    ----------
    directory
        A Hugging Face directory.
    device
        Where to put it.
    attention
        ``"sdpa"`` to write texts, ``shared_prompt.NAME`` to learn from them.
    four_bits
        Whether the weights of its layers are rounded to 4 bits, as QLoRA does (arXiv 2305.14314).
    weights
        Directory of the weights, where they are not in ``directory`` but were fine-tuned themselves.

    Raises
    ------
    InputError
        If the model scales or caps its logits or its attention's scores, which is not done here; if fine-tuned
        weights are missing or surplus; if 4 bits are asked for and there is no GPU or no bitsandbytes.
    """
    model, found = AutoModelForCausalLM.from_pretrained(
        weights or directory,
        dtype=pick_precision(device),
        attn_implementation=attention,
        local_files_only=True,
        quantization_config=_round_to_four_bits(device) if four_bits else None,
        output_loading_info=True,
    )
    if weights and (found["missing_keys"] or found["unexpected_keys"]):
        missing, surplus = (sorted(found[key])[:3] for key in ("missing_keys", "unexpected_keys"))
        raise InputError(weights, f"weights missing {missing}, surplus {surplus}", "Fine-tune again")
    for name in ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise InputError(directory, f"{name} is set, and the loss would be wrong", "Choose another model")
    if four_bits:  # embeddings, norms and head in float32, here and not in build, so that texts are written as learnt
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.requires_grad_(False)
    return model.to(device), AutoTokenizer.from_pretrained(directory, local_files_only=True)


def _round_to_four_bits(device: torch.device) -> BitsAndBytesConfig:
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


def add_adapter(model: PreTrainedModel, tuning: dict) -> PeftModel:
    """Return the model wrapped by PEFT, with a new adapter as ``tuning`` says; see ``bundle.build``."""
    further = {name: value for name, value in tuning.items() if name not in ("mode", "targets")}
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=_check_targets(model, tuning["targets"]), **further)
    if tuning["mode"] == "lora" and not (tuning["lora_dropout"] or tuning["use_dora"]):
        config._register_custom_module({nn.Linear: FusedLora})
    # The optimiser keeps float32 masters; adapters in float32 would make each layer cast back and forth.
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    join_siblings(adapted)
    return adapted


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
            f"no layers that can take an adapter are named {', '.join(wrong) or 'there'}",
            f"This language model has {', '.join(known)}",
        )
    return targets
