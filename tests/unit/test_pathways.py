"""Gene sets are scored, standardised on training cells only, and described in text that can be parsed."""

import re
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse

from cell2text.cells import h5ad
from cell2text.contracts import CELLS, DESCRIPTIONS, PATHWAY_SCORES, TERM_SLOTS, TERMS
from cell2text.corpus import score_pathways as scoring
from cell2text.corpus import write_descriptions as writing
from cell2text.corpus.gene_sets import find_members, name_pathways, read_gene_sets, readable_name
from cell2text.corpus.pathways import choose_pathways, fit_sets
from cell2text.corpus.score_pathways import THINNED_TO, kept_share, score_pathways
from cell2text.corpus.write_descriptions import write_descriptions
from cell2text.evaluation.similarity import ontology_edges
from cell2text.files import read_json
from cell2text.grammar import PATHWAY, Slots, Terms, parse, render

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


def test_the_score_is_the_expected_number_of_genes_left_at_50_counts(tmp_path):
    counts = np.zeros((3, 40))
    counts[0, :4] = 1, 2, 97, 100  # 200 counts: each is kept with probability 1/4
    counts[1, :2] = 1, 49  # 50 counts, which is not thinned
    counts[2, 1] = 3  # fewer counts
    scores = score(tmp_path, counts, {"A": ["G00", "G01"], "B": ["G01", "G02", "G30"]})
    one, two, many = 1 - 3 / 4, 1 - (3 / 4) ** 2, 1 - (3 / 4) ** 97
    assert scores["A"].tolist() == pytest.approx([one + two, 2, 1])
    assert scores["B"].tolist() == pytest.approx([two + many, 1, 1])


def test_the_expected_score_does_not_depend_on_depth(tmp_path):
    rng = np.random.default_rng(0)
    cell = rng.multinomial(2000, rng.dirichlet(np.full(40, 0.1)))
    sets = {"A": GENES[:9], "B": GENES[5:20], "C": GENES[30:]}
    deep = score(tmp_path, [cell], sets)
    thinned = rng.binomial(cell, 0.1, size=(4000, 40))  # about 200 counts
    shallow = score(tmp_path, thinned, sets)
    error = shallow.std() / len(shallow) ** 0.5
    assert ((shallow.mean() - deep.iloc[0]).abs() < 4 * error + 0.01).all()
    assert (thinned > 0).sum(axis=1).mean() < 0.8 * (cell > 0).sum()  # unlike the number of expressed genes


def test_the_score_of_a_cell_does_not_depend_on_other_cells_or_blocks(tmp_path, monkeypatch):
    # Sparse, so that many genes have no counts in a few cells; at very different depths.
    counts = np.random.default_rng(0).poisson(0.2, (20, 40)) * (1 + 10 * np.arange(20)[:, None]) + np.eye(20, 40)
    sets = {"A": GENES[:9], "B": GENES[5:20]}
    whole = score(tmp_path, counts, sets)
    monkeypatch.setattr(scoring, "read_blocks", partial(h5ad.read_blocks, at_once=3))
    pd.testing.assert_frame_equal(whole, score(tmp_path, counts, sets))
    some = [f"d|{i}" for i in (7, 3, 11)]
    pd.testing.assert_frame_equal(
        whole.loc[some].sort_index(), score(tmp_path, counts, sets, cell_ids=some).sort_index()
    )
    for rows in (slice(0, 7), slice(7, 20)):  # two shards
        shard = score(tmp_path, counts[rows], sets).to_numpy()
        np.testing.assert_array_equal(shard, whole.to_numpy()[rows])


def test_a_set_with_too_few_measured_genes_is_not_scored(tmp_path, caplog):
    sets = {"FEW": ["G00", "G01", "ELSEWHERE"], "MANY": GENES[:3]}
    with caplog.at_level("INFO"):
        scores = score(tmp_path, distinct_counts(3), sets, min_genes=3)
    assert list(scores) == ["FEW", "MANY"]
    assert scores["FEW"].isna().all() and scores["MANY"].notna().all()
    assert "FEW" in caplog.text and "MANY" not in caplog.text


