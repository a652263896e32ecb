import anndata as ad
import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from cell2text.confidence import novelty
from cell2text.confidence.novelty import Reference, choose_limit, draw_cells


def test_novelty_by_hand(monkeypatch):
    monkeypatch.setattr(novelty, "NEIGHBOURS", 2)
    reference = Reference.of(np.array([[0.0], [1.0], [3.0], [100.0]]))
    assert reference.spread.tolist() == [2, 1.5, 2.5, 98]
    # the neighbours of 4 are 3 and 1 at distances of 1 and 3; those of 98 are 100 and 3
    assert reference.novelty(np.array([[4.0], [98.0]])) == pytest.approx([2 / 2, 48.5 / 50.25])
    assert reference.vectors.dtype == reference.spread.dtype == np.float32


def test_the_reference_is_drawn_by_seed(monkeypatch):
    monkeypatch.setattr(novelty, "MOST_CELLS", 50)
    one, same, other = (draw_cells(200, seed).tolist() for seed in (1, 1, 2))
    assert one == same != other and one == sorted(set(one)) and len(one) == 50
    assert draw_cells(50, 1).tolist() == list(range(50))


def test_copies_of_a_cell_and_few_cells_give_finite_values():
    copies = Reference.of(np.ones((20, 4)))
    assert np.isfinite(copies.novelty(np.array([[1.0] * 4, [2.0] * 4]))).all()
    assert copies.novelty(np.ones((1, 4))) == [0]
    assert np.isfinite(Reference.of(np.eye(2)).novelty(np.ones((3, 2)))).all()
    assert copies.novelty(np.empty((0, 4))).shape == (0,)
    for training in (np.ones((1, 4)), np.full((9, 4), np.nan)):
        with pytest.raises(ValueError, match="at least two training cells"):
            Reference.of(training)


def test_novelty_does_not_depend_on_the_density_of_a_cluster():
    rng = np.random.default_rng(0)
    dense, sparse = rng.normal(0, 0.1, size=(500, 8)), rng.normal(20, 5, size=(500, 8))
    reference = Reference.of(np.concatenate([dense, sparse]))
    inside = [reference.novelty(rng.normal(*where, size=(200, 8))) for where in ((0, 0.1), (20, 5))]
    assert np.median(inside[0]) == pytest.approx(np.median(inside[1]), rel=0.1)
    # a distance that is small for the sparse cluster is large for the dense one
    assert reference.novelty(np.full((1, 8), 1.0))[0] > 3 * max(part.max() for part in inside)


def test_the_limit_is_the_conformal_quantile():
    assert choose_limit(np.arange(1, 1000)[::-1]) == 990  # the 990th of 999
    assert choose_limit(np.arange(1, 100)) == 99
    assert choose_limit(np.array([3.0, 1.0])) == 3
    assert choose_limit(np.empty(0)) is None
    rng = np.random.default_rng(0)
    passing = [np.mean(rng.normal(size=2000) <= choose_limit(rng.normal(size=150))) for _ in range(300)]
    assert 0.99 - 0.001 < np.mean(passing) < 1


@pytest.mark.parametrize("held_out", ["B cell", "CD8-positive, alpha-beta T cell"])
def test_cells_of_a_type_without_training_cells_are_farther_away(request, held_out):
    study = request.config.rootpath.parent / "shared/data/studies/pbmc3k.h5ad"
    if not study.is_file():
        pytest.skip(f"needs {study.name} in shared/data beside the repository")
    cells = ad.read_h5ad(study)
    counts = cells.X.toarray()
    expression = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    new = (cells.obs["cell_type"] == held_out).to_numpy()
    train, validation, test = np.split(np.random.default_rng(0).permutation(np.flatnonzero(~new)), [700, 930])
    embedded = PCA(64, random_state=0).fit(expression[train]).transform(expression)
    reference = Reference.of(embedded[train])
    limit = choose_limit(reference.novelty(embedded[validation]))
    like, unlike = (reference.novelty(embedded[rows]) for rows in (test, new))
    assert (like > limit).mean() < 0.04
    assert roc_auc_score([0] * len(like) + [1] * len(unlike), [*like, *unlike]) > 0.8
    assert (unlike > limit).mean() > 2 * (like > limit).mean()
