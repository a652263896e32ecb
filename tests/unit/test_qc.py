"""Cells are excluded for the right reason, and the others are unchanged."""

import json
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.metrics import roc_auc_score

from cell2text.cells import doublets, h5ad
from cell2text.cells.doublets import cut_samples
from cell2text.cells.fetch_dataset import fetch_dataset
from cell2text.cells.filter_cells import filter_cells, name_samples
from cell2text.cells.qc import is_ribosomal, judge_cells, limit_samples, measure_cells, scale_limits
from cell2text.cells.qc_plot import draw_qc
from cell2text.config import check_config
from cell2text.contracts import QC
from cell2text.settings import QcSettings

LIMITS = {"min_genes": 2, "min_counts": 10, "max_mitochondrial_percent": 20}
# good, few genes, few counts, mitochondrial, unlabelled, exactly at every limit, empty
COUNTS = np.array([[9, 9, 2], [50, 0, 0], [5, 4, 0], [10, 0, 10], [9, 9, 2], [8, 0, 2], [0, 0, 0]], dtype=np.float32)
LABELS = ["CL:0000236"] * 4 + ["unknown"] + ["CL:0000236"] * 2
SYMBOLS = ("CD3D", "RPS6", "MT-CO1")
REASONS = [
    "",
    "too few genes (1 < 2)",
    "too few counts (9 < 10)",
    "too many mitochondrial counts (50 > 20)",
    "no cell type label",
    "",
    "too few genes (0 < 2)",
]


def write_cells(path, counts=COUNTS, labels=LABELS, symbols=SYMBOLS, donors=("a",), studies=("study",)):
    obs = pd.DataFrame(
        {
            "dataset_id": np.resize(studies, len(counts)),
            "donor_id": np.resize(donors, len(counts)),
            "cell_type_ontology_term_id": np.resize(labels, len(counts)),
        },
        index=[f"study|{i}" for i in range(len(counts))],
    ).astype("category")
    var = pd.DataFrame({"symbol": list(symbols)}, index=[f"g{i}" for i in range(counts.shape[1])])
    ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=var).write_h5ad(path)
    return path


def fixed_limits(**limits):
    """Return settings without adaptive limits and doublet scores."""
    return QcSettings(**limits, mads=None, score_doublets=False, max_doublet_score=None)


def run(folder, cells, limits=None, own_limits=LIMITS, seed=0):
    files = [folder / name for name in ("kept.h5ad", "qc.parquet", "qc.json", "qc.svg")]
    filter_cells(cells, *files, limits=limits or fixed_limits(**LIMITS), own_limits=own_limits, seed=seed)
    return files


@pytest.fixture(scope="module")
def defaults(request):
    schema = request.config.rootpath / "workflow/schemas/config.schema.yaml"
    return QcSettings(**check_config({"run": "test"}, schema, "test")["qc"])


@pytest.fixture(scope="module")
def default_row(request):
    root = request.config.rootpath
    row = pd.read_csv(root / "config/datasets.tsv", sep="\t", dtype=str).iloc[0].dropna().to_dict()
    return row | {"label_table": str(root / row["label_table"])}


@pytest.fixture(scope="module")
def blood(tmp_path_factory, default_row):
    path = tmp_path_factory.mktemp("blood") / "raw.h5ad"
    fetch_dataset(default_row, path)
    return path


def one_sample(cells):
    return pd.Categorical.from_codes(np.zeros(cells, dtype=int), ["study|a"])


def metrics_of(n_counts, n_genes, mitochondrial=0.0):
    no_score = np.full(len(n_counts), np.nan)
    return pd.DataFrame(
        {"n_counts": n_counts, "n_genes": n_genes, "mitochondrial_percent": mitochondrial, "doublet_score": no_score}
    )


def test_the_reason_is_the_first_limit_that_a_cell_fails(tmp_path):
    kept, table, summary, _ = run(tmp_path, write_cells(tmp_path / "in.h5ad"))
    table = QC.read(table)
    assert list(table["reason"]) == REASONS
    assert list(table["kept"]) == [reason == "" for reason in REASONS]
    assert list(table["n_counts"]) == [20, 50, 9, 20, 20, 10, 0]
    assert list(table["n_genes"]) == [3, 1, 2, 2, 3, 2, 0]
    assert list(table["mitochondrial_percent"]) == [10, 0, 0, 50, 10, 20, 0]
    assert table["ribosomal_percent"].to_numpy() == pytest.approx([45, 0, 400 / 9, 0, 45, 0, 0])
    assert set(table["donor"]) == {"study|a"}
    assert table["doublet_score"].isna().all()
    cells = ad.read_h5ad(kept)
    assert list(cells.obs_names) == ["study|0", "study|5"]
    assert (cells.X.toarray() == COUNTS[[0, 5]]).all()
    assert list(cells.var) == ["symbol"]
    assert list(cells.obs["cell_type_ontology_term_id"].cat.categories) == ["CL:0000236"]
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
        "mads": None,
        "samples": [{"donor": "study|a", "cells": 7, "kept": 2} | LIMITS],
        "genes": 3,
        "genes_detected": 3,
        "genes_mitochondrial": 1,
        "genes_ribosomal": 1,
        "source": "",
    }