def test_a_panel_without_enough_genes_of_any_set_has_no_scores(tmp_path, caplog):
    scores = score(tmp_path, distinct_counts(3), {"A": GENES[:2], "B": GENES[1:3]}, min_genes=3)
    assert scores.shape == (3, 2) and scores.isna().all(axis=None)
    assert "described without gene programmes" in caplog.text
    fitted = pd.DataFrame({"mean": 0.0, "sd": 1.0, "reliability": 1.0}, index=["A", "B"])
    assert choose_pathways(scores, fitted, 2).tolist() == [[-1, -1]] * 3


def test_a_symbol_shared_by_two_genes_counts_once(tmp_path):
    counts = np.zeros((1, 40))
    counts[0, [0, 1, 2]] = 1, 150, 49  # G00, again G00, G01
    scores = score(tmp_path, counts, {"A": ["G00", "G01"], "B": ["G00"]}, symbols=["G00", *GENES[:-1]])
    # The second gene counts for the depth of the cell, 200 counts, but not for the set.
    assert scores.to_numpy().tolist() == [pytest.approx([1 / 4 + 1 - (3 / 4) ** 49, 1 / 4])]


def test_sets_are_standardised_and_filtered_as_by_hand():
    scores = pd.DataFrame(
        {
            "CONSTANT": [0.5, 0.5, 0.5, 0.5],
            "COMMON": [0.4, 0.2, 0.4, 0.2],
            "RARE": [0.0, 0.0, 0.0, 0.8],
            "ELSEWHERE": [np.nan, np.nan, 0.1, 0.3],
        },
        index=list("abcd"),
    )
    fitted = fit_sets(lambda: [(scores, np.zeros(4))], per_cell=1, min_active_share=0)
    # COMMON: z +1, -1, +1, -1. RARE: z -0.58 three times, then 1.73. ELSEWHERE: -1, +1.
    # Highest z with a score above zero: a COMMON, b COMMON (RARE is zero), c COMMON, d RARE.
    assert fitted["active_share"].to_dict() == {"COMMON": 0.75, "RARE": 0.25}
    assert fitted["mean"].to_dict() == pytest.approx({"COMMON": 0.3, "RARE": 0.2})
    assert fitted["sd"].to_dict() == pytest.approx({"COMMON": 0.1, "RARE": 0.2 * 3**0.5})
    assert fitted["reliability"].tolist() == [1, 1]  # no thinning, no noise
    assert list(fit_sets(lambda: [(scores, np.zeros(4))], 1, 0.25).index) == ["COMMON"]
    assert named(choose_pathways(scores, fitted, 2), fitted) == [
        ("COMMON",), ("COMMON",), ("COMMON",), ("RARE", "COMMON"),
    ]  # fmt: skip
    in_parts = fit_sets(lambda: ((scores[i : i + 1], np.zeros(1)) for i in range(4)), 1, 0)
    pd.testing.assert_frame_equal(in_parts, fitted)


def test_a_set_counts_by_the_share_of_its_variance_that_is_not_sampling_noise():
    scores = pd.DataFrame({"QUIET": [1.0, 3.0, 1.0, 3.0], "NOISY": [9.0, 11.0, 11.0, 9.0], "NOISE": [60.0, 62, 60, 62]})
    fitted = fit_sets(lambda: [(scores, np.array([0.05, 0.05, 0.01, 0.01]))], per_cell=3, min_active_share=0)
    # Each has variance 1. Noise: the mean of score times kept share, such as (0.05 + 0.15 + 0.01 + 0.03) / 4.
    noise = {"QUIET": 0.24 / 4, "NOISY": (20 * 0.05 + 20 * 0.01) / 4}
    assert fitted["reliability"].to_dict() == pytest.approx(
        {name: 1 - n for name, n in noise.items()} | {"NOISE": 0.01}
    )
    # All three are a standard deviation above their mean in the second cell.
    assert named(choose_pathways(scores, fitted, 3), fitted)[1] == ("QUIET", "NOISY", "NOISE")


