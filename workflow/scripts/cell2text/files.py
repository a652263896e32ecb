"""Files that appear whole or not at all, and JSON as the project writes it."""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cell2text.errors import InputError

OTHER_FOLDER = "Run in a folder that can be written"
UNWRITABLE = {
    errno.ENOSPC: "Free some space on that disk",
    errno.EDQUOT: "Free some space, the quota is used up",
    errno.EROFS: OTHER_FOLDER,
    errno.ENOTDIR: OTHER_FOLDER,
    errno.EEXIST: OTHER_FOLDER,  # a file where a folder should be
}


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and move it there when the block ends without an error.

    Raises
    ------
    InputError
        If the disk is full or cannot be written.
    """
    path = Path(path)
    # the same name each time, so that a job overwrites what a killed one has left
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise InputError(path, f"cannot be written: {os.strerror(error.errno)}", UNWRITABLE[error.errno]) from error
    finally:
        with suppress(OSError):  # where nothing could be written, nothing is left
            unfinished.unlink(missing_ok=True)


def write_jsonl(rows: Iterable[dict[str, Any]], path: str | Path) -> None:
    """Write one JSON object a line, whole."""
    with whole_file(path) as unfinished, unfinished.open("w") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, one a line."""
    with Path(path).open() as file:
        for line in file:
            yield json.loads(line)


def write_json(value: Any, path: str | Path) -> None:
    """Write a JSON file, whole, with sorted keys."""
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Return what a JSON file holds."""
    return json.loads(Path(path).read_text())
