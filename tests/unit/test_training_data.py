"""What fine-tuning reads: openings, batches, vectors, targets of alignment, and the optimiser and its schedule."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cell2text.contracts import CELLS, DESCRIPTIONS, PREDICTIONS, TERMS, TOKENS
from cell2text.embedding.embed_genes import embed_genes
from cell2text.embedding.vectors import Embeddings
from cell2text.errors import InputError
from cell2text.evaluation.baselines.aligned import predict_aligned
from cell2text.files import read_json, seal
from cell2text.finetuning import data
from cell2text.finetuning.data import (
    BatchSize,
    Cells,
    Texts,
    balance,
    find_depths,
    find_programmes,
    plan_epoch,
    read_cells,
)
from cell2text.finetuning.loop import Finetuning
from cell2text.finetuning.optimiser import MasterAdamW
from cell2text.processes import Team
from finetune_run import PROJECTOR, TYPES, finetune, losses, schedule, weights, write_files
from ranked_files import random_encoder, write_genes
from tests_terms import small_table, two_names_per_slot

NO_PROGRAMMES = torch.empty(30, 0, dtype=torch.long)


@pytest.fixture
def files(tmp_path, tiny_model):
    return write_files(tmp_path, tiny_model)


def test_a_text_that_names_nothing_is_its_own_opening():
    texts = Texts.of([[1, 2, 3], [4, 5]], np.array([0, 1]))
    cells = Cells(None, texts, None, ["a", "b"], torch.tensor([2, 0]), None, None).openings_alone()
    assert [text.tolist() for text in cells.texts] == [[1, 2], [4, 5]]


def test_the_model_knows_the_programmes_of_training_texts_and_how_many_a_text_names(files, tiny_model):
    path = files / "descriptions.parquet"
    ids, numbers = find_programmes(path)
    assert ids == [] and numbers.shape == (30, 0) and numbers.dtype == torch.int64
    table = DESCRIPTIONS.read(path)
    of_training = [["HYPOXIA"], [], ["INTERFERON", "HYPOXIA"], *[[]] * 18]
    # one that no training text names, and more than a training text names
    of_validation = [["GLYCOLYSIS", "INTERFERON", "HYPOXIA"], *[["INTERFERON"]] * 8]
    table["pathway_ids"] = [*of_training, *of_validation]
    DESCRIPTIONS.write_parts([table[:2], table[2:25], table[25:]], path)
    ids, numbers = find_programmes(path)
    assert ids == ["HYPOXIA", "INTERFERON"]
    assert numbers[:4].tolist() == [[0, -1], [-1, -1], [1, 0], [-1, -1]]
    assert numbers[21:23].tolist() == [[-1, 1], [1, -1]] and numbers[29].tolist() == [1, -1]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = SimpleNamespace(tokenizer=tokenizer, projector=SimpleNamespace(reads="pooled"))
    embeddings, classes = Embeddings([str(files / "embeddings.safetensors")]), {"cell_type": TYPES}
    cells = read_cells(table, "validation", embeddings, classes, numbers, model)
    assert cells.labels.tolist()[:2] == [[0], [1]] and cells.aligned_to.tolist()[:2] == [[0, -1, 1], [1, 1, -1]]
    TERMS.write(two_names_per_slot().assign(ancestors=None), files / "terms.parquet")
    about = read_json(finetune(files, tiny_model, "model", align_steps=1, epochs=1) / "cell2text.json")
    assert about["labels"]["pathway"] == ["HYPOXIA", "INTERFERON"] and about["programmes_per_cell"] == 2
    assert about["labels"]["cell_type"] == TYPES


def tokenizer_of_long_tokens(texts):
    """Return a tokenizer whose tokens cross the borders of words and sentences."""
    long = Tokenizer(models.BPE())
    long.decoder = decoders.Fuse()
    long.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=long, eos_token=".")


@pytest.mark.parametrize("long", [False, True])
def test_opening_and_first_sentence_end_with_the_token_of_their_full_stop(files, tiny_model, long):
    table = DESCRIPTIONS.read(files / "descriptions.parquet")
    table.loc[0, "text"] = "The sample is blood."
    tokenizer = tokenizer_of_long_tokens(table["text"]) if long else AutoTokenizer.from_pretrained(tiny_model)
    model = SimpleNamespace(tokenizer=tokenizer, projector=SimpleNamespace(reads="pooled"))
    embeddings = Embeddings([str(files / "embeddings.safetensors")])
    cells = read_cells(table, "train", embeddings, {"cell_type": TYPES}, NO_PROGRAMMES, model)
    assert cells.first_sentences[0] == 0 and tokenizer.decode(cells.texts[0][: cells.openings[0]]) == table["text"][0]
    for cell, name in zip(range(1, len(cells.texts)), [1, 2, 0] * 7, strict=False):
        sentence = f"This is a {small_table()['name'][name]}."
        opening = f"{sentence} The sample is blood, without known disease."
        for words, tokens in ((sentence, cells.first_sentences[cell]), (opening, cells.openings[cell])):
            whole, short = (tokenizer.decode(cells.texts[cell][:n]) for n in (tokens, tokens - 1))
            assert whole.startswith(words) and not short.startswith(words)
            assert long or whole == words


def test_cells_with_the_same_text_share_its_tokens(files, tiny_model, monkeypatch):
    monkeypatch.setattr(data, "TOKENISED_AT_ONCE", 2)
    table = DESCRIPTIONS.read(files / "descriptions.parquet").astype({"text": "category"})
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = SimpleNamespace(tokenizer=tokenizer, projector=SimpleNamespace(reads="pooled"))
    embeddings = Embeddings([str(files / "embeddings.safetensors")])
    cells = read_cells(table, "train", embeddings, {"cell_type": TYPES}, NO_PROGRAMMES, model)
    expected = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in table["text"][:21]]
    assert [text.tolist() for text in cells.texts] == expected
    assert cells.text_lengths.tolist() == [len(text) for text in expected]
    assert len(cells.texts.tokens) == sum(map(len, expected[:3]))  # there are three types
    short = cells.openings_alone()
    assert [text.tolist() for text in short.texts] == [
        text[:end] for text, end in zip(expected, cells.openings.tolist(), strict=True)
    ]
    assert short.texts.tokens is cells.texts.tokens


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
    table["n_counts"] = 1000.0
    TOKENS.write_parts([table[:11], table[11:]], path)


def test_gene_vectors_computed_on_the_fly_equal_stored_ones(files, tiny_model):
    random = np.random.default_rng(1)
    write_tokens(files / "tokens.parquet", random)
    (files / "encoder").mkdir()
    random_encoder(9, 6).save(files / "encoder")
    genes = write_genes(files / "genes.parquet", {"tokens": [True] * 9})
    for name, top_k in (("stored", 4), ("fresh", 0)):
        for shard in range(2):
            path = files / f"{name}{shard}.safetensors"
            embed_genes(files / "encoder", files / "tokens.parquet", genes, path, shard, 2, top_k, views=0, seed=0)
    stored = Embeddings([str(files / f"stored{shard}.safetensors") for shard in range(2)])
    fresh = [str(files / f"fresh{shard}.safetensors") for shard in range(2)]
    fresh = Embeddings(fresh, str(files / "encoder"), [str(files / "tokens.parquet")], str(genes), top_k=4)
    ids, rows = [f"study|{i}" for i in (29, 3, 14, 0, 15)], np.array([4, 0, 2, 2])
    mlp = PROJECTOR | {"kind": "mlp"}
    with fresh.with_store() as stocked, stored.with_store() as same:
        assert same is stored
        for reads in ("pooled", "gene_vectors"):
            saved, computed = (some.vectors(ids, reads) for some in (stored, stocked))
            assert len(saved) == len(computed) == 5
            assert all(map(torch.equal, saved[rows], computed[rows])) == (reads != "pooled")
            assert torch.equal(saved[rows][0], computed[rows][0])
        assert saved[rows][0].shape == (4, 4, 6) and saved[rows][1].tolist() == [3, 4, 4, 4]
        with pytest.raises(InputError, match="1 cells have no ranked genes, such as x"):
            stocked.vectors(["study|1", "x"], "gene_vectors")
        first = finetune(files, tiny_model, "first", stored, mlp, epochs=2)
        second = finetune(files, tiny_model, "second", stocked, mlp, epochs=2)
    assert not stocked.store.exists()
    assert losses(first).equals(losses(second)) and weights(first) == weights(second)


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
    directory = finetune(files, tiny_model, "model", align_to="descriptions", align_steps=120)
    history = losses(directory)
    first, last = history.loc[history["stage"] == "align", "loss"].iloc[[0, -1]]
    # about 7 of 21 cells share a text and are all correct matches, so the loss cannot be lower than log 7
    assert first > np.log(21) and np.log(7) < last < np.log(7) + 0.3
    learnt = history[history["stage"] == "finetune"]
    assert learnt["align_loss"].between(0, np.log(4) + 0.3).all()
    assert not losses(finetune(files, tiny_model, "labels", align_steps=60)).equals(history)


def predict_validation_cells(files, model, language_model):
    """Return what the projector alone predicts for the validation cells."""
    texts = DESCRIPTIONS.read(files / "descriptions.parquet")
    corpus = texts[["cell_id", "split"]].reindex(columns=list(CELLS.columns))
    CELLS.write(corpus.astype(object).where(corpus.notna(), None).assign(n_counts=1.0), files / "cells.parquet")
    inputs = [str(path) for path in (model, language_model, files / "cells.parquet", files / "terms.parquet")]
    embeddings = Embeddings([str(files / "embeddings.safetensors")])
    predict_aligned(*inputs, embeddings, str(files / "aligned.parquet"), ["validation"])
    return PREDICTIONS.read(files / "aligned.parquet")


def test_the_aligned_projector_encodes_each_slot_in_its_own_soft_tokens(files, tiny_model):
    texts = DESCRIPTIONS.read(files / "descriptions.parquet")
    tissues = np.where(texts["cell_type_id"] == TYPES[0], "UBERON:0002048", "UBERON:0000178")
    DESCRIPTIONS.write(texts.assign(tissue_id=tissues), files / "descriptions.parquet")
    terms = TERMS.read(files / "terms.parquet")
    lung = terms[terms["slot"] == "tissue"].assign(id="UBERON:0002048", name="lung")
    TERMS.write(pd.concat([terms, lung], ignore_index=True), files / "terms.parquet")
    projector = PROJECTOR | {"soft_tokens": 3}  # for cell type, tissue and disease
    model = finetune(files, tiny_model, "model", align_steps=60, projector=projector)
    predicted, truth = predict_validation_cells(files, model, tiny_model), texts["split"] == "validation"
    assert (predicted["tissue_id"].to_numpy() == tissues[truth]).mean() > 0.8
    assert (predicted["cell_type_id"].to_numpy() == texts.loc[truth, "cell_type_id"].to_numpy()).mean() > 0.8


@pytest.mark.parametrize("align_to", ["labels", "descriptions"])
def test_the_aligned_projector_alone_names_well_separated_cells(files, tiny_model, align_to):
    model = finetune(files, tiny_model, "model", align_steps=60, align_to=align_to)
    predicted, texts = (
        predict_validation_cells(files, model, tiny_model),
        DESCRIPTIONS.read(files / "descriptions.parquet"),
    )
    truth = texts[texts["split"] == "validation"]
    assert predicted["cell_id"].tolist() == truth["cell_id"].tolist()
    assert (predicted["cell_type_id"].to_numpy() == truth["cell_type_id"].to_numpy()).mean() > 0.8
    assert set(predicted["tissue_id"]) == {"UBERON:0000178"} and (predicted["tissue_confidence"] == 1).all()
    assert predicted["sex_id"].isna().all() and predicted["cell_type_confidence"].between(1 / 3, 1).all()
    assert predicted["text"].str.startswith("This is a").all()


@pytest.mark.parametrize("align_to", ["labels", "descriptions"])
def test_the_aligned_projector_is_compared_with_the_embeddings_it_was_aligned_to(files, tiny_model, align_to):
    """Also if fine-tuning has moved the embeddings of the language model far away."""
    changes = {"mode": "full", "learning_rate": 0.001, "epochs": 1}
    model = finetune(files, tiny_model, "model", align_steps=60, align_to=align_to, **changes)
    before = predict_validation_cells(files, model, tiny_model)
    path = model / "language_model/model.safetensors"
    tuned = load_file(path)
    tuned["model.embed_tokens.weight"] = tuned["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tuned, path, metadata={"format": "pt"})
    seal(model, "cell2text.json")
    pd.testing.assert_frame_equal(predict_validation_cells(files, model, tiny_model), before)
    truth = DESCRIPTIONS.read(files / "descriptions.parquet").set_index("cell_id").loc[before["cell_id"]]
    assert (before["cell_type_id"].to_numpy() == truth["cell_type_id"].to_numpy()).mean() > 0.8
