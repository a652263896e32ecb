"""Orthologues on real genes: the table that is fetched, and eight human studies under the names of mouse genes."""

import anndata as ad
import pandas as pd
import pytest

from cell2text.cells.fetch_dataset import fetch_dataset
from cell2text.cells.orthologues import read_orthologues
from cell2text.models.fetch_resource import ORTHOLOGUES
from mouse_names import BIOMART, fetch_table, one_to_one, read_pairs, shares

HUMAN_OF = {
    "Lyz2": "LYZ", "Ins1": "INS", "Ins2": "INS", "Cd8b1": "CD8B", "mt-Cytb": "MT-CYB", "H2-Ea": "HLA-DRA",
    "Il3ra": "IL3RA", "Hbb-bs": "HBB", "Hbb-bt": "HBB", "Fcgr4": "FCGR3B", "Prss1": "PRSS1",
}  # fmt: skip


@pytest.fixture(scope="module")
def tables(request):
    paths = [fetch_table(source, request.config.rootpath) for source in (ORTHOLOGUES, BIOMART)]
    if None in paths:
        pytest.skip("the table of orthologues cannot be fetched")
    return paths


@pytest.fixture
def studies(request):
    folder = request.config.rootpath.parent / "shared/data/studies"
    if not folder.exists():
        pytest.skip(f"{folder} does not exist")
    return sorted(folder.glob("*.h5ad"))


def test_hand_values_of_the_table(tables):
    found = read_orthologues(tables[0])
    used = found.genes[found.genes["sources"] >= 3]
    assert {symbol: used["human_symbol"][found.ids[symbol]] for symbol in HUMAN_OF} == HUMAN_OF
    assert used["others"][found.ids["Fcgr4"]] == ["FCGR3A"]
    assert not set(used["human_symbol"]) & {"GNLY", "CD1C", "CXCL8", "TRAC"}
    assert used.index.is_unique and len(used) > 19_000 and used["human"].nunique() > 17_000
    mitochondrial = used[used["human_symbol"].str.startswith("MT-")]
    assert mitochondrial["human"].nunique() >= 13


@pytest.mark.parametrize("by", ["mouse", "symbol"])
def test_cells_return_from_mouse_names_with_the_same_counts(tables, studies, tmp_path, by):
    study = ad.read_h5ad(next(path for path in studies if path.stem == "pancreas_baron"))
    orthologues = read_orthologues(tables[0])
    pairs = one_to_one(read_pairs(tables[0]))
    clear = (orthologues.genes["others"].loc[pairs["mouse"]].str.len() == 0).to_numpy()  # no second human gene
    pairs = pairs[clear & pairs.index.isin(study.var_names)]
    given = study[:, pairs.index]
    named = ad.AnnData(given.X, given.obs, pd.DataFrame(index=pairs[by].to_numpy()))
    human = ["organism_ontology_term_id", "development_stage_ontology_term_id"]
    named.obs = named.obs.drop(columns=human, errors="ignore")
    named.write_h5ad(tmp_path / "mouse.h5ad")
    row = {"dataset": "m", "source": str(tmp_path / "mouse.h5ad"), "species": "mouse"}
    fetch_dataset(row, tmp_path / "human.h5ad", orthologues=tables[0])
    back = ad.read_h5ad(tmp_path / "human.h5ad")
    assert len(pairs) > 8000 and back.uns["counts_kept"] == 1
    assert set(back.var_names) == set(pairs.index)
    assert (back[:, pairs.index].X != given.X).nnz == 0


def test_more_counts_reach_the_right_gene_than_by_capitals(tables, studies):
    """The names come from another table; lymphocytes, whose genes map worst, are in the first study."""
    orthologues, pairs = read_orthologues(tables[0]), one_to_one(read_pairs(tables[1]))
    for name in ("pbmc3k", "pancreas_baron"):
        found = shares(ad.read_h5ad(next(path for path in studies if path.stem == name)), pairs, orthologues)
        assert found["right"] > found["right in capitals"], name
        assert found["kept"] > 0.97, name
