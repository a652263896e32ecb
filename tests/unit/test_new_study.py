"""The benchmark of new studies draws cells, splits them and scores broad types as by hand."""

import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import new_study
import new_study_scores as scores

T_CELL, CD4, B_LINEAGE, B_CELL = "CL:0000084", "CL:0000624", "CL:0000945", "CL:0000236"
MYELOID, MONOCYTE, NK_CELL = "CL:0000766", "CL:0000576", "CL:0000623"
LYMPHOCYTE = "CL:0000542"


@pytest.mark.parametrize(
    ("term", "broad"),
    [
        (CD4, T_CELL),
        (T_CELL, T_CELL),
        (MONOCYTE, MYELOID),  # also a precursor
        ("CL:0000782", "CL:0000451"),  # a myeloid dendritic cell, nearer to myeloid leukocyte
        ("CL:0000129", "CL:0000125"),  # microglia
        ("CL:0000173", "CL:0000066"),  # a pancreatic D cell, also a neuron
        (LYMPHOCYTE, None),
        (None, None),
    ],
)
def test_the_broad_type_of_a_cell_type(term, broad):
    assert scores.broad_type(term) == broad


def test_all_broad_types_are_live_terms_with_their_names():
    assert all(scores.live_terms("CL")[term]["label"] == name for term, name in scores.BROAD_TYPES.items())


def test_rare_types_are_drawn_and_lone_cells_train():
    types = pd.Series(["common"] * 900 + ["rare"] * 5 + ["lone"])
    rows = new_study.draw_cells(types, 100, np.random.default_rng(0))
    assert len(set(rows)) == 100 and (np.diff(rows) > 0).all()
    assert types[rows].value_counts()[["rare", "lone"]].to_list() == [5, 1]
    assert new_study.draw_cells(types, 2000, np.random.default_rng(0)).tolist() == list(range(906))
    split = pd.Series(new_study.split_cells(types, np.random.default_rng(0)))
    assert 89 <= (split[types == "common"] == "validation").sum() <= 91
    assert split[types == "lone"].item() == "train"


def make_study(counts, genes, dataset="d"):
    obs = pd.DataFrame(index=[f"{dataset}|{i}" for i in range(len(counts))])
    return ad.AnnData(sparse.csr_matrix(np.asarray(counts, np.float32)), obs=obs, var=pd.DataFrame(index=genes))


def test_panels_are_nested_and_thinning_is_binomial(monkeypatch):
    monkeypatch.setattr(new_study, "PANELS", {"genes_2": 2, "genes_5": 5, "genes_20": 20})
    study = make_study(np.random.default_rng(0).poisson(50, (200, 10)), [f"G{i}" for i in range(10)])
    found = dict(new_study.make_variants(study, np.random.default_rng(1)))
    assert list(found) == ["whole", "genes_2", "genes_5", "depth_50", "depth_25", "depth_10"]
    two, five = (list(found[name].var_names) for name in ("genes_2", "genes_5"))
    assert (len(two), len(five)) == (2, 5) and set(two) < set(five)
    assert (found["genes_5"].X != study[:, five].X).nnz == 0
    thinned, whole = found["depth_25"].X.astype(float), study.X.astype(float)
    assert (thinned > whole).nnz == 0 and (thinned.data == thinned.data.round()).all()
    assert thinned.sum() == pytest.approx(whole.sum() / 4, abs=5 * (whole.sum() * 3 / 16) ** 0.5)


def test_scores_by_hand():
    truth = pd.DataFrame({"cell_type_id": [CD4, CD4, B_CELL, MONOCYTE, LYMPHOCYTE, NK_CELL]})
    truth["pathway_ids"] = [["A", "B"]] * 6
    predicted = pd.DataFrame(
        {
            "cell_type_id": [T_CELL, CD4, B_LINEAGE, CD4, CD4, NK_CELL],
            "cell_type_confidence": [0.95, 0.85, 0.95, 0.55, 0.55, 0.55],
            "pathway_ids": [["B", "A"], ["A", "C"], ["C", "D"], [], ["A", "B"], ["A", "B"]],
            "status": ["parsed"] * 5 + ["failed"],
            "cell_type_reported_id": [T_CELL, CD4, None, CD4, LYMPHOCYTE, NK_CELL],
            "novel": [False, False, False, True, False, False],
        }
    )
    trained = {T_CELL, B_LINEAGE, MYELOID, None}  # the NK cell cannot be scored, a lymphocyte has no broad type
    found = scores.score(truth, predicted, trained, writes_text=True)
    assert found["accuracy"] == (0.75, 4)
    assert found["macro_f1"][0] == pytest.approx((4 / 5 + 1 + 0) / 3)
    assert found["exact_accuracy"] == (pytest.approx(2 / 6), 6)
    # bins: two at 0.95 without a hit, one at 0.85 with one, three at 0.55 with one
    assert found["calibration_error"][0] == pytest.approx((1.9 + 0.15 + 0.65) / 6)
    assert found["programmes_jaccard"][0] == pytest.approx((1 + 1 / 3 + 0 + 0 + 1 + 1) / 6)
    assert found["both_right"][0] == 0.5
    assert (found["parsed"][0], found["novel"][0]) == (pytest.approx(5 / 6), pytest.approx(1 / 6))
    assert (found["coverage"][0], found["precision"]) == (pytest.approx(5 / 6), (0.8, 5))
    broad_only = scores.score(truth, predicted[["cell_type_id"]], trained, writes_text=False)
    assert broad_only == {name: found[name] for name in ("accuracy", "macro_f1")}


