"""The model: soft tokens of a cell between the two halves of a chat prompt, and a language model that answers."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from cell2text.contracts import read_json, write_json
from cell2text.device import pick_device, pick_precision
from cell2text.errors import InputError
from cell2text.model.fused import FusedLora, fuse_gates, fuse_norms, fuse_rotations, join_siblings
from cell2text.model.loss import TextLoss
from cell2text.model.projectors import build_projector
from cell2text.model.shared_prompt import NAME, Row

INSTRUCTION = "Describe the cell."
_CELL = "\N{BLACK SQUARE}"  # stands where the soft tokens go while the prompt is still text
# What of the language model learns: an adapter, everything, or an adapter beside weights of 4 bits.
MODES = ("lora", "full", "qlora")
TUNING = {"mode": "lora", "targets": "all-linear", "lora_dropout": 0.0, "use_dora": False, "use_rslora": False}


@dataclass(frozen=True)
class Prompt:
    """Token ids before and after the soft tokens.

    Parameters
    ----------
    before, after
        int64 (tokens,).
    """

    before: Tensor
    after: Tensor

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Prompt":
        """Cut the model's own chat template where the cell goes, so that no reserved token is needed."""
        messages = [{"role": "user", "content": f"{INSTRUCTION} {_CELL}"}]
        if tokenizer.chat_template is None:
            text = f"{INSTRUCTION} {_CELL}\n"
        else:
            if "system" in tokenizer.chat_template:
                # some templates put in a long system message of their own when there is none
                messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": _CELL}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        halves = [tokenizer(half, add_special_tokens=False)["input_ids"] for half in text.split(_CELL)]
        return cls(*(torch.tensor(half, dtype=torch.long) for half in halves))


