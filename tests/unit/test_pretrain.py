"""Pretraining: which genes are masked, and that the model learns, resumes after a kill and can be saved."""

import math
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import BertForMaskedLM

from cell2text.contracts import CELLS, HISTORY, TOKENS
from cell2text.embedding.encoders import load_encoder, masked_genes, pretrain
from cell2text.embedding.encoders.masked_genes import Batch, Cells, MaskedGenes, batches
from cell2text.embedding.encoders.pretrain import Pretrained, shape
from cell2text.embedding.encoders.ranked_bert import Special
from cell2text.embedding.fit_encoder import EncoderInputs, fit_encoder
from cell2text.embedding.ranked_cells import RankedSplit
from cell2text.errors import InputError
from default_settings import encoder_settings
from ranked_files import ranked_cells, write_genes

GENES = 40
SPECIAL = Special(pad=GENES, mask=GENES + 1, cls=GENES + 2, eos=GENES + 3)
SETTINGS = {"kind": "pretrain", "size": "tiny", "epochs": 2, "batch_cells": 8, "learning_rate": 0.003, "layer": -2}


def write_corpus(folder, cells=64):
    """Write cells of two kinds: one has 8 to 14 of the genes 0 to 19, the other as many of the genes 20 to 39."""
    random = np.random.default_rng(0)
    ids = [f"c{i}" for i in range(cells)]
    lists = [(random.permutation(20) + 20 * (i % 2))[: random.integers(8, 15)].astype(np.int32) for i in range(cells)]
    expression = [np.ones(len(genes), dtype=np.float32) for genes in lists]
    table = {"cell_id": ids, "tokens": lists, "expression": expression, "n_counts": 1000.0}
    TOKENS.write(pd.DataFrame(table), folder / "tokens.parquet")
    corpus = pd.DataFrame({"cell_id": ids, "split": ["validation" if i % 4 < 2 else "train" for i in range(cells)]})
    CELLS.write(corpus.reindex(columns=list(CELLS.columns)).astype(object), folder / "cells.parquet")
    write_genes(folder / "genes.parquet", {"tokens": [True] * GENES})
    return [read_split(folder, name) for name in SPLITS]


def read_split(folder, name, genes=GENES):
    return RankedSplit([folder / "tokens.parquet"], folder / "cells.parquet", name, np.ones((1, genes), dtype=bool))


SPLITS = ("train", "validation")


def fit(folder, seed=0, cells=64, **changes):
    return Pretrained.fit(
        *write_corpus(folder, cells), encoder_settings(**SETTINGS | changes), seed, folder / "checkpoints"
    )


def weights_of(encoder):
    return {name: value.clone() for name, value in encoder.bert.state_dict().items()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def cells_of(lengths):
    lists = [np.random.default_rng(i).permutation(GENES)[:length] for i, length in enumerate(lengths)]
    return Cells(np.concatenate(lists).astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]))


def make_model(seed=0):
    torch.manual_seed(seed)
    return BertForMaskedLM(shape("tiny", SPECIAL)).eval()


def make_batch(cells, rows, seed=0):
    return Batch.of(cells, np.array(rows), SPECIAL, np.random.default_rng(seed))


def losses_of(model, batch):
    return float(MaskedGenes(model)(*batch.inputs(torch.device("cpu"))).detach())


def test_long_cells_are_truncated_and_empty_cells_are_excluded(tmp_path):
    lists = [[5, 3, 1, 0], [], [2, 4], [7, 6, 5]]
    table = {"cell_id": list("abcd"), "tokens": lists, "expression": [np.ones(len(genes)) for genes in lists]}
    table["n_counts"] = 1000.0
    TOKENS.write(pd.DataFrame(table), tmp_path / "tokens.parquet")
    corpus = pd.DataFrame({"cell_id": list("abcd"), "split": ["train", "train", "test", "train"]})
    CELLS.write(corpus.reindex(columns=list(CELLS.columns)).astype(object), tmp_path / "cells.parquet")
    cells = Cells.read(read_split(tmp_path, "train", 8), room=3)
    assert cells.tokens.tolist() == [5, 3, 1, 7, 6, 5]
    assert cells.tokens.dtype == np.int32
    assert cells.offsets.tolist() == [0, 3, 6]