def test_cells_of_unknown_depth_do_not_add_noise():
    scores = pd.DataFrame({"A": [1.0, 3.0]})
    fitted = fit_sets(lambda: [(scores, kept_share(np.array([np.nan, np.nan])))], 1, 0)
    assert fitted["reliability"].tolist() == [1]
    assert kept_share(np.array([10.0, THINNED_TO, 4 * THINNED_TO])).tolist() == [1, 1, 0.25]


def named(chosen, fitted):
    return [tuple(fitted.index[i] for i in row if i >= 0) for row in chosen]


def test_fitting_in_parts_with_missing_scores_equals_fitting_at_once():
    rng = np.random.default_rng(0)
    scores = pd.DataFrame(rng.random((500, 6)).astype("float32"), columns=list("ABCDEF")) * 0.1 + 0.9
    scores.loc[:199, "B"] = np.nan
    scores["E"] = np.float32(0.1)  # its mean is rounded
    fitted = fit_sets(
        lambda: ((scores[i : i + 37], np.zeros(len(scores[i : i + 37]))) for i in range(0, 500, 37)), 2, 0.005
    )
    assert list(fitted.index) == list("ABCDF")
    assert fitted["mean"].to_numpy() == pytest.approx(scores[fitted.index].astype(float).mean().to_numpy(), rel=1e-12)
    assert fitted["sd"].to_numpy() == pytest.approx(scores[fitted.index].astype(float).std(ddof=0).to_numpy(), rel=1e-9)
    standard = (scores[fitted.index] - fitted["mean"]) / fitted["sd"]
    expected = [
        tuple(row.dropna().sort_values(ascending=False, kind="stable").index[:2]) for _, row in standard.iterrows()
    ]
    assert named(choose_pathways(scores, fitted, 2), fitted) == expected


def test_a_set_with_a_missing_or_zero_score_is_never_chosen():
    fitted = pd.DataFrame({"mean": [0.5, 0.5, 0.5], "sd": [1, 1, 1], "reliability": 1.0}, index=["A", "B", "C"])
    scores = pd.DataFrame({"A": [0.0, 0.2], "B": [np.nan, 0.2], "C": [0.1, 0.1]})
    # Ties go to the first.
    assert choose_pathways(scores, fitted, 2).tolist() == [[2, -1], [0, 1]]
    assert choose_pathways(scores, fitted, 5).tolist() == [[2, -1, -1, -1, -1], [0, 1, 2, -1, -1]]


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


def test_a_description_contains_the_known_slots_and_can_be_parsed(tmp_path):
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
    assert text.startswith(
        "This is a CD4-positive, alpha-beta T cell. The sample is blood from a female donor, without known disease. "
        "Most active gene programmes: first set; then SET B. Definitions. Cell type: A "
    )
    assert text.endswith(". Programme 1: what the first set does.")
    known = Terms(terms)
    for row in descriptions.itertuples():
        ids = {slot: getattr(row, f"{slot}_id") for slot in TERM_SLOTS}
        slots = Slots(**ids, pathways=tuple(row.pathway_ids))
        assert parse(row.text, known).slots == slots
        assert parse(row.text, known).status == "parsed"


