"""Memory that runs out: fine-tuning reads fewer cells at once to the same sums, any other job ends with one line."""

import numpy as np
import pandas as pd
import pytest
import torch

from cell2text import processes
from cell2text.errors import InputError
from cell2text.files import reading
from cell2text.finetuning.loop import Finetuning
from cell2text.model import language_model as lm
from cell2text.model.fast import FastCell2Text
from finetune_run import finetune, losses, weights, write_files

TOO_LARGE = 1 << 46  # bytes, more than an address space has


@pytest.fixture
def files(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(lm, "pick_precision", lambda device: torch.float32)
    return write_files(tmp_path, tiny_model)


def run_out(where):
    if where == "gpu":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    torch.empty(TOO_LARGE, dtype=torch.uint8)


def limit(monkeypatch, cells, where="cpu", backward=False, from_step=0):
    """Let memory run out if the language model reads more cells at once, from one step on; returns what it read."""
    loss, step, now, read = FastCell2Text.text_loss, Finetuning._step, [], []

    def count(self, *given):
        now[:] = [self.state.step]
        return step(self, *given)

    def text_loss(self, soft, *rest):
        if now and now[0] >= from_step:
            read.append(len(soft))
            if len(soft) > cells and backward:  # the last gradient of all, when those of the weights are there
                soft.register_hook(lambda gradient: run_out(where))
            elif len(soft) > cells:
                run_out(where)
        return loss(self, soft, *rest)

    monkeypatch.setattr(Finetuning, "_step", count)
    monkeypatch.setattr(FastCell2Text, "text_loss", text_loss)
    return read


def assert_same(found, expected):
    pd.testing.assert_frame_equal(losses(found), losses(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("where", "backward", "changes"),
    [
        ("gpu", False, {}),
        ("cpu", True, {"align_to": "descriptions", "accumulate": 2}),
        ("gpu", True, {"mode": "full", "learning_rate": 0.001, "batch_tokens": 300}),
    ],
)
def test_cells_are_read_in_halves_to_the_same_sums(files, tiny_model, monkeypatch, caplog, where, backward, changes):
    whole = finetune(files, tiny_model, "whole", **changes)
    read = limit(monkeypatch, 1, where, backward)
    assert_same(finetune(files, tiny_model, "halves", **changes), whole)
    assert read[:4] == [4, 2, 1, 1] and not any(cells > 1 for cells in read[2:])
    lines = [record.getMessage() for record in caplog.records if "memory ran out" in record.getMessage()]
    assert [line.split(":")[0] for line in lines] == [f"memory ran out with {cells} cells at once" for cells in (4, 2)]


def test_a_run_resumes_where_memory_suffices_again(files, tiny_model, monkeypatch):
    whole = finetune(files, tiny_model, "whole")
    with monkeypatch.context() as scarce:
        read = limit(scarce, 2, from_step=2)
        step = Finetuning._step
        scarce.setattr(Finetuning, "_step", lambda self, *rest: 1 / (self.state.step != 9) and step(self, *rest))
        with pytest.raises(ZeroDivisionError):
            finetune(files, tiny_model, "model")
        assert read[:5] == [4, 2, 2, 2, 2]
    assert_same(finetune(files, tiny_model, "model"), whole)


def test_the_same_lack_of_memory_gives_the_same_bytes(files, tiny_model, monkeypatch):
    found = []
    for name in ("first", "second"):
        with monkeypatch.context() as scarce:
            limit(scarce, 2, from_step=1)
            found.append(weights(finetune(files, tiny_model, name, epochs=1, lora_dropout=0.1)))
    assert found[0] == found[1]


def test_a_single_cell_that_does_not_fit_is_one_line(files, tiny_model, monkeypatch):
    limit(monkeypatch, 0)
    line = r"^config: finetune.batch_cells: memory ran out with a single cell, study\|\d+\. Set finetune.checkpoint_act"
    with pytest.raises(InputError, match=line):
        finetune(files, tiny_model, "model")
    assert not (files / "model").exists()


def test_another_error_is_not_taken_for_a_lack_of_memory(files, tiny_model, monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Finetuning, "_read_texts", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        finetune(files, tiny_model, "model")


@pytest.mark.parametrize("allocate", [lambda: run_out("gpu"), lambda: run_out("cpu"), lambda: np.empty(TOO_LARGE)])
def test_a_lack_of_memory_is_not_taken_for_a_damaged_file(tmp_path, allocate):
    with pytest.raises((RuntimeError, MemoryError)) as error, reading(tmp_path / "file"):
        allocate()
    assert not isinstance(error.value, InputError)


def test_one_of_several_processes_says_so_in_one_line(monkeypatch, caplog):
    monkeypatch.setattr(processes.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(processes.ctypes, "CDLL", lambda _: None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit) as stopped:
        processes._run(1, lambda team: run_out("cpu"), 2, "", torch.get_num_threads(), [], ())
    (line,) = [record.getMessage() for record in caplog.records]
    assert stopped.value.code == processes.REPORTED and line.startswith("memory: ran out (") and "\n" not in line
