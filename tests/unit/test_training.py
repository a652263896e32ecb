"""Fine-tuning on a tiny real model: it learns, resumes to the same bytes, and says when it cannot."""

import numpy as np
import pandas as pd
import pytest
import torch

from cell2text import training
from cell2text.contracts import DESCRIPTIONS, EMBEDDINGS, HISTORY, TERMS, TOKENS, write_json
from cell2text.descriptions import Slots, Terms, describe, render
from cell2text.embedding import embed_shard
from cell2text.encoders.coexpression import Coexpression
from cell2text.errors import InputError
from cell2text.model.cell2text import load
from cell2text.model.optimiser import MasterAdamW, warm_up_then_decay
from cell2text.vectors import Embeddings
from tests_terms import small_table

TYPES = ["CL:0000236", "CL:0000623", "CL:0001054"]
SETTINGS = {
    "align_steps": 30,
    "align_weight": 1.0,
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
    """Thirty cells of three types that lie far apart, in the files that fine-tuning reads."""
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
    slots = [describe(Slots(label, None, "UBERON:0000178", "PATO:0000461"), terms) for label in labels]
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


def finetune(files, tiny_model, name, embeddings=None, projector=PROJECTOR, **changes):
    training.finetune(
        str(tiny_model),
        str(files / "descriptions.parquet"),
        str(files / "terms.parquet"),
        embeddings or Embeddings([str(files / "embeddings.safetensors")]),
        str(files / name),
        projector=projector,
        settings={**SETTINGS, **changes},
        seed=3,
        library="test",
    )
    return files / name


def weights(directory):
    return [(directory / name).read_bytes() for name in ("projector.safetensors", "adapter/adapter_model.safetensors")]


def losses(directory):
    return HISTORY.read(directory / "history.parquet").drop(columns="seconds")


def test_a_killed_run_goes_on_to_the_same_bytes(files, tiny_model, monkeypatch):
    whole = finetune(files, tiny_model, "whole")
    step = training.Finetuning._step

    def die(self, rows):
        if self.state.step == 9:  # in the middle of the second epoch, after the checkpoint at step 8
            raise KeyboardInterrupt
        return step(self, rows)

    monkeypatch.setattr(training.Finetuning, "_step", die)
    with pytest.raises(KeyboardInterrupt):
        finetune(files, tiny_model, "broken")
    assert not (files / "broken").exists()
    assert (files / "broken.checkpoints/last.safetensors").is_file()
    steps = []
    monkeypatch.setattr(
        training.Finetuning, "_step", lambda self, rows: steps.append(self.state.step) or step(self, rows)
    )
    resumed = finetune(files, tiny_model, "broken")
    assert steps[0] == 8
    assert weights(resumed) == weights(whole)
    pd.testing.assert_frame_equal(losses(resumed), losses(whole))
    assert not (files / "broken.checkpoints").exists()


def test_a_checkpoint_of_other_settings_is_not_taken_up(files, tiny_model, monkeypatch):
    step = training.Finetuning._step

    def die(self, rows):
        if self.state.step == 5:
            raise KeyboardInterrupt
        return step(self, rows)

    monkeypatch.setattr(training.Finetuning, "_step", die)
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
    assert model.settings["best_epoch"] == int(validation.argmin()) + 1


def test_it_stops_when_validation_no_longer_improves(files, tiny_model, monkeypatch):
    values = iter([3.0, 2.0, 2.5, 2.6, 1.0])
    monkeypatch.setattr(training.Finetuning, "validate", lambda self: next(values))
    history = losses(finetune(files, tiny_model, "model", epochs=5, patience=2))
    assert history["validation_loss"].dropna().tolist() == [3.0, 2.0, 2.5, 2.6]


def test_a_loss_that_is_not_finite_is_told(files, tiny_model, monkeypatch):
    loss = training.Cell2Text.text_loss

    def broken(self, *batch):
        total, tokens = loss(self, *batch)
        return total * float("nan"), tokens

    monkeypatch.setattr(training.Cell2Text, "text_loss", broken)
    with pytest.raises(InputError, match="not finite at step 1"):
        finetune(files, tiny_model, "model")


def test_batches_hold_every_cell_once_with_texts_of_like_length():
    lengths = np.random.default_rng(0).integers(50, 200, 1000)
    rows = training.batches(lengths, 16, seed=1, epoch=2)
    assert sorted(np.concatenate(rows)) == list(range(1000))
    padded = sum(lengths[batch].max() * len(batch) for batch in rows)
    assert padded / lengths.sum() < 1.1
    again = training.batches(lengths, 16, seed=1, epoch=2)
    assert all((a == b).all() for a, b in zip(rows, again, strict=True))
    assert any(
        (a != b).any() for a, b in zip(rows, training.batches(lengths, 16, 1, 3), strict=False) if len(a) == len(b)
    )


def test_masters_add_up_updates_that_bfloat16_would_lose():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimiser = MasterAdamW([(1e-4, {"weight": weight})])
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimiser.step(1.0, 1.0)
    assert weight.tolist() == pytest.approx([0.99] * 4, abs=0.004)


def test_schedule_rises_then_falls():
    scale = warm_up_then_decay(100)
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


def test_gene_vectors_made_on_the_fly_are_those_that_are_stored(files, tiny_model):
    random = np.random.default_rng(1)
    write_tokens(files / "tokens.parquet", random)
    (files / "encoder").mkdir()
    Coexpression(random.normal(size=(9, 6)).astype(np.float32), np.zeros(6, np.float32)).save(files / "encoder")
    for name, top_k in (("stored", 4), ("fresh", 0)):
        for shard in range(2):
            path = files / f"{name}{shard}.safetensors"
            embed_shard(files / "encoder", files / "tokens.parquet", path, shard, 2, top_k)
    stored = Embeddings([str(files / f"stored{shard}.safetensors") for shard in range(2)])
    fresh = [str(files / f"fresh{shard}.safetensors") for shard in range(2)]
    fresh = Embeddings(fresh, str(files / "encoder"), [str(files / "tokens.parquet")], top_k=4)
    ids, rows = [f"study|{i}" for i in (29, 3, 14, 0, 15)], np.array([4, 0, 2, 2])
    for reads in ("pooled", "gene_vectors"):
        held, made = (some.vectors(ids, reads) for some in (stored, fresh))
        assert len(held) == len(made) == 5 and all(map(torch.equal, held[rows], made[rows])) == (reads != "pooled")
        assert torch.equal(held[rows][0], made[rows][0])
    assert held[rows][0].shape == (4, 4, 6) and held[rows][1].tolist() == [3, 4, 4, 4]
    with pytest.raises(InputError, match="1 cells are missing, such as x"):
        fresh.vectors(["study|1", "x"], "gene_vectors")
    mlp = PROJECTOR | {"kind": "mlp"}
    first = finetune(files, tiny_model, "first", stored, mlp, epochs=2)
    second = finetune(files, tiny_model, "second", fresh, mlp, epochs=2)
    assert losses(first).equals(losses(second)) and weights(first) == weights(second)
