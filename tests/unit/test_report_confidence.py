"""What the report says about confidence: reported terms, thresholds, calibration, novel cells and free text."""

import math
from dataclasses import replace

import pandas as pd
import pytest

from cell2text.confidence.back_off import NOTHING, Threshold
from cell2text.confidence.decisions import Confidence
from cell2text.contracts import METRICS, TERMS
from cell2text.evaluation.methods import GREEDY, title_of
from cell2text.files import read_json, read_jsonl, write_json, write_jsonl
from cell2text.report.charts import reliability
from cell2text.report.confidence import count_novel, rate_slots
from cell2text.report.examples import choose_examples
from cell2text.report.limits import list_limits
from cell2text.report.results import read_results
from cell2text.report.tables import best_baseline, compare_methods, list_unparsed
from report_run import HOSTILE, Page, record_tables, render_page, term_table, write_run, write_tsv


@pytest.fixture
def files(tmp_path):
    return write_run(tmp_path)


def page_text(files, tmp_path):
    return " ".join(Page(render_page(files, tmp_path)).text.split())


def add_greedy(files):
    """Add free text, which scores higher than any baseline, and clearly higher than the fine-tuned model."""
    table = pd.read_csv(files.metrics, sep="\t")
    greedy = table[table["method"] == "knn"].assign(method=GREEDY, value=0.97)
    greedy[["difference", "difference_low", "difference_high"]] = -0.2, -0.3, -0.1
    table.loc[(table["metric"] == "parsed") & (table["method"] != "shuffled"), "value"] = 1.0
    write_tsv(pd.concat([table, greedy]), METRICS, files.metrics)
    record_tables(files.metrics.parent)


def test_programmes_stand_next_to_cell_types(files, tmp_path):
    table = pd.read_csv(files.metrics, sep="\t")
    baseline = [*("test", "knn", "pathways", "subset_accuracy", 0.55, 0.5, 0.6, 24, "cell"), -0.18, -0.25, -0.1]
    write_tsv(pd.concat([table, pd.DataFrame([baseline], columns=list(METRICS))]), METRICS, files.metrics)
    record_tables(files.metrics.parent)
    text = page_text(files, tmp_path)
    titles = (
        "Method Accuracy Macro-F1 Ontology similarity Similarity among errors Calibration error Jaccard All correct"
    )
    assert f"Cell type Gene programmes Text {titles} Calibration error BLEU ROUGE-L Exact match" in text
    own = "75.0 70.0–80.0 75.0 70.0–80.0 – – 4.3 2.0–9.0 75.0 70.0–80.0 37.0 30.0–45.0 12.8 8.0–19.0 75.0 70.0–80.0 – –"
    assert f"from its gene vectors {own}" in text
    assert "45.0 ▼ 40.0–50.0 55.0 ▲ 50.0–60.0 – 45.0 ▼" in text  # of the nearest neighbours
    minus = "\N{MINUS SIGN}"
    row = f"Gene programmes, all correct 37.0 55.0 {title_of('knn')} {minus}18.0 {minus}25.0 to {minus}10.0"
    assert f"{row} baseline better" in text.split("Map of the test cells")[0]


def test_the_table_of_confidence(files, tmp_path):
    first, tissue, programmes = rate_slots(read_results(files))
    # Reported and labelled: all but cells 7 (a T cell of depth 9) and 11 (an NK cell of depth 6) of eight of each type.
    assert first["true_depth"] == pytest.approx((8 * (5 + 9 + 6) - 9 - 6) / 22)
    assert first["basis"] == "40 validation cells, guaranteed"
    assert [row["only"] for row in (first, tissue, programmes)] == [None, "blood", "glycolysis"]
    assert (tissue["basis"], tissue["precision"]) == ("3 validation cells: too few for a guarantee", None)
    assert (programmes["slot"], programmes["threshold"]) == ("pathways", None)
    text = page_text(files, tmp_path)
    row = "Cell type 80.0 61.2 40 validation cells, guaranteed 91.0 82.0–97.0 91.7 79.0–100.0 5.2 truth 6.6 4.3 2.0–9.0"
    assert f"{row} 6.7 3.0–12.0" in text
    assert (
        "Gene programmes only glycolysis: not informative – – 79 programmes of validation cells – – – 12.8 8.0–19.0 –"
        in text
    )
    assert "at most 20% of the reported terms are wrong" in text
    assert "same mixture of studies, donors and cell types" in text
    card = (tmp_path / "model_card.md").read_text()
    row = "| cell type | 0.8 | 0.612 | 40 validation cells, guaranteed | 0.910 [0.820, 0.970] | 0.917 [0.790, 1.000] |"
    assert f"{row} 5.2 | 6.6 | 0.043 [0.020, 0.090] | 0.067 [0.030, 0.120] |" in card
    assert "at most 20% of the reported terms are wrong" in card
    assert (
        "| tissue (only blood: not informative) | 0.8 | 0.800 | 3 validation cells: too few for a guarantee |" in card
    )