def test_metrics_and_limits_do_not_depend_on_the_block_size(tmp_path, monkeypatch, blood, defaults):
    expected = [path.read_bytes() for path in run(tmp_path / "a", blood, defaults, {})[1:]]
    monkeypatch.setattr(h5ad.read_blocks, "__defaults__", (37,))
    monkeypatch.setattr("cell2text.contracts.table.ROWS_AT_ONCE", 700)
    assert [path.read_bytes() for path in run(tmp_path / "b", blood, defaults, {})[1:]] == expected


def test_metrics_equal_scanpys(blood):
    cells = ad.read_h5ad(blood)
    cells.X = sparse.csr_matrix(cells.X.toarray())
    symbols = cells.var["symbol"].copy()
    symbols.iloc[:5] = [f"MT-{i}" for i in range(5)]
    metrics, detected = measure_cells([cells.X[:300], cells.X[300:]], cells.n_obs, symbols)
    cells.var["mt"], cells.var["ribo"] = symbols.str.startswith("MT-"), is_ribosomal(symbols)
    assert cells.var["ribo"].sum() == 4
    theirs, genes = sc.pp.calculate_qc_metrics(cells, qc_vars=["mt", "ribo"], percent_top=None, log1p=False)
    assert (metrics["n_counts"].to_numpy() == theirs["total_counts"].to_numpy()).all()
    assert (metrics["n_genes"].to_numpy() == theirs["n_genes_by_counts"].to_numpy()).all()
    for ours, name in (("mitochondrial_percent", "pct_counts_mt"), ("ribosomal_percent", "pct_counts_ribo")):
        assert metrics[ours].to_numpy() == pytest.approx(theirs[name].to_numpy(), rel=1e-5)
    assert detected == (genes["n_cells_by_counts"] > 0).sum()


def test_a_cell_without_counts_is_excluded_even_without_limits():
    metrics = metrics_of([0.0, 1], [0, 1], [0.0, 100])
    bounds = limit_samples(metrics, one_sample(2), {"min_genes": 0, "max_mitochondrial_percent": 100}, None)
    _, reasons = judge_cells(metrics, one_sample(2), bounds, np.array([True, True]))
    assert list(reasons) == ["too few counts (0 < 1)", ""]


def test_genes_that_merely_start_with_mt_are_not_mitochondrial(tmp_path):
    counts = np.array([[5, 5, 5]], dtype=np.float32)
    cells = write_cells(tmp_path / "in.h5ad", counts, LABELS[:1], ["MTOR", "MT1X", "mt-Nd1"])
    _, table, summary, _ = run(tmp_path, cells, own_limits=LIMITS | {"max_mitochondrial_percent": 100})
    assert json.loads(summary.read_text())["genes_mitochondrial"] == 1
    assert QC.read(table)["mitochondrial_percent"][0] == pytest.approx(100 / 3)


def test_ribosomal_proteins_are_distinguished_from_kinases_and_pseudogenes():
    ribosomal = ["RPS6", "RPL13A", "RPLP0", "RPSA", "RPS4Y1", "RPL36AL", "RPL7L1", "Rpl3l", "RPS4X"]
    others = ["RPS6KA1", "RPS6KB2", "RPS19BP1", "RPL7P9", "RPL17-C18orf32", "MRPL3", "RPN1", "RPS6KL1"]
    assert list(is_ribosomal(pd.Series(ribosomal + others))) == [True] * len(ribosomal) + [False] * len(others)


UNSCALED = {"min_genes": 200, "min_counts": 300, "max_mitochondrial_percent": 20}


def gene_names(genes, *named):
    return pd.Series([*named, *(f"G{i}" for i in range(genes - len(named)))])


