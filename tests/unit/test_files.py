"""Files and folders are written whole, nobody else's are deleted, and a full disk is reported in one line."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from cell2text import files
from cell2text.errors import InputError
from cell2text.files import check_ours, read_json, read_sealed, whole_file, whole_folder, write_json, writing
from small_disk import small_files

FACTS = {"source": "somewhere", "licence": "MIT"}


def write(folder, content="weights"):
    with whole_folder(folder, "source.json") as unfinished:
        (unfinished / "part").mkdir()
        (unfinished / "part/weights").write_text(content)
        write_json(FACTS, unfinished / "source.json")
    return folder


def everything(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = write(tmp_path / "models/tiny", "old")
    with pytest.raises(KeyboardInterrupt), whole_folder(folder, "source.json") as unfinished:
        (unfinished / "weights").write_text("half")
        raise KeyboardInterrupt
    assert (folder / "part/weights").read_text() == "old"
    write(folder, "new")
    assert (folder / "part/weights").read_text() == "new"
    assert everything(tmp_path / "models") == ["tiny", "tiny/part", "tiny/part/weights", "tiny/source.json"]


def test_content_is_on_disk_before_the_rename(tmp_path, monkeypatch):
    events = []
    sync, replace, rename = os.fsync, Path.replace, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(str(Path(f"/proc/self/fd/{fd}").readlink())) or sync(fd))
    monkeypatch.setattr(Path, "replace", lambda *pair: events.append("rename") or replace(*pair))
    monkeypatch.setattr(Path, "rename", lambda *pair: events.append("rename") or rename(*pair))
    with whole_file(tmp_path / "table") as unfinished:
        unfinished.write_text("rows")
    assert events == [str(tmp_path / ".table.unfinished"), "rename", str(tmp_path)]
    events.clear()
    write(tmp_path / "tiny")
    before = events[: len(events) - 1 - events[::-1].index("rename")]
    unfinished = tmp_path / ".tiny.unfinished"
    assert {str(unfinished / name) for name in ("", "part", "part/weights", "source.json")} <= set(before)
    assert events[-2:] == ["rename", str(tmp_path)]


def foreign(folder, kind):
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("three years")
    if kind == "other source.json":
        write_json({"source": "a map"}, folder / "source.json")
    elif kind == "damaged marker":
        (folder / "encoder.json").write_text('{"kind": "coex')
    elif kind == "a list":
        write_json(["source", "licence"], folder / "source.json")


@pytest.mark.parametrize("kind", ["no marker", "other source.json", "damaged marker", "a list"])
def test_a_folder_of_somebody_else_is_never_replaced(tmp_path, kind):
    folder = tmp_path / "models/tiny"
    foreign(folder, kind)
    before = everything(tmp_path)
    with pytest.raises(InputError, match=rf"^{folder}: this folder was not written by the workflow \(.*\)\. Move it"):
        write(folder)
    assert everything(tmp_path) == before


def test_a_folder_that_became_somebody_elses_during_the_block_is_kept(tmp_path):
    folder = tmp_path / "tiny"
    with pytest.raises(InputError, match="not written by the workflow"), whole_folder(folder, "source.json") as new:
        write_json(FACTS, new / "source.json")
        foreign(folder, "no marker")
    assert everything(tmp_path) == ["tiny", "tiny/thesis.txt"]


def test_what_may_be_replaced(tmp_path):
    check_ours(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    check_ours(tmp_path / "empty")
    write(tmp_path / "tiny")
    check_ours(tmp_path / "tiny")
    (tmp_path / "link").symlink_to("tiny")  # a model on another disk
    write(tmp_path / "link", "new")
    assert (tmp_path / "tiny/part/weights").read_text() == "weights"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file: is in the place of a folder"):
        write(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "link", "tiny"]


KILLED = """
import os, signal, sys
from cell2text.files import whole_folder
with whole_folder(sys.argv[1], "source.json") as folder:
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    folder = tmp_path / "models/tiny"
    scripts = Path(files.__file__).parents[1]
    code = subprocess.run([sys.executable, "-c", KILLED, folder], cwd=scripts).returncode
    assert code == -signal.SIGKILL
    assert everything(folder.parent) == [".tiny.lock", ".tiny.unfinished", ".tiny.unfinished/half"]
    write(folder)
    assert everything(folder.parent) == ["tiny", "tiny/part", "tiny/part/weights", "tiny/source.json"]


