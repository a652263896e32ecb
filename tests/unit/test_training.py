"""Fine-tuning on a tiny real model: it learns, resumes to the same bytes, and reports what it cannot do."""

import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cell2text.contracts import CELLS, DESCRIPTIONS, EMBEDDINGS, HISTORY, PREDICTIONS, TERMS, TOKENS
from cell2text.embedding.embed_genes import embed_genes
from cell2text.embedding.encoders.coexpression import Coexpression
from cell2text.embedding.vectors import Embeddings
from cell2text.errors import InputError
from cell2text.evaluation.baselines.aligned import predict_aligned
from cell2text.files import read_json, write_json
from cell2text.finetuning import align as aligning
from cell2text.finetuning import finetune as finetune_module
from cell2text.finetuning.data import BatchSize, Cells, balance, find_depths, plan_epoch, read_cells
from cell2text.finetuning.loop import Finetuning
from cell2text.finetuning.optimiser import MasterAdamW
from cell2text.generation.decode import write_texts
from cell2text.grammar import Slots, Terms, render, with_definition
from cell2text.model import language_model as lm
from cell2text.model.bundle import load
from cell2text.model.cell2text import Cell2Text
from cell2text.model.fast import FastCell2Text
from cell2text.processes import Team
from cell2text.training import warm_up_then_decay
from default_settings import finetune_settings, projector_settings
from tests_terms import small_table

TYPES = ["CL:0000236", "CL:0000623", "CL:0001054"]
SETTINGS = {
    "align_steps": 30,
    "opening_epochs": 0,
    "epochs": 3,
    "patience": 3,
    "batch_cells": 4,
    "learning_rate": 0.01,
    "projector_learning_rate": 0.002,
    "lora_rank": 4,
    "lora_alpha": 8,
    "checkpoint_steps": 2,
}
PROJECTOR = {"kind": "pooled", "soft_tokens": 2, "hidden": 16}


@pytest.fixture
def files(tmp_path, tiny_model):
    """Input files of fine-tuning, with thirty cells of three well separated types."""
    random = np.random.default_rng(0)
    ids = [f"study|{i}" for i in range(30)]
    labels = [TYPES[i % 3] for i in range(30)]
    pooled = (np.eye(3, 6)[np.arange(30) % 3] * 4 + random.normal(0, 0.3, (30, 6))).astype(np.float32)
    EMBEDDINGS.write(
        {
            "pooled": pooled,
            "gene_vectors": np.zeros((30, 2, 6), dtype=np.float16),
            "lengths": np.full(30, 2, dtype=np.int32),
        },
        ids,
        tmp_path / "embeddings.safetensors",
    )
    terms = Terms(small_table())
    slots = [with_definition(Slots(label, None, "UBERON:0000178", "PATO:0000461"), terms) for label in labels]
    DESCRIPTIONS.write(
        pd.DataFrame(
            {
                "cell_id": ids,
                "split": ["train"] * 21 + ["validation"] * 9,
                "cell_type_id": labels,
                "tissue_id": "UBERON:0000178",
                "disease_id": "PATO:0000461",
                "sex_id": None,
                "stage_id": None,
                "pathway_ids": [[]] * 30,
                "definition": [slot.definition for slot in slots],
                "text": [render(slot, terms) for slot in slots],
            }
        ),
        tmp_path / "descriptions.parquet",
    )
    TERMS.write(small_table(), tmp_path / "terms.parquet")
    write_json({"source": "a tiny model"}, tiny_model / "source.json")
    return tmp_path


def finetune(files, tiny_model, name, embeddings=None, projector=PROJECTOR, processes=1, **changes):
    finetune_module.finetune(
        str(tiny_model),
        str(files / "descriptions.parquet"),
        str(files / "terms.parquet"),
        embeddings or Embeddings([str(files / "embeddings.safetensors")]),
        str(files / name),
        projector=projector_settings(**projector),
        settings=finetune_settings(**SETTINGS | changes),
        seed=3,
        library="test",
        processes=processes,
    )
    return files / name


def weights(directory):
    return [(directory / name).read_bytes() for name in ("projector.safetensors", "adapter/adapter_model.safetensors")]


def losses(directory):
    return HISTORY.read(directory / "history.parquet").drop(columns="seconds")


