"""Gene vectors sum to the coordinates of a cell; validation cells decide how many axes are kept."""

import logging
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest

from cell2text.embedding.axes import Axes
from cell2text.embedding.encoders import coexpression, load_encoder
from cell2text.embedding.encoders.coexpression import Coexpression, ProgrammeMeans, choose_candidate
from cell2text.errors import InputError
from cell2text.files import read_json
from default_settings import encoder_settings
from ranked_files import ranked_cells, write_studies


def write_cells(directory, expression, types=None, splits="train", ends=()):
    """Write the cells of one study, and return their training and validation splits."""
    return write_studies(directory, {"a": expression}, splits, types, ends)


def simulate(cells, genes, programmes, seed=0):
    """Return expression from ``programmes`` gene programmes of decreasing strength plus noise; a third is zero."""
    rng = np.random.default_rng(seed)
    strength = 3 * 0.8 ** np.arange(programmes)
    values = rng.normal(size=(cells, programmes)) * strength @ rng.normal(size=(programmes, genes)) / np.sqrt(genes)
    values += 2 + rng.normal(scale=0.1, size=values.shape)
    return np.where(rng.random(values.shape) < 1 / 3, 0, np.maximum(values, 0)).astype(np.float32)


def fit(splits, dimensions, seed=0):
    return Coexpression.fit(*splits, encoder_settings(dimensions=dimensions), seed, None)


def is_whitened(encoder):
    return bool((encoder.scale != 1).any())


def of_types(informative, loud, seed=0, cells=240):
    """Return cells of two types that differ in gene 0; ``loud`` genes vary independently of the type."""
    rng = np.random.default_rng(seed)
    types = np.arange(cells) % 2
    expression = 5 + rng.normal(size=(cells, 1 + len(loud))) * [0.3, *loud]
    expression[:, 0] += informative * types
    splits = np.where(np.arange(cells) % 3 == 2, "validation", "train")
    return expression, np.array(["CL:0", "CL:1"])[types], splits


def test_there_are_fewer_axes_than_cells_and_genes(tmp_path):
    for cells, genes in ((5, 30), (30, 5)):
        directory = tmp_path / str(cells)
        assert fit(write_cells(directory, simulate(cells, genes, 4)), 64).axes.vectors.shape == (genes, 4)


def test_axes_without_variance_are_dropped(tmp_path):
    expression = np.repeat(simulate(4, 30, 3), 5, axis=0)
    assert fit(write_cells(tmp_path, expression), 10).dimensions == 3


def test_identical_training_cells_are_an_error(tmp_path):
    for count in (1, 6):
        with pytest.raises(InputError, match="all training cells have the same expression"):
            fit(write_cells(tmp_path / str(count), np.repeat(simulate(1, 30, 3), count, axis=0)), 4)


def test_gene_vectors_minus_the_centre_sum_to_the_pooled_vector(tmp_path, monkeypatch):
    monkeypatch.setattr(coexpression, "choose_candidate", lambda candidates: candidates[1])
    expression, types, splits = of_types(1, [1, 0.5] * 10)
    train, validation = write_cells(tmp_path, expression, types, splits)
    encoder = fit((train, validation), 16)
    assert is_whitened(encoder)
    (cells,) = train
    vectors = encoder.embed(cells, 21)
    centre = encoder.axes.mean @ encoder.axes.vectors / encoder.scale
    placed, expected = np.hsplit(vectors["pooled"], 2)
    np.testing.assert_allclose(vectors["gene_vectors"].astype(float).sum(axis=1) - centre, placed, atol=0.05)
    np.testing.assert_allclose(expected, encoder.axes.expect(cells) / encoder.scale, atol=1e-4)
    assert placed.dtype == np.float32
    # whitened: the axes of the training cells have unit variance and are uncorrelated
    np.testing.assert_allclose(placed.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(placed.T), np.eye(16), atol=1e-3)


def test_a_saved_encoder_can_be_loaded(tmp_path):
    expression, types, splits = of_types(1, [1] * 40)
    encoder = fit(write_cells(tmp_path, expression, types, splits), 20)
    encoder.save(tmp_path)
    about = read_json(tmp_path / "encoder.json")
    assert about["kind"] == "coexpression"
    assert about["dimensions"] == encoder.dimensions == len(encoder.scale)
    assert [(one["dimensions"], one["whitened"]) for one in about["candidates"]] == [
        (20, False), (20, True), (10, False), (10, True),
    ]  # fmt: skip
    again = load_encoder(tmp_path)
    for name, values in asdict(encoder.axes).items():
        assert values.dtype == np.float32 and (getattr(again.axes, name) == values).all()
    assert (again.scale == encoder.scale).all() and again.dimensions == encoder.dimensions
    again.save(tmp_path / "..")
    assert read_json(tmp_path / ".." / "encoder.json") == about


