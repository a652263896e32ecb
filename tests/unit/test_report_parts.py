"""The parts of the report: map, comparison of methods, confusions, examples, charts and limits."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cell2text.contracts import HELD_OUT, HISTORY, SEEN
from cell2text.evaluation import methods
from cell2text.evaluation.methods import title_of
from cell2text.files import read_json, write_json
from cell2text.grammar import Terms
from cell2text.report import cell_map
from cell2text.report.cell_map import COLOURS, GRID, colours, lay_out, sample_cells
from cell2text.report.charts import Axis, reliability, training_curve
from cell2text.report.examples import choose_examples, mark_text
from cell2text.report.limits import list_limits
from cell2text.report.results import CALIBRATION, read_results
from cell2text.report.tables import (
    best_baseline,
    compare_methods,
    compare_with_best,
    confusion_matrix,
    score_slots,
    verdict,
)
from report_run import (
    METHODS,
    TYPES,
    Page,
    history,
    record_tables,
    render_page,
    term_table,
    write_run,
    write_tsv,
)

NO_UNIT = {"unit": None, "donors": 1}


@pytest.fixture
def files(tmp_path):
    return write_run(tmp_path)


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


def test_the_verdict_is_read_from_the_interval_of_the_difference():
    def judge(difference, low, high):
        return verdict({"difference": difference, "difference_low": low, "difference_high": high})

    assert judge(-0.1, -0.2, -0.01) == "better"
    assert judge(0.1, 0.01, 0.2) == "worse"
    assert judge(-0.1, -0.2, 0.0) == judge(0.1, -0.01, 0.2) == judge(0.0, 0.0, 0.0) == "unclear"
    assert judge(1.0, math.nan, math.nan) == "unclear"
    assert judge(math.nan, math.nan, math.nan) is None


def test_baselines_are_marked_by_their_paired_difference(files, tmp_path):
    rows = {row["method"]: row["scores"] for row in compare_methods(read_results(files))}
    # differences of 0.1, 0.2, ... with intervals of 0.15 to both sides
    assert [rows[method][0]["verdict"] for method in METHODS] == [None, "unclear", *["worse"] * 4]
    page = " ".join(Page(render_page(files, tmp_path)).text.split())
    assert page.count("▼") == 1 + 4 * 4 and page.count("▲") == 1  # four columns with scores, and the explanation


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
    text = "This is a B cell. The sample is blood. Most active gene programmes: hypoxia; then glycolysis. "
    text += "Definitions. Cell type: A B cell. Programme 2: glycolysis of blood."
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
    record_tables(files.calibration.parent)
    drawn = reliability(read_results(files), "cell_type")["bins"]
    low, high = ([(290 - bin[end]) / 280 for bin in drawn] for end in ("low", "high"))  # positions to shares
    # by hand with z = 1.96: (5 + z^2/2 -+ z sqrt(10/4 + z^2/4)) / (10 + z^2), and 10 / (10 + z^2) to 1
    np.testing.assert_allclose(low, [0.2366, 0.7225], atol=1e-3)
    np.testing.assert_allclose(high, [0.7634, 1.0], atol=1e-3)


def with_difference(metrics, method, *difference):
    metrics = metrics.copy()
    metrics.loc[metrics["method"] == method, ["difference", "difference_low", "difference_high"]] = difference
    return metrics


def test_limits_follow_the_scores(files):
    results = read_results(files)
    limits = " ".join(list_limits(results, {"study": "a note"}))
    assert "One donor only." in limits
    assert "study: a note" in limits
    assert "resampling cells, not donors" in limits
    assert "3 of 3 cell types have fewer than 10 test cells" in limits
    majority = title_of("majority")
    assert f"these cells do not show whether Cell2Text or {majority} is better" in limits
    assert "paired difference in accuracy +10.0 percentage points, 95% interval \N{MINUS SIGN}5.0 to +25.0" in limits
    better = with_difference(results.metrics, "majority", -0.1, -0.15, -0.05)
    limits = " ".join(list_limits(replace(results, metrics=better), {}))
    assert f"{majority} is more accurate than Cell2Text" in limits
    worse = with_difference(results.metrics, "majority", 0.1, 0.05, 0.15)
    limits = " ".join(list_limits(replace(results, metrics=worse), {}))
    assert "do not show" not in limits and "is more accurate than" not in limits


@pytest.mark.parametrize(
    ("unit", "donors", "sentence"),
    [
        ("donor", 12, "The intervals come from resampling donors (12)."),
        ("cell", 7, "resampling cells, not donors: the test cells have 7 donors, and fewer than 8 are too few."),
        (None, 1, "There are no intervals, because the test split has fewer than 8 cells."),
    ],
)
def test_limits_say_what_was_resampled(files, unit, donors, sentence):
    results = read_results(files)
    results.provenance["bootstrap"]["splits"]["test"] = {"unit": unit, "donors": donors}
    limits = list_limits(replace(results, metrics=results.metrics.assign(resampled=unit or "")), {})
    assert sum(sentence in limit for limit in limits) == 1
    assert not any(limit.startswith("Cell type: the intervals") for limit in limits)
    few = replace(results, metrics=results.metrics.assign(resampled="cell" if unit == "donor" else "other"))
    assert any(limit.startswith("Cell type: the intervals") for limit in list_limits(few, {}))


def test_the_best_baseline_of_each_score(files):
    results = read_results(files)
    baseline = best_baseline(results, "pathways", "jaccard")
    numbers = {"value": 0.65, "low": 0.6, "high": 0.7, "n": 24}
    difference = {"difference": 0.1, "difference_low": -0.05, "difference_high": 0.25}
    assert baseline == pytest.approx(numbers | difference | {"name": title_of("majority")})
    assert best_baseline(results, "sex", "accuracy") is None
    own = results.metrics[results.metrics["method"] == "cell2text"]
    assert best_baseline(replace(results, metrics=own), "pathways", "jaccard") is None


def test_the_first_screen_compares_each_score_with_the_best_baseline(files, tmp_path):
    table = pd.read_csv(files.metrics, sep="\t")
    differences = ["value", "difference", "difference_low", "difference_high"]
    knn = (table["method"] == "knn") & (table["split"] == "test")
    table.loc[knn & (table["metric"] == "macro_f1"), differences] = [0.78, -0.03, -0.07, 0.01]
    table.loc[knn & (table["metric"] == "jaccard"), differences] = [0.9, -0.15, -0.25, -0.05]
    accuracy = (table["metric"] == "accuracy") & (table["method"] == "majority")
    table.loc[accuracy, differences] = [0.65, 0.1, 0.05, 0.15]
    same = table[accuracy | ((table["metric"] == "accuracy") & (table["method"] == "cell2text"))].assign(slot="tissue")
    same[differences[1:]] = 0.0  # the slot has a single term
    pd.concat([table, same]).to_csv(files.metrics, sep="\t", index=False)
    record_tables(files.metrics.parent)
    rows = compare_with_best(read_results(files))
    assert [(row["title"], row["baseline"]["name"], row["words"]) for row in rows] == [
        ("Cell type, accuracy", title_of("majority"), "Cell2Text better"),
        ("Cell type, macro-F1", title_of("knn"), "no clear difference"),
        ("Gene programmes, Jaccard index", title_of("knn"), "baseline better"),
    ]
    header = " ".join(Page(render_page(files, tmp_path)).text.split()).split("Map of the test cells")[0]
    for row in (
        f"Cell type, accuracy 75.0 65.0 {title_of('majority')} +10.0 +5.0 to +15.0 Cell2Text better",
        f"Cell type, macro-F1 75.0 78.0 {title_of('knn')} −3.0 −7.0 to +1.0 no clear difference",
        f"Gene programmes, Jaccard index 75.0 90.0 {title_of('knn')} −15.0 −25.0 to −5.0 baseline better",
    ):
        assert row.replace("−", "\N{MINUS SIGN}") in header
    assert "was chosen on these cells" in header and "resampling cells, not donors" in header
    card = (tmp_path / "model_card.md").read_text()
    assert f"| Cell type, macro-F1 | {title_of('knn')} | -0.030 [-0.070, +0.010] | no clear difference |" in card
    assert "resampling cells, not donors" in card


def test_a_tie_is_shown(files):
    table = pd.read_csv(files.metrics, sep="\t")
    table.loc[table["metric"] == "macro_f1", ["difference", "difference_low", "difference_high"]] = 0.0
    table.to_csv(files.metrics, sep="\t", index=False)
    record_tables(files.metrics.parent)
    rows = {row["title"]: row["words"] for row in compare_with_best(read_results(files))}
    assert rows["Cell type, macro-F1"] == "no clear difference"


def test_held_out_cell_types_are_listed_apart(files, tmp_path):
    table = pd.read_csv(files.metrics, sep="\t")
    parts = [table.assign(slot=table["slot"].replace("cell_type", slot)) for slot in (SEEN, HELD_OUT)]
    held_out = parts[1].assign(value=0.25, low=math.nan, high=math.nan, resampled="")
    pd.concat([table, *(part[part["slot"].isin((SEEN, HELD_OUT))] for part in (parts[0], held_out))]).to_csv(
        files.metrics, sep="\t", index=False
    )
    record_tables(files.metrics.parent)
    results = read_results(files)
    terms = {row["slot"]: row["terms"] for row in score_slots(results)}
    assert (terms["cell_type"], terms[SEEN], terms[HELD_OUT]) == (3, 1, 2)  # the model's labels have one of the types
    text = " ".join(Page(render_page(files, tmp_path)).text.split())
    assert "Cell type (held out) 2 25.0 25.0" in text
    assert "Cell type (held out), accuracy 25.0" in text.split("Map of the test cells")[0]
    assert "Cell type (held out): the intervals do not exist: it has fewer than 8 cells." in text


def test_a_run_with_too_few_cells_has_no_intervals(files, tmp_path):
    table = pd.read_csv(files.metrics, sep="\t")
    table[["low", "high", "difference_low", "difference_high"]] = math.nan
    table.assign(resampled="").to_csv(files.metrics, sep="\t", index=False)
    record_tables(files.metrics.parent)
    write_json({**read_json(files.provenance), "bootstrap": {"splits": {"test": NO_UNIT}}}, files.provenance)
    html = render_page(files, tmp_path)
    text = " ".join(Page(html).text.split())
    assert "nan" not in html.split('id="map-data"')[0].lower().replace("finance", "")
    assert "Cell type accuracy 75.0% no interval;" in text and "There are no intervals" in text


def test_scores_that_were_not_computed_are_absent(files, tmp_path):
    table = pd.read_csv(files.metrics, sep="\t")
    table[table["slot"] != "pathways"].to_csv(files.metrics, sep="\t", index=False)
    record_tables(files.metrics.parent)
    text = " ".join(Page(render_page(files, tmp_path)).text.split())
    assert "Jaccard index of" not in text and "Reported cell types right 91.0%" in text
    values = "0.750 [0.700, 0.800]"
    row = f"| Cell2Text | {values} | {values} | – | – | 0.043 [0.020, 0.090] | – |"
    assert row in (tmp_path / "model_card.md").read_text()


def test_the_model_card_says_if_only_the_projector_was_trained(files, tmp_path):
    about = files.model / "cell2text.json"
    write_json(read_json(about) | {"best_epoch": 0, "validation_loss": None}, about)
    render_page(files, tmp_path)
    card = (tmp_path / "model_card.md").read_text()
    assert "trained the projector alone, by alignment. The training" in card and "Saved weights" not in card


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