def test_a_share_of_each_cells_genes_is_masked_and_the_rest_is_unchanged():
    lengths = [1, 3, 10, 20, 40, 33]
    cells = cells_of(lengths)
    batch = make_batch(cells, [4, 0, 5, 1, 2, 3])
    # 15 % rounded, at least one
    assert batch.chosen.sum(1).tolist() == [6, 1, 5, 1, 2, 3]
    for row, cell in enumerate([4, 0, 5, 1, 2, 3]):
        genes = cells.tokens[cells.offsets[cell] : cells.offsets[cell + 1]].tolist()
        padding = [SPECIAL.pad] * (40 - len(genes))
        assert batch.genes[row].tolist() == [SPECIAL.cls, *genes, SPECIAL.eos, *padding]
        assert batch.attended[row].tolist() == [True] * (len(genes) + 2) + [False] * len(padding)
    assert (batch.ids[~batch.chosen] == batch.genes[~batch.chosen]).all()
    assert (batch.genes[batch.chosen] < GENES).all()


def test_eight_of_ten_chosen_genes_become_the_mask_and_one_another_gene():
    batch = make_batch(cells_of([40] * 3000), range(3000))
    ids, genes = batch.ids[batch.chosen], batch.genes[batch.chosen]
    assert len(ids) == 18000
    replaced = (ids != genes) & (ids != SPECIAL.mask)
    # within four standard deviations of 18,000 draws; one of forty random genes is the gene itself
    assert (ids == SPECIAL.mask).mean() == pytest.approx(0.8, abs=0.012)
    assert replaced.mean() == pytest.approx(0.1 * 39 / 40, abs=0.009)
    assert set(ids[replaced]) == set(range(GENES))
    # all ranks are equally likely to be chosen
    assert batch.chosen[:, 1:-1].mean(0) == pytest.approx(0.15, abs=0.03)


def test_the_same_step_masks_the_same_genes_and_another_step_others():
    cells = cells_of([30, 20, 25])
    one, same, other = (make_batch(cells, [0, 1, 2], seed) for seed in ([0, 5, 1], [0, 5, 1], [0, 6, 1]))
    assert (one.ids == same.ids).all()
    assert (one.chosen != other.chosen).any()


def test_the_loss_equals_that_of_full_logits_at_masked_genes():
    model, batch = make_model(), make_batch(cells_of([30, 12, 25]), [0, 1, 2])
    labels = torch.from_numpy(np.where(batch.chosen, batch.genes, -100))
    plain = model(
        input_ids=torch.from_numpy(batch.ids), attention_mask=torch.from_numpy(batch.attended).long(), labels=labels
    ).loss
    chosen = batch.chosen.sum()
    assert losses_of(model, batch) / chosen == pytest.approx(float(plain.detach()), rel=1e-5)
    # genes that were not chosen do not change the loss
    other = Batch(batch.ids, batch.attended, batch.chosen, np.where(batch.chosen, batch.genes, 0))
    assert losses_of(model, other) == losses_of(model, batch)


def test_padding_changes_nothing():
    model, batch = make_model(), make_batch(cells_of([9, 30]), [0, 1])
    parts = batch.ids, batch.attended, batch.chosen, batch.genes
    first = Batch(*(values[:1] for values in parts))
    alone = Batch(*(values[:1, :11] for values in parts))
    assert alone.attended.all()
    assert alone.inputs(torch.device("cpu"))[1] is None
    assert batch.inputs(torch.device("cpu"))[1] is not None
    assert losses_of(model, first) == pytest.approx(losses_of(model, alone), rel=1e-5)


def test_batches_have_every_cell_once_and_similar_lengths():
    lengths = np.random.default_rng(0).integers(10, 1000, size=1003)
    found = batches(lengths, 8, seed=0, epoch=0)
    assert sorted(np.concatenate(found).tolist()) == list(range(1003))
    assert {len(rows) for rows in found} == {7, 8}
    spread = np.mean([np.ptp(lengths[rows]) for rows in found])
    by_chance = np.mean([np.ptp(lengths[i : i + 8]) for i in range(0, 1000, 8)])
    assert spread < by_chance / 5
    assert [rows.tolist() for rows in batches(lengths, 8, 0, 0)] == [rows.tolist() for rows in found]
    assert [rows.tolist() for rows in batches(lengths, 8, 0, 1)] != [rows.tolist() for rows in found]


