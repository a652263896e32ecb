"""Atomic writing of files and folders, errors of full disks, and JSON."""

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cell2text.errors import InputError, is_out_of_memory
from cell2text.provenance import hash_config, hash_file

log = logging.getLogger("cell2text.files")

FULL = {
    errno.ENOSPC: "Free some space on that disk",
    errno.EDQUOT: "Free some space, because the quota is used up",
    errno.EFBIG: "Raise the limit on the size of files (`ulimit -f`), or use another disk",
}
OTHER_FOLDER = "Run in a folder that can be written"
UNWRITABLE = FULL | {
    errno.EROFS: OTHER_FOLDER,
    errno.EACCES: OTHER_FOLDER,
    errno.EPERM: OTHER_FOLDER,
    errno.ENOTDIR: OTHER_FOLDER,
    errno.EEXIST: OTHER_FOLDER,  # a file in place of a folder
}
# Files by which a folder of this workflow is recognised, and keys that they have. No other folder is ever deleted.
MARKERS = {
    "source.json": {"source", "licence"},
    "encoder.json": {"kind", "dimensions"},
    "cell2text.json": {"projector", "finetune"},
}
DAMAGED = "Delete it and run the workflow again"


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn a failed write in the block into an ``InputError`` that names ``path`` and its disk.

    Libraries report a full disk in their own ways: h5py and pyarrow may give the reason only in the text of an
    ``OSError`` or ``RuntimeError``, the error of safetensors is no ``OSError``. All of them are recognised.

    Raises
    ------
    InputError
        If the disk is full or not writable.
    """
    path = Path(path)
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        number = _system_error(error, path)
        if number is None:
            raise
        disk = f" (disk: {_disk(path)})" if number in FULL else ""
        raise InputError(path, f"cannot be written: {os.strerror(number)}{disk}", UNWRITABLE[number]) from error


def _system_error(error: BaseException, path: Path) -> int | None:
    """Return the number of the system's error behind an exception, if it is that ``path`` cannot be written."""
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else path
        if error.errno in FULL or named.is_relative_to(path.parent) or path.is_relative_to(named):
            return error.errno
    chain: BaseException | None = error
    while chain is not None:
        text = str(chain)
        for number in FULL:
            if getattr(chain, "errno", None) == number or os.strerror(number) in text:
                return number
        chain = chain.__cause__ or chain.__context__
    return None


def _disk(path: Path) -> Path:
    """Return the mount point of the disk of a file, which need not exist."""
    folder = path.resolve()
    return next(parent for parent in (folder, *folder.parents) if parent.is_mount() or parent == parent.parent)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path`` and rename it to ``path`` if the block succeeds.

    The content is on disk before the rename, so that even a power failure leaves the old file or the new one.

    Raises
    ------
    InputError
        If the disk is full or not writable.
    """
    path = Path(path)
    # always the same name, so that a job overwrites what a killed one left behind
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield unfinished
            _sync(unfinished)
            unfinished.replace(path)
            _sync(path.parent)
    finally:
        with suppress(OSError):  # if nothing could be written, there is nothing to delete
            unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path, marker: str) -> Iterator[Path]:
    """Yield an empty folder next to ``path`` that replaces ``path`` if the block succeeds.

    Before that, ``marker`` is sealed (see :func:`seal`) and the content is on disk. A second process that writes the
    same folder waits until the first has finished. What a killed process left is deleted.

    Parameters
    ----------
    path
        Folder to write.
    marker
        One of ``MARKERS``, which the block writes.

    Raises
    ------
    InputError
        If ``path`` is not a folder of this workflow, or the disk is full or not writable.
    """
    path = Path(path)
    unfinished, old, lock = (path.with_name(f".{path.name}.{ending}") for ending in ("unfinished", "old", "lock"))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock):
            try:
                check_ours(path)
                _remove(unfinished)
                _remove(old)
                unfinished.mkdir()
                yield unfinished
                seal(unfinished, marker)
                for part in (*unfinished.rglob("*"), unfinished):
                    if not part.is_symlink():
                        _sync(part)
                check_ours(path)  # the block may have taken hours
                if path.exists():
                    path.rename(old)  # a rename cannot be interrupted halfway, unlike the deletion of a folder
                unfinished.rename(path)
                _sync(path.parent)
                _remove(old)
            finally:
                _remove(unfinished)


def _remove(path: Path) -> None:
    """Delete a folder or a link to one."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def check_ours(path: str | Path) -> None:
    """Raise an error if there is anything at ``path`` but an empty folder or one that this workflow wrote."""
    path = Path(path)
    if not os.path.lexists(path):
        return
    remedy = "Move it elsewhere, or delete it if nobody needs it"
    if not path.is_dir():
        raise InputError(path, "is in the place of a folder that the workflow writes", remedy)
    found = [name for name in MARKERS if (path / name).exists()]
    if not any(_is_marker(path / name) for name in found) and any(path.iterdir()):
        problem = f"{found[0]} is damaged" if found else f"has no {', '.join(MARKERS)}"
        raise InputError(path, f"this folder was not written by the workflow ({problem})", remedy)