class Cell2Text(nn.Module):
    """A causal language model with a projector in front.

    Parameters
    ----------
    language_model
        Any causal model of transformers, or the same wrapped by PEFT.
    tokenizer
        Its tokenizer.
    projector
        One of ``projectors.PROJECTORS``.
    settings
        What :func:`save` needs to write beside the weights: the config's ``projector`` section, the encoder's
        dimensions, and what :func:`build` takes as ``tuning``.
    """

    def __init__(
        self,
        language_model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        projector: nn.Module,
        settings: dict,
    ):
        super().__init__()
        self.language_model, self.tokenizer, self.projector = language_model, tokenizer, projector
        self.settings = settings
        self.prompt = Prompt.of(tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.projector.scale.device

    @property
    def mode(self) -> str:
        """What of the language model learns, one of ``MODES``."""
        return self.settings.get("tuning", TUNING)["mode"]

    @property
    def decoder(self) -> nn.Module:
        """The language model without its head."""
        model = self.language_model
        return (model.get_base_model() if isinstance(model, PeftModel) else model).get_decoder()

    @property
    def head(self) -> nn.Linear:
        """From hidden states to logits."""
        return self.language_model.get_output_embeddings()

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Return the language model's own embeddings of token ids."""
        return self.language_model.get_input_embeddings()(ids)

    def read_cells(self, vectors: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prompt of each cell as embeddings, padded on the left.

        Parameters
        ----------
        vectors, lengths
            What the projector reads; see its ``forward``.

        Returns
        -------
        embeddings
            (cells, prompt, width), in the language model's dtype.
        mask
            bool (cells, prompt); false on the padding.
        """
        soft, there = self.projector(vectors, lengths)
        cells = len(soft)
        before, after = (
            self.embed_tokens(half.to(soft.device)).expand(cells, -1, -1)
            for half in (self.prompt.before, self.prompt.after)
        )
        prompt = torch.cat([before, soft.to(before.dtype), after], dim=1)
        mask = torch.cat([there.new_ones(before.shape[:2]), there, there.new_ones(after.shape[:2])], dim=1)
        if bool(mask.all()):
            return prompt, mask
        # Padding moves from behind the soft tokens to the left; a stable sort keeps the order of the rest.
        order = mask.to(torch.int8).argsort(dim=1, stable=True)
        return prompt.gather(1, order[..., None].expand_as(prompt)), mask.gather(1, order)

    def text_loss(self, soft: Tensor, there: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed negative log likelihood of the texts, and of how many tokens it is the sum.

        Only the text is scored, never the prompt, and logits are computed nowhere else. What stands before the
        soft tokens is the same for all cells and read once.

        Parameters
        ----------
        soft, there
            As the projector gives them.
        text, text_mask
            Token ids of the description and the end token, int64 (cells, text), padded on the right; which
            are there, bool.
        """
        return self.loss_of(self.states_before(soft, there, text, text_mask), text[text_mask]), text_mask.sum()

    def states_before(self, soft: Tensor, there: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Return the hidden state before each token of the texts, (tokens, width); parameters as of `text_loss`."""
        before, after = (self.embed_tokens(half.to(soft.device)) for half in (self.prompt.before, self.prompt.after))
        of_cells = torch.cat([soft.to(before.dtype), after.expand(len(soft), -1, -1), self.embed_tokens(text)], dim=1)
        mask = torch.cat([there, there.new_ones(len(soft), len(after)), text_mask], dim=1)
        row = Row.of(len(before), mask, before.dtype)
        hidden = self.decoder(
            inputs_embeds=row.join(before, of_cells),
            position_ids=row.positions(),
            use_cache=False,
            row=row,
        ).last_hidden_state
        # The hidden state before a token predicts it.
        of_text = row.of_cells(nn.functional.pad(text_mask, (mask.shape[1] - text.shape[1], 0)))
        return hidden[0, row.prompt - 1 :].index_select(0, of_text.nonzero().squeeze(1))

    def loss_of(self, states: Tensor, targets: Tensor) -> Tensor:
        """Return the summed negative log likelihood of tokens, (tokens,), given the states before them."""
        weight, bias = self.head.weight, self.head.bias
        if not torch.is_grad_enabled():  # an autograd function is not told so, and would compute their gradients
            weight, bias = weight.detach(), bias if bias is None else bias.detach()
        return TextLoss.apply(states, weight, bias, targets)

    def checkpoint_activations(self) -> None:
        """Hold the activations of one layer, not of all: the backward pass computes each anew (arXiv 1604.06174).

        Raises
        ------
        InputError
            If transformers cannot do so with this language model.
        """
        if not self.decoder.supports_gradient_checkpointing:
            told = f"{type(self.decoder).__name__} cannot compute its layers anew"
            raise InputError("config: finetune.checkpoint_activations", told, "Set it to false")
        self.decoder.activation_checkpointing_enable({"use_reentrant": False})

    def ready_to_write(self) -> "Cell2Text":
        """Fold the adapter into the language model's weights and take the attention that decodes fastest."""
        if self.mode == "lora":  # the sum with weights of 4 bits would be rounded to 4 bits again
            self.language_model = self.language_model.merge_and_unload()
        self.language_model.set_attn_implementation("sdpa")
        return self.eval()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that fine-tuning changes, by name, in a fixed order."""
        return {name: value for name, value in sorted(self.named_parameters()) if value.requires_grad}


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


def build(
    language_model: str | Path, projector: dict, dimensions: int, tuning: dict, device: torch.device
) -> Cell2Text:
    """Return a new model: the projector untrained, the language model as it was, an adapter without effect yet.

    Parameters
    ----------
    language_model
        A Hugging Face directory.
    projector
        The config's ``projector`` section.
    dimensions
        Of the encoder's vectors.
    tuning
        ``mode``, one of ``MODES``. For an adapter also ``r`` and ``lora_alpha``, ``targets`` ("all-linear" or a list
        of ends of layers' names), and further options of PEFT's LoraConfig: ``lora_dropout``, ``use_dora`` (arXiv
        2402.09353), ``use_rslora`` (arXiv 2312.03732). ``TUNING`` holds what may be left out.
    device
        Where to put it.

    Raises
    ------
    InputError
        If the mode is unknown or cannot run here, or the targets are no layers of the language model.
    """
    tuning = TUNING | tuning
    mode = tuning["mode"]
    if mode not in MODES:
        raise InputError("config: finetune.mode", f"{mode} is none of {', '.join(MODES)}", "Set one of them")
    model, tokenizer = load_language_model(language_model, device, NAME, mode == "qlora")
    embeddings = model.get_input_embeddings().weight
    fuse_norms(model)
    fuse_gates(model)
    fuse_rotations(model)
    tuned = model.requires_grad_(True) if mode == "full" else _add_adapter(model, tuning)
    new = build_projector(projector, dimensions, model.config.hidden_size).to(device)
    new.start_at(embeddings.detach())
    return Cell2Text(tuned, tokenizer, new, {"projector": projector, "dimensions": dimensions, "tuning": tuning})


def _add_adapter(model: PreTrainedModel, tuning: dict) -> PeftModel:
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


def save(model: Cell2Text, directory: str | Path, about: dict) -> None:
    """Write what was trained and ``cell2text.json``, all that is needed beside the original language model.

    That is the projector, and the adapter in ``adapter/`` or the whole language model in ``language_model/``.

    Parameters
    ----------
    model
        A model as :func:`build` makes it.
    directory
        An existing directory.
    about
        Further facts for ``cell2text.json``, such as the language model's source and the training settings.
    """
    directory = Path(directory)
    if model.mode == "full":
        model.language_model.save_pretrained(directory / "language_model")
    else:
        _save_adapter(model.language_model, directory / "adapter")
    projector = {name: value.contiguous().cpu() for name, value in model.projector.state_dict().items()}
    save_file(projector, directory / "projector.safetensors")
    write_json({**model.settings, **about}, directory / "cell2text.json")


def _save_adapter(adapted: PeftModel, directory: Path) -> None:
    adapted.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    config = read_json(directory / "adapter_config.json")
    # PEFT notes where the base model lay on this machine, which says nothing elsewhere, and the targets as a set.
    config |= {"base_model_name_or_path": None, "target_modules": sorted(config["target_modules"])}
    write_json(config, directory / "adapter_config.json")


def load(directory: str | Path, language_model: str | Path, device: torch.device | None = None) -> Cell2Text:
    """Read what :func:`save` wrote, ready for generation.

    Parameters
    ----------
    directory
        Where it was written.
    language_model
        Directory of the original language model; of a model trained in full, only its tokenizer is read.
    device
        Where to put it; a GPU if there is one.

    Raises
    ------
    InputError
        If a weight is missing or surplus, or the model is of 4 bits and cannot run here.
    """
    directory = Path(directory)
    device = device or pick_device()
    about = read_json(directory / "cell2text.json")
    mode = about.get("tuning", TUNING)["mode"]
    weights = directory / "language_model" if mode == "full" else None
    model, tokenizer = load_language_model(language_model, device, "sdpa", mode == "qlora", weights)
    projector = build_projector(about["projector"], about["dimensions"], model.config.hidden_size)
    try:
        projector.load_state_dict(load_file(directory / "projector.safetensors"), strict=True)
    except RuntimeError as error:
        raise InputError(directory / "projector.safetensors", str(error), "Fine-tune again") from error
    tuned = model if mode == "full" else _load_adapter(model, directory / "adapter")
    return Cell2Text(tuned, tokenizer, projector.to(device), about).eval()


def _load_adapter(model: PreTrainedModel, directory: Path) -> PeftModel:
    adapted = PeftModel.from_pretrained(model, directory, autocast_adapter_dtype=False)
    saved = set(load_file(directory / "adapter_model.safetensors"))
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if saved != expected:
        raise InputError(
            directory,
            f"weights missing {sorted(expected - saved)[:3]}, surplus {sorted(saved - expected)[:3]}",
            "Fine-tune again with this language model",
        )
    return adapted
