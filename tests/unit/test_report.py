"""The report and the model card: their content, and that the page is self-contained and escapes all input."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cell2text.contracts import CELLS, DESCRIPTIONS, EMBEDDINGS, HISTORY, METRICS, TERM_SLOTS, TERMS
from cell2text.errors import InputError
from cell2text.evaluation import methods
from cell2text.evaluation.methods import title_of
from cell2text.files import write_json, write_jsonl
from cell2text.grammar import Slots, Terms, render
from cell2text.report import cell_map
from cell2text.report.cell_map import COLOURS, GRID, colours, lay_out, sample_cells
from cell2text.report.charts import Axis, reliability, training_curve
from cell2text.report.examples import choose_examples, mark_text
from cell2text.report.limits import list_limits
from cell2text.report.render_report import render_report, sort_facts
from cell2text.report.results import CALIBRATION, CONFUSION, PER_CLASS, RunFiles, read_results
from cell2text.report.tables import best_baseline, clearly_best, compare_methods, confusion_matrix, lost_slots
from cell2text.report.timings import rule_costs

RULES = Path(__file__).parents[2] / "workflow/rules"
METHODS = ["cell2text", "majority", "pca_logistic", "knn", "nearest_text", "shuffled"]
TYPES = {"CL:0000236": "B cell", "CL:0000624": "CD4-positive, alpha-beta T cell", "CL:0000623": "NK cell"}
PATHWAYS = {"GLYCOLYSIS": "glycolysis", "HYPOXIA": "hypoxia"}
HOSTILE = "</script><img src=x onerror=\"alert('1')\">\u2028&amp;<!--{{ 7 * 7 }}"


def term_table():
    rows = [("cell_type", key, name, f"A {name}.") for key, name in TYPES.items()]
    rows += [("pathway", key, name, "") for key, name in PATHWAYS.items()]
    rows += [("tissue", "UBERON:0000178", "blood", "")]
    return pd.DataFrame(rows, columns=["slot", "id", "name", "definition"]).assign(depth=None)


def write_run(folder, cells=24, cell_name="study|cell", donor="study|donor", run_text=""):
    """Write the results of a run with three cell types; every fourth test cell is wrong, cell 7 has no prediction."""
    table = term_table()
    terms = Terms(table)
    TERMS.write(table, folder / "terms.parquet")
    rng = np.random.default_rng(0)
    ids = [f"{cell_name}{i:03d}" for i in range(cells + 6)]
    truth = [list(TYPES)[i % 3] for i in range(cells + 6)]
    split = ["test"] * cells + ["train"] * 6

    def describe(term, pathways):
        return render(Slots(term, None, "UBERON:0000178", None, None, None, tuple(pathways)), terms)

    reference = pd.DataFrame(
        {
            "cell_id": ids,
            "split": split,
            "cell_type_id": truth,
            "tissue_id": "UBERON:0000178",
            "disease_id": None,
            "sex_id": None,
            "stage_id": None,
            "pathway_ids": [["GLYCOLYSIS"]] * len(ids),
            "definition": None,
            "text": [describe(term, ["GLYCOLYSIS"]) for term in truth],
        }
    )
    DESCRIPTIONS.write(reference, folder / "descriptions.parquet")
    corpus = pd.DataFrame({name: [None] * len(ids) for name in CELLS.columns})
    CELLS.write(corpus.assign(cell_id=ids, dataset_id="study", donor=donor, split=split), folder / "cells.parquet")

    predicted = [list(TYPES)[(i + (i % 4 == 3)) % 3] for i in range(cells)]
    rows = []
    for i in range(cells):
        term, pathways = (None, []) if i == 7 else (predicted[i], ["HYPOXIA" if i == 0 else "GLYCOLYSIS"])
        text = "words" if term is None else describe(term, pathways)
        rows.append(
            {"cell_id": ids[i], "split": "test", "text": text + run_text, "pathway_ids": pathways}
            | {f"{slot}_id": None for slot in TERM_SLOTS}
            | {f"{slot}_confidence": None for slot in TERM_SLOTS}
            | {"cell_type_id": term, "tissue_id": term and "UBERON:0000178"}
            | {"cell_type_confidence": term and 0.875, "status": "parsed" if term else "failed"}
        )
    write_jsonl(rows[: cells // 2], folder / "0.jsonl")
    write_jsonl(rows[cells // 2 :], folder / "1.jsonl")

    tensors = {
        "gene_vectors": np.zeros((len(ids), 1, 2), np.float16),
        "lengths": np.ones(len(ids), np.int32),
        "pooled": (rng.normal(size=(len(ids), 5)) + 9 * np.arange(len(ids))[:, None] % 3).astype(np.float32),
    }
    EMBEDDINGS.write(tensors, ids, folder / "0.safetensors")

    metrics = [("cell_type", "accuracy"), ("cell_type", "macro_f1"), ("pathways", "jaccard")]
    metrics += [("text", "bleu"), ("text", "parsed")]
    rows = [
        ("test", method, *metric, 0.75 - 0.1 * i, 0.7 - 0.1 * i, 0.8 - 0.1 * i, cells)
        for i, method in enumerate(METHODS)
        for metric in metrics
    ]
    rows.append(("validation", "cell2text", "cell_type", "accuracy", 0.111, 0.1, 0.12, 9))
    write_tsv(rows, METRICS, folder / "metrics.tsv")
    scores = [("test", "cell2text", "cell_type", key, name, 8, math.nan, 0.5, 0.6) for key, name in TYPES.items()]
    write_tsv(scores, PER_CLASS, folder / "per_class.tsv")
    counts = pd.DataFrame({"true": truth[:cells], "predicted": [term or "" for term in predicted]}).value_counts()
    names = {**TYPES, "": "not determined"}
    confused = [
        ("test", "cell2text", "cell_type", true, names[true], guess, names[guess], n)
        for (true, guess), n in sorted(counts.items())
    ]
    write_tsv(confused, CONFUSION, folder / "confusion.tsv")
    bins = [("test", "cell2text", "cell_type", 0.8, 0.9, 0.875, 0.75, cells - 1)]
    write_tsv(bins, CALIBRATION, folder / "calibration.tsv")

    svg = '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><circle id="p1" r="4"/></svg>'
    for name in ("comparison.svg", "study.svg"):
        (folder / name).write_text(svg)
    guarantee = {"claim": "No donor is in two splits", "holds": False, "detail": "1 of 1"}
    sizes = {"train": 6, "validation": 0, "test": cells}
    write_json(
        {
            "split": "cells",
            "cells": sizes,
            "guarantees": [guarantee],
            "limits": ["One donor only."],
            "diversity": [
                {
                    "slot": "cell_type",
                    "values_before": 1234,
                    "values_after": 567,
                    "diversity_before": 0.61,
                    "diversity_after": 0.7894,
                }
            ],
            "more": 1,
        },
        folder / "audit.json",
    )
    summary = {"dataset_id": "study", "cells": 40, "kept": 30, "dropped": {"too few genes": 10}, "genes": 765}
    samples = [{"donor": f"study|{n}", "cells": 20, "kept": 15, "min_genes": float(n)} for n in (1234, 200)]
    write_json({**summary, "samples": samples, "more": 1}, folder / "study.json")
    provenance = {
        "config": "a" * 64,
        "seed": 1,
        "packages": {"numpy": "2.0"},
        "files": {"x.h5ad": "b" * 64},
    }
    write_json(
        {**provenance, "bootstrap": {"replicates": 100, "splits": {"test": {"unit": "cell"}}}},
        folder / "provenance.json",
    )
    model = {
        "language_model": {"source": "hf://org/Tiny@main", "licence": "<own>"},
        "projector": {"kind": "perceiver"},
        "finetune": {"mode": "full", "lora_rank": 4},
        "labels": {"cell_type": ["CL:0000236", "CL:0000576"]},
        "dimensions": 8,
        "trainable_parameters": 1234567,
        "validation_loss": 0.25,
        "best_epoch": 2,
        "seed": 7,
    }
    write_json(model, folder / "cell2text.json")
    HISTORY.write(history(), folder / "history.parquet")
    return RunFiles(
        **{name: folder / f"{name}.tsv" for name in ("metrics", "per_class", "confusion", "calibration")},
        **{name: folder / f"{name}.json" for name in ("provenance", "audit")},
        **{name: folder / f"{name}.parquet" for name in ("descriptions", "terms")},
        comparison=folder / "comparison.svg",
        generations=[folder / "0.jsonl", folder / "1.jsonl"],
        corpus=folder / "cells.parquet",
        qc=[folder / "study.json"],
        qc_plots=[folder / "study.svg"],
        embeddings=[folder / "0.safetensors"],
        encoder=folder / "encoder",
        model=folder,
    )


def write_tsv(rows, columns, path):
    pd.DataFrame(rows, columns=list(columns)).to_csv(path, sep="\t", index=False)


def history():
    rows = [("align", step, 0, 2.0, 2.0, math.nan, math.nan, 1e-3, 0, 0.1 * step) for step in range(3)]
    for step in range(4):
        validation = 0.2 if step == 3 else math.nan
        rows.append(("finetune", step, step // 2, 1 / (1 + step), 0.5, validation, math.nan, 1e-4, 100, 1.0 * step))
    table = pd.DataFrame(rows, columns=list(HISTORY.columns))
    return table.astype({"step": "int32", "epoch": "int32"})


class Page(HTMLParser):
    """Tags with their attributes, the content of scripts, and the visible text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.scripts, self.text, self._in = [], [], "", None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("td", "th"):
            self.text += " "
        if tag not in ("meta", "img", "link"):
            self._in = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        if self._in == "script":
            self.scripts[-1] += data
        elif self._in != "style":
            self.text += data


