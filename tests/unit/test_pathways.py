"""Gene sets are scored, standardised on training alone, and told in words that can be read back."""

import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse

from cell2text import pathways
from cell2text.contracts import CELLS, DESCRIPTIONS, PATHWAY_SCORES, TERM_SLOTS, TERMS, read_json
from cell2text.descriptions import PATHWAY, Slots, Terms, parse
from cell2text.pathways import (
    choose_pathways,
    count_top_genes,
    fit_sets,
    name_pathways,
    read_gene_sets,
    score_pathways,
    write_descriptions,
)

GENES = [f"G{i:02d}" for i in range(40)]


def write_cells(path, counts, symbols=GENES):
    cells = ad.AnnData(
        sparse.csr_matrix(np.asarray(counts, dtype=np.float32)),
        obs=pd.DataFrame(index=[f"d|{i}" for i in range(len(counts))]),
        var=pd.DataFrame({"symbol": list(symbols)}, index=[f"id{i}" for i in range(len(symbols))]),
    )
    cells.write_h5ad(path)
    return path


def write_corpus(path, cell_ids, splits="train", **columns):
    table = pd.DataFrame({"cell_id": cell_ids, "split": splits, **columns})
    for column in CELLS.columns:
        table[column] = table.get(column)
    CELLS.write(table[list(CELLS.columns)], path)
    return path


def score(tmp_path, counts, sets, cell_ids=None, min_genes=1, symbols=GENES):
    cells = write_cells(tmp_path / "cells.h5ad", counts, symbols)
    cell_ids = cell_ids or [f"d|{i}" for i in range(len(counts))]
    corpus = write_corpus(tmp_path / "corpus.parquet", cell_ids)
    gmt = tmp_path / "sets.gmt"
    gmt.write_text("".join(f"{name}\t\t{chr(9).join(genes)}\n" for name, genes in sets.items()))
    score_pathways(cells, corpus, gmt, min_genes, tmp_path / "scores.parquet")
    return PATHWAY_SCORES.read(tmp_path / "scores.parquet").set_index("cell_id")


def distinct_counts(cells, seed=0):
    """Return counts without ties: each cell a permutation of 1..40."""
    rng = np.random.default_rng(seed)
    return np.array([rng.permutation(len(GENES)) + 1 for _ in range(cells)])


def test_the_score_is_the_area_under_the_recovery_curve(tmp_path, monkeypatch):
    monkeypatch.setattr(pathways, "TOP_SHARE", 0.25)  # the top 10 of 40 genes
    counts = [range(40, 0, -1)]  # G00 ranks first, G39 last
    scores = score(tmp_path, counts, {"A": ["G00", "G04", "G20"], "B": ["G30", "G31"], "C": GENES[:3]})
    # Ranks 1 and 5 of three genes: (5-1)*1 + (10-5)*2 = 14; ranks 1, 2, 3 would give 1 + 2 + 7*3 = 24.
    assert scores.loc["d|0"].to_dict() == pytest.approx({"A": 14 / 24, "B": 0, "C": 1})


def test_the_score_of_a_cell_does_not_depend_on_its_neighbours_or_blocks(tmp_path, monkeypatch):
    # Sparse, so that a few cells alone leave many genes without a count.
    counts = np.random.default_rng(0).poisson(0.2, (20, 40)) + np.eye(20, 40, dtype=int)
    monkeypatch.setattr(pathways, "count_top_genes", lambda path, corpus: 6)
    sets = {"A": GENES[:9], "B": GENES[5:20]}
    whole = score(tmp_path, counts, sets)
    monkeypatch.setattr(pathways, "CELLS_AT_ONCE", 3)
    pd.testing.assert_frame_equal(whole, score(tmp_path, counts, sets))
    some = [f"d|{i}" for i in (7, 3, 11)]
    pd.testing.assert_frame_equal(whole.loc[some], score(tmp_path, counts, sets, cell_ids=some))


def test_a_set_with_too_few_measured_genes_is_not_scored(tmp_path, caplog):
    sets = {"FEW": ["G00", "G01", "ELSEWHERE"], "MANY": GENES[:3]}
    with caplog.at_level("INFO"):
        scores = score(tmp_path, distinct_counts(3), sets, min_genes=3)
    assert list(scores) == ["FEW", "MANY"]
    assert scores["FEW"].isna().all() and scores["MANY"].notna().all()
    assert "FEW" in caplog.text and "MANY" not in caplog.text


def test_a_symbol_that_two_genes_share_counts_once(tmp_path):
    counts = distinct_counts(2)
    scores = score(tmp_path, counts, {"A": ["G00", "G01"]}, symbols=["G00", *GENES[:-1]])
    once = score(tmp_path, counts[:, [0, *range(2, 40)]], {"A": ["G00", "G01"]}, symbols=GENES[:-1])
    pd.testing.assert_frame_equal(scores, once)


