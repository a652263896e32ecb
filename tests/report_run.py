"""The files of a run, as the report reads them, written without running anything."""

import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd

from cell2text.confidence.back_off import Threshold
from cell2text.confidence.calibration import ProgrammeCalibration, SlotCalibration
from cell2text.confidence.decisions import Confidence
from cell2text.contracts import CELLS, DESCRIPTIONS, EMBEDDINGS, HISTORY, METRICS, TERM_SLOTS, TERMS
from cell2text.files import read_json, write_json, write_jsonl
from cell2text.grammar import Slots, Terms, render
from cell2text.provenance import hash_file
from cell2text.report.render_report import render_report
from cell2text.report.results import CALIBRATION, CONFUSION, PER_CLASS, RunFiles

RULES = Path(__file__).parents[1] / "workflow/rules"
METHODS = ["cell2text", "majority", "pca_logistic", "knn", "nearest_text", "shuffled"]
# Slot, metric, value, low, high and n of the fine-tuned model's confidences and reported terms.
SURE = [
    ("cell_type", "reported_precision", 0.91, 0.82, 0.97, 22),
    ("cell_type", "coverage", 0.917, 0.79, 1.0, 24),
    ("cell_type", "reported_depth", 5.25, 5.0, 5.5, 22),
    ("cell_type", "calibration_error", 0.043, 0.02, 0.09, 23),
    ("cell_type", "reported_calibration_error", 0.067, 0.03, 0.12, 22),
    ("pathways", "subset_accuracy", 0.37, 0.3, 0.45, 24),
    ("pathways", "calibration_error", 0.128, 0.08, 0.19, 24),
]
TYPES = {"CL:0000236": "B cell", "CL:0000624": "CD4-positive, alpha-beta T cell", "CL:0000623": "NK cell"}
PATHWAYS = {"GLYCOLYSIS": "glycolysis", "HYPOXIA": "hypoxia"}
HOSTILE = "</script><img src=x onerror=\"alert('1')\">\u2028&amp;<!--{{ 7 * 7 }}"


def term_table():
    rows = [("cell_type", key, name, f"A {name}.") for key, name in TYPES.items()]
    rows += [("pathway", key, name, "") for key, name in PATHWAYS.items()]
    rows += [("tissue", "UBERON:0000178", "blood", "")]
    rows.append(("cell_type", "CL:0000084", "T cell", "A T cell."))
    table = pd.DataFrame(rows, columns=["slot", "id", "name", "definition"]).assign(depth=None, ancestors=None)
    table.loc[table["slot"] == "cell_type", "depth"] = [5, 9, 6, 4]
    return table


def write_run(folder, cells=24, cell_name="study|cell", donor="study|donor", run_text=""):
    """Write the results of a run with three cell types; every fourth test cell is wrong, cell 7 has no prediction.

    The reported terms are the guesses, but T cell for cell 3 and none for cells 7 and 11. Cells 0 and 5 are novel.
    """
    table = term_table()
    terms = Terms(table)
    TERMS.write(table, folder / "terms.parquet")
    rng = np.random.default_rng(0)
    ids = [f"{cell_name}{i:03d}" for i in range(cells + 6)]
    truth = [list(TYPES)[i % 3] for i in range(cells + 6)]
    split = ["test"] * cells + ["train"] * 6

    def describe(term, pathways):
        return render(Slots(term, "UBERON:0000178", None, None, None, tuple(pathways)), terms)

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
            | {f"{slot}_reported_{part}": None for slot in TERM_SLOTS for part in ("id", "confidence")}
            | {"cell_type_confidence": term and 0.875, "status": "parsed" if term else "failed"}
            | {"pathway_confidences": [0.625] * len(pathways), "novelty": 1.0, "novel": i in (0, 5)}
        )
        if term and i != 11:
            reported = ("CL:0000084", 0.9375) if i == 3 else (term, 0.875)
            rows[-1] |= dict(zip(("cell_type_reported_id", "cell_type_reported_confidence"), reported, strict=True))
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
    rows = []
    for i, method in enumerate(METHODS):
        scores = (0.75 - 0.1 * i, 0.7 - 0.1 * i, 0.8 - 0.1 * i, cells, "cell")
        difference = (0.1 * i, 0.1 * i - 0.15, 0.1 * i + 0.15) if i else (math.nan,) * 3
        rows += [("test", method, *metric, *scores, *difference) for metric in metrics]
    rows += [("test", "cell2text", *scores, "cell", *(math.nan,) * 3) for scores in SURE]
    rows.append(("validation", "cell2text", "cell_type", "accuracy", 0.111, 0.1, 0.12, 9, "cell", *(math.nan,) * 3))
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
    bins += [("test", "cell2text", "pathways", low, low + 0.1, low + 0.05, 0.5, cells - 2) for low in (0.3, 0.6)]
    write_tsv(bins, CALIBRATION, folder / "calibration.tsv")

    svg = '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><circle id="p1" r="4"/></svg>'
    for name in ("comparison.svg", "study.svg"):
        (folder / name).write_text(svg)
    guarantee = {"claim": "No donor is in two splits", "holds": False, "detail": "1 of 1"}
    sizes = {"train": 6, "validation": 40, "test": cells}
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
        {**provenance, "bootstrap": {"replicates": 100, "splits": {"test": {"unit": "cell", "donors": 1}}}},
        folder / "provenance.json",
    )
    record_tables(folder)
    slots = {slot: SlotCalibration(40) for slot in ("cell_type", "tissue")}
    thresholds = {"cell_type": Threshold(0.612, 0.8, 40, True), "tissue": Threshold(0.8, 0.8, 3, False)}
    Confidence(slots, thresholds, SlotCalibration(), ProgrammeCalibration(79), 1.5).save(folder / "confidence.json")
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
        **{name: folder / f"{name}.json" for name in ("provenance", "audit", "confidence")},
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


def record_tables(folder):
    """Record the hashes of the tables as they are now, as ``evaluate`` does."""
    tables = {path.name: hash_file(path) for path in folder.glob("*.tsv")}
    write_json({**read_json(folder / "provenance.json"), "tables": tables}, folder / "provenance.json")


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


def render_page(files, tmp_path, seed=3, benchmarks=None):
    render_report(
        files,
        tmp_path / "report.html",
        tmp_path / "model_card.md",
        run="demo",
        seed=seed,
        benchmarks=benchmarks or {},
        notes={"study": "its labels are <approximate>"},
    )
    return (tmp_path / "report.html").read_text()