@pytest.fixture
def files(tmp_path):
    return write_run(tmp_path)


def render_page(files, tmp_path, seed=3):
    render_report(
        files,
        tmp_path / "report.html",
        tmp_path / "model_card.md",
        run="demo",
        seed=seed,
        benchmarks=tmp_path / "none",
        notes={"study": "its labels are <approximate>"},
    )
    return (tmp_path / "report.html").read_text()


def test_the_page_shows_the_run(files, tmp_path):
    page = Page(render_page(files, tmp_path))
    text = " ".join(page.text.split())
    assert "demo" in text and "Tiny" in text
    for method in METHODS:
        assert title_of(method) in text
    # scores of the test split, not of the validation split
    for score in ("Cell type accuracy", "Gene programmes (Jaccard)", "Texts parsed"):
        assert f"{score} 75.0% 95% interval 70.0–80.0; best baseline, {title_of('majority')}: 65.0 (60.0–70.0)" in text
    assert "11.1" not in text
    assert "✗ does not hold" in text and "One donor only." in text
    assert "10 too few genes" in text
    assert "min genes 200 to 1,234" in text
    assert "Cell type 1,234 567 0.610 0.789" in text
    assert "No benchmark files were found" in text
    assert sum(tag == "article" for tag, _ in page.tags) == 20


