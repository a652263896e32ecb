"""Clusters: terms on which their cells agree, markers, text, and columns that hold no clusters."""

import re
from dataclasses import replace
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse
from sklearn.metrics import adjusted_rand_score

from cell2text.annotation import markers
from cell2text.annotation.cluster_text import clusters_table, paragraph
from cell2text.annotation.clusters import Cluster, OwnLabel, TermShare, check_clusters, describe_clusters
from cell2text.annotation.communities import find_clusters
from cell2text.annotation.markers import find_markers
from cell2text.errors import InputError
from cell2text.spreadsheet import write_tsv
from scored_cells import terms_table


def table(reported, guesses=None, pathways=None, novel=None, flag=None):
    """Return the predictions of cells; what is not given is empty."""
    count = len(reported)
    return pd.DataFrame(
        {
            "cell_id": [f"s|{number}" for number in range(count)],
            "cell_type_id": pd.Series(guesses or [None] * count, dtype=object),
            "cell_type_reported_id": pd.Series(reported, dtype=object),
            "pathway_ids": pathways or [[]] * count,
            "novel": pd.Series([None] * count if novel is None else novel, dtype=object),
            "flag": flag or [""] * count,
        }
    )


def no_markers(codes):
    return {}


def describe(cells, clusters=None, own=None, confidence=0.8, **options):
    clusters = pd.Series(["a"] * len(cells) if clusters is None else clusters)
    own = None if own is None else pd.Series(own, dtype=object)
    return describe_clusters(cells, no_markers, clusters, terms_table(), own, confidence, **options)


def agreed(reported, confidence, **options):
    found = describe(table(reported), confidence=confidence, **options)[0]
    return (found.reported.id, found.reported.share) if found.reported else None


def test_agreement_by_hand():
    # 6 memory and 2 naive B cells, a B cell, and a cell without a reported term
    cells = ["BM"] * 6 + ["BN"] * 2 + ["B", None]
    assert agreed(cells, 0.6) == ("BM", 0.6)
    assert agreed(cells, 0.61) == ("B", 0.9)
    assert agreed(cells, 0.9) == ("B", 0.9)
    assert agreed(cells, 0.91) is None
    # B cells and T cells are lymphocytes, but so is every cell type of this ontology
    mixed = ["BM", "BN", "T4", "T8"]
    assert agreed(mixed, 0.5) == ("B", 0.5)
    assert agreed(mixed, 0.51) is None
    assert agreed([None, None], 0.1) is None


def test_a_term_above_all_labels_of_the_model_is_not_reported():
    assert agreed(["T4", "T8"], 0.8) == ("T", 1)
    assert agreed(["T4", "T8"], 0.8, labels=["T4", "T8", "BM"]) == ("T", 1)
    assert agreed(["T4", "T8"], 0.8, labels=["T4", "T8"]) is None


def test_ties_are_resolved_by_id():
    assert agreed(["T8", "BN"], 0.5) == ("BN", 0.5)
    found = describe(table([None] * 5, ["T8", "BN", "T4", "T8", "BN"]))[0]
    assert (found.guess, found.runner_up) == (
        TermShare("BN", "naive B cell", 0.4),
        TermShare("T8", "cytotoxic T cell", 0.4),
    )
    assert describe(table(["BN"], ["BN"]))[0].runner_up is None
    assert describe(table([None]))[0].guess is None


def test_shares_of_programmes_novel_and_flagged_cells():
    pathways = [["P3", "P1"], ["P1"], [], np.array(["P2", "P3"], dtype=object), ["P4"], None]
    novel, flag = [True, False, None, False, True, None], ["", "doublet", "few genes", "", None, "doublet"]
    cells = table(["T4"] * 6, pathways=pathways, novel=novel, flag=flag)
    first, second = describe(cells, ["a"] * 4 + ["b"] * 2)
    assert [(one.id, one.share) for one in first.programmes] == [("P1", 0.5), ("P3", 0.5), ("P2", 0.25)]
    assert first.programmes[0].name == "programme 1"
    assert (first.novel, first.flagged) == (1 / 3, 0.5)
    assert (second.novel, second.flagged) == (1, 0.5)
    assert describe(table(["T4"]))[0].novel is None


@pytest.mark.parametrize(
    ("reported", "label", "conflict"),
    [
        ("B", "B", False),
        ("B", "BM", False),
        ("B", "L", False),
        ("B", "T4", True),
        ("BM", "BN", True),
        (None, "T4", None),
        ("B", "T lymphocytes", None),
    ],
)
def test_conflict_with_the_files_own_labels(reported, label, conflict):
    own = describe(table([reported] * 4), own=[label] * 3 + ["BM"])[0].own_label
    name = dict(zip(terms_table()["id"], terms_table()["name"], strict=True)).get(label)
    assert own == OwnLabel(label, name, 0.75 if label != "BM" else 1, conflict)