@pytest.mark.parametrize(
    ("changes", "steps_of_epochs", "last"),
    [
        ({}, [6, 6, 6], 9),
        ({"batch_tokens": 194, "balance": True}, [8, 9, 8], 21),
        ({"opening_epochs": 2, "epochs": 1}, [3, 3, 6], 5),
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
    names = {f"This is a {small_table()['name'][i]}." for i in range(3)}
    texts = {f"{text}{tokenizer.eos_token}" for text in DESCRIPTIONS.read(files / "descriptions.parquet")["text"]}
    assert set().union(*read[: len(openings)]) == names and set().union(*read[len(openings) :]) == texts
    assert len(openings) < len(whole)  # micro-batches have more openings than whole texts, with as many tokens
    assert openings["tokens"].median() == pytest.approx(whole["tokens"].median(), rel=0.2)
    validated = history.dropna(subset="validation_loss")
    assert len(validated) == 5 and validated["validation_loss"].is_unique
    # an epoch of openings is never the best, because the model has not learnt the rest of a text
    assert read_json(directory / "cell2text.json")["best_epoch"] >= 3


def test_a_text_that_names_no_cell_type_is_its_own_opening():
    texts = [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]
    cells = Cells(None, texts, None, ["a", "b"], torch.tensor([2, 0]), None).openings_alone()
    assert [text.tolist() for text in cells.texts] == [[1, 2], [4, 5]]


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
    openings = cells.openings.clone()
    cells.openings[0] = 0  # as if it had no cell type
    accuracy_of_others = work.validate()[1]
    written = write_texts(work.model.ready_to_write(), *cells.vectors[np.arange(9)], int(openings.max()))
    correct = [
        one.ids[:opening] == text[:opening].tolist()
        for one, text, opening in zip(written, cells.texts, openings.tolist(), strict=True)
    ]
    assert 0 < accuracy < 1
    assert (accuracy, accuracy_of_others) == (np.mean(correct), np.mean(correct[1:]))


def tokenizer_of_long_tokens(texts):
    """Return a tokenizer whose tokens cross the borders of words and sentences."""
    long = Tokenizer(models.BPE())
    long.decoder = decoders.Fuse()
    long.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=long, eos_token=".")


@pytest.mark.parametrize("long", [False, True])
def test_an_opening_ends_with_the_token_of_its_full_stop(files, tiny_model, long):
    table = DESCRIPTIONS.read(files / "descriptions.parquet")
    table.loc[0, "text"] = "The sample is blood."
    tokenizer = tokenizer_of_long_tokens(table["text"]) if long else AutoTokenizer.from_pretrained(tiny_model)
    model = SimpleNamespace(tokenizer=tokenizer, projector=SimpleNamespace(reads="pooled"))
    embeddings = Embeddings([str(files / "embeddings.safetensors")])
    cells = read_cells(table, "train", embeddings, {"cell_type": TYPES}, model)
    assert cells.openings[0] == 0
    for text, opening, name in zip(cells.texts[1:], cells.openings[1:], [1, 2, 0] * 7, strict=False):
        sentence = f"This is a {small_table()['name'][name]}."
        whole, short = (tokenizer.decode(text[:n]) for n in (opening, opening - 1))
        assert whole.startswith(sentence) and not short.startswith(sentence)
        assert long or whole == sentence


def test_a_loss_that_is_not_finite_is_reported(files, tiny_model, monkeypatch):
    loss = Cell2Text.text_loss

    def broken(self, *batch):
        total, tokens = loss(self, *batch)
        return total * float("nan"), tokens

    monkeypatch.setattr(Cell2Text, "text_loss", broken)
    with pytest.raises(InputError, match=r"not finite at step 1, with cells study\|\d+, study\|\d+, "):
        finetune(files, tiny_model, "model")


def join(steps):
    """Return the rows of all micro-batches of the steps."""
    return np.concatenate([rows for batches in steps for rows in batches])


@pytest.mark.parametrize("size", [BatchSize(16), BatchSize(1, 3000, 30)])
@pytest.mark.parametrize("step_batches", [1, 3])
def test_an_epoch_has_every_cell_once(size, step_batches):
    lengths = np.random.default_rng(0).integers(50, 200, 5000)
    steps = plan_epoch(lengths, size, step_batches, seed=1, epoch=2)
    assert sorted(join(steps)) == list(range(5000))
    assert [len(batches) == step_batches for batches in steps[:-1]] == [True] * (len(steps) - 1)
    again, other = (plan_epoch(lengths, size, step_batches, 1, epoch) for epoch in (2, 3))
    assert np.array_equal(join(steps), join(again)) and not np.array_equal(join(steps), join(other))


def test_micro_batches_mix_texts_of_all_lengths():
    """Texts of equal length have the same cell type; a model that read them together would forget the other types."""
    lengths = np.repeat([60, 90, 120, 150], 250)
    distinct = [len(set(lengths[rows])) for (rows,) in plan_epoch(lengths, BatchSize(16), 1, 0, 0)]
    assert np.mean(distinct) > 3.5


def test_micro_batches_of_a_step_split_a_larger_batch():
    lengths = np.random.default_rng(0).integers(50, 200, 1000)
    whole = plan_epoch(lengths, BatchSize(12), 1, 5, 0)
    parts = plan_epoch(lengths, BatchSize(4), 3, 5, 0)
    assert [np.concatenate(batches).tolist() for batches in parts] == [rows.tolist() for (rows,) in whole]
    assert {len(rows) for batches in parts for rows in batches} == {4}


def test_a_micro_batch_is_filled_up_to_its_maximum_of_tokens():
    lengths = np.array([5, 30, 1, 2, 9, 1])  # plus a prompt of one token each
    batches = BatchSize(8, 12, 1).cut(np.array([3, 0, 2, 1, 5, 4]), lengths)
    assert [rows.tolist() for rows in batches] == [[3, 0, 2], [1], [5, 4]]  # 11, more than the maximum, 12
    lengths = np.random.default_rng(0).integers(50, 200, 5000)
    found = [rows for (rows,) in plan_epoch(lengths, BatchSize(1, 3000, 30), 1, 0, 0)]
    tokens = np.array([(30 + lengths[rows]).sum() for rows in found])
    assert tokens.max() <= 3000 and np.median(tokens) > 2850


def test_masters_accumulate_updates_that_bfloat16_would_lose():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimiser = MasterAdamW([(1e-4, {"weight": weight})])
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimiser.take_gradients()
        optimiser.step(1.0, 1.0)
    assert weight.tolist() == pytest.approx([0.99] * 4, abs=0.004)


def test_processes_share_the_state_of_the_optimiser():
    sizes = {"a": 50, "b": 30, "c": 60, "d": 40}
    parameters = {name: torch.nn.Parameter(torch.zeros(size)) for name, size in sizes.items()}
    kept = [set(MasterAdamW([(1e-4, parameters)], team=Team(rank, 2)).masters) for rank in range(2)]
    assert kept == [{"c", "b"}, {"a", "d"}]  # 90 weights each


def schedule(steps):
    return warm_up_then_decay(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), steps)


