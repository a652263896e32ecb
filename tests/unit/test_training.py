"""Fine-tuning on a tiny real model: it learns, resumes to the same bytes, and reports what it cannot do."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

import cell2text
import srun_stand_in
from cell2text.contracts import DESCRIPTIONS
from cell2text.errors import InputError
from cell2text.files import read_json
from cell2text.finetuning import finetune as finetune_module
from cell2text.finetuning import loop
from cell2text.finetuning.loop import Finetuning
from cell2text.generation.decode import write_texts
from cell2text.model import language_model as lm
from cell2text.model.bundle import load
from cell2text.model.cell2text import Cell2Text
from cell2text.model.fast import FastCell2Text
from cell2text.processes import count_processes, run_on_nodes
from finetune_run import finetune, losses, schedule, weights, write_files
from small_disk import small_files
from tests_terms import small_table


@pytest.fixture
def files(tmp_path, tiny_model):
    return write_files(tmp_path, tiny_model)


@pytest.fixture(scope="module")
def undisturbed():
    """Losses and weights of the runs that the interrupted ones must equal, by number of processes or kind."""
    return {}


@pytest.mark.parametrize(
    ("changes", "steps_of_epochs", "last"),
    [
        ({}, [6, 6, 6], 9),
        ({"batch_tokens": 194, "balance": True}, [8, 9, 8], 21),
        ({"opening_epochs": 2, "epochs": 1}, [4, 4, 6], 7),
        ({"opening_epochs": 2, "epochs": 0}, [4, 4], 5),
    ],
)
def test_a_killed_run_resumes_to_the_same_bytes(files, tiny_model, monkeypatch, changes, steps_of_epochs, last):
    whole = finetune(files, tiny_model, "whole", **changes)
    learnt = losses(whole).query("stage != 'align'")
    assert learnt["epoch"].value_counts(sort=False).to_list() == steps_of_epochs
    scale = schedule(sum(steps_of_epochs))
    rates = [0.01 * scale(step) for step in range(sum(steps_of_epochs))]
    assert learnt["learning_rate"].to_list() == pytest.approx(rates)
    assert learnt["tokens"].max() <= changes.get("batch_tokens", 4 * (28 + 39))
    step = Finetuning._step

    def die(self, rows, stop):
        if self.state.step == last:  # in the middle of an epoch, one step after a checkpoint
            raise KeyboardInterrupt
        return step(self, rows, stop)

    monkeypatch.setattr(Finetuning, "_step", die)
    with pytest.raises(KeyboardInterrupt):
        finetune(files, tiny_model, "broken", **changes)
    assert not (files / "broken").exists()
    assert (files / "broken.checkpoints/last.safetensors").is_file()
    steps = []
    monkeypatch.setattr(Finetuning, "_step", lambda self, *given: steps.append(self.state.step) or step(self, *given))
    resumed = finetune(files, tiny_model, "broken", **changes)
    assert steps == list(range(last - 1, sum(steps_of_epochs)))
    assert weights(resumed) == weights(whole)
    pd.testing.assert_frame_equal(losses(resumed), losses(whole))
    assert not (files / "broken.checkpoints").exists()


def test_a_checkpoint_of_other_settings_is_ignored(files, tiny_model, monkeypatch):
    step = Finetuning._step

    def die(self, rows, stop):
        if self.state.step == 5:
            raise KeyboardInterrupt
        return step(self, rows, stop)

    monkeypatch.setattr(Finetuning, "_step", die)
    with pytest.raises(KeyboardInterrupt):
        finetune(files, tiny_model, "model")
    monkeypatch.undo()
    other = finetune(files, tiny_model, "model", learning_rate=0.005)
    monkeypatch.undo()
    assert weights(other) == weights(finetune(files, tiny_model, "anew", learning_rate=0.005))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_run_with_a_damaged_checkpoint_ends_with_the_same_bytes(files, tiny_model, monkeypatch, undisturbed, damage):
    if "short" not in undisturbed:
        whole = finetune(files, tiny_model, "whole")
        undisturbed["short"] = losses(whole), weights(whole)
    monkeypatch.setattr(Finetuning, "validate", lambda self: 1 / 0)  # after six steps
    with pytest.raises(ZeroDivisionError):
        finetune(files, tiny_model, "model")
    monkeypatch.undo()
    file = files / "model.checkpoints/last.safetensors"
    content = file.read_bytes()
    changed = {
        "cut": content[: len(content) // 2],
        "flipped": content[:-999] + bytes([content[-999] ^ 1]) + content[-998:],
        "empty": b"",
        "foreign": b"not a checkpoint",
    }
    file.write_bytes(changed[damage])
    model = finetune(files, tiny_model, "model")
    pd.testing.assert_frame_equal(losses(model), undisturbed["short"][0])
    assert weights(model) == undisturbed["short"][1]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_too_small_for_a_checkpoint_is_one_line(files, tiny_model, tmp_path, processes):
    written = tmp_path / "job.log"
    logging.getLogger().addHandler(handler := logging.FileHandler(written))
    line = r"last.safetensors: cannot be written: File too large \(disk: .*\)\. Raise the limit"
    try:
        with small_files(50_000), pytest.raises(InputError if processes == 1 else SystemExit) as error:
            finetune(files, tiny_model, "model", processes=processes)
    finally:
        logging.getLogger().removeHandler(handler)
    if processes == 1:
        assert re.search(line, str(error.value))
    else:
        assert error.value.code == 1
        assert len(re.findall(line, written.read_text())) == 1 and "Traceback" not in written.read_text()
    assert not any(path.is_file() for path in (files / "model.checkpoints").iterdir())


def test_same_seed_same_history(files, tiny_model):
    first, second = finetune(files, tiny_model, "first"), finetune(files, tiny_model, "second")
    assert weights(first) == weights(second)
    pd.testing.assert_frame_equal(losses(first), losses(second))


def test_it_learns_and_keeps_the_best_epoch(files, tiny_model):
    directory = finetune(files, tiny_model, "model", epochs=6, patience=6)
    history = losses(directory)
    aligned = history.loc[history["stage"] == "align", "loss"]
    assert aligned.iloc[-1] < aligned.iloc[0]
    learnt = history[history["stage"] == "finetune"]
    validation = learnt["validation_loss"].dropna().to_numpy()
    assert len(validation) == 6
    assert validation.min() < 0.5 * learnt["loss"].iloc[0]
    model = load(directory, tiny_model, torch.device("cpu"))
    assert model.about["best_epoch"] == int(validation.argmin()) + 1


def test_names_alone_are_learnt_in_openings_alone(files, tiny_model):
    directory = finetune(files, tiny_model, "model", opening_epochs=6, epochs=0, patience=6)
    learnt = losses(directory).query("stage == 'openings'")
    validation = learnt["validation_loss"].dropna().to_numpy()
    assert len(validation) == 6 and validation.min() < 0.5 * learnt["loss"].iloc[0]
    about = read_json(directory / "cell2text.json")
    assert about["best_epoch"] == int(validation.argmin()) + 1
    assert about["validation_loss"] == pytest.approx(validation.min())


def test_openings_alone_stop_when_validation_no_longer_improves(files, tiny_model, monkeypatch):
    measured = iter([(3.0, 0.5), (2.0, 0.5), (2.5, 0.5), (2.6, 0.5), (1.0, 0.5)])
    monkeypatch.setattr(Finetuning, "validate", lambda self: next(measured))
    directory = finetune(files, tiny_model, "model", opening_epochs=5, epochs=0, patience=2)
    assert read_json(directory / "cell2text.json")["best_epoch"] == 2
    assert losses(directory)["validation_loss"].dropna().to_list() == [3.0, 2.0, 2.5, 2.6]


def test_without_epochs_only_the_projector_is_trained(files, tiny_model, monkeypatch):
    monkeypatch.setattr(finetune_module, "_try_fast", lambda *_: pytest.fail("compared two ways to train"))
    model = load(finetune(files, tiny_model, "model", epochs=0), tiny_model)
    history = losses(files / "model")
    assert set(history["stage"]) == {"align"} and history["loss"].iloc[-1] < 0.5 * history["loss"].iloc[0]
    adapter = {name: value for name, value in model.language_model.named_parameters() if "lora_B" in name}
    assert adapter and not any(value.any() for value in adapter.values())
    assert (model.about["best_epoch"], model.about["validation_loss"]) == (0, None)
    assert not (files / "model.checkpoints").exists()


def test_openings_are_read_before_whole_texts(files, tiny_model, monkeypatch):
    tokenizer, read = AutoTokenizer.from_pretrained(tiny_model), []
    loss = FastCell2Text.text_loss

    def record(self, soft, present, text, text_mask):
        read.append({tokenizer.decode(ids[mask]) for ids, mask in zip(text, text_mask, strict=True)})
        return loss(self, soft, present, text, text_mask)

    monkeypatch.setattr(FastCell2Text, "text_loss", record)
    directory = finetune(files, tiny_model, "model", opening_epochs=2, epochs=3, patience=2, learning_rate=0.0)
    del read[:1]  # the texts on which the fast path is compared with the plain one
    history = losses(directory).query("stage != 'align'")
    openings, whole = (history[history["stage"] == stage] for stage in ("openings", "finetune"))
    assert (openings["epoch"].max(), whole["epoch"].min(), len(read)) == (1, 2, len(history))
    sample = " The sample is blood, without known disease."
    names = {f"This is a {small_table()['name'][i]}.{sample}" for i in range(3)}
    texts = {f"{text}{tokenizer.eos_token}" for text in DESCRIPTIONS.read(files / "descriptions.parquet")["text"]}
    assert set().union(*read[: len(openings)]) == names and set().union(*read[len(openings) :]) == texts
    assert len(openings) < len(whole)  # micro-batches have more openings than whole texts, with as many tokens
    assert openings["tokens"].median() == pytest.approx(whole["tokens"].median(), rel=0.2)
    validated = history.dropna(subset="validation_loss")
    assert len(validated) == 5 and validated["validation_loss"].is_unique
    # an epoch of openings is never the best, because the model has not learnt the rest of a text
    assert read_json(directory / "cell2text.json")["best_epoch"] >= 3


@pytest.mark.parametrize(("keep_best", "epochs", "best"), [("loss", 4, 2), ("cell_type_accuracy", 6, 4)])
def test_it_stops_when_validation_no_longer_improves(files, tiny_model, monkeypatch, keep_best, epochs, best):
    measured = [(3.0, 0.5), (2.0, 0.5), (2.6, 0.75), (2.5, 0.75), (2.5, 0.75), (1.0, 0.7), (0.5, 1.0)]
    values, masters = iter(measured), []

    def validate(self):
        masters.append({name: value.clone() for name, value in self.optimiser.masters.items()})
        return next(values)

    monkeypatch.setattr(Finetuning, "validate", validate)
    directory = finetune(files, tiny_model, "model", epochs=7, patience=2, keep_best=keep_best)
    history, about = losses(directory), read_json(directory / "cell2text.json")
    columns = ["validation_loss", "validation_accuracy"]
    assert history[columns].dropna().to_numpy().tolist() == [list(pair) for pair in measured[:epochs]]
    assert (about["best_epoch"], *(about[column] for column in columns)) == (best, *measured[best - 1])
    kept = load(directory, tiny_model, torch.device("cpu")).projector.state_dict()
    assert torch.equal(kept["scale"], masters[best - 1]["projector.scale"])


def test_validation_accuracy_equals_that_of_greedy_decoding(files, tiny_model, monkeypatch):
    monkeypatch.setattr(lm, "pick_precision", lambda device: torch.float32)
    kept = []
    monkeypatch.setattr(finetune_module, "_save", lambda work, *rest: kept.append(work))
    finetune(files, tiny_model, "model", epochs=10, patience=10, align_steps=0, align_weight=0.0)
    work, cells = kept[0], kept[0].texts.validation
    loss, accuracy = work.validate()
    assert (loss, accuracy) == (work.state.best_loss, work.state.best_accuracy)
    sentences = cells.first_sentences.clone()
    assert (sentences < cells.openings).all()
    cells.first_sentences[0] = 0  # as if it had no cell type
    accuracy_of_others = work.validate()[1]
    written = write_texts(work.model.ready_to_write(), *cells.vectors[np.arange(9)], int(sentences.max()))
    correct = [
        one.ids[:sentence] == text[:sentence].tolist()
        for one, text, sentence in zip(written, cells.texts, sentences.tolist(), strict=True)
    ]
    assert 0 < accuracy < 1
    assert (accuracy, accuracy_of_others) == (np.mean(correct), np.mean(correct[1:]))


def test_a_loss_that_is_not_finite_is_reported(files, tiny_model, monkeypatch):
    loss = Cell2Text.text_loss

    def broken(self, *batch):
        total, tokens = loss(self, *batch)
        return total * float("nan"), tokens

    monkeypatch.setattr(Cell2Text, "text_loss", broken)
    with pytest.raises(InputError, match=r"not finite at step 1, with cells study\|\d+, study\|\d+, "):
        finetune(files, tiny_model, "model")


def begin(files, tiny_model, name, **changes):
    """Start fine-tuning in a process group of its own and return its leader when the first checkpoint exists."""
    process = get_context("spawn").Process(target=lead_group, args=(files, tiny_model, name), kwargs=changes)
    process.start()
    deadline = time.monotonic() + 120
    while not (files / f"{name}.checkpoints/last.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


def lead_group(*given, **changes):
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run in the background of a shell
    finetune(*given, **changes)


def send_to_process(process, sent):
    os.kill(process.pid, sent)


def send_to_all_twice(process, sent):
    os.killpg(process.pid, sent)
    time.sleep(0.02)
    os.killpg(process.pid, sent)


@pytest.mark.parametrize(
    ("send", "sent", "code", "processes"),
    [
        (send_to_process, signal.SIGKILL, -9, 1),
        (send_to_process, signal.SIGTERM, 143, 1),
        (send_to_all_twice, signal.SIGINT, 143, 1),
        pytest.param(send_to_process, signal.SIGTERM, 143, 2, marks=pytest.mark.slow),
        pytest.param(send_to_all_twice, signal.SIGINT, 143, 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_receives_a_signal_resumes_to_the_same_bytes(
    files, tiny_model, undisturbed, send, sent, code, processes
):
    long = {"epochs": 30 // processes, "patience": 30, "processes": processes}
    process = begin(files, tiny_model, "broken", **long)
    before = steps_in(files / "broken.checkpoints/last.safetensors")
    send(process, sent)
    process.join(60)
    assert process.exitcode == code and not (files / "broken").exists()
    if sent != signal.SIGKILL:  # the checkpoint was written on the signal, not every second step
        assert steps_in(files / "broken.checkpoints/last.safetensors") > before
    resumed = finetune(files, tiny_model, "broken", **long)
    if processes not in undisturbed:
        whole = finetune(files, tiny_model, "whole", **long)
        undisturbed[processes] = losses(whole), weights(whole)
    pd.testing.assert_frame_equal(losses(resumed), undisturbed[processes][0], rtol=0, atol=1e-6)
    assert weights(resumed) == undisturbed[processes][1]


def test_the_processes_end_with_their_parent(files, tiny_model):
    process = begin(files, tiny_model, "broken", epochs=1000, patience=1000, processes=2)
    children = multiprocessing_children(process.pid)
    assert len(children) == 2
    process.kill()
    process.join()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a process survived its parent"
        time.sleep(0.01)


def steps_in(checkpoint):
    with safe_open(checkpoint, framework="pt") as file:
        return json.loads(file.metadata()["state"])["step"]


def multiprocessing_children(parent):
    """Return the training processes that a process has spawned, without Python's resource tracker."""
    running = [path for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [
        int(path.name)
        for path in running
        if path.exists()
        and f"PPid:\t{parent}\n" in (path / "status").read_text()
        and "spawn_main" in (path / "cmdline").read_text()
    ]


@pytest.mark.parametrize("batch_tokens", [None, 300])
def test_two_processes_equal_one_that_accumulates(files, tiny_model, batch_tokens):
    one = finetune(files, tiny_model, "one", accumulate=2, batch_tokens=batch_tokens)
    two = finetune(files, tiny_model, "two", processes=2, batch_tokens=batch_tokens)
    columns = ["loss", "align_loss", "validation_loss", "validation_accuracy"]
    first, second = losses(one), losses(two)
    assert len(first) == len(second) and first["tokens"].tolist() == second["tokens"].tolist()
    np.testing.assert_allclose(first[columns], second[columns], atol=1e-4)


def test_the_loss_of_a_step_is_the_mean_over_the_tokens_of_all_micro_batches(files, tiny_model, monkeypatch):
    monkeypatch.setattr(loop, "OWN_NOISE", 0.0)  # each micro-batch of a step has its own
    monkeypatch.setattr(lm, "pick_precision", lambda device: torch.float32)
    whole = losses(finetune(files, tiny_model, "whole", batch_cells=4, align_weight=0.0))
    parts = losses(finetune(files, tiny_model, "parts", batch_cells=2, accumulate=2, align_weight=0.0))
    assert parts["tokens"].to_list() == whole["tokens"].to_list()
    np.testing.assert_allclose(whole["loss"], parts["loss"], atol=0.02)


def test_checkpointed_activations_give_the_same_losses(files, tiny_model):
    stored, recomputed = (
        finetune(files, tiny_model, str(use), mode="full", learning_rate=0.001, checkpoint_activations=use)
        for use in (False, True)
    )
    pd.testing.assert_frame_equal(losses(recomputed), losses(stored), rtol=1e-3)


def test_the_plain_path_learns_the_same_as_the_fast_one(files, tiny_model, monkeypatch):
    monkeypatch.setattr(lm, "pick_precision", lambda device: torch.float32)
    fast, plain = (finetune(files, tiny_model, str(setting), fast=setting) for setting in ("auto", False))
    assert [read_json(folder / "cell2text.json")["fast"] for folder in (fast, plain)] == [True, False]
    np.testing.assert_allclose(losses(fast)["loss"], losses(plain)["loss"], rtol=2e-3)
    columns = ["validation_loss", "validation_accuracy"]
    np.testing.assert_allclose(losses(fast)[columns].dropna(), losses(plain)[columns].dropna(), rtol=2e-3)


@pytest.mark.parametrize(
    ("visible", "allowed", "gpus", "found"),
    [
        (0, 1, 1, 1),
        (0, 1, 8, 1),  # the CPU, in one process
        (4, 4, 4, 4),
        (8, 8, 2, 2),
        (2, 4, 4, r"4 GPUs, but this job sees only 2\. Set it to 2, or run where there are 4"),
        (8, 1, 8, r"8 GPUs, but Snakemake may use only 1\. Add --resources gpu=8, or set it to 1"),
    ],
)
def test_there_is_a_process_for_each_gpu_of_the_config(monkeypatch, visible, allowed, gpus, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    if isinstance(found, int):
        assert count_processes(gpus, allowed) == found
    else:
        with pytest.raises(InputError, match=f"^config: finetune.gpus: {found}$"):
            count_processes(gpus, allowed)


SCRIPT = """
import sys
from pathlib import Path

sys.path[:0] = [{scripts!r}, {tests!r}]
from cell2text.job import find_process_number
from cell2text.processes import run_on_nodes
from finetune_run import finetune

if __name__ == "__main__":
    if find_process_number() is None:
        run_on_nodes(2, 1, 1)
    else:
        finetune(Path({files!r}), Path({model!r}), "nodes", **{changes!r})
"""


def train_on_two_nodes(files, tiny_model, tmp_path, **changes):
    """Fine-tune in a script that starts itself on two nodes, and return how that ended."""
    folders = {"scripts": Path(cell2text.__file__).parents[1], "tests": Path(__file__).parents[1]}
    given = {name: str(path) for name, path in (folders | {"files": files, "model": tiny_model}).items()}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(**given, changes=changes))
    environment = srun_stand_in.put_in_path(tmp_path / "bin") | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_two_nodes_train_like_two_processes_of_one(files, tiny_model, tmp_path):
    done = train_on_two_nodes(files, tiny_model, tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_json(files / "nodes/cell2text.json")["processes"] == 2
    assert weights(files / "nodes") == weights(finetune(files, tiny_model, "processes", processes=2))


def test_several_nodes_without_a_job_of_slurm_are_one_line(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    fix = r"2 nodes, but this is no job of SLURM\. Set it to 1, or run with --workflow-profile slurm"
    with pytest.raises(InputError, match=f"^config: finetune.nodes: {fix}$"):
        run_on_nodes(2, 1, 1)


def test_a_failure_on_a_node_ends_the_others(files, tiny_model, tmp_path):
    done = train_on_two_nodes(files, tiny_model, tmp_path, max_new_tokens=1)
    assert done.returncode == 1 and "max_new_tokens" in done.stderr and not (files / "nodes").exists()
