import json

import numpy as np
import pandas as pd
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from cell2text.contracts import CELLS, DESCRIPTIONS, PREDICTIONS, TERM_SLOTS, TERMS
from cell2text.errors import InputError
from cell2text.evaluation import sums
from cell2text.evaluation.bootstrap import Bootstrap
from cell2text.evaluation.compare import compare
from cell2text.evaluation.evaluate import evaluate
from cell2text.evaluation.metrics import HELD_OUT, SEEN, known, score_method, term_similarities
from cell2text.evaluation.tables import confusion, per_class
from cell2text.files import read_json, write_json, write_jsonl
from cell2text.grammar import Terms
from cell2text.provenance import hash_config, hash_file

B_CELL, NK_CELL, CD4_T = "CL:0000236", "CL:0000623", "CL:0000624"
NAMES = {B_CELL: "B cell", NK_CELL: "natural killer cell", CD4_T: "CD4-positive, alpha-beta T cell"}
TERM_TABLE = pd.DataFrame(
    [("cell_type", key, name, "") for key, name in NAMES.items()]
    + [("pathway", key, key.lower(), "") for key in ("P1", "P2", "P3")],
    columns=["slot", "id", "name", "definition"],
).assign(depth=None, ancestors=None)


def cells_of(cell_types, pathways=None, texts=None, confidence=None, split="test", status="parsed"):
    """Rows to use as truth or as predictions; slots other than the cell type are empty."""
    n = len(cell_types)
    table = pd.DataFrame({"cell_id": [f"cell {i}" for i in range(n)], "split": split, "status": status})
    for slot in TERM_SLOTS:
        table[f"{slot}_id"] = pd.Series([None] * n, dtype=object)
        table[f"{slot}_confidence"] = np.float32("nan")
    table["cell_type_id"] = known(pd.Series(cell_types, dtype=object))
    if confidence is not None:
        table["cell_type_confidence"] = np.array(confidence, dtype=np.float32)
    table["pathway_ids"] = pd.Series(pathways or [[]] * n, dtype=object)
    table["text"] = texts or [f"This is a {NAMES.get(term)}." for term in cell_types]
    return table.reindex(columns=[*table, *(name for name in PREDICTIONS.columns if name not in table)])


def scores(truth, predicted, donors=None, replicates=50):
    donors = pd.Series(range(len(truth))) if donors is None else donors
    bootstrap = Bootstrap(donors, replicates, seed=0)
    found = score_method(truth, predicted, term_similarities([truth, predicted]), bootstrap)
    return {score.key: score.row() for score in found}