def test_misleading_axes_are_truncated(tmp_path):
    # 20% of the labels are wrong, and with 60 training cells the axes after the first fit the wrong labels
    expression, types, _ = of_types(20, [2] * 60, cells=600)
    types = np.where(np.random.default_rng(1).random(600) < 0.2, types[::-1], types)
    splits = np.where(np.arange(600) < 60, "train", "validation")
    encoder = fit(write_cells(tmp_path, expression + 20, types, splits), 40)
    scores = {(one["dimensions"], one["whitened"]): one["log_likelihood"] for one in encoder.candidates}
    assert encoder.dimensions == 10 and not is_whitened(encoder)
    assert scores[10, False] > scores[20, False] > scores[40, False] > scores[40, True]


def test_whitening_is_chosen_if_an_axis_of_low_variance_separates_the_types(tmp_path):
    # next to genes with a spread 50 times as large, the gene that separates the types almost vanishes
    for loud, whitened in ((40, True), (0.3, False)):
        expression, types, splits = of_types(1.2, [loud] * 7 + [0.01], cells=600)
        encoder = fit(write_cells(tmp_path / str(loud), expression / 10 + 20, types, splits), 8)
        assert encoder.dimensions == 8 and is_whitened(encoder) == whitened


def test_the_first_candidate_within_one_standard_error_is_chosen():
    def candidate(behind, error):
        return {"behind": behind, "standard_error": error}

    candidates = [candidate(0.3, 0.2), candidate(0.2, 0.2), candidate(0.1, 0.2), candidate(0.0, 0.0)]
    assert choose_candidate(candidates) is candidates[1]
    assert choose_candidate([candidate(0.3, 0.2), candidate(0.0, 0.0)])["behind"] == 0


def test_the_differences_of_candidates_follow_their_scores(tmp_path):
    expression, types, splits = of_types(1, [1] * 40)
    candidates = fit(write_cells(tmp_path, expression, types, splits), 20).candidates
    best = max(one["log_likelihood"] for one in candidates)
    for one in candidates:
        assert one["behind"] == pytest.approx(best - one["log_likelihood"])
        assert (one["standard_error"] > 0) == (one["behind"] > 0)


@pytest.mark.parametrize("case", ["none known", "one type", "another type", "no validation cells"])
def test_without_labels_all_axes_are_kept(tmp_path, case, caplog):
    caplog.set_level(logging.INFO)
    expression, types, splits = of_types(1, [1] * 40)
    validation = splits == "validation"
    if case == "none known":
        types = np.where(validation, None, types)
    elif case == "one type":
        types = np.full(len(types), "CL:0")
    elif case == "another type":
        types = np.where(validation, "CL:9", types)
    else:
        splits = np.full(len(splits), "train")
    encoder = fit(write_cells(tmp_path, expression, types, splits), 20)
    assert encoder.dimensions == 20 and not is_whitened(encoder) and encoder.candidates == []
    assert "keeping all dimensions: fewer than two training cell types" in caplog.text
    assert "kept 20 of 20 dimensions, not whitened" in caplog.text


def test_cells_of_types_absent_from_training_are_not_scored(tmp_path):
    expression, types, splits = of_types(1, [1] * 40)
    known = fit(write_cells(tmp_path, expression, types, splits), 20)
    # the same validation cells again, with a type absent from training or no type
    more = np.concatenate([expression, expression[splits == "validation"] * 3])
    types = [*types, *np.resize(["CL:9", None], len(more) - len(types))]
    splits = [*splits, *["validation"] * (len(more) - len(splits))]
    found = fit(write_cells(tmp_path / "more", more, types, splits), 20)
    assert found.candidates == known.candidates


def test_candidates_are_compared_on_a_sample_of_the_cells(tmp_path, monkeypatch):
    scored = []
    monkeypatch.setattr(coexpression, "SELECTION_CELLS", 30)
    monkeypatch.setattr(coexpression, "_score", lambda splits: scored.append(splits) or np.arange(30.0))
    expression, types, splits = of_types(1, [1] * 40)
    encoder = fit(write_cells(tmp_path, expression, types, splits, ends=[100]), 20)
    assert len(encoder.candidates) == len(scored) == 4
    for candidate, both in zip(encoder.candidates, scored, strict=True):
        for coordinates, cell_types in both:
            assert coordinates.shape == (30, candidate["dimensions"]) and set(cell_types) == {"CL:0", "CL:1"}