def test_the_learning_rate_rises_then_falls():
    scale = schedule(100)
    values = [scale(step) for step in range(100)]
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in zip(values[5:], values[6:], strict=False))
    assert 0 < values[-1] < 0.02


def write_tokens(path, random):
    """Write ranked genes of thirty cells, in two parts."""
    tokens = [random.permutation(9)[: 3 + i % 5].astype(np.int32) for i in range(30)]
    table = pd.DataFrame({"cell_id": [f"study|{i}" for i in range(30)], "tokens": tokens})
    table["expression"] = [random.random(len(cell)).astype(np.float32) for cell in tokens]
    TOKENS.write_parts([table[:11], table[11:]], path)


def test_gene_vectors_computed_on_the_fly_equal_stored_ones(files, tiny_model):
    random = np.random.default_rng(1)
    write_tokens(files / "tokens.parquet", random)
    (files / "encoder").mkdir()
    Coexpression(random.normal(size=(9, 6)).astype(np.float32), np.zeros(6, np.float32)).save(files / "encoder")
    for name, top_k in (("stored", 4), ("fresh", 0)):
        for shard in range(2):
            path = files / f"{name}{shard}.safetensors"
            embed_genes(files / "encoder", files / "tokens.parquet", path, shard, 2, top_k)
    stored = Embeddings([str(files / f"stored{shard}.safetensors") for shard in range(2)])
    fresh = [str(files / f"fresh{shard}.safetensors") for shard in range(2)]
    fresh = Embeddings(fresh, str(files / "encoder"), [str(files / "tokens.parquet")], top_k=4)
    ids, rows = [f"study|{i}" for i in (29, 3, 14, 0, 15)], np.array([4, 0, 2, 2])
    for reads in ("pooled", "gene_vectors"):
        saved, computed = (some.vectors(ids, reads) for some in (stored, fresh))
        assert len(saved) == len(computed) == 5
        assert all(map(torch.equal, saved[rows], computed[rows])) == (reads != "pooled")
        assert torch.equal(saved[rows][0], computed[rows][0])
    assert saved[rows][0].shape == (4, 4, 6) and saved[rows][1].tolist() == [3, 4, 4, 4]
    with pytest.raises(InputError, match="1 cells are missing, such as x"):
        fresh.vectors(["study|1", "x"], "gene_vectors")
    mlp = PROJECTOR | {"kind": "mlp"}
    first = finetune(files, tiny_model, "first", stored, mlp, epochs=2)
    second = finetune(files, tiny_model, "second", fresh, mlp, epochs=2)
    assert losses(first).equals(losses(second)) and weights(first) == weights(second)


