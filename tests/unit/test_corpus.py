"""Cells are drawn and split as promised, whatever their order and Python's hash seed."""

import os
import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from cell2text import corpus
from cell2text.contracts import CELLS, SAMPLED_CELLS, SPLITS, TERM_SLOTS, read_json
from cell2text.corpus import assign_cells, assign_groups, audit_split, sample_cells, split_donors
from cell2text.counts import CELLXGENE
from cell2text.errors import InputError

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


def write_cells(path, dataset, counts, genes=None, donors="d1", order=None):
    """Write cells as filter_cells does; ``order`` permutes cells and genes."""
    counts = np.asarray(counts, dtype=np.float32)
    genes = genes or [f"g{i}" for i in range(counts.shape[1])]
    obs = pd.DataFrame(
        {"dataset_id": dataset, "donor_id": donors, "assay_ontology_term_id": "EFO:0009922"},
        index=[f"{dataset}|{i:04d}" for i in range(len(counts))],
    )
    for slot, column in CELLXGENE.items():
        obs[f"{column}_ontology_term_id"] = "CL:0000236" if slot == "cell_type" else "unknown"
        obs[column] = "B cell" if slot == "cell_type" else "unknown"
    cells = ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame({"symbol": genes}, index=genes))
    if order is not None:
        cells = cells[order].copy()[:, genes[::-1]].copy()
    cells.write_h5ad(path)
    return path


def sample(tmp_path, files, cells=1000, seed=0):
    sample_cells(files, cells, seed, tmp_path / "sampled.parquet")
    return SAMPLED_CELLS.read(tmp_path / "sampled.parquet")


def make_table(cell_types, donors, studies="s", hashes=None):
    """Return a table as sample_cells writes it."""
    table = pd.DataFrame({"cell_type_id": cell_types, "donor": donors, "dataset_id": studies})
    table["cell_id"] = [f"c{i}" for i in range(len(table))]
    table["counts_hash"] = table["cell_id"] if hashes is None else hashes
    table["cell_type"] = table["cell_type_id"]
    for column in SAMPLED_CELLS.columns:
        table[column] = table.get(column)
    return table[list(SAMPLED_CELLS.columns)]


def parted(groups, split):
    """Return the groups whose cells are in more than one split."""
    pairs = set(zip(groups, split, strict=True))
    return {group for group, _ in pairs if len({s for g, s in pairs if g == group}) > 1}


def test_the_draw_does_not_depend_on_the_order_of_files_cells_or_genes(tmp_path):
    rng = np.random.default_rng(1)
    one, two = rng.poisson(1, (30, 5)), rng.poisson(1, (20, 5))
    a = [write_cells(tmp_path / "a1.h5ad", "a", one), write_cells(tmp_path / "a2.h5ad", "b", two)]
    b = [
        write_cells(tmp_path / "b2.h5ad", "b", two, order=rng.permutation(20)),
        write_cells(tmp_path / "b1.h5ad", "a", one, order=rng.permutation(30)),
    ]
    first = sample(tmp_path, a, cells=25, seed=7)
    pd.testing.assert_frame_equal(first, sample(tmp_path, b, cells=25, seed=7))
    assert len(first) == first["cell_id"].nunique() == 25
    assert set(first["cell_id"]) != set(sample(tmp_path, a, cells=25, seed=8)["cell_id"])
    assert len(sample(tmp_path, a, cells=50)) == len(sample(tmp_path, a, cells=51)) == 50


def test_every_cell_has_the_same_chance(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "hash_counts", lambda path, ids, progress: dict.fromkeys(ids, "h"))
    cells = write_cells(tmp_path / "in.h5ad", "s", np.ones((10, 2)))
    drawn = [sample(tmp_path, [cells], cells=3, seed=seed)["cell_id"] for seed in range(100)]
    # 30 draws a cell on average, standard deviation 4.6
    assert pd.concat(drawn).value_counts().reindex(drawn[0]).between(14, 46).all()
    assert pd.concat(drawn).nunique() == 10


def test_what_is_unknown_is_none_and_donors_carry_their_dataset(tmp_path):
    table = sample(tmp_path, [write_cells(tmp_path / "in.h5ad", "s", np.ones((2, 2)), donors=["1", "2"])])
    assert list(table["donor"]) == ["s|1", "s|2"]
    assert set(table["cell_type_id"]) == {"CL:0000236"}
    assert table[[f"{slot}_id" for slot in TERM_SLOTS[1:]]].isna().all().all()
    assert table["tissue"][0] is None


