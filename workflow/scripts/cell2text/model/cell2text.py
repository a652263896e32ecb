"""The model: soft tokens of a cell between the two halves of a chat prompt, and a language model that answers."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cell2text.contracts import read_json, write_json
from cell2text.device import pick_device
from cell2text.errors import InputError
from cell2text.model.fused import FusedLora, fuse_norms, join_siblings
from cell2text.model.loss import TextLoss
from cell2text.model.projectors import build_projector
from cell2text.model.shared_prompt import NAME, Row

INSTRUCTION = "Describe the cell."
_CELL = "\N{BLACK SQUARE}"  # stands where the soft tokens go while the prompt is still text


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
        What :func:`save` needs to write beside the weights: the config's ``projector`` section and the
        encoder's dimensions.
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
        before, after = (
            self.embed_tokens(half.to(soft.device))[None] for half in (self.prompt.before, self.prompt.after)
        )
        of_cells = torch.cat([soft.to(before.dtype), after.expand(len(soft), -1, -1), self.embed_tokens(text)], dim=1)
        mask = torch.cat([there, there.new_ones(len(soft), after.shape[1]), text_mask], dim=1)
        row = Row.of(before.shape[1], mask, before.dtype)
        hidden = self.decoder(
            inputs_embeds=torch.cat([before, of_cells.flatten(0, 1)[None]], dim=1),
            position_ids=row.positions(),
            use_cache=False,
            row=row,
        ).last_hidden_state
        # The hidden state before a token predicts it.
        states = hidden[0, row.prompt :].view_as(of_cells)[:, -text.shape[1] - 1 : -1][text_mask]
        return TextLoss.apply(states, self.head.weight, self.head.bias, text[text_mask]), text_mask.sum()

    def ready_to_write(self) -> "Cell2Text":
        """Fold the adapter into the language model's weights and take the attention that decodes fastest."""
        self.language_model = self.language_model.merge_and_unload()
        self.language_model.set_attn_implementation("sdpa")
        return self.eval()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that fine-tuning changes, by name, in a fixed order."""
        return {name: value for name, value in sorted(self.named_parameters()) if value.requires_grad}


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device computes in it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    bfloat16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if bfloat16 else torch.float32


def load_language_model(
    directory: str | Path, device: torch.device, attention: str
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

    Raises
    ------
    InputError
        If the model scales or caps its logits or its attention's scores, which is not done here.
    """
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=compute_dtype(device),
        attn_implementation=attention,
        local_files_only=True,
    )
    for name in ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise InputError(directory, f"{name} is set, and the loss would be wrong", "Choose another model")
    model.requires_grad_(False)
    return model.to(device), AutoTokenizer.from_pretrained(directory, local_files_only=True)


def build(language_model: str | Path, projector: dict, dimensions: int, lora: dict, device: torch.device) -> Cell2Text:
    """Return a new model: the projector untrained, the adapter without effect yet.

    Parameters
    ----------
    language_model
        A Hugging Face directory.
    projector
        The config's ``projector`` section.
    dimensions
        Of the encoder's vectors.
    lora
        ``r`` and ``lora_alpha`` of PEFT's LoraConfig.
    device
        Where to put it.
    """
    base, tokenizer = load_language_model(language_model, device, NAME)
    fuse_norms(base)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **lora)
    config._register_custom_module({nn.Linear: FusedLora})
    adapted = get_peft_model(
        base,
        config,
        # The optimiser keeps float32 masters; adapters in float32 would make each layer cast back and forth.
        autocast_adapter_dtype=False,
    )
    join_siblings(adapted)
    new = build_projector(projector, dimensions, base.config.hidden_size).to(device)
    new.start_at(base.get_input_embeddings().weight)
    return Cell2Text(adapted, tokenizer, new, {"projector": projector, "dimensions": dimensions})


def save(model: Cell2Text, directory: str | Path, about: dict) -> None:
    """Write adapter, projector and ``cell2text.json``, all that is needed beside the language model.

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
    model.language_model.save_pretrained(directory / "adapter", safe_serialization=True)
    # PEFT notes where the base model lay on this machine; that says nothing elsewhere.
    (directory / "adapter" / "README.md").unlink(missing_ok=True)
    adapter_config = directory / "adapter" / "adapter_config.json"
    write_json(read_json(adapter_config) | {"base_model_name_or_path": None}, adapter_config)
    projector = {name: value.contiguous().cpu() for name, value in model.projector.state_dict().items()}
    save_file(projector, directory / "projector.safetensors")
    write_json({**model.settings, **about}, directory / "cell2text.json")


def load(directory: str | Path, language_model: str | Path, device: torch.device | None = None) -> Cell2Text:
    """Read what :func:`save` wrote, ready for generation.

    Raises
    ------
    InputError
        If a weight is missing or surplus.
    """
    directory = Path(directory)
    device = device or pick_device()
    about = read_json(directory / "cell2text.json")
    base, tokenizer = load_language_model(language_model, device, "sdpa")
    projector = build_projector(about["projector"], about["dimensions"], base.config.hidden_size)
    try:
        projector.load_state_dict(load_file(directory / "projector.safetensors"), strict=True)
    except RuntimeError as error:
        raise InputError(directory / "projector.safetensors", str(error), "Fine-tune again") from error
    adapted = PeftModel.from_pretrained(base, directory / "adapter", autocast_adapter_dtype=False)
    saved = {key.split("base_model.")[-1] for key in load_file(directory / "adapter/adapter_model.safetensors")}
    expected = {
        name.replace(".default", "").split("base_model.")[-1]
        for name, _ in adapted.named_parameters()
        if "lora_" in name
    }
    if saved != expected:
        raise InputError(
            directory / "adapter",
            f"weights missing {sorted(expected - saved)[:3]}, surplus {sorted(saved - expected)[:3]}",
            "Fine-tune again with this language model",
        )
    return Cell2Text(adapted, tokenizer, projector.to(device), about).eval()
