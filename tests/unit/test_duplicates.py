"""Duplicate cells are found, independent of the order of genes and files, and no others."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from cell2text.corpus import duplicates
from cell2text.corpus.duplicates import find_pairs, hash_counts, join_cells, join_groups


def write_cells(path, counts, genes=None):
    counts = sparse.csr_matrix(np.asarray(counts, dtype=np.float32))
    genes = genes or [f"g{i}" for i in range(counts.shape[1])]
    obs = pd.DataFrame(index=[f"c{i}" for i in range(counts.shape[0])])
    ad.AnnData(counts, obs=obs, var=pd.DataFrame({"symbol": genes}, index=genes)).write_h5ad(path)
    return path


def hashes(path, cells=None):
    names = ad.read_h5ad(path).obs_names
    rows = np.ones(len(names), dtype=bool) if cells is None else names.isin(cells)
    found = pd.concat(hash_counts(path, rows)).set_index("cell_id")
    assert list(found.index) == list(names[rows])
    return found


def table(*cells):
    """Return a table of cells given as (name, study, hash, total)."""
    return pd.DataFrame(cells, columns=["cell_id", "dataset_id", "counts_hash", "n_counts"])


def sets_of(labels):
    return sorted(sorted(rows) for rows in pd.Series(range(len(labels))).groupby(labels).agg(list) if len(rows) > 1)


def test_hashes_are_equal_if_and_only_if_counts_are(tmp_path):
    counts = [[1, 2, 0], [1, 2, 0], [2, 1, 0], [1, 2, 1], [0, 1, 2], [3, 0, 0]]
    a = hashes(write_cells(tmp_path / "a.h5ad", counts))
    assert a["counts_hash"].iloc[0] == a["counts_hash"].iloc[1] and a["counts_hash"].nunique() == 5
    assert a["counts_hash"].str.fullmatch("[0-9a-f]{32}").all()
    assert list(a["n_counts"]) == [3, 3, 3, 4, 3, 3]
    # The same genes in another order, with an additional gene that the first cell lacks; and other genes.
    same = write_cells(tmp_path / "b.h5ad", [[0, 0, 2, 1], [9, 9, 9, 9]], ["g2", "none", "g1", "g0"])
    other = write_cells(tmp_path / "c.h5ad", [[1, 2, 0]], ["g0", "g1x", "g2"])
    assert hashes(same)["counts_hash"].iloc[0] == a["counts_hash"].iloc[0]
    assert hashes(other)["counts_hash"].iloc[0] != a["counts_hash"].iloc[0]


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999))
def test_hashes_distinguish_the_same_cells_as_their_counts(tmp_path_factory, seed):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.4, (60, 5))
    found = hashes(write_cells(tmp_path_factory.mktemp("cells") / "in.h5ad", counts))["counts_hash"]
    assert len(np.unique(counts, axis=0)) == found.nunique()


def test_hashes_do_not_depend_on_blocks_and_empty_cells_are_equal(tmp_path, monkeypatch):
    counts = np.random.default_rng(0).poisson(1, (9, 4))
    counts[[0, 4, 8]] = 0
    cells = write_cells(tmp_path / "in.h5ad", counts)
    whole = hashes(cells)
    assert len(set(whole["counts_hash"].iloc[[0, 4, 8]])) == 1
    blocks = duplicates.read_blocks
    monkeypatch.setattr(duplicates, "read_blocks", lambda path, ids: blocks(path, ids, 2))
    pd.testing.assert_frame_equal(hashes(cells), whole)
    pd.testing.assert_frame_equal(hashes(cells, ["c3", "c7"]), whole.loc[["c3", "c7"]])


def test_cells_with_identical_counts_are_pairs():
    cells = table(("a", "s", "x", 5), ("b", "s", "y", 5), ("c", "t", "x", 5), ("d", "t", "x", 5), ("e", "t", None, 5))
    pairs = find_pairs(cells)
    assert pairs[["first", "second"]].to_numpy().tolist() == [[0, 2], [0, 3]]
    assert pairs["identical"].all()
    assert sets_of(join_cells(5, pairs)) == [[0, 2, 3]]


def test_a_cell_published_by_two_studies_is_a_pair():
    cells = table(
        ("s|AAACATTGAGCTAC-1", "s", "h1", 900.0),
        ("t|run7_AAACATTGAGCTAC", "t", "h2", 900.0),  # other genes, so another hash
        ("u|AAACATTGAGCTAC-1", "u", "h3", 901.0),  # other counts
        ("u|AAACATTGAGCTAG-1", "u", "h4", 900.0),  # another barcode
        ("s|lane2_AAACATTGAGCTAC", "s", "h5", 900.0),  # in the same study as the first, but linked through t
        ("v|GATTACA", "v", "h6", 900.0),  # no barcode
        ("w|GATTACA", "w", "h7", 900.0),
        ("x|CCCCATTGAGCTAC", "x", "h8", None),
        ("y|CCCCATTGAGCTAC", "y", "h9", None),
    )
    pairs = find_pairs(cells)
    assert not pairs["identical"].any()
    assert sets_of(join_cells(len(cells), pairs)) == [[0, 1, 4]]
    # Within one study, two lanes share barcodes by chance.
    assert find_pairs(cells.iloc[[0, 4]].reset_index(drop=True)).empty


def test_pairs_are_joined_transitively():
    cells = table(
        ("s|AAACATTGAGCTAC", "s", "h1", 9.0),
        ("t|AAACATTGAGCTAC", "t", "h2", 9.0),
        ("t|other", "t", "h2", 9.0),
        ("t|third", "t", "h3", 9.0),
    )
    assert sets_of(join_cells(4, find_pairs(cells))) == [[0, 1, 2]]


@pytest.mark.parametrize(("shared", "joined"), [(0, []), (1, []), (2, [[0, 1]])])
def test_donors_are_joined_by_two_barcodes_but_not_by_one(shared, joined):
    barcodes = ["AAACATTGAGCTAC", "CCCCATTGAGCTAC", "GGGCATTGAGCTAC"]
    cells = table(
        *((f"s|{barcode}", "s", f"a{i}", i + 100.0) for i, barcode in enumerate(barcodes)),
        *((f"t|{barcode}", "t", f"b{i}", i + 100.0 + (i >= shared)) for i, barcode in enumerate(barcodes)),
    )
    donors = np.repeat([0, 1, 2], [3, 2, 1])
    assert sets_of(join_groups(donors, find_pairs(cells))) == joined


def test_donors_are_joined_by_one_cell_with_identical_counts():
    cells = table(("a", "s", "x", 5), ("b", "t", "x", 5), ("c", "t", "y", 5), ("d", "u", "y", 5), ("e", "v", "z", 5))
    assert sets_of(join_groups(np.array([0, 1, 2, 3, 4]), find_pairs(cells))) == [[0, 1], [2, 3]]
    assert sets_of(join_groups(np.array([0, 1, 1, 3, 2]), find_pairs(cells))) == [[0, 1, 3]]
    assert sets_of(join_groups(np.array([0, 0, 1, 1, 2]), find_pairs(cells))) == []


@settings(deadline=None)
@given(hashes=st.lists(st.integers(0, 8), min_size=1, max_size=30))
def test_joined_cells_are_those_with_the_same_hash(hashes):
    cells = table(*((f"c{i}", "s", f"h{value}", 1.0) for i, value in enumerate(hashes)))
    joined = join_cells(len(cells), find_pairs(cells))
    assert len(set(zip(joined, hashes, strict=True))) == len(set(joined)) == len(set(hashes))
