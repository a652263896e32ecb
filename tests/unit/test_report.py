"""The report and the model card: their content, and that the page is self-contained and escapes all input."""

import json
import re
import shutil
import subprocess
from dataclasses import fields, replace

import numpy as np
import pytest

from cell2text.contracts import DESCRIPTIONS, EMBEDDINGS, TERMS
from cell2text.errors import InputError
from cell2text.evaluation.methods import title_of
from cell2text.files import write_jsonl
from cell2text.report import cell_map
from cell2text.report.render_report import sort_facts
from cell2text.report.results import RunFiles, read_results
from cell2text.report.timings import rule_costs
from report_run import (
    HOSTILE,
    METHODS,
    RULES,
    TYPES,
    Page,
    record_tables,
    render_page,
    term_table,
    write_run,
)


@pytest.fixture
def files(tmp_path):
    return write_run(tmp_path)


def test_the_page_shows_the_run(files, tmp_path):
    page = Page(render_page(files, tmp_path))
    text = " ".join(page.text.split())
    assert "demo" in text and "Tiny" in text
    for method in METHODS:
        assert title_of(method) in text
    # scores of the test split, not of the validation split
    for score in ("Cell type accuracy", "Gene programmes"):
        assert f"{score} 75.0% 95% interval 70.0–80.0; best baseline, {title_of('majority')}: 65.0" in text
    reported = "Reported cell types right 91.0% 95% interval 82.0–97.0 the true type or an ancestor; "
    assert f"{reported}91.7% of the cells have one; 80% requested" in text
    assert "resampling cells, not donors: the test cells have 1 donor, and fewer than 8 are too few" in text
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
    assert "pointMap" in script
    assert HOSTILE in page.text  # displayed literally


def test_a_hostile_term_is_escaped(files, tmp_path):
    terms = term_table()
    terms.loc[0, "name"] = HOSTILE
    TERMS.write(terms, files.terms)
    for path in (files.per_class, files.confusion):
        path.write_text(path.read_text().replace("B cell", HOSTILE.replace('"', "'")))
    record_tables(files.metrics.parent)
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
    titles = (
        "| method | cell type accuracy | cell type macro-F1 | gene programmes, Jaccard index | gene programmes, all "
    )
    titles += "correct | calibration error, cell type | calibration error, gene programmes |"
    values = ["0.750 [0.700, 0.800]"] * 3
    values += ["0.370 [0.300, 0.450]", "0.043 [0.020, 0.090]", "0.128 [0.080, 0.190]"]
    assert titles in card and f"| Cell2Text | {' | '.join(values)} |" in card
    assert "its labels are &lt;approximate&gt;" in card and "not a diagnosis" in card


@pytest.mark.parametrize("field", ["metrics", "comparison", "confidence", "audit", "corpus"])
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
    record_tables(files.metrics.parent)
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


def test_costs_are_summed_by_rule(tmp_path):
    one = {"s": 1.5, "h:m:s": "0:00:01", "max_rss": 100.0, "cpu_time": 2.0}
    benchmarks = {
        "embed": [tmp_path / "embed/study/0.jsonl", tmp_path / "embed/study/1.jsonl"],
        "compare": [tmp_path / "compare.jsonl"],
        "fetch": [tmp_path / "fetch/missing.jsonl"],
    }
    write_jsonl([one], benchmarks["embed"][0])
    write_jsonl([one | {"s": 3.0, "max_rss": 300.0}], benchmarks["embed"][1])
    write_jsonl([one | {"s": 0.1, "max_rss": "NA", "cpu_time": "NA"}], benchmarks["compare"][0])
    write_jsonl([one], tmp_path / "embed/study/2.jsonl")  # of a run with more shards
    embed, compare = rule_costs(benchmarks)
    assert embed == {"rule": "embed", "jobs": 2, "seconds": 4.5, "cpu_seconds": 4.0, "peak_mb": 300.0}
    assert compare == {"rule": "compare", "jobs": 1, "seconds": 0.1, "cpu_seconds": None, "peak_mb": None}
    assert rule_costs({}) == rule_costs({"fetch": benchmarks["fetch"]}) == []


def test_costs_are_shown(files, tmp_path):
    benchmarks = {"finetune": [tmp_path / "finetune.jsonl"]}
    write_jsonl([{"s": 75.2, "max_rss": 1234.5, "cpu_time": 80.0}], benchmarks["finetune"][0])
    text = " ".join(Page(render_page(files, tmp_path, benchmarks=benchmarks)).text.split())
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
