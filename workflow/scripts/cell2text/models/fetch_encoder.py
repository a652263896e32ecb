"""Fetch a Geneformer checkpoint and store it with its gene table."""

import logging
import pickle
import re
import shutil
import tempfile
from pathlib import Path

from cell2text.errors import InputError
from cell2text.files import read_json, write_json
from cell2text.models.gene_dictionaries import SAME_SERIES, find_dictionaries
from cell2text.models.sources import download, licence_of
from cell2text.provenance import hash_file
from cell2text.spreadsheet import write_tsv

log = logging.getLogger("cell2text.models")

_HUB_FOLDER = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)@(?P<revision>[\w.-]+)/(?P<folder>[\w.-]+)")
ENCODER = "config: encoder.source"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


def fetch_encoder(source: str, directory: str | Path) -> None:
    """Fetch a Geneformer checkpoint and store it with its gene table, without any pickles.

    The directory holds ``config.json``, ``model.safetensors``, ``genes.tsv`` (``contracts.GENES``, one row per gene
    name), ``encoder.json`` and ``source.json``. It is written atomically.

    Parameters
    ----------
    source
        Folder of an official repository, or of one with the same layout (see ``gene_dictionaries.PLACES``).
    directory
        Directory to write.

    Raises
    ------
    InputError
        If the checkpoint cannot be fetched, is not a BERT model, or its dictionaries belong to another series.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".fetch-") as folder:
        downloads, model = Path(folder, "downloads"), Path(folder, "model")
        downloads.mkdir()
        model.mkdir()
        checkpoint, licence = _fetch_checkpoint(source, downloads)
        config = _read_config(checkpoint)
        dictionaries = find_dictionaries(checkpoint, config["vocab_size"])
        special = dictionaries.special
        _write_weights(checkpoint, model / "model.safetensors", config)
        if config.get("pad_token_id", 0) != special["pad"]:
            raise InputError(
                checkpoint / "config.json",
                f"pad_token_id is {config['pad_token_id']}, not {special['pad']}",
                SAME_SERIES,
            )
        shutil.copyfile(checkpoint / "config.json", model / "config.json")
        write_tsv(dictionaries.table(), model / "genes.tsv")
        about = {"kind": "geneformer", "layer": -2, "special": special, "dimensions": config["hidden_size"]}
        write_json(about, model / "encoder.json")
        files = {path.name: hash_file(path) for path in sorted(model.iterdir())}
        write_json({"source": source, "licence": licence, "sha256": files}, model / "source.json")
        shutil.rmtree(directory, ignore_errors=True)
        model.replace(directory)
    log.info("%s: %d tokens, up to %d per cell", directory, config["vocab_size"], config["max_position_embeddings"])


def _fetch_checkpoint(source: str, downloads: Path) -> tuple[Path, str]:
    checkpoint = Path(source)
    if source.startswith("hf://"):
        match = _HUB_FOLDER.fullmatch(source)
        if match is None:
            raise InputError(ENCODER, f"cannot read {source}", "Write hf://organisation/name@revision/folder")
        files = [f"{match['folder']}/{name}" for name in ("config.json", *WEIGHTS)]
        files += ["README.md", *(f"{place}/*.pkl" for place in ("geneformer", "geneformer/gene_dictionaries_30m"))]
        download(match["repository"], match["revision"], files, downloads, ENCODER)
        checkpoint = downloads / match["folder"]
    own, parents = (licence_of(folder) for folder in (checkpoint, checkpoint.parent))
    return checkpoint, parents if own == "not stated" else own


def _read_config(checkpoint: Path) -> dict:
    try:
        config = read_json(checkpoint / "config.json")
    except (OSError, ValueError) as error:
        raise InputError(
            ENCODER, f"no config.json to read in {checkpoint}", "Give the folder of a Geneformer checkpoint"
        ) from error
    if config.get("model_type") != "bert":
        raise InputError(ENCODER, f"{checkpoint} is no BERT model", "Give the folder of a Geneformer checkpoint")
    return config


def _write_weights(checkpoint: Path, path: Path, config: dict) -> None:
    """Write the encoder's weights as safetensors; a ``.bin`` file is read without executing code in it."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    file = next((checkpoint / name for name in WEIGHTS if (checkpoint / name).is_file()), None)
    if file is None:
        raise InputError(ENCODER, f"{checkpoint} has no {' or '.join(WEIGHTS)}", "Fetch the checkpoint again")
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True) if file.suffix == ".bin" else load_file(file)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(file, f"no plain weights ({reason})", "Fetch the checkpoint again") from error
    rows = len(weights[WORD_EMBEDDINGS]) if WORD_EMBEDDINGS in weights else 0
    if rows != config["vocab_size"]:
        raise InputError(file, f"{rows} tokens, but {config['vocab_size']} in config.json", "Fetch it again")
    # the masked-gene prediction head is not used here, and shares its weights with the embeddings
    kept = {name: value.contiguous() for name, value in weights.items() if name.startswith("bert.")}
    save_file(kept, path, metadata={"format": "pt"})