def test_the_page_is_self_contained(files, tmp_path):
    html = render_page(files, tmp_path)
    page = Page(html)
    links = [
        (tag, value)
        for tag, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
    ]
    assert {"img", "a"} <= {tag for tag, _ in links}
    assert all(value.startswith(("#", "data:")) for _, value in links)
    assert "url(" not in html and "@import" not in html
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_same_inputs_give_the_same_bytes(files, tmp_path):
    first = render_page(files, tmp_path)
    shards = list(files.generations)
    for shard in shards:
        shard.write_text("".join(reversed(shard.read_text().splitlines(keepends=True))))
    again = replace(files, generations=shards[::-1])
    assert render_page(again, tmp_path) == first
    assert render_page(files, tmp_path, seed=4) != first


def test_all_user_input_is_escaped(tmp_path):
    files = write_run(tmp_path, cell_name=HOSTILE, donor=HOSTILE, run_text=HOSTILE)
    html = render_page(files, tmp_path)
    page = Page(html)
    assert "\u2028" not in page.scripts[0]
    assert [attributes["src"][:5] for tag, attributes in page.tags if tag == "img"] == ["data:", "data:"]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    data, script = page.scripts
    assert json.loads(data)["cell"][0] == f"{HOSTILE}000"
    assert all(HOSTILE in text for text in json.loads(data)["texts"])
    assert script.strip().startswith("(() =>")
    assert HOSTILE in page.text  # displayed literally


def test_a_hostile_term_is_escaped(files, tmp_path):
    terms = term_table()
    terms.loc[0, "name"] = HOSTILE
    TERMS.write(terms, files.terms)
    for path in (files.per_class, files.confusion):
        path.write_text(path.read_text().replace("B cell", HOSTILE.replace('"', "'")))
    page = Page(render_page(files, tmp_path))
    assert len(page.scripts) == 2
    assert json.loads(page.scripts[0])["classes"][0]["name"] == HOSTILE
    assert sum(tag == "img" for tag, _ in page.tags) == 2