def test_cell_type_metrics_by_hand():
    truth = cells_of([B_CELL, B_CELL, NK_CELL, CD4_T])
    predicted = cells_of([B_CELL, NK_CELL, NK_CELL, None])
    found = scores(truth, predicted)
    assert found["cell_type", "accuracy"]["value"] == 0.5
    # F1: B 2*1/(2+1), NK 2*1/(1+2), CD4 0
    assert found["cell_type", "macro_f1"]["value"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert found["cell_type", "abstention"]["value"] == 0.25
    similarity = term_similarities([truth, predicted])["cell_type"]["similarity"].loc[NK_CELL, B_CELL]
    assert 0 < similarity < 1
    assert found["cell_type", "similarity"]["value"] == pytest.approx((1 + similarity + 1 + 0) / 4)
    assert found["cell_type", "similarity_among_errors"]["value"] == pytest.approx(similarity / 2)
    assert found["cell_type", "similarity_among_errors"]["n"] == 2
    assert found["cell_type", "accuracy"]["n"] == 4


def test_unlabelled_cells_are_excluded_and_unknown_is_never_correct():
    truth = cells_of([None, "unknown", B_CELL, NK_CELL])
    found = scores(truth, cells_of([None, "unknown", "unknown", NK_CELL]))
    assert found["cell_type", "accuracy"]["value"] == 0.5
    assert found["cell_type", "accuracy"]["n"] == 2
    assert found["cell_type", "abstention"]["value"] == 0.5
    assert ("tissue", "accuracy") not in found


def test_predictions_for_unlabelled_cells_do_not_lower_precision():
    truth = cells_of([None, B_CELL])
    assert scores(truth, cells_of([B_CELL, B_CELL]))["cell_type", "macro_f1"]["value"] == 1


def test_similarity_among_errors_needs_an_error():
    truth = cells_of([B_CELL, NK_CELL])
    found = scores(truth, truth)
    assert ("cell_type", "similarity_among_errors") not in found
    assert found["cell_type", "similarity_paper"]["value"] == 1


labels = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcde")), min_size=1, max_size=30)


@given(labels)
@settings(max_examples=50, deadline=None)
def test_macro_f1_equals_that_of_scikit_learn(pairs):
    truth, predicted = (pd.Series(list(column)) for column in zip(*pairs, strict=True))
    classes = pd.Index(sorted(set(truth)))
    whole = sums.class_terms(truth, predicted, classes).sum(axis=0)[None]
    expected = f1_score(truth, predicted, labels=list(classes), average="macro", zero_division=0)
    assert sums.macro_f1(whole)[0] == pytest.approx(expected)


def test_pathway_metrics_by_hand():
    truth = pd.Series([["P1", "P2"], ["P1", "P2"], [], ["P1"], ["P1", "P2"]])
    predicted = pd.Series([np.array(["P2", "P1"]), ["P1", "P3"], None, [], ["P1", "P1"]])
    equal, jaccard = sums.compare_sets(truth, predicted)
    assert equal.tolist() == [1, 0, 1, 0, 0]
    assert jaccard.tolist() == pytest.approx([1, 1 / 3, 1, 0, 0.5])


def test_calibration_error_by_hand():
    # Bin 0.5-0.6: confidences 0.5 and 0.58, one correct, |0.54 - 0.5|. Bin 0.9-1.0: confidences 0.95, 1.0 and 0.9,
    # two correct, |0.95 - 2/3|. The abstention and the unlabelled cell do not count.
    truth = cells_of([B_CELL] * 6 + [None])
    predicted = cells_of(
        [B_CELL, NK_CELL, B_CELL, B_CELL, NK_CELL, None, B_CELL],
        confidence=[0.5, 0.58, 0.95, 1.0, 0.9, 0.2, 0.1],
    )
    found = scores(truth, predicted)["cell_type", "calibration_error"]
    assert found["value"] == pytest.approx((2 * 0.04 + 3 * (0.95 - 2 / 3)) / 5, abs=1e-6)
    assert found["n"] == 5


TEXTS = [
    ("This is a B cell. It is small.", "This is a B cell. It is small."),
    ("This is a natural killer cell.", "This is a B cell."),
    ("This is a CD4-positive, alpha-beta T cell.", ""),
    ("Most active gene programmes: one; then two.", "Most active gene programmes: two; then one, too."),
]


def test_bleu_equals_that_of_sacrebleu():
    reference, text = (pd.Series(list(column)) for column in zip(*TEXTS * 3, strict=True))
    counts, overlap = sums.text_terms(reference, text)
    assert sums.bleu(counts.sum(axis=0)[None])[0] == pytest.approx(
        sacrebleu.corpus_bleu(list(text), [list(reference)]).score / 100, abs=1e-12
    )
    # second pair: 4 words in common, in order, of 5 and 6 words
    assert overlap[:3].tolist() == pytest.approx([1, 2 * 4 / (5 + 6), 0])


def test_text_metrics():
    reference, text = (list(column) for column in zip(*TEXTS * 2, strict=True))
    truth = cells_of([B_CELL] * 8, texts=reference)
    predicted = cells_of([B_CELL] * 8, texts=text, status=["parsed", "parsed", "failed", "partial"] * 2)
    found = scores(truth, predicted)
    assert found["text", "exact_match"]["value"] == 0.25
    assert found["text", "parsed"]["value"] == 0.5
    bleu = found["text", "bleu"]
    assert 0 < bleu["low"] <= bleu["value"] <= bleu["high"] <= 1


def test_methods_without_text_have_no_text_metrics():
    truth = cells_of([B_CELL, NK_CELL])
    found = scores(truth, truth.assign(text=None))
    assert ("text", "bleu") not in found
    assert ("text", "parsed") in found


def test_the_unit_depends_on_the_donors_of_the_counted_cells():
    donors = pd.Series([f"donor {i // 4}" for i in range(40)])
    truth = cells_of([B_CELL, NK_CELL] * 20)
    truth["tissue_id"] = ["UBERON:0000178"] * 28 + [None] * 12  # of seven donors
    truth["disease_id"] = ["PATO:0000461"] * 7 + [None] * 33
    found = scores(truth, truth, donors)
    assert [found[slot, "accuracy"]["resampled"] for slot in ("cell_type", "tissue", "disease")] == [
        "donor",
        "cell",
        None,
    ]
    assert found["text", "bleu"]["resampled"] == "donor"
    assert np.isnan([found["disease", "accuracy"][end] for end in ("low", "high")]).all()


def test_a_paired_difference_is_narrower_than_the_overlap_of_two_intervals():
    """One method has 120 of 200 cells right, the other the same and 12 more: better, although the intervals overlap."""
    truth = cells_of([B_CELL] * 200)
    better = cells_of([B_CELL] * 132 + [NK_CELL] * 68)
    worse = cells_of([B_CELL] * 120 + [NK_CELL] * 80)
    bootstrap = Bootstrap(pd.Series(["one"] * 200), 2000, seed=0)
    ours, theirs = (
        {score.key: score for score in score_method(truth, table, term_similarities([truth, table]), bootstrap)}
        for table in (better, worse)
    )
    key = ("cell_type", "accuracy")
    row, own = theirs[key].row(ours[key]), ours[key].row()
    assert own["low"] < row["high"]
    assert row["difference"] == pytest.approx(0.06)
    # the difference per cell is 1 with a probability of 0.06, and 0 otherwise
    error = 1.96 * np.sqrt(0.06 * 0.94 / 200)
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((0.06 - error, 0.06 + error), abs=0.006)
    assert row["difference_low"] > 0
    assert "difference" not in own
    for metric in ("abstention", "similarity_among_errors"):  # not scored on the same cells, or less is better
        assert "difference" not in theirs["cell_type", metric].row(ours["cell_type", metric])


def test_a_rare_class_does_not_lower_the_interval_of_macro_f1():
    """Ten classes of one cell, all correct: in every resample a third of them is missing, and none is wrong."""
    types = [f"CL:{i:07d}" for i in range(10)] + [B_CELL] * 10
    found = scores(cells_of(types), cells_of(types), pd.Series(["one"] * 20))["cell_type", "macro_f1"]
    assert (found["value"], found["low"], found["high"]) == (1, 1, 1)


def test_held_out_cell_types_are_scored_apart():
    truth = cells_of([B_CELL, B_CELL, NK_CELL, CD4_T, CD4_T, None])
    predicted = cells_of([B_CELL, CD4_T, NK_CELL, CD4_T, NK_CELL, B_CELL])
    bootstrap = Bootstrap(pd.Series(range(6)), 50, seed=0)
    similarities = term_similarities([truth, predicted])

    def score(trained):
        found = score_method(truth, predicted, similarities, bootstrap, trained)
        return {one.key: one.row() for one in found}

    found = score({B_CELL, NK_CELL})
    assert (found["cell_type", "accuracy"]["value"], found["cell_type", "accuracy"]["n"]) == (0.6, 5)
    seen, held_out = ({key[1]: row for key, row in found.items() if key[0] == slot} for slot in (SEEN, HELD_OUT))
    assert (seen["accuracy"]["value"], seen["accuracy"]["n"]) == (pytest.approx(2 / 3), 3)
    assert (held_out["accuracy"]["value"], held_out["accuracy"]["n"]) == (0.5, 2)
    # seen: B 2/3, NK 1; a B cell predicted as CD4 T lowers the F1 of no held-out class
    assert seen["macro_f1"]["value"] == pytest.approx((2 / 3 + 1) / 2)
    assert held_out["macro_f1"]["value"] == pytest.approx(2 / 3)
    near = similarities["cell_type"]["similarity"].loc[NK_CELL, CD4_T]
    assert held_out["similarity"]["value"] == pytest.approx((1 + near) / 2)
    for trained in (None, {B_CELL, NK_CELL, CD4_T}):
        assert not {SEEN, HELD_OUT} & {slot for slot, _ in score(trained)}
    assert SEEN not in {slot for slot, _ in score(set())}


def test_tables_keep_names_with_commas_and_abstentions(tmp_path):
    truth, predicted = pd.Series([CD4_T, CD4_T, B_CELL]), pd.Series([CD4_T, None, CD4_T])
    terms = Terms(TERM_TABLE)
    path = tmp_path / "confusion.tsv"
    confusion("cell_type", truth, predicted, terms).to_csv(path, sep="\t", index=False)
    pairs = pd.read_csv(path, sep="\t").set_index(["true_name", "predicted_name"])["n"]
    assert pairs.to_dict() == {
        ("B cell", NAMES[CD4_T]): 1,
        (NAMES[CD4_T], NAMES[CD4_T]): 1,
        (NAMES[CD4_T], "not determined"): 1,
    }
    rows = per_class("cell_type", truth, predicted, terms).set_index("name")
    assert rows.loc[NAMES[CD4_T], ["n", "precision", "recall", "f1"]].tolist() == [2, 0.5, 0.5, 0.5]
    assert np.isnan(rows.loc["B cell", "precision"]) and rows.loc["B cell", "f1"] == 0


@pytest.fixture
def results(tmp_path):
    """Two splits of six cells, generations in two shards, one baseline."""
    types = [B_CELL, NK_CELL, CD4_T, B_CELL, NK_CELL, CD4_T]
    truth = pd.concat([cells_of(types, [["P1", "P2"]] * 6, split=split) for split in ("validation", "test")])
    truth["cell_id"] = [f"cell {i}" for i in range(12)]
    DESCRIPTIONS.write(truth[list(DESCRIPTIONS.columns)], tmp_path / "descriptions.parquet")
    TERMS.write(TERM_TABLE, tmp_path / "terms.parquet")
    corpus = pd.DataFrame(dict.fromkeys(CELLS.columns), index=range(12))
    corpus["cell_id"], corpus["donor"] = truth["cell_id"].to_numpy(), ["s|1", "s|2"] * 3 + ["s|3"] * 6
    CELLS.write(corpus, tmp_path / "cells.parquet")
    predicted = truth.assign(cell_type_confidence=np.float32(0.75))[list(PREDICTIONS.columns)]
    generated = predicted.drop(columns="stage_confidence").assign(
        cell_type_reported_id=predicted["cell_type_id"],
        cell_type_reported_confidence=0.75,
        pathway_confidences=[[0.75, 0.75]] * 12,
    )
    generated = generated.astype(object).where(generated.notna(), None)
    for split, rows in generated.groupby("split"):
        for shard in range(2):
            part = rows.iloc[shard::2].to_dict("records")
            write_jsonl(part, tmp_path / f"generations/{split}/{shard}.jsonl")
    PREDICTIONS.write(predicted.assign(cell_type_id=B_CELL), tmp_path / "majority.parquet")
    for file in ("model/adapter/weights.safetensors", "model/projector.safetensors"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(file)
    (tmp_path / "model/cell2text.json").write_text(json.dumps({"threads": 3}))
    (tmp_path / "language_model").mkdir()
    (tmp_path / "language_model/source.json").write_text(json.dumps({"licence": "Apache-2.0"}))
    return tmp_path


CONFIG = {"run": "é", "encoder": {"kind": "coexpression"}}


def run(folder, name="evaluation"):
    outputs = {table: folder / name / f"{table}.tsv" for table in ("metrics", "per_class", "confusion")}
    outputs |= {"calibration": folder / name / "calibration.tsv", "provenance": folder / name / "provenance.json"}
    outputs["config"] = folder / name / "config.json"
    evaluate(
        folder / "descriptions.parquet",
        folder / "terms.parquet",
        folder / "cells.parquet",
        sorted(folder.glob("generations/*/*.jsonl")),
        [folder / "majority.parquet"],
        folder / "model",
        folder / "language_model",
        outputs,
        seed=1,
        replicates=100,
        config=CONFIG,
    )
    return outputs


def test_evaluation_end_to_end(results):
    outputs = run(results)
    metrics = pd.read_csv(outputs["metrics"], sep="\t")
    value = metrics.set_index(["split", "method", "slot", "metric"])["value"]
    assert value["test", "cell2text", "cell_type", "accuracy"] == 1
    assert value["test", "majority", "cell_type", "accuracy"] == pytest.approx(1 / 3, abs=1e-6)
    assert value["validation", "majority", "pathways", "jaccard"] == 1
    assert metrics["value"].between(0, 1).all()
    assert value["test", "cell2text", "cell_type", "reported_precision"] == 1
    assert value["test", "cell2text", "pathways", "calibration_error"] == 0.25
    assert set(metrics["method"][metrics["metric"].isin(["coverage", "reported_precision"])]) == {"cell2text"}
    compared = metrics[(metrics["split"] == "test") & (metrics["metric"] == "accuracy")]
    difference = compared.set_index(["method", "slot"])["difference"]
    assert difference["majority", "cell_type"] == pytest.approx(2 / 3, abs=1e-6)
    assert np.isnan(difference["cell2text", "cell_type"])
    assert compared["resampled"].isna().all() and compared["low"].isna().all()  # six cells give no interval
    assert compared["slot"].to_list() == ["cell_type", "cell_type_held_out"] * 2  # there are no training cells
    bins = pd.read_csv(outputs["calibration"], sep="\t")
    assert (bins["bin_low"].unique(), bins["bin_high"].unique()) == (0.7, 0.8)
    assert bins["n"][bins["slot"] == "pathways"].to_list() == [12, 12]  # validation and test
    assert bins.groupby("method")["accuracy"].max().to_dict() == pytest.approx(
        {"cell2text": 1, "majority": 1 / 3}, abs=1e-6
    )
    provenance = read_json(outputs["provenance"])
    assert provenance["bootstrap"]["splits"] == {
        "validation": {"unit": None, "donors": 2},
        "test": {"unit": None, "donors": 1},
    }
    assert sorted(provenance["model"]) == ["adapter/weights.safetensors", "cell2text.json", "projector.safetensors"]
    assert provenance["threads"] == {"finetune": 3}
    assert provenance["language_model"] == {"licence": "Apache-2.0"}
    assert read_json(outputs["config"]) == CONFIG
    assert provenance["config"] == hash_config(CONFIG) and len(provenance["code"]) == 64


def test_the_same_input_gives_the_same_files(results):
    one, two = run(results), run(results, "again")
    assert all(one[table].read_bytes() == two[table].read_bytes() for table in one)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "described twice"])