def test_it_learns_which_genes_go_together(tmp_path):
    encoder = fit(tmp_path, cells=1600, epochs=4, learning_rate=0.001)
    history = pd.DataFrame(encoder.history)
    # a model that recognises the kind of a cell chooses among 20 genes, not 40: 0.69 nats less
    assert history["loss"][0] > math.log(GENES) - 0.1
    assert history["loss"][-20:].mean() < math.log(GENES) - 0.5
    assert history["validation_loss"].iloc[-1] < math.log(GENES) - 0.5


def test_validation_masks_the_same_genes_each_epoch(tmp_path):
    history = pd.DataFrame(fit(tmp_path, learning_rate=1e-30).history)
    first, last = history["validation_loss"].dropna()
    assert first == last
    assert history["loss"].nunique() == len(history)


def test_the_best_epoch_is_kept(tmp_path, monkeypatch):
    seen, validate = [], masked_genes.Training.validate

    def watch(training):
        seen.append(
            {name: value.detach().clone() for name, value in training.masked_genes.model.bert.named_parameters()}
        )
        validate(training)
        return [3.0, 1.0, 2.0][len(seen) - 1]

    monkeypatch.setattr(masked_genes.Training, "validate", watch)
    encoder = fit(tmp_path, epochs=3, layer=-1)
    assert_same_weights(dict(encoder.bert.named_parameters()), seen[1])


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    found = []
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        found.append(weights_of(fit(tmp_path / name, seed, epochs=1)))
    assert_same_weights(found[0], found[1])
    name = "encoder.layer.0.output.dense.weight"
    assert not torch.equal(found[0][name], found[2][name])


class Killed(Exception):
    """Raised in the middle of training."""


@pytest.mark.parametrize("after", [3, 5, 8, 11])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, monkeypatch, after):
    monkeypatch.setattr(masked_genes, "CHECKPOINT_STEPS", 3)
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, step, taken = fit(tmp_path / "whole", epochs=3), masked_genes.Training._step, []

    def counted(training, rows):
        if len(taken) == after:
            raise Killed
        taken.append(training.state.step)
        step(training, rows)

    monkeypatch.setattr(masked_genes.Training, "_step", counted)
    with pytest.raises(Killed):
        fit(tmp_path / "killed", epochs=3)
    taken.clear()
    monkeypatch.setattr(masked_genes.Training, "_step", lambda *call: (taken.append(call[0].state.step), step(*call)))
    encoder = fit(tmp_path / "killed", epochs=3)
    # four steps per epoch, so checkpoints after steps 3, 4, 6, 8, 9 and 12
    assert taken == list(range({3: 3, 5: 4, 8: 8, 11: 9}[after], 12))
    assert_same_weights(weights_of(encoder), weights_of(whole))
    assert [row["loss"] for row in encoder.history] == [row["loss"] for row in whole.history]
    assert [row["step"] for row in encoder.history] == list(range(12))


@pytest.mark.parametrize("damage", [lambda content: content[:-8], lambda content: content[:500] + b"x" + content[501:]])
def test_a_run_with_a_damaged_checkpoint_ends_with_the_same_weights(tmp_path, caplog, damage):
    whole = fit(tmp_path, epochs=1)
    file = tmp_path / "checkpoints/last.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert_same_weights(weights_of(fit(tmp_path, epochs=1)), weights_of(whole))
    assert "the checkpoint is damaged" in caplog.text and file.with_name("last.safetensors.damaged").exists()


@pytest.mark.parametrize("after", [2, 6])
def test_a_run_that_receives_a_signal_resumes_to_the_same_weights(tmp_path, monkeypatch, after):
    monkeypatch.setattr(masked_genes, "ROWS", 4)  # a row every third step, so that a sum must be resumed, too
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole, step = fit(tmp_path / "whole", epochs=3), masked_genes.Training._step

    def interrupted(training, rows):
        step(training, rows)
        if training.state.step == after:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)  # changes nothing

    monkeypatch.setattr(masked_genes.Training, "_step", interrupted)
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(SystemExit) as left:
        fit(tmp_path / "stopped", epochs=3)
    for number, handler in handlers.items():
        assert signal.getsignal(number) == signal.SIG_IGN
        signal.signal(number, handler)
    assert left.value.code == 143
    monkeypatch.setattr(masked_genes.Training, "_step", step)
    encoder = fit(tmp_path / "stopped", epochs=3)
    assert_same_weights(weights_of(encoder), weights_of(whole))
    columns = ["step", "epoch", "loss", "validation_loss"]
    pd.testing.assert_frame_equal(pd.DataFrame(encoder.history)[columns], pd.DataFrame(whole.history)[columns])


