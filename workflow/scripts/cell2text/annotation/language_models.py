"""The original language model of a packed model: found among the fetched ones by its hashes, or where to fetch it."""

from pathlib import Path
from typing import Any

from cell2text.errors import InputError
from cell2text.files import read_json
from cell2text.models.sources import is_local


def locate_language_model(about: dict[str, Any], folder: str | Path) -> dict[str, str]:
    """Return name and source of the language model in a folder of fetched models, where it may still have to be.

    Parameters
    ----------
    about
        The facts about a packed model: ``language_model`` has name, source and hashes.
    folder
        Folder of fetched models.

    Raises
    ------
    InputError
        If it is not there, and its source is a path on another machine.
    """
    wanted = about["language_model"]
    for file in sorted(Path(folder).glob("*/source.json")):
        found = read_json(file)
        if isinstance(found, dict) and found.get("sha256") == wanted["sha256"]:
            return {"name": file.parent.name, "source": str(found["source"])}
    if is_local(wanted["source"]) and not Path(wanted["source"]).exists():
        raise InputError(
            "config: model",
            f"its language model {wanted['name']} is not in {folder}, and was read from {wanted['source']}",
            f"Copy the folder of that language model to {Path(folder, wanted['name'])}",
        )
    taken = Path(folder, wanted["name"]).exists()  # another model of this name
    name = f"{wanted['name']}-{wanted['sha256']['config.json'][:8]}" if taken else wanted["name"]
    return {"name": name, "source": wanted["source"]}
