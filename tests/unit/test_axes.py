"""Axes computed in parts equal the exact principal axes, and genes that a study does not measure are missing."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA

from cell2text.embedding import axes as module
from cell2text.embedding.axes import BETWEEN_STUDIES, RIDGE, Axes, find_axes, find_profile
from cell2text.embedding.ranked_cells import SCALE
from cell2text.errors import InputError
from ranked_files import ranked_cells, write_studies


def simulate(cells, genes, programmes, seed=0):
    """Return expression from ``programmes`` gene programmes of decreasing strength plus noise; a third is zero."""
    rng = np.random.default_rng(seed)
    strength = 3 * 0.8 ** np.arange(programmes)
    values = rng.normal(size=(cells, programmes)) * strength @ rng.normal(size=(programmes, genes)) / np.sqrt(genes)
    values += 2 + rng.normal(scale=0.1, size=values.shape)
    return np.where(rng.random(values.shape) < 1 / 3, 0, np.maximum(values, 0)).astype(np.float32)


def one_study(directory, expression, splits="train", ends=()):
    """Write the cells of one study, and return its training cells."""
    return write_studies(directory, {"a": expression}, splits, ends=ends)[0]


def expression_of(shares):
    """Return expression from the share of each gene in a cell's counts."""
    return np.log1p(np.asarray(shares) * SCALE)


def measuring(cells, measured):
    """Return the expression of cells as a study with only these genes sees them; NaN marks the others."""
    shares = np.expm1(cells) / SCALE * measured
    return np.where(measured, expression_of(shares / shares.sum(axis=1, keepdims=True)), np.nan)


