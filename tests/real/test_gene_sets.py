"""Published gene sets are scored on real cells as in a plain loop, and described in text."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cell2text.contracts import CELLS, DESCRIPTIONS, PATHWAY_SCORES, TERM_SLOTS, TERMS
from cell2text.corpus.gene_sets import name_pathways, read_gene_sets
from cell2text.corpus.score_pathways import score_pathways
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


@pytest.fixture
def blood(tmp_path, shared):
    """Fifty real cells in the format of the workflow: the cells, their file, and their corpus."""
    study = ad.read_h5ad(shared / "studies/pbmc3k.h5ad")[:CELLS_TRIED]
    ids = [f"pbmc3k|{barcode}" for barcode in study.obs_names]
    cells = ad.AnnData(
        sparse.csr_matrix(study.X, dtype=np.float32),
        obs=pd.DataFrame(index=ids),
        var=pd.DataFrame({"symbol": study.var["feature_name"].astype(str).to_numpy()}, index=study.var_names),
    )
    cells.write_h5ad(tmp_path / "cells.h5ad")
    corpus = pd.DataFrame({"cell_id": ids, "split": "train"})
    for column in CELLS.columns:
        corpus[column] = corpus.get(column)
    corpus["cell_type_id"] = study.obs["cell_type_ontology_term_id"].astype(object).replace("unknown", None).to_numpy()
    CELLS.write(corpus, tmp_path / "corpus.parquet")
    return cells, tmp_path / "cells.h5ad", tmp_path / "corpus.parquet"


def score_by_hand(counts, symbols, sets, top_genes):
    """AUCell gene by gene: a gene at rank r adds the ranks after it, relative to the maximum."""
    drawn = np.random.default_rng(seed=0).choice(len(symbols), len(symbols), replace=False)
    place = np.argsort(drawn)  # genes with equal counts are in the order of the draw
    scores = np.zeros((len(counts), len(sets)))
    for cell, row in enumerate(counts):
        rank = pd.Series(np.argsort(np.lexsort((place, -row))) + 1, index=symbols)
        for column, genes in enumerate(sets.values()):
            ranks = rank[rank.index.intersection(genes)].to_numpy()
            most = np.clip(top_genes - np.arange(1, len(ranks) + 1), 0, None).sum()
            scores[cell, column] = np.clip(top_genes - ranks, 0, None).sum() / most
    return scores


def test_hallmark_scores_equal_those_of_a_plain_loop(tmp_path, shared, blood):
    cells, cells_file, corpus_file = blood
    gmt = shared / "gene_sets/human_hallmark_v2025.gmt"
    score_pathways(cells_file, corpus_file, gmt, 5, tmp_path / "scores.parquet")
    scores = PATHWAY_SCORES.read(tmp_path / "scores.parquet").set_index("cell_id")
    unique = ~cells.var["symbol"].duplicated().to_numpy()
    counts = cells.X[:, unique].toarray()
    top_genes = min(np.ceil(0.05 * cells.n_vars), int(np.quantile(np.diff(cells.X.indptr), 0.05)))
    # most genes around the last rank have equal counts
    assert np.median(np.sort(counts, axis=1)[:, -int(top_genes)]) <= 2
    expected = score_by_hand(counts, cells.var["symbol"][unique].to_numpy(), read_gene_sets(gmt), int(top_genes))
    assert scores.notna().all(axis=None)
    np.testing.assert_allclose(scores.to_numpy(), expected, atol=1e-6)


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
