"""A model built, saved and loaded: the projector, and the adapter or the weights of the language model."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from cell2text.device import pick_device
from cell2text.errors import InputError
from cell2text.files import read_json, read_sealed, reading, write_json, writing
from cell2text.model.cell2text import Cell2Text
from cell2text.model.language_model import add_adapter, load_language_model
from cell2text.model.projectors import build_projector
from cell2text.settings import FinetuneSettings, ProjectorSettings
from cell2text.weights import check_finite, read_weights

FIX = "Delete the model's folder and fine-tune again with this language model"


def build(
    language_model: str | Path,
    projector: ProjectorSettings,
    dimensions: int,
    settings: FinetuneSettings,
    device: torch.device,
) -> Cell2Text:
    """Return a new model: an untrained projector, and the language model with an adapter that has no effect yet.

    Parameters
    ----------
    language_model
        A Hugging Face directory.
    projector, settings
        The config's ``projector`` and ``finetune`` sections.
    dimensions
        Length of the encoder's vectors.
    device
        Where to put the model.

    Raises
    ------
    InputError
        If the mode is unknown or cannot run here, a target is not a layer of the language model, or a file of the
        language model has changed since it was fetched.
    """
    check_unchanged(language_model)
    model, tokenizer = load_language_model(language_model, device, settings.mode)
    embed = model.get_input_embeddings()
    with torch.no_grad():  # as the layers receive them: some models multiply their embeddings by a constant
        embeddings = embed(torch.arange(embed.weight.shape[0], device=device))
    tuned = model.requires_grad_(True) if settings.mode == "full" else add_adapter(model, settings)
    new = build_projector(projector, dimensions, embeddings.shape[1]).to(device)
    new.start_at(embeddings)
    about = {"projector": asdict(projector), "dimensions": dimensions, "finetune": asdict(settings)}
    return Cell2Text(tuned, tokenizer, new, about)


def check_unchanged(directory: str | Path) -> None:
    """Raise an ``InputError`` if a file of a fetched language model has changed; others have no list of hashes."""
    if Path(directory, "source.json").exists():
        read_sealed(directory, "source.json")


def save(model: Cell2Text, directory: str | Path, about: dict[str, Any]) -> None:
    """Write the trained weights and ``cell2text.json``: all that is needed besides the original language model.

    The weights are the projector's, and the adapter in ``adapter/`` or the whole language model in ``language_model/``.

    Parameters
    ----------
    model
        A model as :func:`build` returns it.
    directory
        An existing directory.
    about
        Further facts for ``cell2text.json``, such as the language model's source.

    Raises
    ------
    InputError
        If the disk is full or not writable.
    """
    directory = Path(directory)
    with writing(directory):
        if model.about["finetune"]["mode"] == "full":
            model.language_model.save_pretrained(directory / "language_model")
        else:
            _save_adapter(model.language_model, directory / "adapter")
        projector = {name: value.contiguous().cpu() for name, value in model.projector.state_dict().items()}
        save_file(projector, directory / "projector.safetensors")
        write_json({**model.about, **about}, directory / "cell2text.json")


def _save_adapter(adapted: PeftModel, directory: Path) -> None:
    adapted.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    config = read_json(directory / "adapter_config.json")
    # PEFT records the base model's path on this machine, which means nothing elsewhere, and the targets as a set.
    config |= {"base_model_name_or_path": None, "target_modules": sorted(config["target_modules"])}
    write_json(config, directory / "adapter_config.json")


def load(directory: str | Path, language_model: str | Path, device: torch.device | None = None) -> Cell2Text:
    """Read what :func:`save` wrote, ready for generation.

    Parameters
    ----------
    directory
        The directory given to :func:`save`.
    language_model
        Directory of the original language model; for ``mode: full``, only its tokenizer is read.
    device
        Where to put the model; by default the GPU, if there is one.

    Raises
    ------
    InputError
        If a file is missing, damaged or has changed, a weight is missing, surplus or not finite, or the model has 4-bit
        weights, which cannot run here.
    """
    directory = Path(directory)
    device = device or pick_device()
    about = read_sealed(directory, "cell2text.json")
    check_unchanged(language_model)
    with reading(directory / "cell2text.json", FIX):
        mode = about["finetune"]["mode"]
    weights = directory / "language_model" if mode == "full" else None
    model, tokenizer = load_language_model(language_model, device, mode, weights)
    if mode == "full":
        check_finite(dict(model.named_parameters()), weights, FIX)
    tuned = model if mode == "full" else _load_adapter(model, directory / "adapter")
    return Cell2Text(tuned, tokenizer, _load_projector(directory, about, model), about).eval()


def load_projector(directory: str | Path, language_model: str | Path, device: torch.device | None = None) -> Cell2Text:
    """Read the projector that :func:`save` wrote, with the original language model, whose embeddings it is aligned to.

    The projector is aligned to the embeddings from before fine-tuning, which ``mode: full`` changes. No weights are
    rounded to 4 bits, so this needs no GPU in any mode.

    Parameters
    ----------
    directory, language_model, device
        As in :func:`load`.

    Raises
    ------
    InputError
        If a file of either is damaged.
    """
    directory = Path(directory)
    about = read_sealed(directory, "cell2text.json")
    check_unchanged(language_model)
    model, tokenizer = load_language_model(language_model, device or pick_device(), "lora")
    return Cell2Text(model, tokenizer, _load_projector(directory, about, model), about).eval()


def _load_projector(directory: Path, about: dict[str, Any], model: PreTrainedModel) -> nn.Module:
    with reading(directory / "cell2text.json", FIX):
        settings, dimensions = ProjectorSettings(**about["projector"]), about["dimensions"]
    file = directory / "projector.safetensors"
    with reading(file, FIX):
        projector = build_projector(settings, dimensions, model.get_input_embeddings().weight.shape[1])
        projector.load_state_dict(read_weights(file, FIX), strict=True)
    return projector.to(model.device)


def _load_adapter(model: PreTrainedModel, directory: Path) -> PeftModel:
    saved = set(read_weights(directory / "adapter_model.safetensors", FIX))
    with reading(directory, FIX):
        adapted = PeftModel.from_pretrained(model, directory, autocast_adapter_dtype=False)
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if saved != expected:
        raise InputError(
            directory,
            f"weights missing {sorted(expected - saved)[:3]}, surplus {sorted(saved - expected)[:3]}",
            "Fine-tune again with this language model",
        )
    return adapted
