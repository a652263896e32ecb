"""Scores of reported terms (the most specific ones that are probable enough) and of programmes' confidences."""

import numpy as np
import pandas as pd
import pytest

from cell2text.contracts import PREDICTIONS, TERM_SLOTS
from cell2text.evaluation.bootstrap import Bootstrap
from cell2text.evaluation.evaluate import _programme_calibration
from cell2text.evaluation.metrics import known, score_method, term_similarities
from cell2text.evaluation.sums import is_at_or_above, rate_programmes

LYMPHOCYTE, T_CELL, CD4_T, B_CELL, NK_CELL = "CL:0000542", "CL:0000084", "CL:0000624", "CL:0000236", "CL:0000623"
FEMALE, MALE = "PATO:0000383", "PATO:0000384"
TERMS = pd.DataFrame(
    [
        ("cell_type", LYMPHOCYTE, 4, []),
        ("cell_type", T_CELL, 5, np.array([LYMPHOCYTE], dtype=object)),  # as read from Parquet
        ("cell_type", CD4_T, 8, [T_CELL, LYMPHOCYTE]),
        ("cell_type", B_CELL, 6, [LYMPHOCYTE]),
        ("sex", FEMALE, None, []),
        ("sex", MALE, None, None),
    ],
    columns=["slot", "id", "depth", "ancestors"],
)


def cells_of(**columns):
    """Rows to use as truth or as predictions; whatever is not given is missing."""
    table = pd.DataFrame(columns).reindex(columns=list(PREDICTIONS.columns)).astype(object)
    table["cell_id"], table["status"] = [f"cell {i}" for i in range(len(table))], "parsed"
    for name in columns:
        table[name] = known(table[name]) if name.endswith("_id") else table[name]
    table["text"] = "This is a cell."
    return table.where(table.notna(), None)


def scores(truth, predicted, terms=TERMS):
    bootstrap = Bootstrap(pd.Series(range(len(truth))), 50, seed=0)
    found = score_method(truth, predicted, term_similarities([truth, predicted]), bootstrap, terms=terms)
    return {score.key: score.row() for score in found}


def test_reported_terms_by_hand():
    truth = cells_of(
        cell_type_id=[CD4_T, CD4_T, CD4_T, T_CELL, B_CELL, NK_CELL, None, CD4_T, B_CELL, B_CELL],
        sex_id=[FEMALE] * 9 + [None],
    )
    # right, ancestor, wrong, too specific, right, no ancestors known, unlabelled, not determined
    predicted = cells_of(
        cell_type_id=[CD4_T] * 10,
        cell_type_reported_id=[CD4_T, T_CELL, B_CELL, CD4_T, LYMPHOCYTE, LYMPHOCYTE, B_CELL, None, None, None],
        cell_type_reported_confidence=[0.95, 0.95, 0.85, 0.85, 0.85, 0.95, 0.2, None, None, None],
    )
    found = {key[1]: row for key, row in scores(truth, predicted).items() if key[0] == "cell_type"}
    assert (found["reported_precision"]["value"], found["reported_precision"]["n"]) == (0.5, 6)
    assert (found["coverage"]["value"], found["coverage"]["n"]) == (pytest.approx(6 / 9), 9)
    assert (found["reported_depth"]["value"], found["reported_depth"]["n"]) == ((8 + 5 + 6 + 8 + 4 + 4) / 6, 6)
    # 0.8-0.9: one right of three; 0.9-1.0: two of three
    error = (3 * (0.85 - 1 / 3) + 3 * (0.95 - 2 / 3)) / 6
    assert found["reported_calibration_error"]["value"] == pytest.approx(error, abs=1e-6)
    assert found["coverage"]["low"] <= 6 / 9 <= found["coverage"]["high"]
    # a slot in which nothing is determined has a coverage, and a slot without depths has no depth
    sex = {key[1]: row for key, row in scores(truth, predicted).items() if key[0] == "sex"}
    assert sex["coverage"]["value"] == 0 and "reported_precision" not in sex
    sex = {key[1] for key in scores(truth, predicted.assign(sex_reported_id=FEMALE)) if key[0] == "sex"}
    assert "reported_precision" in sex and "reported_depth" not in sex
    assert {"reported_precision", "coverage"}.isdisjoint({key[1] for key in scores(truth, predicted, None)})