def test_a_small_test_split_is_shown_completely(tmp_path):
    page = Page(render_page(write_run(tmp_path, cells=8), tmp_path))
    assert sum(tag == "article" for tag, _ in page.tags) == 8


def test_the_model_card_lists_data_scores_and_limits(files, tmp_path):
    render_page(files, tmp_path)
    card = (tmp_path / "model_card.md").read_text()
    assert "projector and all weights of the language model (1,234,567 parameters)" in card
    assert "The training data has 2 cell types" in card
    assert "hf://org/Tiny@main, licence: &lt;own&gt;" in card
    assert "epoch 2, with a validation loss of 0.2500 nats per token" in card
    assert "| study | 40 | 30 |" in card and "Seed: 7" in card and "a" * 64 in card
    metrics = [("cell_type", "accuracy"), ("cell_type", "macro_f1"), ("pathways", "jaccard"), ("text", "parsed")]
    scores = [read_results(files).metric("cell2text", *metric) for metric in metrics]
    values = [f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]" for score in scores]
    assert f"| Cell2Text | {' | '.join(values)} |" in card
    assert (
        "| method | cell type accuracy | cell type macro-F1 | gene programmes, Jaccard index | texts parsed |" in card
    )
    assert "its labels are &lt;approximate&gt;" in card and "not a diagnosis" in card