def test_descriptions_do_not_depend_on_parts_or_files(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    scores = pd.DataFrame(rng.random((60, 4)), index=[f"d|{i}" for i in range(60)], columns=list("ABCD"))
    known = {
        "cell_type_id": rng.choice(["CL:0000236", "CL:0000624", None], 60),
        "tissue_id": rng.choice(["UBERON:0000178", None], 60),
        "disease_id": rng.choice(["PATO:0000461", "MONDO:0005233", None], 60),
        "sex_id": None,
        "stage_id": rng.choice(["HsapDv:0000206", None], 60),
    }
    whole, terms, kept = describe_all(tmp_path, scores, ["train"] * 40 + ["test"] * 20, **known)
    words = Terms(terms)
    for row in whole.itertuples():
        slots = Slots(
            **{
                slot: known[f"{slot}_id"][row.Index] if known[f"{slot}_id"] is not None else None for slot in TERM_SLOTS
            },
            pathways=tuple(row.pathway_ids),
        )
        assert row.text == render(slots, words)
        assert len(row.pathway_ids) == 2

    monkeypatch.setattr(writing, "DESCRIBED_AT_ONCE", 7)
    shuffled = scores.sample(frac=1, random_state=0)
    parts = [write_scores(tmp_path / f"{i}.parquet", shuffled[i * 25 : (i + 1) * 25]) for i in range(3)]
    files = [tmp_path / name for name in ("again.parquet", "terms2.parquet", "kept2.json")]
    write_descriptions(tmp_path / "corpus.parquet", parts, None, 0.005, 2, *files)
    pd.testing.assert_frame_equal(DESCRIPTIONS.read(files[0]), whole)
    pd.testing.assert_frame_equal(TERMS.read(files[1]), terms)
    pd.testing.assert_frame_equal(pd.DataFrame(kept), pd.DataFrame(read_json(files[2])), rtol=1e-9)


def test_a_cell_without_scores_is_an_error(tmp_path):
    scores = pd.DataFrame({"A": [0.1, 0.2], "B": [0.2, 0.1]}, index=["d|0", "d|1"])
    corpus = write_corpus(tmp_path / "corpus.parquet", ["d|0", "d|1", "d|2"])
    files = [tmp_path / name for name in ("descriptions.parquet", "terms.parquet", "kept.json")]
    with pytest.raises(ValueError, match=r"d\|2 has no scores"):
        write_descriptions(corpus, [write_scores(tmp_path / "scores.parquet", scores)], None, 0.005, 2, *files)
    assert not any(file.exists() for file in files)


def test_terms_contain_every_slot_and_only_the_kept_sets(tmp_path):
    scores = pd.DataFrame({"A": [0.1, 0.2], "CONSTANT": [0.3, 0.3]}, index=["d|0", "d|1"])
    _, terms, _ = describe_all(tmp_path, scores, "train", cell_type_id="CL:0000236")
    assert set(terms["slot"]) == {*TERM_SLOTS, PATHWAY}
    assert not terms.duplicated(["slot", "id"]).any() and not terms.duplicated(["slot", "name"]).any()
    assert terms["id"][terms["slot"] == PATHWAY].tolist() == ["A"]
    assert "PATO:0000461" in set(terms["id"][terms["slot"] == "disease"])
    cell_types = terms[terms["slot"] == "cell_type"].set_index("id")
    assert len(cell_types) > 3000
    # a T cell is a lymphocyte, a mononuclear leukocyte, a leukocyte, a hematopoietic cell, a cell
    line = ["CL:0000000", "CL:0000988", "CL:0000738", "CL:0000842", "CL:0000542", "CL:0000084"]
    assert cell_types.loc[line, "depth"].tolist() == [0, 1, 2, 3, 4, 5]
    nearest_first = [term for term in cell_types["ancestors"]["CL:0000084"] if term in line]
    assert nearest_first == line[-2::-1] and cell_types["ancestors"]["CL:0000000"].tolist() == []
    above = terms.groupby("slot")["ancestors"].agg(lambda ids: ids.map(len).max() > 0)
    assert set(above.index[above]) == {"cell_type", "tissue", "disease"}
    no_place = terms[~terms["slot"].isin(above.index[above]) | (terms["id"] == "PATO:0000461")]
    assert no_place["depth"].isna().all() and terms["depth"].isna().sum() == len(no_place)
    tissues = terms[terms["slot"] == "tissue"].set_index("id")
    cortex, kidney = "UBERON:0001225", "UBERON:0002113"
    assert kidney in tissues["ancestors"][cortex]  # by part_of
    assert tissues["depth"][[cortex, kidney, "UBERON:0001062"]].tolist() == [4, 3, 0]
    parents = pd.DataFrame(ontology_edges("CL"), columns=["child", "parent"])
    nearest = parents["parent"].map(cell_types["depth"]).groupby(parents["child"]).min()
    assert len(nearest) > 3000 and (cell_types.loc[nearest.index, "depth"] == nearest + 1).all()


def test_a_set_that_is_not_in_the_table_is_named_after_its_id(tmp_path):
    (tmp_path / "sets.tsv").write_text("id\tname\tdescription\n")
    rows = name_pathways(["HALLMARK_HYPOXIA", "2-LTR circle formation"], tmp_path / "sets.tsv")
    assert rows["name"].tolist() == ["hypoxia", "2-LTR circle formation"]
    assert rows["definition"].tolist() == ["", ""]
    pd.testing.assert_frame_equal(name_pathways(["HALLMARK_HYPOXIA", "2-LTR circle formation"], None), rows)


def test_sets_with_the_same_name_keep_their_collection():
    rows = name_pathways(["HALLMARK_APOPTOSIS", "KEGG_APOPTOSIS", "WP_FERROPTOSIS"], None)
    assert rows["name"].tolist() == ["HALLMARK APOPTOSIS", "KEGG APOPTOSIS", "ferroptosis"]


@pytest.mark.parametrize(
    ("gene_set", "name"),
    [
        ("HALLMARK_TNFA_SIGNALING_VIA_NFKB", "TNFA signaling via NFKB"),
        ("HALLMARK_IL6_JAK_STAT3_SIGNALING", "IL6 JAK STAT3 signaling"),
        ("HALLMARK_KRAS_SIGNALING_DN", "KRAS signaling down"),
        ("HALLMARK_MYC_TARGETS_V1", "MYC targets V1"),
        ("HALLMARK_PI3K_AKT_MTOR_SIGNALING", "PI3K AKT MTOR signaling"),
        ("REACTOME_REGULATION_OF_TP53_ACTIVITY", "regulation of TP53 activity"),
        ("GOBP_DNA_REPAIR", "DNA repair"),
        ("HALLMARK", "HALLMARK"),
        ("HALLMARK_", "HALLMARK"),
        ("CD8_TEFF_GZMK", "CD8 TEFF GZMK"),
        ("Regulation of TP53 Activity", "Regulation of TP53 Activity"),
        ("my_own_set", "my own set"),
    ],
)
def test_readable_names_of_gene_sets(gene_set, name):
    assert readable_name(gene_set) == name


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


def blood_counts():
    published = sc.datasets.pbmc68k_reduced()
    counts = np.rint(np.expm1(published.raw.X.toarray()) * published.obs["n_counts"].to_numpy()[:, None] / 1e4)
    return published, counts


def test_our_programmes_distinguish_blood_cells(tmp_path, request):
    published, counts = blood_counts()
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
    fitted = fit_sets(lambda: [(scores, kept_share(counts.sum(axis=1)))], 2, 0.005)
    chosen = named(choose_pathways(scores, fitted, 2), fitted)
    b_cells = [names for names, label in zip(chosen, labels, strict=True) if label == "CD19+ B"]
    assert np.mean(["B_CELL_RECEPTOR_IMMUNOGLOBULIN" in names for names in b_cells]) > 0.7


def test_members_of_sets_by_hand():
    found = find_members([["A", "C", "NONE"], [], ["B"]], ["B", "A", "C", "A"])
    # the second A is another gene, which the set does not mean
    assert found.toarray().tolist() == [[0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 0]]