def test_methods_that_report_no_terms_have_no_such_metrics():
    truth = cells_of(cell_type_id=[B_CELL] * 8)
    assert not {key for key in scores(truth, truth) if "reported" in key[1] or key[1] == "coverage"}
    assert ("pathways", "calibration_error") not in scores(truth, truth)


def test_a_missing_term_is_never_right():
    pairs = [(None, None), (None, B_CELL), (B_CELL, None), (np.nan, np.nan), (B_CELL, B_CELL), ("new", "new")]
    predicted, truth = (pd.Series(list(column), dtype=object) for column in zip(*pairs, strict=True))
    assert is_at_or_above(predicted, truth, {}).tolist() == [False] * 4 + [True] * 2


PROGRAMMES = {
    "truth": pd.Series([["P1", "P2"], ["P1"], [], ["P3"], None, ["P1", "P2"]]),
    "predicted": pd.Series([["P2", "P3"], ["P1", "P2"], ["P1"], [], ["P1"], ["P1", "P2"]]),
    "confidences": pd.Series([[0.95, 0.85], np.array([0.95, 0.15]), [0.15], [], [0.85], None]),
}


def test_confidences_of_programmes_by_hand():
    confidence, right = rate_programmes(**PROGRAMMES)
    assert np.nan_to_num(confidence, nan=-1).tolist() == [
        [0.95, 0.85], [0.95, 0.15], [0.15, -1], [-1, -1], [0.85, -1], [-1, -1]
    ]  # fmt: skip
    assert right.tolist() == [[True, False], [True, False]] + [[False, False]] * 4
    none = pd.Series([None, None], dtype=object)
    assert rate_programmes(none, none, none)[0].shape == (2, 0)


def test_calibration_error_of_programmes_by_hand():
    truth, predicted = PROGRAMMES["truth"], PROGRAMMES["predicted"]
    truth, predicted = cells_of(pathway_ids=truth), cells_of(pathway_ids=predicted)
    predicted["pathway_confidences"] = PROGRAMMES["confidences"]
    # six programmes: 0.95 twice, both right; 0.85 twice and 0.15 twice, all wrong
    row = scores(truth, predicted)["pathways", "calibration_error"]
    assert row["value"] == pytest.approx((2 * 0.05 + 2 * 0.85 + 2 * 0.15) / 6)
    assert row["n"] == 4  # cells
    table = _programme_calibration(truth, predicted)
    assert table[["bin_low", "n"]].to_numpy().tolist() == [[0.1, 2], [0.8, 2], [0.9, 2]]
    assert table["accuracy"].tolist() == [0, 0, 1]


def test_missing_columns_are_written_as_nulls(tmp_path):
    table = pd.DataFrame({"cell_id": ["a", "b"], "pathway_ids": [["P1"], []], "cell_type_id": [B_CELL, None]})
    PREDICTIONS.write(table.reindex(columns=list(PREDICTIONS.columns)), tmp_path / "method.parquet")
    read = PREDICTIONS.read(tmp_path / "method.parquet")
    assert read.drop(columns=["cell_id", "pathway_ids", "cell_type_id"]).isna().all(axis=None)
    full = table.reindex(columns=list(PREDICTIONS.columns)).assign(
        pathway_confidences=[[0.5], None], novel=[True, None], novelty=[1.5, None], cell_type_reported_id=[None, B_CELL]
    )
    PREDICTIONS.write(full, tmp_path / "method.parquet")
    read = PREDICTIONS.read(tmp_path / "method.parquet")
    assert read["pathway_confidences"][0].tolist() == [0.5] and read["pathway_confidences"][1] is None
    assert read["novel"].tolist() == [True, None] and read["cell_type_reported_id"].tolist() == [None, B_CELL]
    assert {f"{slot}_reported_confidence" for slot in TERM_SLOTS} <= set(read)