def test_a_checkpoint_of_other_settings_is_ignored(tmp_path):
    plain = weights_of(fit(tmp_path))
    assert (tmp_path / "checkpoints/last.safetensors").is_file()
    other = fit(tmp_path, learning_rate=0.001)
    assert len(other.history) == 8
    assert other.history[3]["learning_rate"] < 0.001
    assert not torch.equal(
        plain["embeddings.word_embeddings.weight"], weights_of(other)["embeddings.word_embeddings.weight"]
    )


def test_a_saved_encoder_embeds_as_before(tmp_path):
    encoder = fit(tmp_path, epochs=1)
    cells = next(iter(read_split(tmp_path, "validation")))
    before = encoder.embed(cells, 6)
    encoder.save(tmp_path)
    after = Pretrained.load(tmp_path, torch.float32).embed(cells, 6)
    assert before.keys() == after.keys() == {"gene_vectors", "lengths", "pooled", "cls"}
    assert before["gene_vectors"].shape == (32, 6, 64)
    assert all((before[name] == after[name]).all() for name in before)
    assert np.isfinite(before["pooled"]).all()
    assert before["pooled"].std(0).min() > 0


def test_cells_longer_than_the_models_input_are_truncated(tmp_path):
    genes = 300
    TOKENS.write(
        pd.DataFrame(
            {
                "cell_id": list("ab"),
                "tokens": [np.arange(genes, dtype=np.int32)] * 2,
                "expression": [np.ones(genes, dtype=np.float32)] * 2,
                "n_counts": 1000.0,
            }
        ),
        tmp_path / "tokens.parquet",
    )
    corpus = pd.DataFrame({"cell_id": list("ab"), "split": SPLITS})
    CELLS.write(corpus.reindex(columns=list(CELLS.columns)).astype(object), tmp_path / "cells.parquet")
    splits = [read_split(tmp_path, name, genes) for name in SPLITS]
    encoder = Pretrained.fit(*splits, encoder_settings(**SETTINGS | {"epochs": 1}), 0, tmp_path / "checkpoints")
    assert encoder.bert.config.vocab_size == 304
    cells = ranked_cells([np.arange(genes)], [np.ones(genes)], genes)
    assert encoder.embed(cells, 260)["lengths"].tolist() == [254]


def test_the_rule_writes_the_model_and_its_history(tmp_path):
    write_corpus(tmp_path)
    paths = [str(tmp_path / name) for name in ("cells.parquet", "genes.parquet", "tokens.parquet", "encoder")]
    settings = encoder_settings(**SETTINGS | {"top_k": 4})
    fit_encoder(EncoderInputs(paths[0], paths[1], [paths[2]], settings, seed=0), paths[3])
    history = HISTORY.read(tmp_path / "encoder/history.parquet")
    assert set(history["stage"]) == {"pretrain"} and history["align_loss"].isna().all()
    assert history["step"].tolist() == list(range(8))
    assert history["epoch"].tolist() == [0] * 4 + [1] * 4
    assert history["validation_loss"].notna().tolist() == [False, False, False, True] * 2
    assert history["seconds"].is_monotonic_increasing
    assert not (tmp_path / "encoder.checkpoints").exists()
    encoder = load_encoder(tmp_path / "encoder")
    assert isinstance(encoder, Pretrained)
    assert (encoder.layer, encoder.special, len(encoder.bert.encoder.layer)) == (-1, SPECIAL, 1)


def test_a_loss_that_is_not_finite_is_reported_with_the_setting(tmp_path):
    with pytest.raises(InputError, match="encoder.learning_rate: the loss is not finite.*Lower the learning rate"):
        fit(tmp_path, learning_rate=1e38)


def test_a_layer_that_does_not_exist_is_reported_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "Training", None)
    with pytest.raises(InputError, match="encoder.layer: -3 of 2 layers"):
        fit(tmp_path, layer=-3)


@pytest.mark.parametrize(
    ("size", "expected"), [("tiny", (2, 64, 2, 256, 256)), ("v1-10m", (6, 256, 4, 512, 2048))], ids=["tiny", "V1"]
)
def test_sizes_are_those_of_geneformer(size, expected):
    config = shape(size, SPECIAL)
    assert expected == (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        config.max_position_embeddings,
    )
    assert (config.hidden_act, config.layer_norm_eps, config.pad_token_id) == ("relu", 1e-12, GENES)