def begin(files, tiny_model, name, **changes):
    """Start fine-tuning in a new process and return the process when the first checkpoint exists."""
    process = get_context("spawn").Process(target=finetune, args=(files, tiny_model, name), kwargs=changes)
    process.start()
    deadline = time.monotonic() + 120
    while not (files / f"{name}.checkpoints/last.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(
    ("sent", "code", "processes"), [(signal.SIGKILL, -9, 1), (signal.SIGTERM, 143, 1), (signal.SIGTERM, 143, 2)]
)
def test_a_run_that_receives_a_signal_resumes_to_the_same_bytes(files, tiny_model, sent, code, processes):
    long = {"epochs": 30, "patience": 30, "processes": processes}
    whole = finetune(files, tiny_model, "whole", **long)
    process = begin(files, tiny_model, "broken", **long)
    for child in multiprocessing_children(process.pid) if processes == 2 else [process.pid]:
        os.kill(child, sent)
    process.join(60)
    assert process.exitcode == code and not (files / "broken").exists()
    resumed = finetune(files, tiny_model, "broken", **long)
    pd.testing.assert_frame_equal(losses(resumed), losses(whole), rtol=0, atol=1e-6)
    assert weights(resumed) == weights(whole)


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
    monkeypatch.setattr(aligning, "INPUT_NOISE", 0.0)  # each micro-batch of a step has its own noise
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


def test_balanced_epochs_draw_rare_labels_as_often_as_common_ones():
    labels = np.repeat([0, 1, 2], [900, 90, 10])
    weights_ = balance(labels)
    drawn = join(plan_epoch(np.full(1000, 50), BatchSize(16), 1, 0, 0, weights_))
    assert len(drawn) == 1000
    assert np.all(np.abs(np.bincount(labels[drawn]) - 333) < 60)
    again = plan_epoch(np.full(1000, 50), BatchSize(16), 1, 0, 0, weights_)
    assert np.array_equal(drawn, join(again))


def test_a_curriculum_orders_only_the_first_epoch(files, tiny_model, monkeypatch):
    terms = small_table().assign(depth=[6, 7, 4, *[None] * 5])
    TERMS.write(terms, files / "terms.parquet")
    types = DESCRIPTIONS.read(files / "descriptions.parquet")["cell_type_id"][:21].mask(np.arange(21) == 5)
    depths = find_depths(types, terms)
    assert depths.tolist() == [6, 7, 4, 6, 7, 0, *[6, 7, 4] * 5]  # a cell without a type counts as the root
    step, seen = Finetuning._step, []
    monkeypatch.setattr(Finetuning, "_step", lambda self, rows, stop: seen.append(rows[0]) or step(self, rows, stop))
    for balanced in (False, True):
        epochs = []
        for curriculum in (False, True):
            seen.clear()
            finetune(files, tiny_model, f"{balanced}{curriculum}", curriculum=curriculum, balance=balanced, epochs=2)
            epochs.append([[tuple(rows) for rows in seen[:6]], [tuple(rows) for rows in seen[6:]]])
        (shuffled, later), (ordered, later_again) = epochs
        seen_depths = [[6, 7, 4][row % 3] for rows in ordered for row in rows]
        assert seen_depths == sorted(seen_depths)
        assert ordered != shuffled and sorted(np.concatenate(ordered)) == sorted(np.concatenate(shuffled))
        assert later == later_again