def test_limits_scale_with_the_panel():
    limits = replace(fixed_limits(**UNSCALED), mads=5)
    for genes in (15_000, 33_538):
        assert scale_limits(limits, gene_names(genes, "MT-ND1")) == UNSCALED
    # a third of the counts of the other genes, so the share is 20 of 20 + 80 / 3
    expected = {"min_genes": 67, "min_counts": 100, "max_mitochondrial_percent": 42.86}
    assert scale_limits(limits, gene_names(5000, "MT-ND1")) == expected
    # never above half of the counts, and never below the limit of a whole transcriptome
    assert scale_limits(limits, gene_names(691, "MT-ND1"))["max_mitochondrial_percent"] == 50
    high = replace(limits, max_mitochondrial_percent=60)
    assert scale_limits(high, gene_names(691, "MT-ND1"))["max_mitochondrial_percent"] == 60
    zero = replace(limits, max_mitochondrial_percent=0)
    assert scale_limits(zero, gene_names(691, "MT-ND1"))["max_mitochondrial_percent"] == 0
    # without mitochondrial genes there is no share to limit
    for genes, part in ((1500, {"min_genes": 20, "min_counts": 30}), (20_000, {"min_genes": 200, "min_counts": 300})):
        assert scale_limits(limits, gene_names(genes, "MTOR", "MTND1P23")) == part


def test_a_file_of_the_detected_genes_is_no_panel():
    """Ribosomal proteins show whether only undetected genes are missing, or all but a choice of genes."""
    ribosomal = [f"RPL{i}" for i in range(3, 40)] + [f"RPS{i}" for i in range(2, 30)]
    limits = fixed_limits(**UNSCALED)
    assert scale_limits(limits, gene_names(6000, "MT-ND1", *ribosomal)) == UNSCALED
    assert scale_limits(limits, gene_names(6000, "MT-ND1", *ribosomal[:50]))["min_genes"] == 80
    assert scale_limits(limits, gene_names(6000, "MT-ND1", *["RPL3"] * 65))["min_genes"] == 80


def test_measured_genes_decide_however_few_are_detected(tmp_path):
    counts = np.zeros((50, 16_000), dtype=np.float32)
    counts[:, :300] = 1
    counts[:, -1] = 60  # a sixth; the limit of a panel with 301 genes would be half
    counts[:10, -1] = 100
    cells = write_cells(tmp_path / "in.h5ad", counts, LABELS[:1], [*gene_names(15_999), "MT-CO1"])
    kept, table, summary, _ = run(tmp_path, cells, fixed_limits(**UNSCALED), {})
    summary = json.loads(summary.read_text())
    assert summary["limits"] == UNSCALED
    assert (summary["genes"], summary["genes_detected"]) == (16_000, 301)
    assert list(QC.read(table)["reason"]) == ["too many mitochondrial counts (25 > 20)"] * 10 + [""] * 40


def test_limits_of_the_sheet_are_not_scaled(tmp_path):
    cells = write_cells(tmp_path / "in.h5ad")
    limits = fixed_limits(min_genes=10_000, min_counts=15_000, max_mitochondrial_percent=100)
    run(tmp_path, cells, limits, {"min_genes": 3})
    limits = json.loads((tmp_path / "qc.json").read_text())["limits"]
    assert limits == {"min_genes": 3, "min_counts": 3, "max_mitochondrial_percent": 100}


def test_adaptive_limits_by_hand():
    # medians of ln(1 + x): ln 101 for counts, ln 11 for genes; a third of the cells is ln 2 above, a third ln 2 below
    counts = np.repeat([2 * 101 - 1, 101 / 2 - 1, 100.0], 20)
    genes = np.repeat([2 * 11 - 1, 11 / 2 - 1, 10.0], 20)
    share = np.repeat([14.0, 10, 12], 20)
    fixed = {"min_genes": 1, "min_counts": 30, "max_mitochondrial_percent": 90}
    bounds = limit_samples(metrics_of(counts, genes, share), one_sample(60), fixed, 2)
    lower = np.exp(2 * 1.4826 * np.log(2))
    assert bounds.loc["study|a", "min_counts"] == 30 > np.ceil(101 / lower - 1)
    assert bounds.loc["study|a", "min_genes"] == np.ceil(11 / lower - 1) == 1
    assert bounds.loc["study|a", "max_mitochondrial_percent"] == pytest.approx(12 + 2 * 1.4826 * 2, abs=0.006)
    bounds = limit_samples(metrics_of(counts, genes, share), one_sample(60), fixed, 1)
    assert bounds.loc["study|a", "min_counts"] == np.ceil(101 / np.exp(1.4826 * np.log(2)) - 1) == 36
    assert bounds.loc["study|a", "min_genes"] == np.ceil(11 / np.exp(1.4826 * np.log(2)) - 1) == 3


