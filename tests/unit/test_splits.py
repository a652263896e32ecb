"""Groups and duplicates stay together in a split, and every cell type is in training."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cell2text.contracts import SPLITS
from cell2text.corpus.duplicates import find_pairs
from cell2text.corpus.splits import TEST, TRAIN, assign_cells, assign_groups, read_split
from cell2text.errors import InputError

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


def make_table(cell_types, donors="s|d", studies="s", hashes=None):
    """Return the columns of a corpus that a split uses."""
    table = pd.DataFrame({"cell_type_id": cell_types, "donor": donors, "dataset_id": studies})
    table["cell_id"] = [f"c{i}" for i in range(len(table))]
    table["counts_hash"] = table["cell_id"] if hashes is None else hashes
    return table.assign(cell_type=table["cell_type_id"], n_counts=1.0)


def split_cells(cells, shares=SHARES, seed=0):
    return assign_cells(cells, find_pairs(cells), shares, np.random.default_rng(seed))


def split_groups(cells, column="donor", shares=SHARES, seed=0):
    return assign_groups(cells, column, find_pairs(cells), shares, np.random.default_rng(seed))


def broken(groups, split):
    """Return the groups whose cells are in more than one split."""
    splits = pd.Series(split).groupby(np.asarray(groups)).nunique()
    return set(splits.index[splits > 1])


@st.composite
def studies_of_donors(draw):
    """Return a table of three to nine donors, each with some of five cell types; some donors share cells."""
    cell_types, donors = [], []
    for donor in range(draw(st.integers(3, 9))):
        for cell_type in sorted(draw(st.sets(st.integers(0, 4), min_size=1))):
            number = draw(st.integers(1, 20))
            cell_types += [f"CL:{cell_type}"] * number
            donors += [f"s|{donor}"] * number
    hashes = [f"h{i}" for i in range(len(donors))]
    for first, second in draw(st.lists(st.tuples(*[st.integers(0, len(donors) - 1)] * 2), max_size=2)):
        hashes[first] = hashes[second]
    return make_table(cell_types, donors, hashes=hashes)


def possible_splits(cells):
    """Yield every valid split by whole donors, by brute force."""
    donors = sorted(set(cells["donor"]))
    for chosen in product(range(3), repeat=len(donors)):
        split = cells["donor"].map(dict(zip(donors, chosen, strict=True))).to_numpy()
        trained = set(cells["cell_type_id"][split == TRAIN])
        if len(set(chosen)) == 3 and trained == set(cells["cell_type_id"]) and not broken(cells["counts_hash"], split):
            yield split


@settings(deadline=None, max_examples=50)
@given(cells=studies_of_donors(), seed=st.integers(0, 9))
def test_donors_stay_whole_and_training_has_every_cell_type(cells, seed):
    try:
        split = split_groups(cells, seed=seed)
    except InputError as error:
        assert "must be in training" in str(error) or "at least three are needed" in str(error)
        if cells["donor"].nunique() <= 6:
            assert next(possible_splits(cells), None) is None
        return
    assert not broken(cells["donor"], split)
    assert not broken(cells["counts_hash"], split)
    assert set(split) == {0, 1, 2}
    assert set(cells["cell_type_id"][split == TRAIN]) == set(cells["cell_type_id"])


def distance(split):
    goals = len(split) * np.array([SHARES[name] for name in SPLITS])
    return np.sqrt(np.average((np.bincount(split, minlength=3) / goals - 1) ** 2, weights=goals))


@settings(deadline=None, max_examples=15)
@given(cells=studies_of_donors().filter(lambda cells: cells["donor"].nunique() <= 7))
def test_no_split_by_donors_is_much_closer_to_the_shares(cells):
    best = min(map(distance, possible_splits(cells)), default=None)
    if best is not None:
        assert distance(split_groups(cells)) <= best + 0.1


def test_the_only_donor_of_a_cell_type_is_in_training():
    cells = make_table(["CL:1"] * 50 + ["CL:2"] * 10, [f"s|{i // 10}" for i in range(60)])
    for seed in range(10):
        assert set(split_groups(cells, seed=seed)[50:]) == {TRAIN}


def test_a_cell_type_with_one_cell_is_in_training():
    cells = make_table(["CL:1"] * 59 + ["CL:2"], [f"s|{i // 10}" for i in range(60)])
    for seed in range(10):
        assert split_groups(cells, seed=seed)[59] == TRAIN


def test_three_donors_are_enough_for_three_splits():
    cells = make_table(["CL:1"] * 30, [f"s|{i // 10}" for i in range(30)])
    for seed in range(10):
        assert set(split_groups(cells, seed=seed)) == {0, 1, 2}


def test_donors_reach_the_shares():
    rng = np.random.default_rng(0)
    donors = np.repeat([f"s|{i}" for i in range(60)], rng.integers(5, 40, 60))
    cells = make_table(rng.choice(["CL:1", "CL:2", "CL:3"], len(donors)), donors)
    for shares in (SHARES, {"train": 0.95, "validation": 0.025, "test": 0.025}):
        reached = np.bincount(split_groups(cells, shares=shares)) / len(cells)
        assert reached == pytest.approx(list(shares.values()), abs=0.005)


def test_cells_outside_training_are_divided_between_validation_and_test():
    # One donor has 900 cells and a cell type of its own, so 90% of the cells are in training.
    cells = make_table(["CL:1"] * 900 + ["CL:2"] * 100, ["s|big"] * 900 + [f"s|{i // 10}" for i in range(100)])
    cells.loc[0, "cell_type_id"] = "CL:2"
    assert np.bincount(split_groups(cells)).tolist() == [900, 30, 70]


def test_the_test_donors_are_drawn_uniformly():
    cells = make_table(["CL:1"] * 200, [f"s|{i // 5}" for i in range(200)])
    tested = [set(cells["donor"][split_groups(cells, seed=seed) == TEST]) for seed in range(40)]
    # Each of 40 donors is tested 8 times on average, standard deviation 2.5.
    times = pd.Series([donor for some in tested for donor in some]).value_counts()
    assert len(times) == 40 and times.max() <= 18


def test_studies_stay_whole_and_cover_every_cell_type_in_training_if_possible():
    cells = make_table(["CL:1", "CL:2"] * 40, [f"d{i}" for i in range(80)], [f"s{i // 10}" for i in range(80)])
    cells.loc[75, "cell_type_id"] = "CL:3"
    for seed in range(10):
        split = split_groups(cells, "dataset_id", seed=seed)
        assert not broken(cells["dataset_id"], split)
        assert set(split) == {0, 1, 2} and set(split[70:]) == {TRAIN}


def test_studies_with_their_own_cell_types_are_still_split():
    # Each study has its own type; the fourth has three, so it is the one in training.
    cells = make_table(
        ["a"] * 10 + ["b"] * 10 + ["c"] * 10 + ["d", "e", "f"] * 3, "d", [f"s{i // 10}" for i in range(39)]
    )
    split = split_groups(cells, "dataset_id")
    assert set(split) == {0, 1, 2} and set(split[30:]) == {TRAIN}
    with pytest.raises(InputError, match="must be in training"):
        split_groups(cells.assign(donor=cells["dataset_id"]))


def test_studies_that_share_cells_stay_together():
    hashes = [f"h{i}" for i in range(80)]
    hashes[15] = hashes[62]
    cells = make_table(["CL:1"] * 80, "d", [f"s{i // 10}" for i in range(80)], hashes)
    for seed in range(10):
        split = split_groups(cells, "dataset_id", seed=seed)
        assert len(set(split[10:20]) | set(split[60:70])) == 1


def test_too_few_donors_after_joining_is_an_error():
    cells = make_table(["CL:1"] * 9, [f"s|{i // 3}" for i in range(9)], hashes=["h", *"abcdefg", "h"])
    with pytest.raises(
        InputError,
        match=r"3 donors in the corpus .*, 2 after joining those that share cells, but at least three are needed",
    ):
        split_groups(cells)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
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
    cells = make_table(cell_types, hashes=hashes)
    split = split_cells(cells, shares, seed)
    assert not broken(hashes, split)
    assert set(cell_types[split == TRAIN]) == set(cell_types)


def test_a_type_with_only_duplicates_of_another_type_is_in_training():
    # Both cells of CL:2 duplicate a cell of CL:1, under which they are drawn.
    cells = make_table(["CL:1"] * 8 + ["CL:2"] * 2, hashes=[f"h{i}" for i in [*range(8), 6, 7]])
    for seed in range(100):
        split = split_cells(cells, seed=seed)
        assert TRAIN in split[8:]
        assert not broken(cells["counts_hash"], split)


def test_splits_reach_the_shares_within_each_type():
    cells = make_table(["CL:1", *["CL:2"] * 10] * 100)
    split = split_cells(cells)
    assert np.bincount(split[cells["cell_type_id"] == "CL:1"]) == pytest.approx([70, 10, 20], abs=1)
    assert np.bincount(split[cells["cell_type_id"] == "CL:2"]) == pytest.approx([700, 100, 200], abs=1)


def test_rare_types_reach_the_shares_on_average():
    cells = make_table(["CL:1"] * 3)
    drawn = np.concatenate([split_cells(cells, seed=seed) for seed in range(400)])
    assert np.bincount(drawn) / len(drawn) == pytest.approx(list(SHARES.values()), abs=0.05)


def write_split(path, **columns):
    pd.DataFrame(columns).to_csv(path, sep="\t", index=False)
    return path


def test_a_user_defined_split_is_used(tmp_path):
    cells = make_table(["CL:1"] * 4, ["s|2", "s|1", "s|3", "s|1"])
    by_donor = write_split(
        tmp_path / "split.tsv", donor=["s|1", "s|2", "s|3", "s|9"], split=["test", "train", "validation", "train"]
    )
    assert read_split(by_donor, cells).tolist() == [0, 2, 1, 2]
    by_cell = write_split(
        tmp_path / "split.tsv", split=["test", "train", "train", "train"], cell_id=["c2", "c0", "c1", "c3"]
    )
    assert read_split(by_cell, cells).tolist() == [0, 0, 2, 0]
    by_study = write_split(tmp_path / "split.tsv", dataset_id=["s"], split=["test"])
    assert set(read_split(by_study, cells)) == {TEST}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"barcode": ["c0"], "split": ["train"]}, "columns barcode, split"),
        ({"donor": ["s|d"], "group": ["train"]}, "columns donor, group"),
        ({"donor": ["s|d", "t"], "split": ["train", "Test"]}, "line 3: split: unknown split 'Test'"),
        ({"donor": ["s|d", "s|d"], "split": ["train", "test"]}, "s|d appears twice"),
        ({"donor": ["t|d"], "split": ["train"]}, "no line for s|d, which is in the corpus"),
    ],
)
def test_mistakes_in_a_user_defined_split_are_reported(tmp_path, columns, message):
    with pytest.raises(InputError) as error:
        read_split(write_split(tmp_path / "split.tsv", **columns), make_table(["CL:1"]))
    assert str(tmp_path / "split.tsv") in str(error.value) and message in str(error.value)