@pytest.mark.parametrize(
    ("cells", "genes", "dimensions"),
    [(120, 300, 12), (300, 120, 12), (40, 20, 19), (9, 200, 8), (200, 700, 30)],
)
def test_axes_equal_those_of_the_exact_solution(tmp_path, cells, genes, dimensions):
    expression = simulate(cells, genes, dimensions)
    train = one_study(tmp_path, expression, ends=[cells // 3, cells // 2])
    axes = find_axes(train, dimensions, 0)
    exact = PCA(dimensions, svd_solver="full").fit(expression.astype(float))
    np.testing.assert_allclose(axes.mean, exact.mean_, atol=1e-6)
    np.testing.assert_allclose(axes.variance, exact.explained_variance_, rtol=1e-4)
    left = expression - exact.inverse_transform(exact.transform(expression.astype(float)))
    np.testing.assert_allclose(axes.noise, left.var(axis=0, ddof=1), rtol=1e-2, atol=1e-6)
    np.testing.assert_allclose(axes.vectors.T @ axes.vectors, np.eye(dimensions), atol=1e-10)
    for leading in (1, dimensions // 2, dimensions):
        angles = subspace_angles(axes.vectors[:, :leading], exact.components_[:leading].T)
        assert np.cos(angles).min() > 0.999
    coordinates = np.concatenate([axes.place(part) for part in train])
    np.testing.assert_allclose(coordinates, (expression - exact.mean_) @ axes.vectors, atol=1e-4)
    np.testing.assert_allclose(coordinates.var(axis=0, ddof=1), axes.variance, rtol=1e-5)


def test_axes_by_hand(tmp_path):
    # gene 0 is 1 or 3, gene 1 is independently 1 or 2, and gene 2 does not vary
    expression = [[1, 1, 4], [1, 2, 4], [3, 1, 4], [3, 2, 4]]
    train = one_study(tmp_path, expression)
    axes = find_axes(train, 5, 0)
    np.testing.assert_allclose(axes.vectors, [[1, 0], [0, 1], [0, 0]], atol=1e-7)
    np.testing.assert_allclose(axes.mean, [2, 1.5, 4], rtol=1e-6)
    np.testing.assert_allclose(axes.variance, [4 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(axes.noise, 0, atol=1e-6)
    # with the second axis as noise, its gene weighs 3 and the others, without any, as much as the average
    one = axes.first(1)
    np.testing.assert_allclose(one.noise, [0, 1 / 3, 0], atol=1e-6)
    np.testing.assert_allclose(one.weights, 3, rtol=1e-5)
    # z = 3 (x - 2) / (3 + 3 / 4)
    np.testing.assert_allclose(
        np.concatenate([one.expect(part) for part in train])[:, 0], [-0.8, -0.8, 0.8, 0.8], rtol=1e-5
    )


@settings(deadline=None, max_examples=10)
@given(ends=st.lists(st.integers(1, 59), unique=True, max_size=8).map(sorted))
def test_parts_do_not_change_the_axes(tmp_path_factory, ends):
    expression = simulate(60, 90, 8)
    whole = find_axes(one_study(tmp_path_factory.mktemp("whole"), expression), 8, 3)
    cut = find_axes(one_study(tmp_path_factory.mktemp("cut"), expression, ends=ends), 8, 3)
    for name in ("vectors", "mean", "profile", "variance", "noise"):
        np.testing.assert_allclose(getattr(whole, name), getattr(cut, name), rtol=1e-5, atol=1e-5)


def test_largest_entries_are_positive_for_any_seed(tmp_path):
    train = one_study(tmp_path, simulate(80, 150, 6))
    axes = [find_axes(train, 6, seed).vectors for seed in range(4)]
    for found in axes:
        assert (found[np.abs(found).argmax(axis=0), np.arange(6)] > 0).all()
        np.testing.assert_allclose(found, axes[0], atol=1e-3)
    assert (find_axes(train, 6, 1).vectors == axes[1]).all()


def test_few_genes_need_few_passes(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for genes, passes in ((14, 1), (15, 2), (28, 2), (300, module.PASSES)):
        find_axes(one_study(tmp_path / str(genes), simulate(40, genes, 4)), 4, 0)
        assert f" of {40 * (1 + passes)} cells read" in caplog.messages[-1]


def test_axes_are_fitted_on_training_cells_only(tmp_path):
    expression = simulate(60, 30, 5)
    splits = np.where(np.arange(60) % 3 == 2, "validation", "train")
    axes = find_axes(one_study(tmp_path, expression, splits, ends=[7, 40]), 4, 0)
    exact = PCA(4, svd_solver="full").fit(expression[splits == "train"].astype(float))
    np.testing.assert_allclose(axes.mean, exact.mean_, rtol=1e-5)
    np.testing.assert_allclose(axes.variance, exact.explained_variance_, rtol=1e-5)


def test_cells_that_do_not_differ_have_no_axes(tmp_path):
    for splits, count in (("train", 1), ("train", 4), ("test", 4)):
        same = one_study(tmp_path / f"{splits}{count}", np.repeat(simulate(1, 30, 3), count, axis=0), splits)
        with pytest.raises(InputError, match="all training cells have the same expression"):
            find_axes(same, 3, 0)


def test_the_mean_of_a_gene_is_that_of_the_studies_that_measure_it(tmp_path):
    a, b = expression_of([[0.5, 0.3, 0.2], [0.3, 0.5, 0.2]]), expression_of([[0.6, 0.4], [0.5, 0.5], [0.2, 0.8]])
    b = np.column_stack([b, np.full(3, np.nan)])
    train, _ = write_studies(tmp_path, {"a": a, "b": b})
    axes = find_axes(train, 2, 0)
    # b measures 0.8 of the counts
    b = np.log1p(np.expm1(b[:, :2]) * 0.8)
    np.testing.assert_allclose(axes.mean, [*np.concatenate([a[:, :2], b]).mean(axis=0), a[:, 2].mean()], rtol=1e-5)


def test_the_covariance_is_that_of_cells_with_missing_values_at_the_mean(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BETWEEN_STUDIES", 1)
    cells = simulate(70, 40, 5)
    kept = np.random.default_rng(1).random((3, 40)) < 0.7
    kept[1] |= ~kept.any(axis=0)
    studies = {"a": cells[:30], "b": cells[30:31], "c": cells[31:]}  # b has a single cell
    studies = {name: np.where(own, values, np.nan) for own, (name, values) in zip(kept, studies.items(), strict=True)}
    train, _ = write_studies(tmp_path, studies)
    axes = find_axes(train, 40, 0)
    coverage = np.repeat([axes.profile[own].sum() for own in kept], [30, 1, 39])[:, None]
    scaled = np.log1p(np.expm1(np.concatenate(list(studies.values()))) * coverage)
    centred = np.nan_to_num(scaled - np.nanmean(scaled, axis=0))
    exact = np.linalg.eigvalsh(centred.T @ centred / 69)[::-1]
    np.testing.assert_allclose(axes.variance, exact[: len(axes.variance)], rtol=1e-4, atol=1e-6)


def test_a_shift_between_studies_counts_less(tmp_path):
    # both studies have the same four cells, up to an increase of gene 3
    cells = np.tile([[1.0, 2, 3, 1], [2, 1, 3, 1], [1, 2, 3, 1], [2, 1, 3, 1]], (2, 1))
    cells[4:, 3] += 4
    train, _ = write_studies(tmp_path, {"a": cells[:4], "b": cells[4:]})
    axes = find_axes(train, 2, 0)
    shift = 4 * cells[:, 3].var(ddof=1) / 4 * BETWEEN_STUDIES**2
    within = 2 * cells[:, 0].var(ddof=1)
    np.testing.assert_allclose(sorted(axes.variance), sorted([shift, within]), rtol=1e-5)
    shifted = np.argmin(np.abs(axes.variance - shift))
    np.testing.assert_allclose(axes.vectors[:, shifted], [0, 0, 0, 1], atol=1e-5)
    # a cell's place is not weighted
    a, b = (axes.place(part)[:, shifted] for part in train)
    np.testing.assert_allclose(b - a, 4, rtol=1e-5)


def test_the_profile_by_hand(tmp_path):
    # a measures three genes, b the first two with three times as many cells: gene 2 has 0.2 of all counts
    a, b = [[0.5, 0.3, 0.2], [0.3, 0.5, 0.2]], [[0.5, 0.5, np.nan]] * 6
    train, _ = write_studies(tmp_path, {"a": expression_of(a), "b": expression_of(b)})
    profile = find_profile(train)
    np.testing.assert_allclose(profile, [0.4, 0.4, 0.2], rtol=1e-4)
    # its fixed point: each study's shares, times the share of the counts that it measures, over its cells
    np.testing.assert_allclose(profile[:2] * 8, np.sum(a, axis=0)[:2] + 0.8 * np.array([3, 3]), rtol=1e-4)


def test_profiles_of_consistent_studies_are_found_again(tmp_path):
    rng = np.random.default_rng(0)
    truth = rng.dirichlet(np.full(60, 0.5))
    kept = rng.random((5, 60)) < np.array([0.9, 0.5, 0.3, 0.2, 0.5])[:, None]
    kept[4] = False  # a study none of whose genes is in the vocabulary
    studies = {f"s{i}": measuring(np.tile(expression_of(truth), (3 * i + 1, 1)), own) for i, own in enumerate(kept[:4])}
    studies["s4"] = np.full((3, 60), np.nan)
    train, _ = write_studies(tmp_path, studies)
    known = kept.any(axis=0)
    np.testing.assert_allclose(find_profile(train), truth * known / truth[known].sum(), rtol=0.02, atol=1e-5)


def test_studies_without_common_genes_or_training_cells(tmp_path):
    studies = {
        "a": expression_of([[0.7, 0.3, np.nan, np.nan], [0.5, 0.5, np.nan, np.nan]]),
        "b": expression_of([[np.nan, np.nan, 0.5, 0.5]] * 5),
        "c": expression_of([[np.nan, 0.5, 0.5, np.nan]]),
    }
    train, _ = write_studies(tmp_path, studies, ["train"] * 7 + ["test"])
    assert train.measured.tolist()[2] == [False, True, True, False]
    np.testing.assert_allclose(find_profile(train), [0.3, 0.2, 0.25, 0.25], rtol=1e-5)
    axes = find_axes(train, 3, 0)
    assert np.isfinite(axes.vectors).all() and (axes.variance > 0).all()
    np.testing.assert_allclose(axes.mean[2:], np.log1p(0.25 * SCALE), rtol=1e-5)
    coordinates = np.concatenate([axes.place(part) for part in train])
    np.testing.assert_allclose(coordinates[2:], 0, atol=1e-4)  # cells of b do not differ from each other


def test_expression_is_that_of_a_cell_with_all_genes():
    axes = Axes(np.eye(4)[:, :2], np.zeros(4), np.array([0.4, 0.3, 0.2, 0.1]), np.ones(2), np.ones(4))
    panels = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=bool)
    lists, shares = [[0, 2], [2], [2, 0], []], [[0.5, 0.5], [1], [0.25, 0.75], []]
    cells = ranked_cells(lists, [expression_of(own) for own in shares], 4, panels=panels, panel=[0, 1, 1, 2])
    expected = expression_of([0.5, 0.5, 0.6, 0.15, 0.45])
    np.testing.assert_allclose(axes.expression(cells), expected, rtol=1e-5)
    np.testing.assert_allclose(axes.place(cells)[3], 0)  # nothing is measured: the cell is at the mean


def test_places_by_hand():
    # one axis of variance 2; the third gene has four times the noise of the others, whose weight is that of the average
    noise = np.array([1.0, 1, 4])
    axes = Axes(np.array([[0.6], [0], [0.8]]), np.array([1.0, 2, 3]), np.array([0.5, 0.5, 0]), np.array([2.0]), noise)
    np.testing.assert_allclose(axes.weights, [1 / 2, 1 / 2, 1 / 4])
    # the third gene is not measured in the first cell, and is 0 in the second
    panels = np.array([[True, True, True], [True, True, False]])
    cells = ranked_cells([[0, 1]] * 2, [[3, 1]] * 2, 3, panels=panels, panel=[1, 0])
    # z = v'(x - m) / (v'v + RIDGE), times 1 + RIDGE
    placed = [0.6 * (3 - 1) / (0.36 + RIDGE) * (1 + RIDGE), 0.6 * (3 - 1) + 0.8 * (0 - 3)]
    np.testing.assert_allclose(axes.place(cells).ravel(), placed, rtol=1e-5)
    expected = [
        0.6 / 2 * (3 - 1) / (0.36 / 2 + 1 / 2),
        (0.6 / 2 * (3 - 1) + 0.8 / 4 * (0 - 3)) / (0.36 / 2 + 0.64 / 4 + 1 / 2),
    ]
    np.testing.assert_allclose(axes.expect(cells).ravel(), expected, rtol=1e-5)
    assert axes.first(0).place(cells).shape == axes.first(0).expect(cells).shape == (2, 0)


def test_ridge_placement_minimises_its_objective():
    rng = np.random.default_rng(0)
    vectors, _ = np.linalg.qr(rng.normal(size=(30, 4)))
    axes = Axes(vectors, rng.random(30), np.full(30, 1 / 30), np.ones(4), np.ones(30))
    measured = rng.random(30) < 0.4
    tokens = np.flatnonzero(measured)
    cells = ranked_cells([tokens], [rng.random(len(tokens)) * 3], 30, panels=measured[None])
    centred = (cells.matrix(axes.expression(cells)).toarray()[0] - axes.mean)[measured]
    stacked = np.concatenate([vectors[measured], np.sqrt(RIDGE) * np.eye(4)])
    expected, *_ = np.linalg.lstsq(stacked, np.concatenate([centred, np.zeros(4)]), rcond=None)
    np.testing.assert_allclose(axes.place(cells)[0], expected * (1 + RIDGE), rtol=1e-5)


def test_the_expectation_is_that_given_the_measured_genes():
    rng = np.random.default_rng(0)
    vectors, _ = np.linalg.qr(rng.normal(size=(30, 4)))
    variance, noise = rng.uniform(1, 9, 4), rng.uniform(1, 1.5, 30)
    axes, measured = Axes(vectors, rng.random(30), np.full(30, 1 / 30), variance, noise), rng.random(30) < 0.4
    tokens = np.flatnonzero(measured)
    cells = ranked_cells([tokens], [rng.random(len(tokens)) * 3], 30, panels=measured[None])
    centred = (cells.matrix(axes.expression(cells)).toarray()[0] - axes.mean)[measured]
    # by the joint normal distribution of coordinates and measured genes
    own = vectors[measured]
    covariance = own @ np.diag(variance) @ own.T + np.diag(np.maximum(noise, noise.mean())[measured])
    expected = np.diag(variance) @ own.T @ np.linalg.solve(covariance, centred)
    np.testing.assert_allclose(axes.expect(cells)[0], expected, rtol=1e-5)


def test_unmeasured_genes_do_not_pull_a_cell_towards_zero(tmp_path):
    rng = np.random.default_rng(0)
    shares = np.exp(rng.normal(size=(300, 5)) @ rng.normal(size=(5, 400)) / 2)  # five programmes
    cells = expression_of(rng.poisson(20 * shares) / (20 * shares).sum(axis=1, keepdims=True))
    axes = find_axes(one_study(tmp_path / "train", cells[:200]), 5, 0)
    half = np.random.default_rng(5).random(400) < 0.5
    (full,) = one_study(tmp_path / "full", cells[200:])
    (seen,) = one_study(tmp_path / "seen", measuring(cells[200:], half))
    (zeros,) = one_study(tmp_path / "zeros", np.nan_to_num(measuring(cells[200:], half)))
    assert (seen.panels == half).all() and zeros.panels.all()
    truth, ridge, filled = (axes.place(part) for part in (full, seen, zeros))
    spread = np.linalg.norm(truth - truth.mean(axis=0), axis=1).mean()
    assert np.linalg.norm(ridge - truth, axis=1).mean() < 0.1 * spread
    assert np.linalg.norm(filled - truth, axis=1).mean() > 0.5 * spread
    # neighbours stay neighbours: most cells are nearest to themselves
    distance = np.linalg.norm(ridge[:, None] - truth[None], axis=2)
    assert (distance.argmin(axis=1) == np.arange(100)).mean() > 0.8