def test_top_genes_are_no_more_than_training_cells_express(tmp_path):
    counts = np.zeros((40, 200))
    for cell in range(40):
        counts[cell, : cell + 1] = 1  # 1 to 40 genes
    cells = write_cells(tmp_path / "cells.h5ad", counts, [f"G{i}" for i in range(200)])
    ids = [f"d|{i}" for i in range(40)]
    rich = pd.DataFrame({"cell_id": ids, "split": ["test"] * 20 + ["train"] * 20})
    poor = pd.DataFrame({"cell_id": ids, "split": ["train"] * 20 + ["test"] * 20})
    assert count_top_genes(cells, rich) == 10  # 5% of 200
    assert count_top_genes(cells, poor) == 2  # the 5th percentile of 1..20 is 1.95, and two is the least
    assert count_top_genes(cells, rich.assign(split="test")) == 2  # of 1..40 it is 2.95


def test_sets_are_standardised_and_filtered_by_hand():
    scores = pd.DataFrame(
        {
            "CONSTANT": [0.5, 0.5, 0.5, 0.5],
            "COMMON": [0.4, 0.2, 0.4, 0.2],
            "RARE": [0.0, 0.0, 0.0, 0.8],
            "ELSEWHERE": [np.nan, np.nan, 0.1, 0.3],
        },
        index=list("abcd"),
    )
    fitted = fit_sets(scores, per_cell=1, min_active_share=0)
    # COMMON: z +1, -1, +1, -1. RARE: z -0.58 three times, then 1.73. ELSEWHERE: -1, +1.
    # Highest above nought: a COMMON, b COMMON (RARE is nought), c COMMON, d RARE.
    assert fitted["active_share"].to_dict() == {"COMMON": 0.75, "RARE": 0.25}
    assert fitted["mean"].to_dict() == pytest.approx({"COMMON": 0.3, "RARE": 0.2})
    assert fitted["sd"].to_dict() == pytest.approx({"COMMON": 0.1, "RARE": 0.2 * 3**0.5})
    assert list(fit_sets(scores, 1, 0.25).index) == ["COMMON"]
    assert choose_pathways(scores, fitted, 2) == [("COMMON",), ("COMMON",), ("COMMON",), ("RARE", "COMMON")]


def test_a_set_that_is_not_measured_or_not_seen_is_never_chosen():
    fitted = pd.DataFrame({"mean": [0.5, 0.5, 0.5], "sd": [1, 1, 1]}, index=["A", "B", "C"])
    scores = pd.DataFrame({"A": [0.0, 0.2], "B": [np.nan, 0.2], "C": [0.1, 0.1]})
    # Of equals, the first.
    assert choose_pathways(scores, fitted, 2) == [("C",), ("A", "B")]


def write_scores(path, scores):
    PATHWAY_SCORES.write(scores.astype("float32").reset_index(names="cell_id"), path)
    return path


def describe_all(tmp_path, scores, splits, table="id\tname\tdescription\n", **columns):
    corpus = write_corpus(tmp_path / "corpus.parquet", list(scores.index), splits, **columns)
    (tmp_path / "sets.tsv").write_text(table)
    files = [tmp_path / name for name in ("descriptions.parquet", "terms.parquet", "kept.json")]
    write_descriptions(
        corpus, [write_scores(tmp_path / "scores.parquet", scores)], tmp_path / "sets.tsv", 0.005, 2, *files
    )
    return DESCRIPTIONS.read(files[0]), TERMS.read(files[1]), read_json(files[2])


def test_nothing_is_fitted_on_validation_or_test(tmp_path):
    rng = np.random.default_rng(0)
    index = [f"d|{i}" for i in range(30)]
    scores = pd.DataFrame(rng.random((30, 4)), index=index, columns=list("ABCD"))
    splits = ["train"] * 20 + ["validation"] * 5 + ["test"] * 5
    first, _, kept = describe_all(tmp_path, scores, splits)
    changed = scores.copy()
    changed.iloc[20:] = rng.random((10, 4)) * 9
    second, _, kept_again = describe_all(tmp_path, changed, splits)
    assert kept == kept_again and len(kept) == 4
    pd.testing.assert_frame_equal(first[:20], second[:20])
    assert first["text"][20:].tolist() != second["text"][20:].tolist()
    assert [row["id"] for row in kept] == list("ABCD")
    assert kept[0]["mean"] == pytest.approx(scores["A"][:20].mean(), rel=1e-6)