@pytest.mark.parametrize("field", ["metrics", "comparison", "audit", "corpus"])
def test_a_missing_file_is_named(files, tmp_path, field):
    getattr(files, field).unlink()
    with pytest.raises(InputError, match=str(getattr(files, field))):
        render_page(files, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_rule_passes_every_file():
    inputs = (RULES / "report.smk").read_text().split("    input:\n")[1].split("    output:\n")[0]
    assert re.findall(r"^        (\w+)=", inputs, re.MULTILINE) == [field.name for field in fields(RunFiles)]


def test_a_missing_history_is_named(files, tmp_path):
    (tmp_path / "history.parquet").unlink()
    with pytest.raises(InputError, match="history.parquet"):
        read_results(files)


def test_a_cell_without_reference_or_embedding_is_reported(files, tmp_path):
    tensors, ids = EMBEDDINGS.read(files.embeddings[0])
    EMBEDDINGS.write({key: value[2:] for key, value in tensors.items()}, ids[2:], files.embeddings[0])
    with pytest.raises(InputError, match="2 described cells have no embedding"):
        read_results(files)
    reference = DESCRIPTIONS.read(files.descriptions)
    DESCRIPTIONS.write(reference.iloc[1:], files.descriptions)
    with pytest.raises(InputError, match="no reference for 1 described cells"):
        read_results(files)


def test_a_missing_column_is_named(files):
    files.metrics.write_text(files.metrics.read_text().replace("\tvalue\t", "\tvalues\t"))
    with pytest.raises(InputError, match="columns missing: value"):
        read_results(files)


def test_cells_and_embeddings_stay_together(files):
    results = read_results(files)
    tensors, ids = EMBEDDINGS.read(files.embeddings[0])
    row_of = {cell: row for row, cell in enumerate(ids)}
    expected = tensors["pooled"][[row_of[cell] for cell in results.cells["cell_id"]]]
    np.testing.assert_array_equal(results.pooled, expected)
    data = cell_map.map_data(results, seed=0)
    names = [entry["id"] for entry in data["classes"]]
    for i, cell in enumerate(data["cell"]):
        row = results.cells.set_index("cell_id").loc[cell]
        assert names[data["truth"][i]] == row["true_cell_type_id"]
        assert data["texts"][data["text"][i]] == row["text"]
        if row["cell_type_id"] is None:
            assert data["predicted"][i] == -1 and data["confidence"][i] is None
        else:
            assert names[data["predicted"][i]] == row["cell_type_id"] and data["confidence"][i] == 0.875


def test_the_layout_separates_groups_and_is_reproducible():
    rng = np.random.default_rng(0)
    pooled = np.concatenate([rng.normal(size=(30, 8)), rng.normal(size=(30, 8)) + 20]).astype(np.float32)
    places = lay_out(pooled, seed=1)
    np.testing.assert_array_equal(places, lay_out(pooled, seed=1))
    assert places.min() == 0 and places.max() == GRID
    centres = places[:30].mean(axis=0), places[30:].mean(axis=0)
    spread = np.linalg.norm(places[:30] - centres[0], axis=1).max()
    assert np.linalg.norm(centres[0] - centres[1]) > 2 * spread


@pytest.mark.parametrize("cells", [1, 2, 5])
def test_the_layout_of_few_cells(cells):
    places = lay_out(np.random.default_rng(0).normal(size=(cells, 4)).astype(np.float32), seed=0)
    assert places.shape == (cells, 2) and places.min() == 0 and places.max() <= GRID


def test_the_map_samples_large_test_splits(files, tmp_path, monkeypatch):
    rows = sample_cells(50_000, seed=2)
    assert len(rows) == len(set(rows)) == 20_000 and (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, sample_cells(50_000, seed=2))
    np.testing.assert_array_equal(sample_cells(7, seed=2), np.arange(7))
    monkeypatch.setattr(cell_map, "sample_cells", lambda cells, seed: np.arange(1, 11))
    page = Page(render_page(files, tmp_path))
    assert "The map shows 10 of 24 cells, drawn at random (seed 3)" in page.text
    assert json.loads(page.scripts[0])["cell"] == [f"study|cell{i:03d}" for i in range(1, 11)]


def test_every_class_has_its_own_colour():
    assert len(set(colours(60))) == 60
    assert colours(3) == list(COLOURS[:3])


def test_a_score_is_best_only_if_intervals_do_not_overlap():
    def score(value, low, high):
        return {"value": value, "low": low, "high": high, "n": 10}

    assert clearly_best([score(0.5, 0.4, 0.6), None, score(0.9, 0.7, 1.0)]) == 2
    assert clearly_best([score(0.5, 0.4, 0.7), score(0.9, 0.7, 1.0)]) is None
    assert clearly_best([score(0.9, math.nan, math.nan), score(0.5, 0.4, 0.6)]) is None
    assert clearly_best([None, score(0.9, 0.7, 1.0)]) is None


def test_methods_outside_the_registry_are_shown(files):
    results = read_results(files)
    extra = results.metrics.assign(method=results.metrics["method"].replace("knn", "celltypist"))
    rows = compare_methods(replace(results, metrics=extra))
    assert [row["method"] for row in rows][-1] == "celltypist"
    assert [row["method"] for row in rows][0] == "cell2text"


def test_confusion_matrix_counts_every_cell(files):
    results = read_results(files)
    rows = [("A", "A", 8), ("A", "B", 2), ("B", "B", 5), ("C", "C", 1), ("B", "X", 3), ("C", "", 1)]
    table = pd.DataFrame(rows, columns=["true_id", "predicted_id", "n"])
    table = table.assign(method="cell2text", slot="cell_type", true_name=table["true_id"])
    table["predicted_name"] = table["predicted_id"]
    results = replace(results, confusion=table)
    whole = confusion_matrix(results)
    by_name = {row["name"]: row for row in whole["rows"]}
    columns = {column["name"]: i for i, column in enumerate(whole["columns"])}
    assert by_name["A"]["cells"][columns["B"]] == (2, 0.2)
    assert by_name["B"]["cells"][columns["X"]] == (3, 0.375)
    assert by_name["C"]["cells"][columns["not determined"]] == (1, 0.5)
    assert [column["name"] for column in whole["columns"][:3]] == [row["name"] for row in whole["rows"]]
    assert abs(columns["A"] - columns["B"]) == 1  # confused types are adjacent
    merged = confusion_matrix(results, most=2)
    assert [row["name"] for row in merged["rows"]][-1] == "1 rarer types"
    assert sum(n for row in merged["rows"] for n, _ in row["cells"]) == table["n"].sum()


def test_examples_are_compared_by_id(files):
    results = read_results(files)
    examples = {example["cell"]: example for example in choose_examples(results, seed=0, examples=24)}
    swapped = examples["study|cell000"]  # correct type, wrong gene programme
    assert swapped["correct"]
    assert [row["slot"] for row in swapped["differing"]] == ["pathways"]
    assert [text for text, differs in swapped["predicted"] if differs] == ["hypoxia"]
    assert [text for text, differs in swapped["true"] if differs] == ["glycolysis"]
    wrong = examples["study|cell003"]  # a B cell predicted as a T cell
    assert not wrong["correct"]
    assert [text for text, differs in wrong["predicted"] if differs] == [TYPES["CL:0000624"]]
    assert wrong["differing"][0]["true"] == [("B cell", "CL:0000236")]
    unparsed = examples["study|cell007"]
    assert not unparsed["correct"] and unparsed["differing"][0]["predicted"] == [("not determined", None)]
    assert "".join(text for text, _ in unparsed["predicted"]) == "words"


def test_marking_keeps_the_whole_text():
    terms = Terms(term_table())
    text = "This is a B cell. The sample is blood. Most active gene programmes: hypoxia; then glycolysis."
    pieces = mark_text(text, {"cell_type", "tissue"}, {"GLYCOLYSIS"}, terms)
    assert "".join(piece for piece, _ in pieces) == text
    assert [piece for piece, differs in pieces if differs] == ["B cell", "blood", "glycolysis"]


def test_the_choice_of_examples_is_seeded(files):
    results = read_results(files)
    chosen = [[example["cell"] for example in choose_examples(results, seed)] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 20


def test_an_axis_maps_values_to_positions():
    assert Axis(0, 10, 100, 200).place(2.5) == 125
    assert Axis(0.01, 100, 200, 0, logarithmic=True).place(1) == 100
    assert [tick["label"] for tick in Axis(0, 1, 0, 100).ticks()] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]


def test_training_curves_of_fine_tuning():
    curve = training_curve(history(), "finetune")
    assert curve["steps"] == 4 and curve["first"] == 1.0 and curve["last"] == 0.25
    assert [(point["epoch"], point["loss"]) for point in curve["validation"]] == [(2, 0.2)]
    assert curve["validation"][0]["x"] == 560  # at the last step, the right end
    assert curve["line"].count("L") == 3
    assert training_curve(history(), "align")["last"] == 2.0
    table = history()
    table.loc[3:4, "stage"] = "openings"
    openings, whole = (training_curve(table, stage) for stage in ("openings", "finetune"))
    assert (openings["steps"], openings["seconds"]) == (2, 1.0) and (whole["steps"], whole["seconds"]) == (2, 2.0)
    assert openings["line"].startswith("M54 ") and whole["line"].startswith("M54 ")
    assert training_curve(history().iloc[:0], "align") is None
    many = pd.concat([history().iloc[3:]] * 1000, ignore_index=True).assign(step=range(4000))
    assert training_curve(many, "finetune")["line"].count("L") < 600


def test_the_curve_of_pre_training_starts_at_zero_and_ignores_the_openings():
    table = history()
    table.loc[3:4, "stage"] = "openings"
    # one row for every five steps, as pre-training writes them
    rows = [("pretrain", step, 0, 6.0, math.nan, math.nan, math.nan, 1e-3, 0, 8.0 + step) for step in range(4, 50, 5)]
    pretraining = pd.DataFrame(rows, columns=list(HISTORY.columns))
    pretraining.loc[9, ["loss", "validation_loss"]] = 5.0, 5.5
    curve = training_curve(pd.concat([table, pretraining], ignore_index=True), "pretrain")
    assert (curve["steps"], curve["seconds"], curve["tokens"], curve["averaged"]) == (50, 57.0, 0, 5)
    assert (curve["first"], curve["last"]) == (6.0, 5.0)
    assert [(point["epoch"], point["loss"], point["x"]) for point in curve["validation"]] == [(1, 5.5, 560)]


def test_pre_training_is_drawn_first_and_only_if_there_was_any(files, tmp_path):
    stages = ["Alignment, loss in nats per cell", "Fine-tuning on whole texts, loss in nats per token"]
    text = " ".join(Page(render_page(files, tmp_path)).text.split())
    assert text.index(stages[0]) < text.index(stages[1])
    assert "nats per masked gene" not in text and "masked genes" not in text
    rows = [("pretrain", step, 0, 6.0, math.nan, 5.5, math.nan, 1e-3, 0, 1.0 + step) for step in range(3)]
    table = pd.DataFrame(rows, columns=list(HISTORY.columns)).astype({"step": "int32", "epoch": "int32"})
    HISTORY.write(table, files.encoder / "history.parquet")
    text = " ".join(Page(render_page(files, tmp_path)).text.split())
    assert "First, the encoder learned to predict masked genes of the training cells." in text
    pretraining = (
        "Pre-training of the encoder, loss in nats per masked gene: from 6 to 6. 3 steps, 0:03. Validation loss"
    )
    places = [text.index(caption) for caption in (pretraining, *stages)]
    assert places == sorted(places)
    assert "4 steps, 400 tokens, 0:03." in text


def test_whiskers_are_wilson_intervals(files):
    bins = [(0.4, 0.5, 0.45, 0.5, 10), (0.9, 1.0, 0.95, 1.0, 10)]
    write_tsv([("test", "cell2text", "cell_type", *row) for row in bins], CALIBRATION, files.calibration)
    drawn = reliability(read_results(files), "cell_type")["bins"]
    low, high = ([(290 - bin[end]) / 280 for bin in drawn] for end in ("low", "high"))  # positions to shares
    # by hand with z = 1.96: (5 + z^2/2 -+ z sqrt(10/4 + z^2/4)) / (10 + z^2), and 10 / (10 + z^2) to 1
    np.testing.assert_allclose(low, [0.2366, 0.7225], atol=1e-3)
    np.testing.assert_allclose(high, [0.7634, 1.0], atol=1e-3)


def test_limits_follow_the_scores(files):
    results = read_results(files)
    limits = " ".join(list_limits(results, {"study": "a note"}))
    assert "One donor only." in limits
    assert "study: a note" in limits
    assert "resampling cells, not donors" in limits
    assert "3 of 3 cell types have fewer than 10 test cells" in limits
    assert f"intervals of Cell2Text and {title_of('majority')} overlap" in limits
    metrics = results.metrics.copy()
    metrics.loc[metrics["method"] == "majority", ["value", "low", "high"]] = [0.9, 0.85, 0.95]
    limits = " ".join(list_limits(replace(results, metrics=metrics), {}))
    assert f"{title_of('majority')} is more accurate than Cell2Text" in limits
    metrics.loc[metrics["method"] == "majority", ["value", "low", "high"]] = [0.1, 0.05, 0.15]
    metrics.loc[metrics["method"] == "pca_logistic", ["value", "low", "high"]] = [0.6, 0.5, 0.69]
    limits = " ".join(list_limits(replace(results, metrics=metrics), {}))
    assert "overlap" not in limits and "is more accurate than" not in limits


def test_the_best_baseline_of_each_score(files):
    results = read_results(files)
    baseline = best_baseline(results, "pathways", "jaccard")
    assert baseline == pytest.approx({"value": 0.65, "low": 0.6, "high": 0.7, "n": 24, "name": title_of("majority")})
    assert best_baseline(results, "sex", "accuracy") is None
    own = results.metrics[results.metrics["method"] == "cell2text"]
    assert best_baseline(replace(results, metrics=own), "pathways", "jaccard") is None


def test_the_first_screen_names_each_slot_in_which_a_baseline_scores_higher(files, tmp_path):
    assert lost_slots(read_results(files)) == []
    assert "scores higher than" not in Page(render_page(files, tmp_path)).text
    table = pd.read_csv(files.metrics, sep="\t")
    scores = ["value", "low", "high"]
    knn = (table["method"] == "knn") & (table["split"] == "test")
    table.loc[knn & (table["metric"] == "accuracy"), scores] = [0.78, 0.71, 0.85]
    table.loc[knn & (table["metric"] == "jaccard"), scores] = [0.9, 0.85, 0.95]
    table.loc[knn & (table["metric"] == "parsed"), scores] = [0.75, 0.7, 0.8]  # equal, not higher
    table.to_csv(files.metrics, sep="\t", index=False)
    sentences = lost_slots(read_results(files))
    assert sentences == [
        f"Cell type: {title_of('knn')} scores higher than Cell2Text "
        "(accuracy 78.0% vs. 75.0%; the 95% intervals overlap).",
        f"Gene programmes: {title_of('knn')} scores higher than Cell2Text "
        "(Jaccard index 90.0% vs. 75.0%; the 95% intervals do not overlap).",
    ]
    header = " ".join(Page(render_page(files, tmp_path)).text.split()).split("Map of the test cells")[0]
    assert all(sentence in header for sentence in sentences)
    card = (tmp_path / "model_card.md").read_text()
    assert all(sentence in card for sentence in sentences)


def test_scores_that_were_not_computed_are_absent(files, tmp_path):
    table = pd.read_csv(files.metrics, sep="\t")
    table[table["slot"] != "pathways"].to_csv(files.metrics, sep="\t", index=False)
    text = " ".join(Page(render_page(files, tmp_path)).text.split())
    assert "Gene programmes (Jaccard)" not in text and "Texts parsed 75.0%" in text
    values = "0.750 [0.700, 0.800]"
    assert f"| Cell2Text | {values} | {values} | – | {values} |" in (tmp_path / "model_card.md").read_text()


def test_names_of_methods_come_from_the_registry(files, tmp_path, monkeypatch):
    for number, name in enumerate(METHODS):
        monkeypatch.setitem(methods.METHODS, name, methods.Method(f"title-{number}", f"summary-{number}"))
    page = Page(render_page(files, tmp_path)).text
    card = (tmp_path / "model_card.md").read_text()
    for number in range(len(METHODS)):
        assert f"title-{number}" in page and f"summary-{number}" in page and f"| title-{number} |" in card
    # Cell2Text is left only as the name of the project
    named = {line.strip() for line in page.splitlines() if "Cell2Text" in line}
    assert named == {"demo · Cell2Text", "Cell2Text", "Cell2Text run"}
    assert re.findall(r".*Cell2Text.*", card) == ["# Cell2Text model of run demo"]


def test_costs_are_summed_by_rule(tmp_path):
    (tmp_path / "embed" / "study").mkdir(parents=True)
    one = {"s": 1.5, "h:m:s": "0:00:01", "max_rss": 100.0, "cpu_time": 2.0}
    write_jsonl([one], tmp_path / "embed" / "study" / "0.jsonl")
    write_jsonl([one | {"s": 3.0, "max_rss": 300.0}], tmp_path / "embed" / "study" / "1.jsonl")
    write_jsonl([one | {"s": 0.1, "max_rss": "NA", "cpu_time": "NA"}], tmp_path / "compare.jsonl")
    write_jsonl([one], tmp_path / "render_report.jsonl")
    embed, compare = rule_costs(tmp_path)
    assert embed == {"rule": "embed", "jobs": 2, "seconds": 4.5, "cpu_seconds": 4.0, "peak_mb": 300.0}
    assert compare == {"rule": "compare", "jobs": 1, "seconds": 0.1, "cpu_seconds": None, "peak_mb": None}
    assert rule_costs(tmp_path / "missing") == []


def test_costs_are_shown(files, tmp_path):
    write_jsonl([{"s": 75.2, "max_rss": 1234.5, "cpu_time": 80.0}], tmp_path / "none" / "finetune.jsonl")
    text = " ".join(Page(render_page(files, tmp_path)).text.split())
    assert "1 job took 1:15 in total" in text and "finetune 1 1:15 1:20 1,234 MB" in text


def test_facts_are_sorted_by_kind():
    record = {
        "seed": 1,
        "packages": {"numpy": "2.0"},
        "model": {"a.json": "0" * 64},
        "bootstrap": {"unit": "cell"},
    }
    assert sort_facts(record) == {
        "facts": [("bootstrap · unit", "cell"), ("seed", "1")],
        "versions": [("numpy", "2.0")],
        "hashes": [("model · a.json", "0" * 64)],
    }


def test_the_script_runs_in_a_browser(tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    render_page(write_run(tmp_path, run_text=HOSTILE), tmp_path)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --virtual-time-budget=2000"
    flags += " --disable-background-networking --disable-component-update --disable-sync --enable-logging=stderr"
    flags += f" --user-data-dir={tmp_path / 'user'}"
    command = [chromium, *flags.split(), "--dump-dom", tmp_path / "report.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    page = Page(done.stdout)
    buttons = [attributes for tag, attributes in page.tags if tag == "button"]
    assert len(buttons) == 3 + len(TYPES)  # three colour modes, and the legend
    assert "study|cell000" in page.text and "88%" in page.text  # the first cell's card
    assert sum(tag == "img" for tag, _ in page.tags) == 2