def test_two_writers_of_one_folder_take_turns(tmp_path):
    folder, inside, most = tmp_path / "models/tiny", [], []

    def run(number):
        with whole_folder(folder, "source.json") as unfinished:
            inside.append(number)
            most.append(len(inside))
            (unfinished / "weights").write_text(str(number))
            time.sleep(0.1)
            assert [path.name for path in unfinished.iterdir()] == ["weights"]
            write_json(FACTS, unfinished / "source.json")
            inside.remove(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5
    assert everything(folder.parent) == ["tiny", "tiny/source.json", "tiny/weights"]
    assert read_sealed(folder, "source.json").items() >= FACTS.items()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    write(tmp_path / "tiny")
    assert everything(tmp_path) == ["tiny", "tiny/part", "tiny/part/weights", "tiny/source.json"]


@pytest.mark.parametrize("name", ["part/weights", "source.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_sealed_folder_shows_damage(tmp_path, name, damage):
    folder = write(tmp_path / "tiny")
    assert read_sealed(folder, "source.json")["sha256"].keys() == {"part/weights"}
    file = folder / name
    content = file.read_bytes()
    for position in range(0, len(content) - 1, 7):
        flipped = bytearray(content)
        flipped[position] ^= 1
        file.write_bytes({"cut": content[:position], "flipped": flipped, "gone": b""}[damage])
        if damage == "gone":
            file.unlink(missing_ok=True)
        with pytest.raises(InputError, match=rf"^{file}: .*Delete {folder} and run the workflow again$"):
            read_sealed(folder, "source.json")


def test_a_folder_without_a_list_of_hashes_is_only_read(tmp_path):
    write_json(FACTS, tmp_path / "source.json")
    assert read_sealed(tmp_path, "source.json") == FACTS


FULL = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, FULL),
        OSError(errno.ENOSPC, FULL, "elsewhere"),
        SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)"),
        OSError(f"Can't write data (file write failed: errno = 28, error message = '{FULL}', buf = 0x5)"),
        RuntimeError(f"Can't decrement id ref count (unable to close file, errno = 28, error message = '{FULL}')"),
        OSError(f"[Errno 28] Error writing bytes to file. Detail: [errno 28] {FULL}"),
    ],
    ids=["system", "named", "safetensors", "h5py", "h5py at close", "pyarrow"],
)
def test_a_full_disk_is_recognised_in_the_errors_of_all_libraries(tmp_path, error):
    disk = next(parent for parent in tmp_path.resolve().parents if parent.is_mount())
    path = tmp_path / "table"
    expected = rf"^{path}: cannot be written: {FULL} \(disk: {disk}\)\. Free some space on that disk$"
    for block in (whole_file(path), writing(path)):
        with pytest.raises(InputError, match=expected), block:
            raise error
    with pytest.raises(InputError, match=expected), whole_file(path):
        try:
            raise error
        finally:
            raise RuntimeError("cannot close the file")
    assert not any(tmp_path.iterdir())


def test_other_errors_are_not_blamed_on_the_disk(tmp_path):
    for error in (ValueError("a bug"), PermissionError(errno.EACCES, "no", "/input"), FileNotFoundError(2, "no", "in")):
        with pytest.raises(type(error)) as found, whole_file(tmp_path / "table"):
            raise error
        assert found.value is error
    mine = InputError("config: seed", "is odd", "Make it even")
    with pytest.raises(InputError, match="is odd") as found, whole_file(tmp_path / "table"):
        raise mine
    assert found.value is mine


def test_a_folder_without_permission(tmp_path):
    error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / ".table.unfinished"))
    expected = r"table: cannot be written: Permission denied\. Run in a folder"
    with pytest.raises(InputError, match=expected), whole_file(tmp_path / "table"):
        raise error


def write_h5(path):
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(100_000)


@pytest.mark.parametrize(
    "writer",
    [
        lambda path: path.write_bytes(b"x" * 100_000),
        lambda path: save_file({"x": np.arange(100_000)}, path),
        lambda path: pd.DataFrame({"x": np.random.default_rng(0).random(100_000)}).to_parquet(path),
        lambda path: pd.DataFrame({"x": np.arange(100_000)}).to_csv(path),
        write_h5,
    ],
    ids=["bytes", "safetensors", "parquet", "csv", "h5"],
)
def test_a_real_failure_of_each_writer(tmp_path, writer):
    with pytest.raises(InputError) as error, small_files(20_000), whole_file(tmp_path / "table") as unfinished:
        writer(unfinished)
    assert re.match(rf"{tmp_path}/table: cannot be written: File too large \(disk: .*\)\. Raise", str(error.value))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{", '{"a": 1}}', b"\xff\xfe", "[" * 100_000])
def test_damaged_json_is_reported(tmp_path, content):
    path = tmp_path / "about.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=rf"^{path}: is damaged: .*\. Delete it and run the workflow again$"):
        read_json(path)
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        read_json(path)
