"""From a fine-tuned model to texts: scored names, calibrated confidences, descriptions, and texts written freely."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from cell2text.confidence.decisions import Confidence
from cell2text.contracts import CELLS, DESCRIPTIONS, EMBEDDINGS, PREDICTIONS, SCORES, TERM_SLOTS, TERMS
from cell2text.embedding.vectors import Embeddings
from cell2text.evaluation.baselines.aligned import predict_aligned
from cell2text.evaluation.baselines.greedy import predict_greedy
from cell2text.evaluation.evaluate import _read_methods
from cell2text.files import read_json, read_jsonl, write_json
from cell2text.generation.candidates import find_candidates
from cell2text.generation.describe import describe_cells
from cell2text.generation.generate_descriptions import generate_descriptions
from cell2text.generation.score import score_names
from cell2text.generation.score_candidates import Scorer, draft_names, score_candidates
from cell2text.grammar import Terms, parse, render_rows
from cell2text.model.bundle import load, load_projector
from finetune_run import finetune, write_files
from scored_cells import LABELS, ROWS, draw, run_calibrate, terms_table, write_embeddings, write_run
from tests_terms import two_names_per_slot

pytestmark = pytest.mark.usefixtures("in_float32")

VARIANTS = {
    "default": {},
    "one soft token per gene": {"projector": {"kind": "mlp", "hidden": 16}},
    "fewer soft tokens than slots": {"projector": {"kind": "pooled", "soft_tokens": 3, "hidden": 16}},
    "all weights": {"mode": "full", "learning_rate": 0.001},
    "aligned to descriptions": {"align_to": "descriptions"},
}
PROGRAMMES = [["INTERFERON", "HYPOXIA"], ["CYTOTOXICITY", "INTERFERON"], ["HYPOXIA"]]
SLOTS = ["cell_type", "tissue", "disease", "pathway"]  # with labels, in the order of their soft tokens


@pytest.fixture(scope="module", params=VARIANTS)
def run(request, tmp_path_factory, tiny_model):
    """Input files and a tiny fine-tuned model whose texts name gene programmes and one of two tissues."""
    folder = write_files(tmp_path_factory.mktemp("run"), tiny_model)
    table = DESCRIPTIONS.read(folder / "descriptions.parquet")
    terms = two_names_per_slot().assign(ancestors=None)
    TERMS.write(terms, folder / "terms.parquet")
    types = np.arange(30) % 3
    table["pathway_ids"] = [PROGRAMMES[number] for number in types]
    table["tissue_id"] = np.where(types == 0, "UBERON:1", "UBERON:0000178")
    table["split"] = ["train"] * 21 + ["validation"] * 5 + ["test"] * 4
    table["text"] = render_rows(table, Terms(terms))
    DESCRIPTIONS.write(table, folder / "descriptions.parquet")
    corpus = table[["cell_id", "split"]].reindex(columns=list(CELLS.columns)).astype(object)
    CELLS.write(corpus.where(corpus.notna(), None).assign(n_counts=1.0), folder / "cells.parquet")
    tensors, ids = EMBEDDINGS.read(folder / "embeddings.safetensors")
    tensors["gene_vectors"][:] = tensors["pooled"][:, None]
    backwards = {name: tensor[::-1] for name, tensor in tensors.items()}
    EMBEDDINGS.write(backwards, ids[::-1], folder / "embeddings.safetensors")
    changes = {"projector": {"kind": "pooled", "soft_tokens": 5, "hidden": 16}} | VARIANTS[request.param]
    model = finetune(folder, tiny_model, "model", align_steps=60, epochs=1, **changes)
    inputs = [str(path) for path in (model, tiny_model, folder / "cells.parquet", folder / "terms.parquet")]
    return folder, inputs, Embeddings([str(folder / "embeddings.safetensors")]), request.param


def test_scores_are_those_of_the_model_and_of_its_projector_in_the_order_of_the_corpus(run):
    folder, inputs, embeddings, variant = run
    score_candidates(*inputs, embeddings, str(folder / "scores.safetensors"), "test", 3)
    about = read_json(folder / "model/cell2text.json")
    assert about["programmes_per_cell"] == 2 and sorted(about["labels"]) == sorted(SLOTS)
    wanted = [*SLOTS, *(f"projector_{slot}" for slot in SLOTS)]
    scores, cells = SCORES.read(folder / "scores.safetensors", wanted)
    assert cells == [f"study|{i}" for i in range(26, 30)]
    for tensor in scores.values():
        assert np.allclose(np.exp(tensor).sum(axis=-1), 1, atol=1e-5)
    assert scores["pathway"].shape == (4, 2, 3) and scores["cell_type"].shape == (4, 3)
    first = scores["projector_pathway"].argmax(axis=1)
    assert np.isneginf(scores["pathway"][np.arange(4), 1, first]).all()
    # the language model
    model, terms = load(*inputs[:2]).ready_to_write(), TERMS.read(inputs[3])
    steps = find_candidates(about["labels"], 2, Terms(terms), model.tokenizer)
    vectors = embeddings.vectors(cells, model.projector.reads)
    drafts = draft_names(steps, scores)
    assert (drafts[:, 0] == scores["projector_cell_type"].argmax(axis=1)).all() and (drafts[:, 3] == first).all()
    assert drafts[:, 4].tolist() == np.argsort(-scores["projector_pathway"], axis=1)[:, 1].tolist()
    (expected,) = score_names(model, vectors, np.arange(4), steps, drafts, 64)
    found = [scores[slot] for slot in ("cell_type", "tissue", "disease")]
    found += [scores["pathway"][:, place] for place in range(2)]
    assert [step.slot for step in steps] == ["cell_type", "tissue", "disease", "pathway", "pathway"]
    for one, other in zip(found, expected, strict=True):
        assert np.allclose(np.exp(one), other.exp(), atol=1e-3)
    assert scores["cell_type"].std(axis=0).max() > 0.01  # the cells differ
    # the projector, of which the slots have soft tokens of their own
    if variant not in ("default", "all weights"):
        return
    original = load_projector(*inputs[:2])
    soft, _ = original.projector(*vectors[np.arange(4)])
    words = original.language_model.get_input_embeddings().weight
    names = terms.set_index("id")["name"]
    for number, slot in enumerate(SLOTS):
        own = functional.normalize(soft[:, number::4].mean(1), dim=1)
        tokens = [original.tokenizer(f" {names[one]}")["input_ids"] for one in about["labels"][slot]]
        directions = torch.stack([functional.normalize(words[ids].float().mean(0), dim=0) for ids in tokens])
        expected = (own @ directions.T / 0.05).log_softmax(1).detach()
        assert np.allclose(scores[f"projector_{slot}"], expected, atol=1e-4)


def test_the_projector_alone_predicts_what_it_scores_highest(run):
    folder, inputs, embeddings, _ = run
    predict_aligned(*inputs, embeddings, str(folder / "aligned.parquet"), ["validation"])
    predicted = PREDICTIONS.read(folder / "aligned.parquet")
    scorer = Scorer(inputs[0], inputs[1], inputs[3])
    cells = [f"study|{i}" for i in range(21, 26)]
    assert list(scorer.labels) == SLOTS and predicted["cell_id"].to_list() == cells
    scores = scorer.score(embeddings.vectors(cells, scorer.model.projector.reads), 2)
    for slot in SLOTS[:3]:
        best = np.array(scorer.labels[slot])[scores[f"projector_{slot}"].argmax(axis=1)]
        assert predicted[f"{slot}_id"].to_list() == best.tolist()
        assert np.allclose(predicted[f"{slot}_confidence"], np.exp(scores[f"projector_{slot}"].max(axis=1)), atol=1e-5)
    middle = np.median(scores["projector_cell_type"][:, 0])
    read = scores["projector_cell_type"][:, 0] < middle
    order = np.argsort(-scores["projector_pathway"], axis=1)[:, :2]
    named = np.array(scorer.labels["pathway"])[order]
    assert [list(one) for one in predicted["pathway_ids"]] == named.tolist()
    assert set(predicted["cell_type_id"]) == set(scorer.labels["cell_type"])
    # the language model reads the cells that need it, and no other
    vectors = embeddings.vectors(cells, scorer.model.projector.reads)
    some = scorer.score(vectors, 2, lambda given: given["projector_cell_type"][:, 0] < middle)
    for name, found in some.items():
        assert np.allclose(np.exp(found[read]), np.exp(scores[name][read]), atol=2e-3)
        assert "projector" in name or np.ptp(found[~read]) == 0
    # a language model that was not trained is not asked
    scorer.model.about["finetune"] |= {"opening_epochs": 0, "epochs": 0}
    alone = scorer.score(embeddings.vectors(cells, scorer.model.projector.reads), 2)
    for name, found in alone.items():
        assert found.shape == scores[name].shape and found.dtype == np.float32
        assert np.array_equal(found, scores[name]) if "projector" in name else np.ptp(found) == 0
        assert np.allclose(np.exp(found).sum(axis=-1), 1, atol=1e-5)


def test_a_model_describes_cells_from_scores_to_texts(run):
    folder, inputs, embeddings, _ = run
    terms = Terms(TERMS.read(inputs[3]))
    for split in ("validation", "test"):
        score_candidates(*inputs, embeddings, str(folder / f"{split}.safetensors"), split, 64)
    calibration, reference = run_calibrate(folder, scores=["validation"])
    out, scores = folder / "test.jsonl", str(folder / "test.safetensors")
    generate_descriptions(inputs[0], scores, calibration, reference, inputs[3], embeddings.files, str(out), "test")
    rows = list(read_jsonl(out))
    assert [row["cell_id"] for row in rows] == [f"study|{i}" for i in range(26, 30)]
    for row in rows:
        read = parse(row["text"], terms)
        assert read.status == row["status"] == "parsed"
        assert list(read.slots.pathways) == row["pathway_ids"] and len(set(row["pathway_ids"])) == 2
        # the text names the guessed cell type, and of the sample what is reported
        named = {slot: row[f"{slot}_{'' if slot == 'cell_type' else 'reported_'}id"] for slot in TERM_SLOTS}
        assert {slot: getattr(read.slots, slot) for slot in TERM_SLOTS} == named
        assert row["sex_id"] is None and 0 < row["cell_type_confidence"] <= 1
        assert len(row["pathway_confidences"]) == 2
    [(_, table, _)] = _read_methods([out], [])
    assert list(table) == list(PREDICTIONS.columns)


def test_a_model_writes_freely_and_its_texts_are_read(run):
    folder, inputs, embeddings, _ = run
    predict_greedy(*inputs, embeddings, str(folder / "greedy.parquet"), ["none", "test"], 3, None)
    table, terms = PREDICTIONS.read(folder / "greedy.parquet"), Terms(TERMS.read(inputs[3]))
    assert table["cell_id"].to_list() == [f"study|{i}" for i in range(26, 30)]
    assert table["status"].isin(["parsed", "partial", "failed"]).all()
    for row in table.itertuples():
        slots = parse(row.text, terms).slots
        assert row.cell_type_id == slots.cell_type and tuple(row.pathway_ids) == slots.pathways
    assert table["cell_type_reported_id"].isna().all() and table["novel"].isna().all()
    # drafts change the number of passes, not the texts
    model = load(*inputs[:2]).ready_to_write()
    vectors = embeddings.vectors(table["cell_id"].to_list(), model.projector.reads)
    plain = list(describe_cells(model, vectors, terms, 64, None))
    assert table["text"].to_list() == [row["text"] for row in plain]
    found = table["cell_type_confidence"].astype(float)
    assert np.allclose(found, [row["cell_type_confidence"] or np.nan for row in plain], rtol=1e-3, equal_nan=True)
    predict_greedy(*inputs, embeddings, str(folder / "greedy.parquet"), ["none"], 3, None)
    assert len(PREDICTIONS.read(folder / "greedy.parquet")) == 0


@pytest.fixture
def described(tmp_path):
    """Files of four cells with known scores: two near the training cells, one far away, one in between."""
    folder = write_run(tmp_path, *draw(200, 1))
    outputs = run_calibrate(folder)
    scores, _, _ = draw(4, 2)
    cells = ["s|d", "s|b", "s|a", "s|c"]
    SCORES.write(scores, cells, folder / "scores.safetensors")
    pooled = np.array([[0, 0, 0, 0], [0.1, 0, 0, 0], [99, 0, 0, 0], [0, 0.1, 0, 0]], dtype=np.float32)
    files = [write_embeddings(folder / "x.safetensors", cells[2:], pooled[2:])]
    files += [write_embeddings(folder / "y.safetensors", ["s|other", *cells[:2]], np.vstack([pooled[:1], pooled[:2]]))]
    files += [write_embeddings(folder / "z.safetensors", [], pooled[:0])]
    return folder, scores, cells, files, outputs


def generate(folder, files, outputs, scores="scores", split="test"):
    out = folder / f"{scores}.jsonl"
    inputs = str(folder / "model"), str(folder / f"{scores}.safetensors"), *outputs, str(folder / "terms.parquet")
    generate_descriptions(*inputs, files, str(out), split)
    return out


def test_descriptions_of_known_scores(described):
    folder, scores, cells, files, outputs = described
    rows = list(read_jsonl(generate(folder, files, outputs)))
    assert [row["cell_id"] for row in rows] == cells and {row["split"] for row in rows} == {"test"}
    assert set(rows[0]) == set(PREDICTIONS.columns)
    ancestors = {"cell_type": {row[1]: row[4] for row in ROWS}, "tissue": {}}
    expected = Confidence.load(outputs[0]).describe(scores, LABELS, ancestors)
    for row, said in zip(rows, expected.to_dict("records"), strict=True):
        assert {name: row[name] for name, value in said.items() if value is not None} == {
            name: value for name, value in said.items() if value is not None
        }
    names = terms_table().set_index("id")["name"]
    for row in rows:
        first, second = (names[one] for one in row["pathway_ids"])
        words = f"This is a {names[row['cell_type_id']]}. The sample is blood. "
        assert row["text"].startswith(f"{words}Most active gene programmes: {first}; then {second}.")
    assert [row["novel"] for row in rows] == [False, False, True, False]
    assert rows[2]["novelty"] > 10 * rows[0]["novelty"] > 0
    # a table of predictions can hold them
    [(_, table, _)] = _read_methods([folder / "scores.jsonl"], [])
    PREDICTIONS.write(table, folder / "table.parquet")
    assert PREDICTIONS.read(folder / "table.parquet")["novel"].to_list() == [False, False, True, False]


def test_an_empty_shard_and_a_run_that_judges_no_cell(described):
    folder, scores, cells, files, outputs = described
    SCORES.write({name: tensor[:0] for name, tensor in scores.items()}, [], folder / "empty.safetensors")
    assert generate(folder, files[2:], outputs, "empty").read_text() == ""
    saved = read_json(outputs[0]) | {"limit": None}
    write_json(saved, outputs[0])
    rows = list(read_jsonl(generate(folder, files, outputs)))
    assert [row["novel"] for row in rows] == [None] * 4 and all(row["novelty"] > 0 for row in rows)
