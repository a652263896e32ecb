"""Atomic writing of files, and JSON."""

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
    errno.EDQUOT: "Free some space, because the quota is used up",
    errno.EROFS: OTHER_FOLDER,
    errno.ENOTDIR: OTHER_FOLDER,
    errno.EEXIST: OTHER_FOLDER,  # a file in place of a folder
}


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path`` and rename it to ``path`` if the block succeeds.

    Raises
    ------
    InputError
        If the disk is full or not writable.
    """
    path = Path(path)
    # always the same name, so that a job overwrites what a killed one left behind
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
        with suppress(OSError):  # if nothing could be written, there is nothing to delete
            unfinished.unlink(missing_ok=True)


def write_jsonl(rows: Iterable[dict[str, Any]], path: str | Path) -> None:
    """Write one JSON object per line, atomically."""
    with whole_file(path) as unfinished, unfinished.open("w") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file with one per line."""
    with Path(path).open() as file:
        for line in file:
            yield json.loads(line)


def write_json(value: Any, path: str | Path) -> None:
    """Write a JSON file with sorted keys, atomically."""
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(Path(path).read_text())