def test_hashes_are_equal_exactly_where_counts_are(tmp_path):
    counts = [[1, 2, 0], [1, 2, 0], [2, 1, 0], [1, 2, 1], [0, 1, 2]]
    a = sample(tmp_path, [write_cells(tmp_path / "a.h5ad", "s", counts)])["counts_hash"]
    assert a[0] == a[1] and a.nunique() == 4
    # The same genes elsewhere, in another order, with one that no cell expresses; and other genes.
    same = write_cells(tmp_path / "b.h5ad", "s", [[0, 0, 2, 1], [9, 9, 9, 9]], genes=["g2", "none", "g1", "g0"])
    other = write_cells(tmp_path / "c.h5ad", "s", [[1, 2, 0]], genes=["g0", "g1x", "g2"])
    assert sample(tmp_path, [same])["counts_hash"][0] == a[0]
    assert sample(tmp_path, [other])["counts_hash"][0] != a[0]


def test_hashes_do_not_depend_on_blocks(tmp_path, monkeypatch):
    cells = write_cells(tmp_path / "in.h5ad", "s", np.random.default_rng(0).poisson(1, (9, 4)))
    whole = sample(tmp_path, [cells])["counts_hash"]
    blocks = corpus.read_blocks
    monkeypatch.setattr(corpus, "read_blocks", lambda path, ids: blocks(path, ids, 2))
    assert (sample(tmp_path, [cells])["counts_hash"] == whole).all()


@st.composite
def studies_of_donors(draw):
    """Return a table of three to twelve donors, each with some of five cell types."""
    cell_types, donors = [], []
    for donor in range(draw(st.integers(3, 12))):
        for cell_type in draw(st.sets(st.integers(0, 4), min_size=1)):
            number = draw(st.integers(1, 20))
            cell_types += [f"CL:{cell_type}"] * number
            donors += [f"s|{donor}"] * number
    return make_table(cell_types, donors)


@settings(deadline=None)
@given(cells=studies_of_donors(), seed=st.integers(0, 9))
def test_donors_stay_whole_and_training_has_every_cell_type(cells, seed):
    try:
        split = assign_groups(cells, "donor", SHARES, np.random.default_rng(seed), cover=True)
    except InputError as error:
        # Only where training needs so many donors that fewer than two are left.
        assert "must be in training" in str(error)
        return
    assert not parted(cells["donor"], split)
    assert set(split) == set(SPLITS)
    assert set(cells["cell_type_id"][split == "train"]) == set(cells["cell_type_id"])


def test_the_only_donor_of_a_cell_type_goes_to_training():
    # Without the rule, chance would leave the sixth donor out of training for some seed.
    cells = make_table(["CL:1"] * 50 + ["CL:2"] * 10, [f"s|{i // 10}" for i in range(60)])
    for seed in range(20):
        split = assign_groups(cells, "donor", SHARES, np.random.default_rng(seed), cover=True)
        assert set(split[50:]) == {"train"}
    free = [assign_groups(cells, "donor", SHARES, np.random.default_rng(s), cover=False)[50] for s in range(20)]
    assert set(free) != {"train"}


def test_three_donors_are_enough_for_three_splits():
    cells = make_table(["CL:1"] * 30, [f"s|{i // 10}" for i in range(30)])
    for seed in range(10):
        split = assign_groups(cells, "donor", SHARES, np.random.default_rng(seed), cover=True)
        assert set(split) == set(SPLITS)


def test_donors_reach_the_shares():
    rng = np.random.default_rng(0)
    donors = np.repeat([f"s|{i}" for i in range(60)], rng.integers(5, 40, 60))
    cells = make_table(["CL:1"] * len(donors), donors)
    split = pd.Series(assign_groups(cells, "donor", SHARES, rng, cover=True))
    reached = split.value_counts(normalize=True)
    assert reached.to_dict() == pytest.approx(SHARES, abs=0.03)


def test_what_training_leaves_is_shared_between_validation_and_test():
    # One donor of 900 cells holds a cell type of its own, so nine tenths are in training.
    donors = ["s|big"] * 900 + [f"s|{i // 10}" for i in range(100)]
    cells = make_table(["CL:1"] * 900 + ["CL:2"] * 100, donors)
    cells.loc[0, "cell_type_id"] = "CL:2"
    split = pd.Series(assign_groups(cells, "donor", SHARES, np.random.default_rng(0), cover=True))
    assert split.value_counts()[["validation", "test"]].tolist() == [30, 70]


def test_a_split_by_donors_does_not_depend_on_the_hash_seed(tmp_path):
    cells = make_table([f"CL:{i % 7}" for i in range(300)], [f"s|{i // 15}" for i in range(300)])
    SAMPLED_CELLS.write(cells, tmp_path / "sampled.parquet")
    code = (
        "import sys; from cell2text.corpus import split_donors; split_donors(sys.argv[1], 'donors', "
        f"{SHARES}, 3, sys.argv[2], sys.argv[3])"
    )
    made = []
    for hash_seed in ("1", "2"):
        files = [tmp_path / f"{hash_seed}.parquet", tmp_path / f"{hash_seed}.json"]
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", code, tmp_path / "sampled.parquet", *files]
        subprocess.run(command, env=environment, check=True)
        made.append([file.read_bytes() for file in files])
    assert made[0] == made[1]