def test_a_description_tells_what_is_known_and_can_be_read_back(tmp_path):
    scores = pd.DataFrame({"SET_A": [0.9, 0.1, 0.2], "SET_B": [0.1, 0.6, 0.1]}, index=["d|0", "d|1", "d|2"])
    descriptions, terms, _ = describe_all(
        tmp_path,
        scores,
        ["train", "train", "test"],
        "id\tname\tdescription\nSET_A\tfirst set\twhat the first set does\n",
        cell_type_id=["CL:0000624", "CL:0000236", "CL:0000236"],
        tissue_id=["UBERON:0000178", None, None],
        disease_id=["PATO:0000461", "MONDO:0005233", None],
        sex_id=["PATO:0000383", None, "PATO:0000384"],
    )
    text = descriptions["text"][0]
    assert text.startswith("This is a CD4-positive, alpha-beta T cell. By definition: ")
    assert "The sample is blood from a female donor, without known disease." in text
    assert text.endswith("Most active gene programmes: first set (what the first set does); then SET B.")
    known = Terms(terms)
    for row in descriptions.itertuples():
        ids = {slot: getattr(row, f"{slot}_id") for slot in TERM_SLOTS}
        told = Slots(**ids, definition=row.definition, pathways=tuple(row.pathway_ids))
        assert parse(row.text, known).slots == told
        assert parse(row.text, known).status == "parsed"


def test_terms_hold_every_slot_and_the_kept_sets_alone(tmp_path):
    scores = pd.DataFrame({"A": [0.1, 0.2], "CONSTANT": [0.3, 0.3]}, index=["d|0", "d|1"])
    _, terms, _ = describe_all(tmp_path, scores, "train", cell_type_id="CL:0000236")
    assert set(terms["slot"]) == {*TERM_SLOTS, PATHWAY}
    assert not terms.duplicated(["slot", "id"]).any() and not terms.duplicated(["slot", "name"]).any()
    assert terms["id"][terms["slot"] == PATHWAY].tolist() == ["A"]
    assert "PATO:0000461" in set(terms["id"][terms["slot"] == "disease"])
    assert (terms["slot"] == "cell_type").sum() > 3000


def test_a_set_without_a_line_goes_by_its_id(tmp_path):
    (tmp_path / "sets.tsv").write_text("id\tname\tdescription\n")
    rows = name_pathways(["HALLMARK_HYPOXIA", "2-LTR circle formation"], tmp_path / "sets.tsv")
    assert rows["name"].tolist() == ["HALLMARK HYPOXIA", "2-LTR circle formation"]
    assert rows["definition"].tolist() == ["", ""]


def test_our_programmes_are_well_formed(request):
    folder = request.config.rootpath / "resources"
    sets = read_gene_sets(folder / "programmes.gmt")
    rows = name_pathways(list(sets), folder / "programmes.tsv").set_index("id")
    described = pd.read_csv(folder / "programmes.tsv", sep="\t")
    assert list(described["id"]) == list(sets)
    assert 16 <= len(sets) <= 20
    for name, genes in sets.items():
        assert 15 <= len(genes) <= 40, name
        assert all(re.fullmatch(r"[A-Z][A-Z0-9-]+", gene) for gene in genes), name
        definition = rows.loc[name, "definition"]
        assert 6 <= len(definition.split()) <= 12, definition
        assert not definition.endswith(".") and not set("();") & set(definition), definition


def test_our_programmes_tell_blood_cells_apart(tmp_path, request):
    published = sc.datasets.pbmc68k_reduced()
    counts = np.rint(np.expm1(published.raw.X.toarray()) * published.obs["n_counts"].to_numpy()[:, None] / 1e4)
    cells = write_cells(tmp_path / "cells.h5ad", counts, list(published.var_names))
    ids = [f"d|{i}" for i in range(700)]
    corpus = write_corpus(tmp_path / "corpus.parquet", ids)
    gmt = request.config.rootpath / "resources/programmes.gmt"
    score_pathways(cells, corpus, gmt, 5, tmp_path / "scores.parquet")
    scores = PATHWAY_SCORES.read(tmp_path / "scores.parquet").set_index("cell_id").loc[ids]
    labels = published.obs["bulk_labels"].astype(str).to_numpy()
    typical = scores.groupby(labels).mean()
    assert typical["B_CELL_RECEPTOR_IMMUNOGLOBULIN"].idxmax() == "CD19+ B"
    assert typical["CYTOTOXICITY"].idxmax() == "CD56+ NK"
    assert typical["COMPLEMENT_PHAGOCYTOSIS"].idxmax() == "CD14+ Monocyte"
    assert typical["ANTIGEN_PRESENTATION_MHC_II"].idxmax() == "Dendritic"
    told = choose_pathways(scores, fit_sets(scores, 2, 0.005), 2)
    b_cells = [names for names, label in zip(told, labels, strict=True) if label == "CD19+ B"]
    assert np.mean(["B_CELL_RECEPTOR_IMMUNOGLOBULIN" in names for names in b_cells]) > 0.7