def test_adaptive_limits_are_per_sample_and_a_small_sample_has_none():
    rng = np.random.default_rng(0)
    deep, shallow, few = rng.lognormal(9, 0.3, 200), rng.lognormal(7, 0.3, 200), rng.lognormal(8, 0.3, 49)
    counts = np.concatenate([deep, shallow, few]).round()
    samples = pd.Categorical.from_codes(np.repeat([0, 1, 2], [200, 200, 49]), ["deep", "shallow", "few"])
    metrics = metrics_of(counts, counts)
    fixed = {"min_genes": 100, "min_counts": 100}
    bounds = limit_samples(metrics, samples, fixed, 5)
    assert bounds.loc["deep", "min_counts"] > bounds.loc["shallow", "min_counts"] > 100
    assert bounds.loc["few", "min_counts"] == 100
    # a typical cell of one sample is an outlier in the other
    assert (bounds.loc["deep", "min_counts"] > np.quantile(shallow, 0.1)).all()
    assert (limit_samples(metrics, samples, fixed, None)["min_counts"] == 100).all()


def test_empty_droplets_do_not_shift_adaptive_limits():
    rng = np.random.default_rng(0)
    cells = rng.lognormal(9, 0.3, 200).round()
    droplets = rng.integers(1, 50, 5000).astype(float)
    fixed = {"min_genes": 100, "min_counts": 100}
    expected = limit_samples(metrics_of(cells, cells), one_sample(200), fixed, 5)
    both = np.concatenate([cells, droplets])
    pd.testing.assert_frame_equal(limit_samples(metrics_of(both, both), one_sample(5200), fixed, 5), expected)


def test_identical_cells_get_no_adaptive_limit_and_a_low_mitochondrial_share_is_allowed():
    equal = np.full(100, 500.0)
    share = np.linspace(0.1, 0.2, 100)
    fixed = {"min_genes": 200, "min_counts": 300, "max_mitochondrial_percent": 20}
    bounds = limit_samples(metrics_of(equal, equal, share), one_sample(100), fixed, 5)
    assert bounds.loc["study|a"].dropna().to_dict() == fixed | {"max_mitochondrial_percent": 5}


def test_samples_are_donors_of_one_study(tmp_path):
    study, donor = pd.Categorical(["s", "t", "s", "t"]), pd.Categorical(["1", "1", "2", "1"])
    assert list(name_samples(study, donor)) == ["s|1", "t|1", "s|2", "t|1"]
    cells = write_cells(tmp_path / "in.h5ad", donors=("a", "b"), studies=("study", "study", "other"))
    _, table, summary, _ = run(tmp_path, cells)
    assert list(QC.read(table)["donor"][:4]) == ["study|a", "study|b", "other|a", "study|b"]
    summary = json.loads(summary.read_text())
    assert summary["dataset_id"] == "qc"
    assert {sample["donor"]: sample["cells"] for sample in summary["samples"]} == {
        "other|a": 1, "other|b": 1, "study|a": 3, "study|b": 2,
    }  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 130), min_size=1, max_size=5), st.integers(0, 99))
