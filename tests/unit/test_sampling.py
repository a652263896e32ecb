"""The sample has the requested size and balance, without duplicates; diversity is normalised Shannon entropy."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cell2text.cells.sampling import POOLS, apportion, draw_sample, entropy, measure_diversity

PAPER = {"natural": 0.3, "cell_type": 0.25, "disease": 0.2, "donor": 0.15, "rare_tissue": 0.1}


def make_cells(**numbers):
    """Return cells with the given number of cells per value of ``cell_type_id`` (or another column)."""
    columns = {column: np.repeat(list(cells), list(cells.values())) for column, cells in numbers.items()}
    cells = pd.DataFrame(columns)
    for column in POOLS.values():
        cells[column] = pd.Categorical(cells.get(column, pd.Series("same", index=cells.index)))
    return cells


def draw(cells, n, shares, caps=None, seed=0):
    return cells.iloc[draw_sample(cells, n, shares, caps or {}, np.random.default_rng(seed))]


@st.composite
def some_cells(draw):
    """Return cells with up to five values per column, some unknown, and a number of cells to draw."""
    cells = draw(st.integers(1, 120))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    values = np.array(["a", "b", "c", "d", "e", None], dtype=object)
    table = {column: pd.Categorical(values[rng.zipf(1.5, cells) % 6]) for column in set(POOLS.values())}
    return pd.DataFrame(table), draw(st.integers(1, 130))


@settings(deadline=None)
@given(
    drawn=some_cells(),
    shares=st.dictionaries(st.sampled_from(sorted(POOLS)), st.floats(0, 1)),
    cap=st.floats(0.01, 1),
    seed=st.integers(0, 9),
)
@example(drawn=(make_cells(donor={"d": 9}), 4), shares={}, cap=1.0, seed=0)
def test_the_size_is_exact_and_no_cell_is_drawn_twice(drawn, shares, cap, seed):
    cells, n = drawn
    caps = {pool: {"a": cap, "any": cap / 2} for pool in shares}
    rows = draw_sample(cells, n, shares, caps, np.random.default_rng(seed))
    assert len(rows) == min(n, len(cells))
    assert (np.diff(rows) > 0).all()
    again = draw_sample(cells, n, shares, caps, np.random.default_rng(seed))
    assert (rows == again).all()


@settings(deadline=None)
@given(drawn=some_cells(), seed=st.integers(0, 9))
def test_the_draw_does_not_depend_on_how_categories_are_coded(drawn, seed):
    cells, n = drawn
    recoded = cells.copy()
    for column in cells:
        names = list(cells[column].cat.categories)
        recoded[column] = cells[column].cat.set_categories(["unused", *reversed(names)])
    as_text = cells.astype(object)
    first, *others = (
        draw_sample(table, n, PAPER, {}, np.random.default_rng(seed)) for table in (cells, recoded, as_text)
    )
    assert all((first == other).all() for other in others)


def test_a_balanced_pool_draws_equal_numbers_as_far_as_there_are_enough():
    cells = make_cells(cell_type_id={"CL:1": 1000, "CL:2": 300, "CL:3": 40, "CL:4": 3})
    drawn = draw(cells, 203, {"cell_type": 1})["cell_type_id"].value_counts()
    # all 3 and 40 cells of the rare types; the other 160 are divided equally
    assert drawn.to_dict() == {"CL:1": 80, "CL:2": 80, "CL:3": 40, "CL:4": 3}
    # one more cell cannot be divided: it goes to either type at random
    more = {draw(cells, 204, {"cell_type": 1}, seed=seed)["cell_type_id"].value_counts().idxmax() for seed in range(20)}
    assert more == {"CL:1", "CL:2"}


def test_caps_are_respected():
    cells = make_cells(disease_id={"normal": 5000, "covid": 2000, **{f"d{i}": 400 for i in range(49)}})
    caps = {"disease": {"covid": 0.01, "normal": 0.5, "any": 0.02}}
    drawn = draw(cells, 2000, {"disease": 1}, caps)["disease_id"].value_counts()
    # without caps each would have 39 or 40; the cells that covid may not have go to the others, within their caps
    assert drawn["covid"] == 20 and drawn.drop(["normal", "covid"]).max() <= 40
    assert drawn["normal"] in (39, 40)
    caps = {"natural": {"blood": 0.15, "brain": 0.2}}
    cells = make_cells(tissue_id={"blood": 5000, "brain": 4000, "lung": 600, "skin": 900})
    drawn = draw(cells, 1000, {"natural": 1}, caps)["tissue_id"].value_counts()
    assert drawn["blood"] == 150 and drawn["brain"] == 200
    # the rest is drawn uniformly: two fifths of it are lung
    assert drawn["lung"] == pytest.approx(650 * 0.4, abs=4 * math.sqrt(650 * 0.4 * 0.6))


def test_a_pool_left_short_by_caps_is_filled_from_all_cells():
    cells = make_cells(donor={"a": 900, "b": 90, "c": 10})
    drawn = draw(cells, 500, {"donor": 1}, {"donor": {"any": 0.1}})["donor"].value_counts()
    assert drawn.sum() == 500 and drawn["c"] >= 10 * 0.9
    assert drawn["a"] > 300


def test_a_natural_draw_is_uniform():
    cells = make_cells(tissue_id={"a": 20})
    drawn = np.concatenate([draw_sample(cells, 5, {"natural": 1}, {}, np.random.default_rng(s)) for s in range(400)])
    # 100 draws per cell on average, standard deviation 8.7
    assert np.bincount(drawn, minlength=20).min() > 60 and np.bincount(drawn, minlength=20).max() < 140
    capped = {"natural": {"a": 0.99}}
    cells = make_cells(tissue_id={"a": 10, "b": 10})
    drawn = np.concatenate(
        [draw_sample(cells, 5, {"natural": 1}, capped, np.random.default_rng(s)) for s in range(400)]
    )
    assert np.bincount(drawn, minlength=20).min() > 60 and np.bincount(drawn, minlength=20).max() < 140


def test_rare_tissues_are_the_rarest_tenth():
    cells = make_cells(tissue_id={f"t{i:02d}": 1000 - 40 * i for i in range(20)})
    drawn = draw(cells, 100, {"rare_tissue": 1})["tissue_id"].value_counts()
    assert drawn[drawn > 0].to_dict() == {"t18": 50, "t19": 50}


def test_unknown_is_not_a_value_to_balance_by():
    cells = make_cells(disease_id={"known": 50})
    cells = pd.concat([cells, cells.assign(disease_id=pd.Categorical([None] * 50))], ignore_index=True)
    assert draw(cells, 50, {"disease": 1})["disease_id"].notna().all()


def test_the_papers_shares_make_a_sample_more_diverse():
    rng = np.random.default_rng(0)
    cells = pd.DataFrame({column: pd.Categorical(rng.zipf(1.6, 20_000) % 60) for column in set(POOLS.values())})
    cells = cells.astype(str).assign(dataset_id="s").astype("category")
    caps = {"cell_type": {"any": 0.03}, "donor": {"any": 0.02}}
    rows = draw_sample(cells, 2000, PAPER, caps, rng)
    natural = draw_sample(cells, 2000, {"natural": 1}, {}, rng)
    balanced, uniform = (measure_diversity(cells, drawn).set_index("slot") for drawn in (rows, natural))
    for slot in ("cell_type", "disease", "donor"):
        assert balanced["diversity_after"][slot] > balanced["diversity_before"][slot] + 0.05
        assert uniform["diversity_after"][slot] == pytest.approx(uniform["diversity_before"][slot], abs=0.03)


@given(
    n=st.integers(0, 10_000),
    shares=st.dictionaries(st.text(max_size=3), st.floats(0.001, 1), min_size=1, max_size=6),
)
def test_parts_add_up_and_are_within_one_of_their_share(n, shares):
    parts = apportion(n, shares)
    assert sum(parts.values()) == n
    assert all(abs(parts[name] - n * share / sum(shares.values())) < 1 for name, share in shares.items())


def test_entropy_by_hand():
    # shares 1/2, 1/4 and 1/4: 1.5 bits of at most log2(3)
    assert entropy(np.array([2, 1, 1])) == pytest.approx(1.5 / math.log2(3))
    # a lost value still counts in the divisor
    assert entropy(np.array([1, 1, 0, 0])) == pytest.approx(0.5)
    assert entropy(np.array([4])) == entropy(np.array([], dtype=int)) == 0


def test_diversity_before_and_after():
    cells = make_cells(cell_type_id={"a": 6, "b": 2}).assign(dataset_id="s")
    cells.loc[0, "disease_id"] = None
    table = measure_diversity(cells, np.array([0, 1, 6, 7])).set_index("slot")
    assert list(table.index) == ["cell_type", "tissue", "disease", "donor", "study"]
    assert table.loc["cell_type"].tolist() == [2, 2, pytest.approx(0.811278), 1.0]
    assert table.loc["study"].tolist() == [1, 1, 0.0, 0.0]


def test_a_cell_type_with_several_cells_keeps_at_least_two():
    types = ["common"] * 900 + [f"rare {i}" for i in range(40) for _ in range(2)] + ["single"] * 1
    cells = pd.DataFrame(dict.fromkeys(["tissue_id", "disease_id", "donor"], "x"), index=range(len(types)))
    cells["cell_type_id"] = types
    for seed in range(5):
        rows = draw_sample(cells, 500, {"natural": 1}, {}, np.random.default_rng(seed))
        assert len(set(rows)) == 500
        kept = cells["cell_type_id"].iloc[rows].value_counts()
        assert set(kept.index[kept == 1]) <= {"single"}