def test_coordinates_and_types_belong_to_the_same_cells(tmp_path):
    expression, types, splits = of_types(1, [1] * 40)
    train, _ = write_cells(tmp_path, expression, types, splits, ends=[33, 100])
    axes = Axes(np.eye(41), np.ones(41), np.full(41, 1 / 41), np.ones(41), np.ones(41))
    chosen = pd.Series({"a|100": "CL:7", "a|3": "CL:8", "a|34": "CL:9"})
    coordinates, found = coexpression._project(train, chosen, axes)
    assert found.tolist() == ["CL:8", "CL:9", "CL:7"]
    np.testing.assert_allclose(coordinates, expression[[3, 34, 100]] - 1, rtol=1e-5, atol=1e-5)


def test_means_of_programmes_by_hand():
    members = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=np.uint8)
    means = ProgrammeMeans(members, np.array([1, 10, 100], dtype=np.float32))
    panels = np.array([[True, True, True, True], [True, False, False, False]])
    cells = replace(ranked_cells([[3, 0, 2], [0]], [[2, 1, 1], [4]], 4), panel=np.array([0, 1]), panels=panels)
    mean = np.array([0.5, 0, 0, 1])
    # all genes: (1 - 0.5) / 2, 10 * 1 / 2 and 100 * (2 - 1); gene 0 alone: 4 - 0.5, and none measured of two programmes
    np.testing.assert_allclose(means.place(cells, cells.expression, mean), [[0.25, 5, 100], [3.5, 0, 0]])


def test_means_of_programmes_vary_as_much_as_the_axes_and_survive_saving(tmp_path):
    train, validation = write_cells(tmp_path, simulate(60, 30, 4))
    members = np.zeros((30, 3), dtype=bool, order="F")  # as a sparse matrix of columns returns it
    members[:5, 0] = members[5:7, 1] = True  # the third has no gene
    encoder = Coexpression.fit(train, validation, encoder_settings(dimensions=8), 0, None, programmes=members)
    (cells,) = train
    pooled = encoder.embed(cells, 1)["pooled"]
    means = pooled[:, 2 * encoder.dimensions :]
    assert pooled.shape[1] == encoder.pooled_dimensions and means.shape[1] == 3
    expected = np.sqrt(np.mean(encoder.axes.variance / encoder.scale**2))
    assert means.std(axis=0) == pytest.approx([expected, expected, 0], rel=1e-3)
    # the mean expression of the genes itself, up to its place and scale
    table = cells.matrix(encoder.axes.expression(cells)).toarray()
    assert np.corrcoef(means[:, 0], table[:, :5].mean(axis=1))[0, 1] == pytest.approx(1, abs=1e-5)
    (tmp_path / "encoder").mkdir()
    encoder.save(tmp_path / "encoder")
    assert (Coexpression.load(tmp_path / "encoder").embed(cells, 1)["pooled"] == pooled).all()


def test_embed_keeps_the_highest_ranked_genes():
    vectors = np.array([[0.6, 0], [0.8, 0], [0, 0.6], [0, 0.8]], dtype=np.float32)
    axes = Axes(vectors, np.array([1, 0, 0, 1]), np.full(4, 0.25), np.array([1, 2]), np.ones(4))
    cells = ranked_cells([[3, 0, 2], [1]], [[2, 1, 1], [4]], 4)
    found = Coexpression(axes, np.array([0.2, 0.4], dtype=np.float32)).embed(cells, 2)
    np.testing.assert_allclose(found["gene_vectors"], [[[0, 4], [3, 0]], [[16, 0], [0, 0]]], rtol=1e-3)
    assert found["lengths"].tolist() == [2, 1]
    without = Coexpression(axes, np.array([0.2, 0.4], dtype=np.float32)).embed(cells, 0)
    assert without["lengths"].tolist() == [3, 1] and without["gene_vectors"].shape == (2, 0, 2)
    # every expressed gene counts: (1 * 0.6, 2 * 0.8 + 1 * 0.6) and (4 * 0.8, 0), minus (0.6, 0.8), over (0.2, 0.4);
    # expected are 1 / (1 + 1 / variance) of it
    np.testing.assert_allclose(found["pooled"], [[0, 3.5, 0, 3.5 / 1.5], [13, -2, 6.5, -2 / 1.5]], atol=1e-5)