def test_large_samples_are_split_at_random_into_equal_parts(sizes, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doublets, "CELLS_PER_RUN", 60)
        samples = np.repeat(np.arange(len(sizes)), sizes)
        parts = cut_samples(samples, np.random.default_rng(seed))
    for sample, size in enumerate(sizes):
        own = parts[samples == sample]
        if size < 50:
            assert (own == -1).all()
        else:
            pieces = np.unique(own, return_counts=True)[1]
            assert len(pieces) == -(-size // 60) and pieces.max() <= 60 and np.ptp(pieces) <= 1
            assert not set(own) & set(parts[samples != sample])
    used = np.unique(parts[parts >= 0])
    assert (used == np.arange(len(used))).all()


def test_simulated_doublets_get_high_scores(tmp_path, blood, defaults, monkeypatch):
    """Also if the sample is split into parts; the same seed gives the same scores."""
    cells = ad.read_h5ad(blood)
    rng = np.random.default_rng(0)
    one, other = rng.integers(cells.n_obs, size=(2, 400))
    labels = cells.obs["cell_type_ontology_term_id"].astype(str).to_numpy()
    pairs = np.flatnonzero(labels[one] != labels[other])[:60]
    counts = sparse.vstack([cells.X, cells.X[one[pairs]] + cells.X[other[pairs]]]).toarray()
    doublet = np.arange(len(counts)) >= cells.n_obs
    path = write_cells(tmp_path / "in.h5ad", counts, LABELS[:1], cells.var["symbol"])
    for most in (1000, 400):
        monkeypatch.setattr(doublets, "CELLS_PER_RUN", most)
        scores = QC.read(run(tmp_path, path, defaults, {})[1])["doublet_score"]
        assert scores.between(0, 1).all()
        assert roc_auc_score(doublet, scores) > 0.85
        assert QC.read(run(tmp_path / "again", path, defaults, {})[1])["doublet_score"].equals(scores)
    assert not list(tmp_path.rglob("*.scratch"))
    other_seed = QC.read(run(tmp_path, path, defaults, {}, seed=1)[1])["doublet_score"]
    assert not other_seed.equals(scores)

    _, table, summary, _ = run(tmp_path, path, replace(defaults, max_doublet_score=0.2), {})
    table = QC.read(table)
    high = scores > 0.2
    assert 0 < high.sum() < 100
    assert list(table["kept"]) == list(~high)
    assert table["reason"][high].str.fullmatch(r"likely a doublet \(0\.\d+ > 0\.2\)").all()
    assert json.loads(summary.read_text())["dropped"] == {"likely a doublet": high.sum()}


def test_samples_that_cannot_be_scored_are_kept_without_a_score(tmp_path, defaults):
    rng = np.random.default_rng(0)
    counts = rng.poisson(3, (109, 20)).astype(np.float32)  # too few genes for Scrublet's principal components
    path = write_cells(tmp_path / "in.h5ad", counts, LABELS[:1], [f"G{i}" for i in range(20)])
    table = QC.read(run(tmp_path, path, replace(defaults, max_doublet_score=0.01), {})[1])
    assert table["doublet_score"].isna().all() and table["kept"].mean() > 0.9
    counts = rng.poisson(0.3, (109, 400)).astype(np.float32)
    donors = ["a"] * 60 + ["b"] * 49
    path = write_cells(tmp_path / "in.h5ad", counts, LABELS[:1], [f"G{i}" for i in range(400)], donors)
    table = QC.read(run(tmp_path, path, defaults, {})[1])
    assert list(table["doublet_score"].notna()) == [donor == "a" for donor in donors]


def test_the_plot_is_reproducible_to_the_byte_and_has_no_date(tmp_path):
    cells = write_cells(tmp_path / "in.h5ad")
    first = run(tmp_path / "a", cells)[3].read_bytes()
    assert first == run(tmp_path / "b", cells)[3].read_bytes()
    assert b"<svg" in first and b"dc:date" not in first


def test_the_plot_shows_every_cell_and_every_limit(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, lines, spans = [], [], []
    hist, axvline, axvspan = Axes.hist, Axes.axvline, Axes.axvspan
    monkeypatch.setattr(Axes, "hist", lambda self, *args, **more: drawn.append(hist(self, *args, **more)) or drawn[-1])
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **more: lines.append(x) or axvline(self, x, **more))
    monkeypatch.setattr(Axes, "axvspan", lambda self, *x, **more: spans.append(x) or axvspan(self, *x, **more))
    kept = np.array([reason == "" for reason in REASONS])
    metrics, _ = measure_cells([sparse.csr_matrix(COUNTS)], len(COUNTS), pd.Series(SYMBOLS))
    bounds = limit_samples(metrics, one_sample(len(kept)), LIMITS, None)
    draw_qc(metrics, kept, bounds, "study", tmp_path / "qc.svg")
    assert [heights[-1].sum() for heights, *_ in drawn] == [len(kept)] * 4
    assert [heights[0].sum() for heights, *_ in drawn] == [kept.sum()] * 4
    assert lines == [10, 2, 20] and not spans

    drawn.clear(), lines.clear()
    metrics["ribosomal_percent"] = 0.0
    metrics["doublet_score"] = [0.1, np.nan, np.nan, np.nan, 0.2, 0.3, np.nan]
    draw_qc(metrics, kept, pd.concat([bounds, bounds * 2, bounds * 1.5]), "study", tmp_path / "qc.svg")
    assert [heights[-1].sum() for heights, *_ in drawn] == [7, 7, 7, 3]
    assert lines == [10, 20, 2, 4, 20, 40] and spans == [(10, 20), (2, 4), (20, 40)]


def test_the_default_run_keeps_every_cell(tmp_path, blood, default_row, defaults):
    assert not set(default_row) & set(LIMITS)
    kept, table, *_ = run(tmp_path, blood, defaults, {})
    assert ad.read_h5ad(kept, backed="r").n_obs == 700
    assert QC.read(table)["doublet_score"].notna().all()