def test_alignment_learns_to_distinguish_descriptions(files, tiny_model):
    directory = finetune(files, tiny_model, "model", align_to="descriptions", align_steps=60)
    history = losses(directory)
    first, last = history.loc[history["stage"] == "align", "loss"].iloc[[0, -1]]
    # about 7 of 21 cells share a text and are all correct matches, so the loss cannot be lower than log 7
    assert first > np.log(21) and np.log(7) < last < np.log(7) + 0.3
    learnt = history[history["stage"] == "finetune"]
    assert learnt["align_loss"].between(0, np.log(4) + 0.3).all()
    assert not losses(finetune(files, tiny_model, "labels", align_steps=60)).equals(history)


def test_the_aligned_projector_encodes_each_slot_in_its_own_soft_tokens(files, tiny_model):
    texts = DESCRIPTIONS.read(files / "descriptions.parquet")
    tissues = np.where(texts["cell_type_id"] == TYPES[0], "UBERON:0002048", "UBERON:0000178")
    DESCRIPTIONS.write(texts.assign(tissue_id=tissues), files / "descriptions.parquet")
    terms = TERMS.read(files / "terms.parquet")
    lung = terms[terms["slot"] == "tissue"].assign(id="UBERON:0002048", name="lung")
    TERMS.write(pd.concat([terms, lung], ignore_index=True), files / "terms.parquet")
    projector = PROJECTOR | {"soft_tokens": 3}  # for cell type, tissue and disease
    model = finetune(files, tiny_model, "model", align_steps=60, projector=projector)
    corpus = texts[["cell_id", "split"]].reindex(columns=list(CELLS.columns))
    CELLS.write(corpus.astype(object).where(corpus.notna(), None).assign(n_counts=1.0), files / "cells.parquet")
    inputs = [str(path) for path in (model, tiny_model, files / "cells.parquet", files / "terms.parquet")]
    embeddings = Embeddings([str(files / "embeddings.safetensors")])
    predict_aligned(*inputs, embeddings, str(files / "aligned.parquet"), ["validation"])
    predicted, truth = PREDICTIONS.read(files / "aligned.parquet"), texts["split"] == "validation"
    assert (predicted["tissue_id"].to_numpy() == tissues[truth]).mean() > 0.8
    assert (predicted["cell_type_id"].to_numpy() == texts.loc[truth, "cell_type_id"].to_numpy()).mean() > 0.8


@pytest.mark.parametrize("align_to", ["labels", "descriptions"])
def test_the_aligned_projector_alone_names_well_separated_cells(files, tiny_model, align_to):
    model = finetune(files, tiny_model, "model", align_steps=60, align_to=align_to)
    texts = DESCRIPTIONS.read(files / "descriptions.parquet")
    corpus = texts[["cell_id", "split"]].reindex(columns=list(CELLS.columns))
    CELLS.write(corpus.astype(object).where(corpus.notna(), None).assign(n_counts=1.0), files / "cells.parquet")
    embeddings = Embeddings([str(files / "embeddings.safetensors")])
    inputs = [str(path) for path in (model, tiny_model, files / "cells.parquet", files / "terms.parquet")]
    predict_aligned(*inputs, embeddings, str(files / "aligned.parquet"), ["validation"])
    predicted = PREDICTIONS.read(files / "aligned.parquet")
    truth = texts[texts["split"] == "validation"]
    assert predicted["cell_id"].tolist() == truth["cell_id"].tolist()
    assert (predicted["cell_type_id"].to_numpy() == truth["cell_type_id"].to_numpy()).mean() > 0.8
    assert set(predicted["tissue_id"]) == {"UBERON:0000178"} and (predicted["tissue_confidence"] == 1).all()
    assert predicted["sex_id"].isna().all() and predicted["cell_type_confidence"].between(1 / 3, 1).all()
    assert predicted["text"].str.startswith("This is a").all()


def test_the_plain_path_learns_the_same_as_the_fast_one(files, tiny_model):
    fast, plain = (finetune(files, tiny_model, str(setting), fast=setting) for setting in ("auto", False))
    assert [read_json(folder / "cell2text.json")["fast"] for folder in (fast, plain)] == [True, False]
    np.testing.assert_allclose(losses(fast)["loss"], losses(plain)["loss"], rtol=2e-3)
    columns = ["validation_loss", "validation_accuracy"]
    np.testing.assert_allclose(losses(fast)[columns].dropna(), losses(plain)[columns].dropna(), rtol=2e-3)
