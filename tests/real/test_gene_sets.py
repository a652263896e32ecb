"""Published gene sets are scored on real cells as in a plain loop, and described in text."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cell2text.contracts import CELLS, DESCRIPTIONS, PATHWAY_SCORES, TERM_SLOTS, TERMS
from cell2text.corpus.gene_sets import name_pathways, read_gene_sets
from cell2text.corpus.pathways import choose_pathways, fit_sets
from cell2text.corpus.score_pathways import THINNED_TO, kept_share, score_pathways
from cell2text.corpus.write_descriptions import write_descriptions
from cell2text.grammar import Slots, Terms, parse, render
from cell2text.ontology import slot_terms

CELLS_TRIED = 50


@pytest.fixture
def shared(request):
    """Folder of real data next to the project."""
    folder = request.config.rootpath.parent / "shared/data"
    if not folder.exists():
        pytest.skip(f"{folder} is not available")
    return folder


def write_study(folder, study, counts):
    """Write a study with the given counts in the format of the workflow; return its cells, their file, the corpus."""
    folder.mkdir(exist_ok=True)
    ids = [f"study|{barcode}" for barcode in study.obs_names]
    cells = ad.AnnData(
        sparse.csr_matrix(counts, dtype=np.float32),
        obs=pd.DataFrame(index=ids),
        var=pd.DataFrame({"symbol": study.var["feature_name"].astype(str).to_numpy()}, index=study.var_names),
    )
    cells.write_h5ad(folder / "cells.h5ad")
    corpus = pd.DataFrame({"cell_id": ids, "split": "train", "n_counts": np.asarray(counts.sum(axis=1)).ravel()})
    for column in CELLS.columns:
        corpus[column] = corpus.get(column)
    corpus["cell_type_id"] = study.obs["cell_type_ontology_term_id"].astype(object).replace("unknown", None).to_numpy()
    CELLS.write(corpus.astype({"n_counts": float}), folder / "corpus.parquet")
    return cells, folder / "cells.h5ad", folder / "corpus.parquet"


@pytest.fixture
def blood(tmp_path, shared):
    """Fifty real cells."""
    study = ad.read_h5ad(shared / "studies/pbmc3k.h5ad")[:CELLS_TRIED]
    return write_study(tmp_path, study, study.X)


def test_hallmark_scores_equal_those_of_a_plain_loop(tmp_path, shared, blood):
    cells, cells_file, corpus_file = blood
    gmt = shared / "gene_sets/human_hallmark_v2025.gmt"
    score_pathways(cells_file, corpus_file, gmt, 5, tmp_path / "scores.parquet")
    scores = PATHWAY_SCORES.read(tmp_path / "scores.parquet").set_index("cell_id")
    first_of = cells.var["symbol"].reset_index(drop=True).drop_duplicates()
    columns = {symbol: column for column, symbol in first_of.items()}
    assert scores.notna().all(axis=None)
    for row, counts in enumerate(cells.X.toarray()):
        kept = min(THINNED_TO / counts.sum(), 1)
        for name, genes in read_gene_sets(gmt).items():
            left = [1 - (1 - kept) ** float(counts[columns[gene]]) for gene in genes if gene in columns]
            assert scores[name].iloc[row] == pytest.approx(sum(left), abs=1e-5)


def jaccard(first, second):
    shared = (first[:, :, None] == second[:, None, :]).sum(axis=(1, 2))
    return np.mean(shared / (4 - shared))


@pytest.mark.parametrize("name", ["pbmc3k", "nsclc_zilionis"])
def test_the_programmes_of_a_cell_survive_a_fifth_of_the_depth(request, tmp_path, shared, name):
    study, rng = ad.read_h5ad(shared / f"studies/{name}.h5ad"), np.random.default_rng(0)
    scores, kept = {}, {}
    for depth in ("whole", "fifth", "again"):
        counts = sparse.csr_matrix(study.X, dtype=np.float32)
        if depth != "whole":
            counts.data = rng.binomial(counts.data.astype(int), 0.2).astype(np.float32)
            counts.eliminate_zeros()
        _, cells_file, corpus_file = write_study(tmp_path / depth, study, counts)
        gmt = request.config.rootpath / "resources/programmes.gmt"
        score_pathways(cells_file, corpus_file, gmt, 5, tmp_path / depth / "scores.parquet")
        scores[depth] = PATHWAY_SCORES.read(tmp_path / depth / "scores.parquet").set_index("cell_id")
        kept[depth] = kept_share(np.asarray(counts.sum(axis=1)).ravel())
    fitted = fit_sets(lambda: [(scores[depth], kept[depth]) for depth in ("whole", "fifth")], 2, 0.005)
    pairs = {depth: choose_pathways(table, fitted, 2) for depth, table in scores.items()}
    shift = (scores["fifth"].mean() - scores["whole"].mean()).abs() / scores["whole"].std()
    assert shift.max() < 0.2
    # AUCell with a number of top genes per dataset: 0.34 and 0.45. Two thinned copies differ by chance alone.
    same, bound = jaccard(pairs["whole"], pairs["fifth"]), jaccard(pairs["fifth"], pairs["again"])
    assert same > 0.5 and same > bound


@pytest.mark.parametrize("name", ["human_hallmark_v2025", "ReactomePathways"])
def test_descriptions_with_published_sets_can_be_parsed(shared, name):
    ids = list(read_gene_sets(shared / f"gene_sets/{name}.gmt"))
    rows = name_pathways(ids, None)
    assert rows["name"].is_unique and len(rows) == {"human_hallmark_v2025": 50, "ReactomePathways": 2751}[name]
    assert not rows["name"].str.contains("_|HALLMARK").any()
    terms = Terms(pd.concat([*(slot_terms(slot) for slot in TERM_SLOTS), rows]))
    for pathways in zip(ids, [*ids[1:], ids[0]], strict=True):
        slots = Slots("CL:0000236", tissue="UBERON:0000178", pathways=pathways)
        assert parse(render(slots, terms), terms).slots == slots


def test_real_cells_are_described_with_reactome(tmp_path, shared, blood):
    _, cells_file, corpus_file = blood
    score_pathways(cells_file, corpus_file, shared / "gene_sets/ReactomePathways.gmt", 5, tmp_path / "scores.parquet")
    files = [tmp_path / file for file in ("descriptions.parquet", "terms.parquet", "kept.json")]
    write_descriptions(corpus_file, [tmp_path / "scores.parquet"], None, 0.005, 2, *files)
    described, terms = DESCRIPTIONS.read(files[0]), Terms(TERMS.read(files[1]))
    assert (described["pathway_ids"].str.len() == 2).all()
    for row in described.itertuples():
        parsed = parse(row.text, terms)
        assert parsed.slots.pathways == tuple(row.pathway_ids)
        assert parsed.slots.cell_type == row.cell_type_id