def test_unknown_own_labels_do_not_count():
    own = describe(table(["B"] * 5), own=["unknown", None, "unknown", "x", np.nan])[0].own_label
    assert own == OwnLabel("x", None, 0.2, None)
    assert describe(table(["B"]), own=["unknown"])[0].own_label is None
    assert describe(table(["B"]))[0].own_label is None


@pytest.mark.parametrize(
    ("clusters", "names"),
    [
        ([10, 2, 2, 10], ["2", "10"]),
        ([10.0, 2.0, 2.0, 10.0], ["2", "10"]),
        (np.array([10, 2, 2, 10], dtype=np.float32), ["2", "10"]),
        (["10", "2", "2", "10"], ["2", "10"]),
        (["c10", "c2b", "c2a", "x"], ["c2a", "c2b", "c10", "x"]),
        ([True, False, False, True], ["False", "True"]),
        (pd.Categorical(["x", "b", "b", "x"], ["x", "unused", "b"]), ["x", "b"]),
        (pd.Categorical([10, 2, 2, 10], [10, 3, 2]), ["10", "2"]),
        (pd.array(["10", "2", "2", "10"], dtype="string"), ["2", "10"]),
    ],
)
def test_clusters_of_any_type(clusters, names):
    column = pd.Series(clusters, index=[7, 7, 8, 9])
    found = describe_clusters(table(["B"] * 4), no_markers, column, terms_table(), None, 0.8)
    assert [cluster.name for cluster in found] == names
    assert [cluster.cells for cluster in found] == [4 // len(names)] * len(names)


@pytest.mark.parametrize(
    ("column", "problem"),
    [
        ([], "no cells"),
        ([None, np.nan], "no cell has a cluster"),
        (["a", None, "b", "b"], "1 of 4 cells have no cluster"),
        (["a", " ", "b", "nan"], "2 of 4 cells have no cluster"),
        ([1.0, np.nan, 2.0, 2.0], "1 of 4 cells have no cluster"),
        (pd.Categorical(["a", "a", None], ["a", "b"]), "1 of 3 cells have no cluster"),
        (["a"] * 4, "all 4 cells are in cluster a"),
        (pd.Categorical(["a", "a"], ["a", "b"]), "all 2 cells are in cluster a"),
        ([7], "all 1 cells are in cluster 7"),
        (["line\nbreak"] * 3, "all 3 cells are in cluster line break"),
        (["AAC", "AAG", "AAT", "ACA"], "each of the 4 cells has a value of its own"),
        ([0.5, 0.25, 0.75, 0.5, 0.1], "4 different values for 5 cells are no clusters"),
    ],
)
def test_columns_that_hold_no_clusters(column, problem):
    with pytest.raises(InputError, match=rf"^my\.h5ad: leiden: {re.escape(problem)}\. (Name|Give) [^\n]+$"):
        check_clusters(pd.Series(column, dtype=None if len(column) else object), "my.h5ad: leiden")


def test_columns_that_hold_clusters():
    check_clusters(pd.Series([1, 2, 1, 2]), "")
    check_clusters(pd.Series(["NA", "unknown", "NA", "x", "x", "x"]), "")


def test_unequal_lengths_and_missing_clusters_are_errors():
    with pytest.raises(ValueError, match="differ in length"):
        describe(table(["B"] * 3), ["a", "b"])
    with pytest.raises(ValueError, match="1 cells have no cluster"):
        describe(table(["B"] * 3), ["a", None, "b"])


def planted(cells=120, genes=60, seed=0):
    """Return counts in which each third of the cells has five genes of its own, and the third of each cell."""
    random = np.random.default_rng(seed)
    rates, groups = np.ones((cells, genes)), np.repeat([0, 1, 2], cells // 3)
    for group in range(3):
        rates[np.ix_(groups == group, range(5 * group, 5 * group + 5))] = 8
    var = pd.DataFrame({"symbol": [f"S{gene}" for gene in range(genes)]}, [f"E{gene}" for gene in range(genes)])
    return ad.AnnData(sparse.csr_matrix(random.poisson(rates).astype(np.float32)), var=var), groups


def markers_of(counts, codes, **options):
    """Return the markers of clusters, with the counts read in blocks of 50 cells."""
    blocks = [counts.X[start : start + 50] for start in range(0, counts.n_obs, 50)]
    return find_markers(lambda: iter(blocks), counts.var, codes, **options)


def test_planted_markers_are_found_and_counts_stay():
    counts, groups = planted()
    counts.var["symbol"] = ["", None, *counts.var["symbol"][2:]]
    before = counts.X.copy()
    found = markers_of(counts, groups)
    assert set(found[0]) == {"E0", "E1", "S2", "S3", "S4"}
    assert set(found[1]) == {f"S{gene}" for gene in range(5, 10)}
    assert set(found[2]) == {f"S{gene}" for gene in range(10, 15)}
    assert (before != counts.X).nnz == 0
    assert markers_of(counts, groups, most=3)[1] == found[1][:3]
    counts.var["symbol"] = "same"
    assert markers_of(counts, groups)[0] == ("same",)


def test_markers_need_two_cells_on_either_side():
    counts, groups = planted()
    groups[0] = 3
    assert set(markers_of(counts, groups)) == {0, 1, 2}
    assert markers_of(counts, np.zeros(len(groups), dtype=int)) == {}
    assert markers_of(counts, (np.arange(len(groups)) == 5).astype(int)) == {}
    empty = ad.AnnData(sparse.csr_matrix((4, 2), dtype=np.int64), var=pd.DataFrame({"symbol": ["A", "B"]}, ["a", "b"]))
    assert markers_of(empty, np.array([0, 0, 1, 1])) == {0: (), 1: ()}


def test_many_clusters_are_tested_in_parts(monkeypatch):
    counts, groups = planted(cells=120)
    codes = groups * 10 + np.arange(120) % 10  # 30 clusters of 4 cells
    found = markers_of(counts, codes)
    assert set(found) == set(range(30))
    named = [set(symbols) <= {f"S{gene}" for gene in range(15)} for symbols in found.values()]
    assert sum(named) > 25
    monkeypatch.setattr(markers, "_CLUSTERS_AT_ONCE", 7)
    assert markers_of(counts, codes) == found


def test_markers_are_those_of_scanpy():
    cells, counts = pbmc()
    labels = cells.obs["bulk_labels"]
    found = markers_of(counts, labels.cat.codes.to_numpy(), most=counts.n_vars)
    sc.pp.normalize_total(counts, target_sum=1e4)
    sc.pp.log1p(counts)
    counts.obs["label"] = labels.to_numpy()
    sc.tl.rank_genes_groups(counts, "label", method="t-test_overestim_var", use_raw=False)
    for number, label in enumerate(labels.cat.categories):
        table = sc.get.rank_genes_groups_df(counts, label)
        table = table[(table["logfoldchanges"] > 0) & (table["pvals_adj"] < 0.05)]
        assert list(found[number]) == table["names"].to_list()
    assert sum(map(len, found.values())) > 300


def pbmc():
    """Return the bundled PBMC with their counts."""
    cells = sc.datasets.pbmc68k_reduced()
    counts = np.rint(np.expm1(cells.raw.X.toarray()) * cells.obs["n_counts"].to_numpy()[:, None] / 1e4)
    var = pd.DataFrame({"symbol": cells.raw.var_names}, cells.raw.var_names)
    return cells, ad.AnnData(sparse.csr_matrix(counts.astype(np.float32)), var=var)


def test_real_cells_have_the_markers_of_their_type():
    cells, counts = pbmc()
    labels = cells.obs["bulk_labels"]
    found, again = (
        describe_clusters(table([None] * 700), partial(markers_of, counts), labels, terms_table(), labels, 0.8)
        for _ in range(2)
    )
    named = {cluster.name: cluster.markers for cluster in found}
    assert list(named) == list(labels.cat.categories)
    assert "CD79A" in named["CD19+ B"]
    assert {"NKG7", "GNLY"} <= set(named["CD56+ NK"])
    assert {"FCN1", "S100A8"} & set(named["CD14+ Monocyte"])
    assert all(len(symbols) <= 10 for symbols in named.values())
    assert [cluster.own_label.label for cluster in found] == list(named)
    assert found == again


def test_found_clusters_of_real_cells():
    cells = sc.datasets.pbmc68k_reduced()
    found, again = (find_clusters(cells.obsm["X_pca"], seed=0) for _ in range(2))
    assert found.equals(again)
    assert 4 < found.nunique() < 15
    assert list(found.cat.categories) == [str(number) for number in range(found.nunique())]
    assert (np.diff(found.value_counts(sort=False)) <= 0).all()
    lineage = cells.obs["bulk_labels"].astype(str).replace({"CD14+ Monocyte": "myeloid", "Dendritic": "myeloid"})
    lineage = lineage.mask(lineage.str.contains(r"CD4\+|CD8\+"), "T cell")
    assert adjusted_rand_score(lineage, found) > 0.4
    check_clusters(found, "")


def test_found_clusters_do_not_mix_distant_groups():
    random, groups = np.random.default_rng(0), np.repeat([0, 1, 2], [60, 90, 30])
    for dimensions in (3, 120):
        pooled = random.normal(size=(180, dimensions)) + 50 * np.eye(3, dimensions)[groups]
        found = pd.crosstab(find_clusters(pooled.astype(np.float32), seed=1), groups)
        assert (found.gt(0).sum(axis=1) == 1).all()


def test_found_clusters_of_few_and_of_identical_cells():
    assert find_clusters(np.zeros((1, 3)), 0).tolist() == ["0"]
    assert find_clusters(np.zeros((1, 300)), 0).tolist() == ["0"]
    assert find_clusters(np.zeros((2, 3)), 0).tolist() == ["0", "0"]
    assert len(find_clusters(np.zeros((40, 3)), 0)) == 40
    for bad in (np.zeros((0, 3)), np.full((3, 3), np.nan)):
        with pytest.raises(ValueError, match="at least one cell"):
            find_clusters(bad, 0)


T_CELL, HELPER = TermShare("T", "T cell", 0.914), TermShare("T4", "helper T cell", 0.62)
FULL = Cluster(
    name="3",
    cells=1412,
    reported=T_CELL,
    guess=HELPER,
    runner_up=TermShare("T8", "cytotoxic T cell", 0.2),
    markers=("IL7R", "LTB"),
    programmes=(TermShare("P1", "ribosome, translation", 0.8), TermShare("P2", "hypoxia", 0.004)),
    novel=0.03,
    flagged=0.996,
    own_label=OwnLabel("T <b>cell</b>", None, 0.97, None),
)


def test_paragraph():
    assert paragraph(FULL) == (
        "Cluster 3 (1,412 cells): T cell (91% of the cells; the most frequent guess is helper T cell, 62%, then "
        "cytotoxic T cell, 20%). Markers: IL7R, LTB. Programmes: ribosome, translation (80%), hypoxia (<1%). "
        "3% of the cells are novel, that is, far from the training cells. >99% of the cells are flagged by QC. "
        'The file\'s own label is "T <b>cell</b>" (97%).'
    )


def test_paragraph_of_little():
    nothing = Cluster("my T\tcells", 5, None, None, None, (), (), None, 0.0, None)
    assert paragraph(nothing) == (
        'Cluster "my T\tcells" (5 cells): cell type not determined (too few cells agree). No marker genes found.'
    )
    guessed = replace(nothing, name="0", guess=HELPER, novel=0.0, own_label=OwnLabel("x", None, 0.4, None))
    assert paragraph(guessed) == (
        "Cluster 0 (5 cells): cell type not determined (too few cells agree; the most frequent guess is helper T cell, "
        '62%). No marker genes found. The file\'s most frequent own label is "x" (40%).'
    )


def test_paragraph_of_one_cell():
    one = replace(FULL, cells=1, runner_up=None, markers=(), novel=1.0, flagged=1.0)
    one = replace(one, own_label=OwnLabel("BM", "memory B cell", 1.0, True))
    assert paragraph(one) == (
        "Cluster 3 (1 cell): T cell (the guess is helper T cell). No marker genes found. Programmes: ribosome, "
        "translation, hypoxia. The cell is novel, that is, far from the training cells. The cell is flagged by QC. The "
        "file's own label is memory B cell [BM], which contradicts the reported cell type."
    )
    assert paragraph(replace(one, guess=replace(HELPER, id="T"))).startswith("Cluster 3 (1 cell): T cell. No marker")
    assert paragraph(replace(one, reported=None, guess=None)).startswith(
        "Cluster 3 (1 cell): cell type not determined."
    )


def test_a_guess_that_is_reported_is_not_named_twice():
    same = replace(FULL, guess=TermShare("T", "T cell", 0.9), runner_up=HELPER)
    assert "T cell (91% of the cells; also the most frequent guess, 90%, then helper T cell, 62%)." in paragraph(same)


def test_table(tmp_path):
    own = OwnLabel("BM", "memory B cell", 0.5, True)
    rows = clusters_table(
        [FULL, replace(FULL, name="4", own_label=own), Cluster("=x", 1, *[None] * 3, (), (), None, 0, None)]
    )
    assert rows["cluster"].tolist() == ["3", "4", "=x"]
    assert rows.loc[0, ["cell_type_id", "agreement", "guess", "runner_up_share"]].tolist() == [
        "T", 0.914, "helper T cell", 0.2,
    ]  # fmt: skip
    assert rows.loc[0, "text"] == paragraph(FULL)
    assert rows.loc[0, "programme_shares"] == "0.800; 0.004"
    assert rows["conflict"].tolist() == [pd.NA, True, pd.NA]
    write_tsv(rows, tmp_path / "clusters.tsv")
    read = pd.read_csv(tmp_path / "clusters.tsv", sep="\t")
    assert read["cells"].tolist() == [1412, 1412, 1]
    assert read["text"].tolist() == rows["text"].tolist()
    assert read["agreement"].isna().tolist() == [False, False, True]
    assert list(clusters_table([]).columns) == list(rows.columns)
