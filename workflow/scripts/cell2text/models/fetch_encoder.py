"""Fetch a Geneformer checkpoint and store it with its gene table."""

import logging
import os
import pickle
import re
import shutil
from pathlib import Path

from cell2text.contracts import GENES
from cell2text.errors import InputError
from cell2text.files import read_json, reason, whole_folder, write_json
from cell2text.models.gene_dictionaries import PLACES, SAME_SERIES, find_dictionaries
from cell2text.models.sources import check_target, download, is_local, licence_of
from cell2text.weights import check_finite

log = logging.getLogger("cell2text.models")

_HUB_FOLDER = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)@(?P<revision>[\w.-]+)/(?P<folder>[\w.-]+)")
ENCODER = "config: encoder.source"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
SIZES = ("vocab_size", "hidden_size", "max_position_embeddings")  # keys of config.json
WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


def fetch_encoder(source: str, directory: str | Path) -> None:
    """Fetch a Geneformer checkpoint and store it with its gene table, without any pickles.

    The directory holds ``config.json``, ``model.safetensors``, ``genes.parquet`` (``contracts.GENES``, one row per gene
    name), ``encoder.json`` and ``source.json``. It is written atomically, and never over a model from another source.

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
    with whole_folder(directory, "source.json") as model:
        check_target(directory, source, ENCODER)
        downloads = model / "downloads"
        downloads.mkdir()
        checkpoint, licence = _fetch_checkpoint(source, downloads)
        config = _read_config(checkpoint)
        dictionaries = find_dictionaries(checkpoint, config["vocab_size"])
        special = dictionaries.special
        _write_weights(checkpoint, model / "model.safetensors", config)
        pad = config.get("pad_token_id", 0)  # as in BertConfig
        if pad != special["pad"]:
            raise InputError(checkpoint / "config.json", f"pad_token_id is {pad}, not {special['pad']}", SAME_SERIES)
        shutil.copyfile(checkpoint / "config.json", model / "config.json")
        GENES.write(dictionaries.table(), model / "genes.parquet")
        about = {"kind": "geneformer", "layer": -2, "special": special, "dimensions": config["hidden_size"]}
        write_json(about, model / "encoder.json")
        write_json({"source": source, "licence": licence}, model / "source.json")
        shutil.rmtree(downloads)
    log.info("%s: %d tokens, up to %d per cell", directory, config["vocab_size"], config["max_position_embeddings"])


def local_files(source: str) -> list[str]:
    """Return the files of a local checkpoint that :func:`fetch_encoder` may read; none for a download."""
    if not is_local(source):
        return []
    folder = Path(source)
    found = [folder / name for name in ("config.json", *WEIGHTS)]
    found += [path for place in PLACES for path in (folder / place).glob("*.pkl")]
    return sorted({os.path.normpath(path) for path in found if path.is_file()})


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
    fix = "Give the folder of a Geneformer checkpoint"
    try:
        config = read_json(checkpoint / "config.json")
    except (InputError, OSError) as error:
        raise InputError(ENCODER, f"no config.json to read in {checkpoint}", fix) from error
    if not isinstance(config, dict) or config.get("model_type") != "bert":
        raise InputError(ENCODER, f"{checkpoint} is no BERT model", fix)
    wrong = [key for key in SIZES if not isinstance(config.get(key), int) or config[key] < 1]
    if wrong:
        raise InputError(checkpoint / "config.json", f"{wrong[0]} is {config.get(wrong[0])}, no positive number", fix)
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
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError) as error:
        raise InputError(file, f"no plain weights ({reason(error)})", "Fetch the checkpoint again") from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise InputError(file, "no plain weights", "Fetch the checkpoint again")
    rows = len(weights[WORD_EMBEDDINGS]) if WORD_EMBEDDINGS in weights else 0
    if rows != config["vocab_size"]:
        raise InputError(file, f"{rows} tokens, but {config['vocab_size']} in config.json", "Fetch it again")
    # the masked-gene prediction head is not used here, and shares its weights with the embeddings
    kept = {name: value.contiguous() for name, value in weights.items() if name.startswith("bert.")}
    check_finite(kept, file, "Fetch the checkpoint again")
    save_file(kept, path, metadata={"format": "pt"})
