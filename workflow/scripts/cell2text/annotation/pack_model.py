"""The model as one self-contained folder: all that describing new cells takes, besides the original language model."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cell2text.contracts import CELLS
from cell2text.errors import InputError
from cell2text.files import read_json, read_sealed, whole_folder, write_json
from cell2text.provenance import versions

log = logging.getLogger("cell2text.annotation")

FORMAT = 5  # raised by a change after which older folders cannot be read
COPY_AGAIN = "Copy the whole folder again, or train the model again with this version"
PACKAGES = ("cell2text", "torch", "transformers", "peft", "numpy", "safetensors")
RETRIEVER = "retriever.safetensors"  # if the model can search
REFINEMENT = "refinement.json"  # if it can refine cell types among similar cells
IGNORED = {".snakemake_timestamp"}


def pack_model(
    finetuned: str,
    encoder: str,
    genes: str,
    terms: str,
    confidence: str,
    reference: str,
    corpus: str,
    card: str,
    model: str,
    settings: dict[str, Any],
    retriever: Sequence[str] = (),
    refinement: Sequence[str] = (),
) -> None:
    """Gather the parts of a trained model in one folder and seal it with the hash of every file.

    Parameters
    ----------
    finetuned, encoder
        Folders written by ``finetune`` and ``fit_encoder``; linked weights of a fetched encoder are copied.
    genes, terms
        Files of ``contracts.GENES``, which tells which study measures a gene, and ``contracts.TERMS``.
    confidence, reference
        Files written by ``choose_thresholds`` and ``calibrate``.
    corpus
        File of ``contracts.CELLS``, only for the depth of the training cells.
    card
        The model card.
    model
        Folder to write.
    settings
        The config's values that describing cells needs: ``top_k``, ``batch_cells``, ``qc``.
    retriever, refinement
        The files written by ``fit_retriever`` and ``fit_refinement``, if there are any.
    """
    about = read_sealed(finetuned, "cell2text.json")
    training = CELLS.read(corpus, ["split", "n_counts"])
    depth = training.loc[training["split"] == "train", "n_counts"]
    with whole_folder(model, "cell2text.json") as folder:
        for source in sorted(Path(finetuned).iterdir()):
            if source.is_dir():
                shutil.copytree(source, folder / source.name)
            elif source.name not in IGNORED:
                shutil.copyfile(source, folder / source.name)
        shutil.copytree(encoder, folder / "encoder", ignore=shutil.ignore_patterns(*IGNORED))
        for file in (genes, terms, confidence, reference):
            shutil.copyfile(file, folder / Path(file).name)
        for files, name in ((retriever, RETRIEVER), (refinement, REFINEMENT)):
            for file in files:
                shutil.copyfile(file, folder / name)
        shutil.copyfile(card, folder / "README.md")  # where Hugging Face looks for the card
        about |= {
            "format": FORMAT,
            "settings": settings,
            "training_counts": [float(value) for value in np.quantile(depth, (0.05, 0.5, 0.95))],
            "versions": versions(*PACKAGES),
        }
        write_json(about, folder / "cell2text.json")
    size = sum(file.stat().st_size for file in Path(model).rglob("*") if file.is_file())
    log.info("%s is complete: %.1f MB, to be used with %s", model, size / 1e6, about["language_model"]["source"])


def read_facts(model: str | Path) -> dict[str, Any]:
    """Return the facts about a packed model that :func:`read_model` has checked, without hashing its files again."""
    return read_json(Path(model) / "cell2text.json", COPY_AGAIN)


def read_model(model: str | Path) -> dict[str, Any]:
    """Return the facts about a packed model after checking all of its files.

    Raises
    ------
    InputError
        If the folder is no packed model, has another format, or a file is missing, surplus or has changed.
    """
    folder = Path(model)
    if not (folder / "cell2text.json").is_file():
        problem = "no such folder" if not folder.is_dir() else "no cell2text.json in it"
        raise InputError(
            model, problem, "Give the folder `model` of a finished run, or hf://organisation/name@revision"
        )
    found = read_json(folder / "cell2text.json", COPY_AGAIN)
    written = found.get("format") if isinstance(found, dict) else None
    if written != FORMAT:
        raise InputError(
            folder / "cell2text.json",
            f"written in format {written}, and this version reads format {FORMAT}",
            "Use the version that trained the model, or train it again",
        )
    facts = read_sealed(folder, "cell2text.json", COPY_AGAIN)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    surplus = sorted(present - set(facts["sha256"]) - IGNORED - {"cell2text.json"})
    if surplus:
        raise InputError(
            folder / surplus[0], "is not a file of this model", "Delete it, or copy the whole folder again"
        )
    return facts