def _is_marker(file: Path) -> bool:
    try:
        facts = read_json(file)
    except InputError:
        return False
    return isinstance(facts, dict) and facts.keys() >= MARKERS[file.name]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``; the system releases the lock if this process dies."""
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that writes %s", path.with_name(path.name[1:]).with_suffix(""))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            log.info("%s: this file system has no locks", path.parent)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # the process that had the lock deleted this file
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def seal(folder: str | Path, marker: str) -> None:
    """Add to the JSON file ``marker`` the SHA-256 of each other file in its folder, and of its own content."""
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / marker)
    facts = read_json(folder / marker)
    facts.pop("seal", None)
    facts["sha256"] = {path.relative_to(folder).as_posix(): hash_file(path) for path in files}
    write_json(facts | {"seal": hash_config(facts)}, folder / marker)


def read_sealed(folder: str | Path, marker: str, fix: str | None = None) -> dict[str, Any]:
    """Return the content of ``marker`` after checking the files that it lists; a file without a list is only read.

    Hashing takes about a second per GB (1.2 GB/s on one core of a Xeon at 2.8 GHz with SHA instructions).

    Parameters
    ----------
    folder, marker
        A folder, and the JSON file in it that :func:`seal` wrote.
    fix
        What the user should do; by default, delete the folder and run the workflow again.

    Raises
    ------
    InputError
        If a file is missing or has changed.
    """
    folder = Path(folder)
    fix = fix or f"Delete {folder} and run the workflow again"
    facts = read_json(folder / marker, fix)
    if not isinstance(facts, dict) or not isinstance(facts.get("sha256", {}), dict):
        raise InputError(folder / marker, "is damaged", fix)
    if facts.pop("seal", None) not in (None, hash_config(facts)):
        raise InputError(folder / marker, "has changed since it was written", fix)
    for name, expected in facts.get("sha256", {}).items():
        file = folder / name
        if file.is_symlink():  # into the folder of the fetched encoder
            file = Path(os.path.relpath(file.resolve()))
        problem = None if file.is_file() else "no such file"
        if not problem and hash_file(file) != expected:
            problem = f"has changed: its sha256 is not that in {folder / marker}"
        if problem:
            linked = (folder / name).is_symlink()
            raise InputError(file, problem, f"Delete {file.parent} and run the workflow again" if linked else fix)
    return facts


def check_hashes(files: Iterable[str | Path], provenance: str | Path) -> None:
    """Check text tables, which have no checksum of their own, against the hashes that were recorded with them.

    Parameters
    ----------
    files
        The tables.
    provenance
        JSON file whose key ``tables`` has the SHA-256 of each by name.

    Raises
    ------
    InputError
        If one is missing or has changed.
    """
    facts = read_json(provenance)
    for file in map(Path, files):
        with reading(provenance):
            expected = facts["tables"][file.name]
        with reading(file):
            if hash_file(file) != expected:
                raise ValueError(f"its sha256 is not that in {provenance}")


@contextmanager
def reading(path: str | Path, fix: str = DAMAGED) -> Iterator[None]:
    """Turn what libraries raise about a damaged or missing file in the block into an ``InputError``.

    Parameters
    ----------
    path
        The file, or the folder of a model.
    fix
        What the user should do.
    """
    try:
        yield
    except InputError:
        raise
    # those of Arrow and h5py are subclasses of these; that of safetensors is not
    except Exception as error:
        kinds = (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, OverflowError)
        if not isinstance(error, kinds) and type(error).__name__ != "SafetensorError":
            raise
        if is_out_of_memory(error):  # which says nothing about the file
            raise
        raise InputError(path, f"cannot be read: {reason(error)}", fix) from error


def reason(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if there is no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def write_jsonl(rows: Iterable[dict[str, Any]], path: str | Path) -> None:
    """Write one JSON object per line, atomically."""
    with whole_file(path) as unfinished, unfinished.open("w") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file with one per line.

    Raises
    ------
    InputError
        If there is no such file, or a line is not a JSON object.
    """
    with reading(path), Path(path).open() as file:
        for number, line in enumerate(file, start=1):
            row = json.loads(line)
            if not isinstance(row, dict) or not line.endswith("\n"):
                raise ValueError(f"line {number} is not a whole JSON object")
            yield row


def write_json(value: Any, path: str | Path) -> None:
    """Write a JSON file with sorted keys, atomically."""
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: str | Path, fix: str = DAMAGED) -> Any:
    """Return the content of a JSON file; ``fix`` is what the user should do if it is damaged.

    Raises
    ------
    InputError
        If there is no such file, or it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise InputError(path, "no such file", fix) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise InputError(path, f"is damaged: {reason(error)}", fix) from error
