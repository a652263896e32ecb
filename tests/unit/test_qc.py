"""Cells are left out for the right reason, and the rest is left as it was."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import sparse

from cell2text.contracts import QC
from cell2text.counts import BUNDLED, fetch_dataset
from cell2text.qc import draw_figures, filter_cells, judge_cells, measure_cells

LIMITS = {"min_genes": 2, "min_counts": 10, "max_mitochondrial_percent": 20}
# good, few genes, few counts, mitochondrial, unlabelled, at every limit, empty
COUNTS = np.array([[9, 9, 2], [50, 0, 0], [5, 4, 0], [10, 0, 10], [9, 9, 2], [8, 0, 2], [0, 0, 0]], dtype=np.float32)
LABELS = ["CL:0000236"] * 4 + ["unknown"] + ["CL:0000236"] * 2
REASONS = [
    "",
    "too few genes (1 < 2)",
    "too few counts (9 < 10)",
    "too many mitochondrial counts (50 > 20)",
    "no cell type label",
    "",
    "too few genes (0 < 2)",
]


def write_cells(path, counts=COUNTS, labels=LABELS, symbols=("CD3D", "LYZ", "MT-CO1")):
    cells = ad.AnnData(
        sparse.csr_matrix(counts),
        obs=pd.DataFrame(
            {"dataset_id": "study", "cell_type_ontology_term_id": labels},
            index=[f"study|{i}" for i in range(len(counts))],
        ),
        var=pd.DataFrame({"symbol": list(symbols)}, index=[f"g{i}" for i in range(counts.shape[1])]),
    )
    cells.write_h5ad(path)
    return path


def run(folder, cells, limits=LIMITS):
    files = [folder / name for name in ("kept.h5ad", "qc.parquet", "qc.json", "qc.svg")]
    filter_cells(cells, *files, limits=limits)
    return files


def test_each_cell_is_judged_by_the_first_limit_it_fails(tmp_path):
    kept, table, summary, _ = run(tmp_path, write_cells(tmp_path / "in.h5ad"))
    table = QC.read(table)
    assert list(table["reason"]) == REASONS
    assert list(table["kept"]) == [reason == "" for reason in REASONS]
    assert list(table["n_counts"]) == [20, 50, 9, 20, 20, 10, 0]
    assert list(table["n_genes"]) == [3, 1, 2, 2, 3, 2, 0]
    assert list(table["mitochondrial_percent"]) == [10, 0, 0, 50, 10, 20, 0]
    cells = ad.read_h5ad(kept)
    assert list(cells.obs_names) == ["study|0", "study|5"]
    assert (cells.X.toarray() == COUNTS[[0, 5]]).all()
    assert list(cells.var) == ["symbol"]
    assert json.loads(summary.read_text()) == {
        "dataset_id": "study",
        "cells": 7,
        "kept": 2,
        "dropped": {
            "no cell type label": 1,
            "too few counts": 1,
            "too few genes": 2,
            "too many mitochondrial counts": 1,
        },
        "limits": LIMITS,
        "genes": 3,
        "genes_with_symbol_MT": 1,
        "source": "",
    }


def test_a_cell_without_counts_is_left_out_even_without_limits():
    figures = pd.DataFrame({"n_counts": [0.0, 1], "n_genes": [0, 1], "mitochondrial_percent": [0.0, 100]})
    limits = {"min_genes": 0, "min_counts": 0, "max_mitochondrial_percent": 100}
    _, reasons = judge_cells(figures, pd.Series([True, True]), limits)
    assert list(reasons) == ["too few counts (0 < 1)", ""]


def test_genes_that_only_begin_with_mt_are_not_mitochondrial(tmp_path):
    counts = np.array([[5, 5, 5]], dtype=np.float32)
    cells = write_cells(tmp_path / "in.h5ad", counts, LABELS[:1], ["MTOR", "MT1X", "mt-Nd1"])
    _, table, summary, _ = run(tmp_path, cells, LIMITS | {"max_mitochondrial_percent": 100})
    assert json.loads(summary.read_text())["genes_with_symbol_MT"] == 1
    assert QC.read(table)["mitochondrial_percent"][0] == pytest.approx(100 / 3)


def test_the_plot_is_the_same_bytes_and_bears_no_date(tmp_path):
    cells = write_cells(tmp_path / "in.h5ad")
    first = run(tmp_path / "a", cells)[3].read_bytes()
    assert first == run(tmp_path / "b", cells)[3].read_bytes()
    assert b"<svg" in first and b"dc:date" not in first


def test_the_plot_shows_every_cell_and_every_limit(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, lines = [], []
    hist, axvline = Axes.hist, Axes.axvline
    monkeypatch.setattr(
        Axes, "hist", lambda self, *args, **kwargs: drawn.append(hist(self, *args, **kwargs)) or drawn[-1]
    )
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **kwargs: lines.append(x) or axvline(self, x, **kwargs))
    cells = ad.read_h5ad(write_cells(tmp_path / "in.h5ad"))
    kept = np.array([reason == "" for reason in REASONS])
    figures = measure_cells(cells, np.array([False, False, True]))
    draw_figures(figures, kept, LIMITS, "study", tmp_path / "qc.svg")
    assert [heights[-1].sum() for heights, *_ in drawn] == [len(kept)] * 3
    assert [heights[0].sum() for heights, *_ in drawn] == [kept.sum()] * 3
    assert lines == [10, 2, 20]


def test_the_default_run_loses_hardly_a_cell(tmp_path, request):
    root = request.config.rootpath
    row = pd.read_csv(root / "config/datasets.tsv", sep="\t", dtype=str).iloc[0].dropna().to_dict()
    limits = yaml.safe_load((root / "config/config.yaml").read_text())["qc"]
    limits = {name: float(row.get(name, limit)) for name, limit in limits.items()}
    row["label_table"] = str(root / row["label_table"])
    assert row["source"] == BUNDLED
    fetch_dataset(row, tmp_path / "raw.h5ad")
    kept, *_ = run(tmp_path, tmp_path / "raw.h5ad", limits)
    assert ad.read_h5ad(kept).n_obs >= 0.99 * 700
