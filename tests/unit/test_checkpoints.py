"""Checkpoints: what is written is read, and any damage is noticed, reported and set aside."""

import json
import logging
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cell2text.errors import InputError
from cell2text.training import read_checkpoint, write_checkpoint

STATE = {"step": 3, "best_loss": float("inf"), "history": [{"loss": 1.25, "align_loss": float("nan")}]}


def tensors():
    torch.manual_seed(0)
    return {
        "weight.a": torch.randn(3, 4),
        "weight.b": torch.randn(5).bfloat16(),
        "step.a": torch.tensor(4.0),
        "empty": torch.zeros(0, 3),
    }


@pytest.fixture
def file(tmp_path):
    write_checkpoint(tmp_path / "checkpoints/last.safetensors", tensors(), STATE, "fingerprint")
    return tmp_path / "checkpoints/last.safetensors"


def assert_set_aside(file, caplog):
    caplog.clear()
    content = file.read_bytes()
    assert read_checkpoint(file, "fingerprint") is None
    damaged = file.with_name("last.safetensors.damaged")
    assert not file.exists() and damaged.read_bytes() == content
    (record,) = caplog.records
    line = record.getMessage()
    assert line.startswith(f"{file}: the checkpoint is damaged (") and "\n" not in line
    assert line.endswith("renamed to last.safetensors.damaged, training starts from the beginning")


def test_a_checkpoint_is_read_as_it_was_written(file):
    state, found = read_checkpoint(file, "fingerprint")
    assert json.dumps(state) == json.dumps(STATE)
    assert found.keys() == tensors().keys()
    for name, value in tensors().items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)


def test_one_of_other_settings_is_left_alone(file, caplog):
    caplog.set_level(logging.INFO)
    assert read_checkpoint(file, "another") is None
    assert file.exists() and "other settings, data or versions" in caplog.text
    assert read_checkpoint(file.with_name("none.safetensors"), "fingerprint") is None


def test_no_changed_byte_goes_unnoticed(file, caplog):
    whole, random = file.read_bytes(), np.random.default_rng(0)
    for place in range(len(whole)):
        other = whole[place] ^ int(random.integers(1, 256))
        file.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
        assert_set_aside(file, caplog)


def test_no_cut_goes_unnoticed(file, caplog):
    whole = file.read_bytes()
    for end in [*range(0, len(whole), 7), len(whole) - 1]:
        file.write_bytes(whole[:end])
        assert_set_aside(file, caplog)
    file.write_bytes(whole + b"\0")
    assert_set_aside(file, caplog)


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04" + b"x" * 500, b"\x89HDF\r\n\x1a\n" * 50, b"{}", b"\0" * 4096, os.urandom(4096)]
)
def test_another_kind_of_file_is_set_aside(file, caplog, content):
    file.write_bytes(content)
    assert_set_aside(file, caplog)


@pytest.mark.parametrize(
    "metadata", [None, {"fingerprint": "fingerprint"}, {"fingerprint": "fingerprint", "state": "{}"}]
)
def test_one_without_checksum_is_set_aside(file, caplog, metadata):
    save_file(tensors(), file, metadata=metadata)
    assert_set_aside(file, caplog)


@pytest.mark.parametrize("change", [lambda value: value[:2], lambda value: value.double(), lambda value: value + 1])
def test_tensors_that_do_not_fit_the_checksum_are_set_aside(file, caplog, change):
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    found = load_file(file)
    save_file(found | {"weight.a": change(found["weight.a"]).contiguous()}, file, metadata=metadata)
    assert_set_aside(file, caplog)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_set_aside(file, caplog, value):
    write_checkpoint(file, tensors() | {"weight.b": torch.tensor([1.0, value])}, STATE, "fingerprint")
    assert_set_aside(file, caplog)
    assert "weight.b has values that are not finite" in caplog.text


def test_one_that_may_not_be_read_is_not_called_damaged(file, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("cell2text.training.safe_open", refuse)
    with pytest.raises(InputError, match="last.safetensors: the checkpoint may not be read. Make it readable"):
        read_checkpoint(file, "fingerprint")
    assert file.exists()