def test_novel_cells_are_counted(files, tmp_path):
    # cells 0 and 5; only the B cells, such as cell 0, are of a type with training cells
    novel = count_novel(read_results(files))
    assert novel == {"cells": 24, "novel": 2, "unseen_cells": 16, "unseen_novel": 1, "expected": 1 / 41}
    text = page_text(files, tmp_path)
    assert "2 of 24 test cells (8.3%) are flagged as novel" in text and "at most 2.4% are expected" in text
    assert "Of the 16 test cells whose type has no training cells, 1 (6.2%) is flagged." in text
    card = (tmp_path / "model_card.md").read_text()
    assert "2 of 24 test cells." in card and "no training cells: 1 of 16." in card
    write_json(read_json(files.audit) | {"cells": {"train": 6, "validation": 400, "test": 24}}, files.audit)
    assert count_novel(read_results(files))["expected"] == pytest.approx(0.01)


def test_without_validation_cells_no_cell_is_judged(files, tmp_path):
    for path in files.generations:
        write_jsonl([row | {"novel": None} for row in read_jsonl(path)], path)
    assert count_novel(read_results(files)) is None
    assert "No test cell was judged, because there were no validation cells" in page_text(files, tmp_path)
    assert "novel, that is" not in (tmp_path / "model_card.md").read_text()


def test_programmes_have_a_reliability_chart(files, tmp_path):
    chart = reliability(read_results(files), "pathways")
    assert (chart["unit"], chart["n"], len(chart["bins"])) == ("programmes", 44, 2)
    assert reliability(read_results(files), "cell_type")["unit"] == "cells"
    html = render_page(files, tmp_path)
    text = " ".join(Page(html).text.split())
    assert "Cell type, 23 cells." in text and "weighted by cells: 4.3 percentage points (2.0–9.0)" in text
    assert "Gene programmes, 44 programmes." in text and "weighted by programmes: 12.8 percentage points" in text
    assert "22 programmes: confidence 35%, accuracy 50%" in text


def test_examples_show_confidences_and_reported_terms(files, tmp_path):
    examples = {example["cell"]: example for example in choose_examples(read_results(files), seed=0, examples=24)}
    same, backed_off, nothing = (examples[f"study|cell{i:03d}"] for i in (0, 3, 11))
    assert [row["name"] for row in same["confidences"]] == ["cell type", "hypoxia"]
    assert [row["backed_off"] for row in same["confidences"]] == [False, False]
    assert same["novel"] and not backed_off["novel"]
    row = backed_off["confidences"][0]
    assert (row["confidence"], row["backed_off"], row["reported"], row["probability"]) == (
        0.875,
        True,
        "T cell",
        0.9375,
    )
    assert nothing["confidences"][0]["reported"] == "not determined"
    assert examples["study|cell007"]["confidences"] == []  # no guess
    page = Page(render_page(files, tmp_path, seed=1))
    shown = {example["cell"] for example in choose_examples(read_results(files), seed=1)}
    assert {f"study|cell{i:03d}" for i in (0, 3, 5, 11)} <= shown
    text = " ".join(page.text.split())
    assert "cell type 88%, reported as T cell, 94%" in text
    assert "cell type 88%, reported as not determined" in text and "determined, " not in text.split("Example desc")[1]
    assert "study|cell000 flagged as novel" in text
    assert text.split("Example descriptions")[1].split("Model settings")[0].count("flagged as novel") == 2  # and cell 5


def test_a_hostile_reported_term_is_escaped(files, tmp_path):
    terms = term_table()
    terms.loc[terms["id"] == "CL:0000084", "name"] = HOSTILE
    TERMS.write(terms, files.terms)
    page = Page(render_page(files, tmp_path, seed=1))
    assert f"reported as {HOSTILE}, 94%" in page.text
    assert len(page.scripts) == 2 and sum(tag == "img" for tag, _ in page.tags) == 2


