"""A packed model from Hugging Face Hub, downloaded once."""

import logging
import shutil
from pathlib import Path

from cell2text.annotation.pack_model import read_model
from cell2text.errors import InputError
from cell2text.files import locked, writing
from cell2text.models.sources import HUB, download, is_local

log = logging.getLogger("cell2text.annotation")

FILES = ["*.json", "*.safetensors", "*.parquet", "README.md"]  # no pickled file is ever read


def fetch_model(source: str, folder: str | Path) -> Path:
    """Return the folder of a packed model; one of Hugging Face Hub is downloaded unless it is there.

    Parameters
    ----------
    source
        A folder, or ``hf://organisation/name@revision``.
    folder
        Where to store downloaded models, each in a folder of its own.

    Raises
    ------
    InputError
        If the source is malformed, cannot be downloaded, or is no packed model.
    """
    if is_local(source):
        return Path(source)
    match = HUB.fullmatch(source)
    if match is None:
        raise InputError("model", f"cannot read {source}", "Write hf://organisation/name@revision, or give a folder")
    name = f"{match['repository']}@{match['revision']}".replace("/", "--")
    path = Path(folder, name)
    if (path / "cell2text.json").is_file():
        return path
    unfinished = path.with_name(f".{name}.unfinished")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{name}.lock")):
            if not (path / "cell2text.json").is_file():  # another process may have downloaded it meanwhile
                log.info("downloading %s", source)
                shutil.rmtree(unfinished, ignore_errors=True)
                download(match["repository"], match["revision"], FILES, unfinished, "model")
                shutil.rmtree(unfinished / ".cache", ignore_errors=True)  # of the download
                read_model(unfinished)
                unfinished.rename(path)
    return path
