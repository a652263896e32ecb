"""Resamples of donors or cells, and the intervals of metrics."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from cell2text.evaluation import sums
from cell2text.evaluation.bootstrap import Bootstrap, interval


def estimate(bootstrap, values):
    return interval(sums.ratio(bootstrap.sum_up(sums.mean_terms(values), bootstrap.unit())))


def test_bootstrap_intervals_are_deterministic_and_contain_the_value():
    rng = np.random.default_rng(0)
    values, donors = rng.random(60) < 0.7, pd.Series(rng.integers(8, size=60))
    one = estimate(Bootstrap(donors, 500, seed=3), values)
    assert one == estimate(Bootstrap(donors, 500, seed=3), values)
    assert one != estimate(Bootstrap(donors, 500, seed=4), values)
    assert one[1] < one[0] < one[2]


def test_the_bootstrap_draws_whole_donors():
    # The cells of a donor are all correct or all wrong, so the mean of a resample is a multiple of 1/8 with a standard
    # deviation of sqrt(1/4 / 8) = 0.18. If cells were drawn, it would be sqrt(1/4 / 800) = 0.02.
    donors = pd.Series(np.repeat(list("abcdefgh"), 100))
    bootstrap = Bootstrap(donors, 400, seed=0)
    assert (bootstrap.unit(), bootstrap.count_donors()) == ("donor", 8)
    assert estimate(bootstrap, np.repeat([0.0, 1.0], 400)) == (0.5, 0.125, 0.875)


@pytest.mark.parametrize(("donors", "unit"), [(1, "cell"), (2, "cell"), (7, "cell"), (8, "donor"), (20, "donor")])
def test_fewer_than_eight_donors_give_an_interval_of_cells(donors, unit):
    bootstrap = Bootstrap(pd.Series(np.arange(400) % donors), 400, seed=0)
    assert bootstrap.unit() == unit
    _, low, high = estimate(bootstrap, np.arange(400) % donors < donors / 2 if donors > 1 else np.arange(400) % 2)
    if unit == "cell":
        assert 0.07 < high - low < 0.12  # 2 x 1.96 x sqrt(1/4 / 400)
    else:
        assert high - low > 0.3


def test_the_bootstrap_interval_of_a_mean_has_the_expected_width():
    values = np.random.default_rng(1).random(400)
    value, low, high = estimate(Bootstrap(pd.Series(["one"] * 400), 2000, seed=0), values)
    error = 1.96 * values.std() / np.sqrt(400)
    assert value == pytest.approx(values.mean())
    assert (value - low, high - value) == pytest.approx((error, error), rel=0.1)


def test_resamples_of_cells_are_weighted_sums():
    """The product in blocks equals the sum over the drawn cells, for dense and sparse terms."""
    terms = np.random.default_rng(0).random((30, 3))
    bootstrap = Bootstrap(pd.Series(["one"] * 30), 100, seed=5)
    rng = np.random.default_rng(5)
    expected = [terms[rng.integers(30, size=30)].sum(axis=0) for _ in range(100)]
    for given_terms in (terms, scipy.sparse.csr_array(terms)):
        found = bootstrap.sum_up(given_terms, "cell")
        assert found[0] == pytest.approx(terms.sum(axis=0))
        np.testing.assert_allclose(found[1:], expected, rtol=1e-5)


def test_the_classes_of_macro_f1_are_the_same_in_every_resample():
    # Cells: A predicted as A, A as B, B as B. Over all cells, both classes have an F1 of 2/3.
    whole, no_b, no_true_b, neither = (
        [1, 1, 2, 1, 1, 2],  # hits, true and predicted cells, of A and B each
        [3, 0, 3, 0, 3, 0],  # three times the first cell: A 1, B undefined, so 2/3
        [1, 0, 3, 0, 1, 2],  # first, second, second: A 2/4, B 0/2
        [0, 1, 0, 3, 0, 3],  # made up: A undefined, B 2/6
    )
    found = sums.macro_f1(np.array([whole, no_b, no_true_b, neither], dtype=float))
    assert found == pytest.approx([2 / 3, (1 + 2 / 3) / 2, 0.25, (2 / 3 + 1 / 3) / 2])