def test_free_text_is_listed_and_is_no_baseline(files, tmp_path):
    add_greedy(files)
    results = read_results(files)
    for metric in (("cell_type", "accuracy"), ("pathways", "jaccard")):
        assert best_baseline(results, *metric)["name"] == title_of("majority")
    row = next(row for row in compare_methods(results) if row["method"] == GREEDY)
    assert row["scores"][0]["value"] == 0.97 and not any(score and score["verdict"] for score in row["scores"])
    assert list_unparsed(results) == [(title_of(GREEDY), 0.97), (title_of("shuffled"), pytest.approx(0.25))]
    text = page_text(files, tmp_path)
    assert f"{title_of(GREEDY)} comes from the same model as Cell2Text" in text
    assert "in full: Unconstrained text 97.0%, Shuffled embeddings 25.0%; all texts of the other methods." in text
    assert (
        title_of(GREEDY) not in text.split("Map of the test cells")[0]
        and title_of(GREEDY) not in text.split("Limits")[-1]
    )
    card = (tmp_path / "model_card.md").read_text()
    assert (
        "| Unconstrained text | 0.970" in card and "Unconstrained text: 97.0% of the texts follow the grammar" in card
    )
    assert f"| Cell type, accuracy | {title_of('majority')} |" in card


def with_thresholds(results, **thresholds):
    confidence = results.confidence
    return replace(results, confidence=Confidence(
        confidence.slots, thresholds, confidence.ranking, confidence.programmes, confidence.limit
    ))  # fmt: skip


def test_limits_of_confidence(files):
    results = read_results(files)
    limits = " ".join(list_limits(results, {}))
    assert "calibrated on the validation cells" in limits and "do not hold for a new study" in limits
    assert "Cells of a new study get the same confidences, which are too high for them" in limits
    new = replace(
        results.confidence, studies={"cell_type": ["a", "b"], "tissue": ["b", "c"]}, new_studies=results.confidence
    )
    told = " ".join(list_limits(replace(results, confidence=new), {}))
    assert "These rest on 40 cells of the 3 training studies" in told and "too high for them" not in told
    for threshold, sentence in (
        (Threshold(0.8, 0.8, 40, False, studies=3), "Too few studies for a guarantee on the cell types"),
        (Threshold(NOTHING, 0.8, 40, True, studies=7), "No cell type is reported in a new study"),
    ):
        assert sentence not in told
        none = replace(results.confidence, thresholds={"cell_type": threshold})
        assert sentence in " ".join(list_limits(replace(results, confidence=replace(new, new_studies=none)), {}))
    assert "most cells of a type that resembles a training type are not flagged" in limits
    assert "count as missing, not as zero" in limits
    assert "Too few labelled validation cells for a guarantee on reported terms: tissue (3)." in limits
    assert "fewer than the requested" not in limits and "too many were wrong" not in limits
    # the interval of the precision ends at 0.97
    strict = with_thresholds(
        results, cell_type=Threshold(0.7, 0.98, 90, True), tissue=Threshold(NOTHING, 0.98, 90, True)
    )
    limits = " ".join(list_limits(strict, {}))
    assert (
        "Cell type: 91.0% of the reported terms are right (95% interval 82.0 to 97.0), fewer than the requested 98%."
        in limits
    )
    assert "too many were wrong on the validation cells: tissue." in limits and "Too few" not in limits
    assert rate_slots(strict)[1]["basis"] == "90 validation cells: too many terms wrong"
    enough = with_thresholds(results, cell_type=Threshold(0.7, 0.97, 90, True))
    assert "fewer than the requested" not in " ".join(list_limits(enough, {}))


def test_a_run_without_intervals_still_shows_its_confidence(files, tmp_path):
    table = pd.read_csv(files.metrics, sep="\t")
    table[["low", "high"]] = math.nan
    write_tsv(table, METRICS, files.metrics)
    record_tables(files.metrics.parent)
    text = page_text(files, tmp_path)
    assert "40 validation cells, guaranteed 91.0 91.7 5.2 truth 6.6 4.3 6.7" in text
    card = (tmp_path / "model_card.md").read_text()
    assert "| 0.910 | 0.917 | 5.2 | 6.6 | 0.043 | 0.067 |" in card
    assert "nan" not in card.split("## Scores")[1].split("minus the best")[0]