def test_studies_stay_whole():
    cells = make_table(["CL:1"] * 80, [f"d{i}" for i in range(80)], [f"s{i // 10}" for i in range(80)])
    split = assign_groups(cells, "dataset_id", SHARES, np.random.default_rng(0), cover=False)
    assert not parted(cells["dataset_id"], split)
    assert set(split) == set(SPLITS)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=6),
    twins=st.integers(0, 10),
    shares=st.sampled_from([SHARES, {"train": 0.2, "validation": 0.4, "test": 0.4}]),
    seed=st.integers(0, 9),
)
def test_cells_with_identical_counts_stay_together_and_every_type_is_in_training(sizes, twins, shares, seed):
    cell_types = np.repeat([f"CL:{i}" for i in range(len(sizes))], sizes)
    rng = np.random.default_rng(seed)
    hashes = np.array([f"h{i}" for i in range(len(cell_types))])
    for first, second in rng.integers(len(hashes), size=(twins, 2)):
        hashes[first] = hashes[second]
    cells = make_table(cell_types, "s|d", hashes=hashes)
    split = assign_cells(cells, shares, rng)
    assert not parted(hashes, split)
    assert set(cell_types[split == "train"]) == set(cell_types)


def test_a_type_that_only_shares_counts_with_another_is_in_training():
    # Both cells of CL:2 have the counts of a cell of CL:1, under which they are drawn.
    cells = make_table(["CL:1"] * 8 + ["CL:2"] * 2, "s|d", hashes=[f"h{i}" for i in [*range(8), 6, 7]])
    for seed in range(100):
        split = assign_cells(cells, SHARES, np.random.default_rng(seed))
        assert "train" in split[8:]
        assert not parted(cells["counts_hash"], split)


def test_cells_reach_the_shares_within_each_type():
    cells = make_table(["CL:1"] * 1000 + ["CL:2"] * 100, "s|d")
    split = pd.Series(assign_cells(cells, SHARES, np.random.default_rng(0)))
    assert split[:1000].value_counts().to_dict() == pytest.approx({"train": 700, "test": 200, "validation": 100}, abs=1)
    assert split[1000:].value_counts().to_dict() == pytest.approx({"train": 70, "test": 20, "validation": 10}, abs=1)


def test_rare_types_reach_every_split_in_the_long_run():
    cells = make_table(["CL:1"] * 3, "s|d")
    drawn = [assign_cells(cells, SHARES, np.random.default_rng(seed)) for seed in range(400)]
    share = pd.Series(np.concatenate(drawn)).value_counts(normalize=True)
    assert share.to_dict() == pytest.approx(SHARES, abs=0.05)


def test_the_audit_counts_what_it_claims(tmp_path):
    cells = make_table(["CL:1", "CL:1", "CL:2"] * 10, [f"s|{i // 3}" for i in range(30)], hashes=["h"] * 30)
    cells["counts_hash"] = [f"h{i // 3}" for i in range(30)]
    SAMPLED_CELLS.write(cells, tmp_path / "in.parquet")
    split_donors(tmp_path / "in.parquet", "donors", SHARES, 0, tmp_path / "out.parquet", tmp_path / "audit.json")
    audit, split = read_json(tmp_path / "audit.json"), CELLS.read(tmp_path / "out.parquet")
    assert audit["split"] == "donors"
    assert audit["cells"] == split["split"].value_counts().to_dict()
    assert sum(audit["donors"].values()) == 10
    assert audit["classes"] == {"train": 2, "validation": 2, "test": 2}
    held = {guarantee["claim"]: guarantee["holds"] for guarantee in audit["guarantees"]}
    assert held == {
        "No donor is in two splits": True,
        "No study is in two splits": False,
        "No two cells with identical counts are in two splits": True,
        "Every cell type of validation and test is in training": True,
    }

    # Spoil the table: the claims must notice.
    train, test = split.index[split["split"] == "train"][0], split.index[split["split"] == "test"][0]
    split.loc[test, ["cell_type_id", "cell_type"]] = "CL:9"
    split.loc[train, "donor"] = split.loc[test, "donor"]
    split.loc[train, "counts_hash"] = split.loc[test, "counts_hash"]
    spoilt = audit_split(split, "donors")
    assert not any(guarantee["holds"] for guarantee in spoilt["guarantees"])
    assert "CL:9" in spoilt["guarantees"][3]["detail"]
    assert any("CL:9" in limit for limit in spoilt["limits"])


def test_the_audit_says_in_words_what_one_donor_cannot_show():
    cells = make_table(["CL:1"] * 10, "s|d").assign(split="train", tissue_id="UBERON:0000178")
    limits = audit_split(cells, "cells")["limits"]
    assert any(limit.startswith("One donor:") for limit in limits)
    assert any(limit.startswith("One study:") for limit in limits)
    assert any("another tissue" in limit for limit in limits)
    assert any("sex is not known" in limit for limit in limits)