def test_confidences_of_several_studies_are_judged_together():
    """One study's confidence is 0.3 too low, the other's 0.3 too high: together they are right."""

    def study(name, right):
        ids = [f"{name}|{i}" for i in range(10)] + [f"{name}.genes_500|{i}" for i in range(10)]
        test = pd.DataFrame({"cell_id": ids, "cell_type_id": CD4, "dataset": [one.split("|")[0] for one in ids]})
        texts = pd.DataFrame({"cell_id": ids, "cell_type_confidence": 0.55, "status": "parsed"})
        texts["cell_type_id"] = [CD4] * right + [NK_CELL] * (10 - right) + [NK_CELL] * 10
        return test, texts[::-1]

    found = scores.pool_whole([study("a", 9), study("b", 2)])
    assert found["exact_accuracy"] == (0.55, 20) and found["parsed"] == (1, 20)
    assert found["calibration_error"] == (pytest.approx(0), 20) and "accuracy" not in found


def test_unmeasured_genes_are_zero_and_totals_are_those_of_the_shared_genes():
    logs = scores.log_counts(make_study([[1, 3, 6], [5, 0, 0]], ["a", "b", "x"]), pd.Index(["c", "b", "a"]))
    np.testing.assert_allclose(logs.toarray(), np.log1p([[0, 7500, 2500], [0, 0, 10000]]))


def test_the_refitted_regression_reads_the_genes_of_each_panel():
    rng = np.random.default_rng(0)
    genes = [f"G{i:02d}" for i in range(60)]
    means = np.full((2, 60), 2.0)
    means[0, :30] = means[1, 30:] = 6
    kinds = np.arange(40) % 2
    counts = rng.poisson(means[kinds])
    training = pd.DataFrame({"cell_id": [f"a|{i}" for i in range(40)], "cell_type_id": np.array([CD4, B_CELL])[kinds]})
    training["dataset"] = "a"
    training = pd.concat([training, training.assign(cell_id=training["cell_id"].str.replace("a", "b"), dataset="b")])
    studies = {"a": make_study(counts, genes, "a"), "b": make_study(counts[:, 5:], genes[5:], "b")}
    variants = {"whole": "new", "genes_52": "new.52", "genes_40": "new.40"}
    for dataset, size in (("new", 60), ("new.52", 52), ("new.40", 40)):  # genes in another order
        studies[dataset] = make_study(counts[:, :size][:, ::-1], genes[:size][::-1], dataset)
    found = scores.refit(studies, training, variants, seed=0)
    datasets = {method: set(table["dataset"]) for method, table in found.items()}
    # 47 genes of the larger panel are in both training studies, and 50 are needed
    of_any, of_all = {"new", "new.52"}, {"new"}
    expected = {"refitted_any": of_any, "refitted_any_broad": of_any, "refitted_all": of_all}
    assert datasets == expected | {"refitted_all_broad": of_all}
    for table in found.values():
        truth = kinds[table["barcode"].astype(int)]
        types = (T_CELL, B_LINEAGE) if "cell_type_confidence" not in table else (CD4, B_CELL)
        assert (table["cell_type_id"] == np.array(types)[truth]).mean() > 0.9


def test_means_are_over_the_same_studies():
    rows = [
        ("one", "whole", "knn", 0.8),
        ("one", "whole", "cell2text", 0.9),
        ("one", "genes_500", "knn", 0.4),
        ("two", "whole", "knn", 0.6),  # measures fewer genes than the panel
    ]
    table = pd.DataFrame(rows, columns=["study", "variant", "method", "value"]).assign(metric="accuracy")
    means = scores.mean_over(table, ["one", "two"]).set_index(["method", "variant"])["value"]
    assert set(means.index.get_level_values("method")) == {"knn"}
    assert means["knn", "whole"] == pytest.approx(0.7) and means["knn", "genes_500"] == pytest.approx(0.5)
    assert scores.mean_over(table, ["one"]).query("method == 'cell2text'")["value"].to_list() == [0.9] * 4