def test_a_method_with_the_wrong_cells_is_rejected(results, fault):
    shard = results / "generations/test/0.jsonl"
    first, *rest = shard.read_text().splitlines()
    other = json.dumps(json.loads(first) | {"cell_id": "cell 99"})
    lines = {"missing": rest, "unexpected": [first, *rest, other], "described twice": [first, first, *rest]}[fault]
    shard.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=f"generations.*1 {fault}, such as cell"):
        run(results)
    assert not (results / "evaluation").exists()


def test_the_comparison_plot_is_deterministic_and_needs_test_cells(results):
    written = run(results)
    metrics, provenance = written["metrics"], written["provenance"]
    plots = [results / "one.svg", results / "two.svg"]
    for plot in plots:
        compare(metrics, provenance, plot)
    assert plots[0].read_bytes() == plots[1].read_bytes()
    assert plots[0].read_text().count("<!-- Cell2Text -->") == 1
    table = pd.read_csv(metrics, sep="\t")
    table[table["split"] == "validation"].to_csv(metrics, sep="\t", index=False)
    write_json({"tables": {metrics.name: hash_file(metrics)}}, provenance)
    with pytest.raises(InputError, match="no score for the test cells"):
        compare(metrics, provenance, results / "three.svg")


def test_half_a_table_of_scores_is_not_plotted(results):
    written = run(results)
    lines = written["metrics"].read_text().splitlines(keepends=True)
    written["metrics"].write_text("".join(lines[: len(lines) // 2]))
    with pytest.raises(InputError, match=r"metrics\.tsv: cannot be read: its sha256 is not that in .*provenance\.json"):
        compare(written["metrics"], written["provenance"], results / "plot.svg")
    assert not (results / "plot.svg").exists()
