"""The run's page: what it says, and what it never lets in or out."""

import json
import math
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from cell2text.contracts import CELLS, DESCRIPTIONS, EMBEDDINGS, HISTORY, METRICS, TERM_SLOTS, TERMS
from cell2text.errors import InputError
from cell2text.evaluation.methods import title_of
from cell2text.files import write_json, write_jsonl
from cell2text.grammar import Slots, Terms, render
from cell2text.report import cell_map
from cell2text.report.cell_map import COLOURS, GRID, colours, draw_cells, lay_out
from cell2text.report.charts import Axis, training_curve, wilson_interval
from cell2text.report.examples import choose_examples, mark_text
from cell2text.report.limits import tell_limits
from cell2text.report.render_report import render_report, sort_facts
from cell2text.report.results import CALIBRATION, CONFUSION, PER_CLASS, RunFiles, read_results
from cell2text.report.tables import clearly_best, compare_methods, confusion_matrix
from cell2text.report.timings import rule_costs

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
    """Write the results of a run of three cell types; every fourth test cell is wrong, cell 7 not told."""
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

    told = [list(TYPES)[(i + (i % 4 == 3)) % 3] for i in range(cells)]
    rows = []
    for i in range(cells):
        term, pathways = (None, []) if i == 7 else (told[i], ["HYPOXIA" if i == 0 else "GLYCOLYSIS"])
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

    figures = [("cell_type", "accuracy"), ("cell_type", "macro_f1"), ("pathways", "jaccard")]
    figures += [("text", "bleu"), ("text", "parsed")]
    rows = [
        ("test", method, *figure, 0.75 - 0.1 * i, 0.7 - 0.1 * i, 0.8 - 0.1 * i, cells)
        for i, method in enumerate(METHODS)
        for figure in figures
    ]
    rows.append(("validation", "cell2text", "cell_type", "accuracy", 0.111, 0.1, 0.12, 9))
    write_tsv(rows, METRICS, folder / "metrics.tsv")
    scores = [("test", "cell2text", "cell_type", key, name, 8, math.nan, 0.5, 0.6) for key, name in TYPES.items()]
    write_tsv(scores, PER_CLASS, folder / "per_class.tsv")
    counts = pd.DataFrame({"true": truth[:cells], "told": [row or "" for row in told]}).value_counts()
    names = {**TYPES, "": "not determined"}
    confused = [
        ("test", "cell2text", "cell_type", true, names[true], said, names[said], n)
        for (true, said), n in sorted(counts.items())
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
    """Tags with their attributes, what scripts hold, and the visible text."""

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


def test_page_tells_the_run(files, tmp_path):
    page = Page(render_page(files, tmp_path))
    text = " ".join(page.text.split())
    assert "demo" in text and "Tiny" in text
    for method in METHODS:
        assert title_of(method) in text
    # the test split's accuracy with its interval beside the best neighbour's, not the validation split's
    assert "75.0%" in text and "70.0–80.0" in text
    assert f"best neighbour, {title_of('majority')}: 65.0 (60.0–70.0)" in text
    assert "11.1" not in text
    assert "✗ does not hold" in text and "One donor only." in text
    assert "10 too few genes" in text
    assert "min genes 200 to 1,234" in text
    assert "Cell type 1,234 567 0.610 0.789" in text
    assert "No benchmark file was found" in text
    assert sum(tag == "article" for tag, _ in page.tags) == 20


def test_page_needs_nothing_from_outside(files, tmp_path):
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


def test_nothing_that_a_user_gave_breaks_out(tmp_path):
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
    assert HOSTILE in page.text  # shown as it was written


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


def test_few_cells_are_all_described(tmp_path):
    page = Page(render_page(write_run(tmp_path, cells=8), tmp_path))
    assert sum(tag == "article" for tag, _ in page.tags) == 8


def test_the_model_card_tells_data_scores_and_limits(files, tmp_path):
    render_page(files, tmp_path)
    card = (tmp_path / "model_card.md").read_text()
    assert "all its weights learnt, with the projector 1,234,567 weights. It can say 2 cell types" in card
    assert "hf://org/Tiny@main, licence: &lt;own&gt;" in card and "Epoch kept: 2, with 0.2500 nats" in card
    assert "| study | 40 | 30 |" in card and "Seed 7" in card and "a" * 64 in card
    accuracy = read_results(files).metric("cell2text", "cell_type", "accuracy")
    assert f"| Cell2Text | {accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}] |" in card
    assert "its labels are &lt;approximate&gt;" in card and "not a diagnosis" in card


@pytest.mark.parametrize("field", ["metrics", "comparison", "audit", "corpus"])
def test_a_missing_file_is_named(files, tmp_path, field):
    getattr(files, field).unlink()
    with pytest.raises(InputError, match=str(getattr(files, field))):
        render_page(files, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_missing_history_is_named(files, tmp_path):
    (tmp_path / "history.parquet").unlink()
    with pytest.raises(InputError, match="history.parquet"):
        read_results(files)


def test_a_cell_without_reference_or_embedding_is_told(files, tmp_path):
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
            assert data["told"][i] == -1 and data["confidence"][i] is None
        else:
            assert names[data["told"][i]] == row["cell_type_id"] and data["confidence"][i] == 0.875


def test_layout_keeps_groups_apart_and_is_repeatable():
    rng = np.random.default_rng(0)
    pooled = np.concatenate([rng.normal(size=(30, 8)), rng.normal(size=(30, 8)) + 20]).astype(np.float32)
    places = lay_out(pooled, seed=1)
    np.testing.assert_array_equal(places, lay_out(pooled, seed=1))
    assert places.min() == 0 and places.max() == GRID
    centres = places[:30].mean(axis=0), places[30:].mean(axis=0)
    spread = np.linalg.norm(places[:30] - centres[0], axis=1).max()
    assert np.linalg.norm(centres[0] - centres[1]) > 2 * spread


@pytest.mark.parametrize("cells", [1, 2, 5])
def test_layout_of_few_cells(cells):
    places = lay_out(np.random.default_rng(0).normal(size=(cells, 4)).astype(np.float32), seed=0)
    assert places.shape == (cells, 2) and places.min() == 0 and places.max() <= GRID


def test_more_cells_than_the_map_holds_are_sampled(files, tmp_path, monkeypatch):
    rows = draw_cells(50_000, seed=2)
    assert len(rows) == len(set(rows)) == 20_000 and (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, draw_cells(50_000, seed=2))
    np.testing.assert_array_equal(draw_cells(7, seed=2), np.arange(7))
    monkeypatch.setattr(cell_map, "draw_cells", lambda cells, seed: np.arange(1, 11))
    page = Page(render_page(files, tmp_path))
    assert "Shown are 10 of 24 cells, drawn at random (seed 3)" in page.text
    assert json.loads(page.scripts[0])["cell"] == [f"study|cell{i:03d}" for i in range(1, 11)]


def test_every_class_has_its_own_colour():
    assert len(set(colours(60))) == 60
    assert colours(3) == list(COLOURS[:3])


def test_best_only_where_intervals_do_not_overlap():
    def figure(value, low, high):
        return {"value": value, "low": low, "high": high, "n": 10}

    assert clearly_best([figure(0.5, 0.4, 0.6), None, figure(0.9, 0.7, 1.0)]) == 2
    assert clearly_best([figure(0.5, 0.4, 0.7), figure(0.9, 0.7, 1.0)]) is None
    assert clearly_best([figure(0.9, math.nan, math.nan), figure(0.5, 0.4, 0.6)]) is None
    assert clearly_best([None, figure(0.9, 0.7, 1.0)]) is None


def test_methods_that_nobody_foresaw_are_shown(files):
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
    marks = {column["name"]: i for i, column in enumerate(whole["columns"])}
    assert by_name["A"]["cells"][marks["B"]] == (2, 0.2)
    assert by_name["B"]["cells"][marks["X"]] == (3, 0.375)
    assert by_name["C"]["cells"][marks["not determined"]] == (1, 0.5)
    assert [column["name"] for column in whole["columns"][:3]] == [row["name"] for row in whole["rows"]]
    assert abs(marks["A"] - marks["B"]) == 1  # those that are confused stand side by side
    lumped = confusion_matrix(results, most=2)
    assert [row["name"] for row in lumped["rows"]][-1] == "1 rarer types"
    assert sum(n for row in lumped["rows"] for n, _ in row["cells"]) == table["n"].sum()


def test_examples_compare_ids(files):
    results = read_results(files)
    examples = {example["cell"]: example for example in choose_examples(results, seed=0, examples=24)}
    swapped = examples["study|cell000"]  # right type, another pathway
    assert swapped["right"]
    assert [row["slot"] for row in swapped["differing"]] == ["pathways"]
    assert [text for text, differs in swapped["told"] if differs] == ["hypoxia"]
    assert [text for text, differs in swapped["true"] if differs] == ["glycolysis"]
    wrong = examples["study|cell003"]  # a B cell called a T cell
    assert not wrong["right"]
    assert [text for text, differs in wrong["told"] if differs] == [TYPES["CL:0000624"]]
    assert wrong["differing"][0]["true"] == [("B cell", "CL:0000236")]
    silent = examples["study|cell007"]
    assert not silent["right"] and silent["differing"][0]["told"] == [("not determined", None)]
    assert "".join(text for text, _ in silent["told"]) == "words"


def test_marking_loses_no_letter():
    terms = Terms(term_table())
    text = "This is a B cell. The sample is blood. Most active gene programmes: hypoxia; then glycolysis."
    pieces = mark_text(text, {"cell_type", "tissue"}, {"GLYCOLYSIS"}, terms)
    assert "".join(piece for piece, _ in pieces) == text
    assert [piece for piece, differs in pieces if differs] == ["B cell", "blood", "glycolysis"]


def test_choice_of_examples_is_seeded(files):
    results = read_results(files)
    chosen = [[example["cell"] for example in choose_examples(results, seed)] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 20


def test_axis_places_values():
    assert Axis(0, 10, 100, 200).place(2.5) == 125
    assert Axis(0.01, 100, 200, 0, logarithmic=True).place(1) == 100
    assert [tick["label"] for tick in Axis(0, 1, 0, 100).ticks()] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]


def test_training_curve_keeps_stages_apart():
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


def test_wilson_interval():
    low, high = wilson_interval(np.array([0.5, 1.0]), np.array([10, 10]))
    np.testing.assert_allclose(low, [0.2366, 0.7225], atol=1e-4)
    np.testing.assert_allclose(high, [0.7634, 1.0], atol=1e-4)


def test_limits_follow_the_scores(files):
    results = read_results(files)
    told = " ".join(tell_limits(results, {"study": "a note"}))
    assert "One donor only." in told
    assert "study: a note" in told
    assert "resampling cells, not donors" in told
    assert "3 of 3 cell types have fewer than 10 test cells" in told
    assert f"intervals of Cell2Text and of {title_of('majority')} overlap" in told
    metrics = results.metrics.copy()
    metrics.loc[metrics["method"] == "majority", ["value", "low", "high"]] = [0.9, 0.85, 0.95]
    told = " ".join(tell_limits(replace(results, metrics=metrics), {}))
    assert f"{title_of('majority')} is better than Cell2Text" in told
    metrics.loc[metrics["method"] == "majority", ["value", "low", "high"]] = [0.1, 0.05, 0.15]
    metrics.loc[metrics["method"] == "pca_logistic", ["value", "low", "high"]] = [0.6, 0.5, 0.69]
    told = " ".join(tell_limits(replace(results, metrics=metrics), {}))
    assert "overlap" not in told and "is better than" not in told


def test_costs_of_rules(tmp_path):
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
    assert "1 job took 1:15 in all" in text and "finetune 1 1:15 1:20 1,234 MB" in text


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


def test_script_runs_in_a_browser(tmp_path):
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
    assert len(buttons) == 3 + len(TYPES)  # three ways to colour, and the legend
    assert "study|cell000" in page.text and "88%" in page.text  # the first cell's card
    assert sum(tag == "img" for tag, _ in page.tags) == 2
