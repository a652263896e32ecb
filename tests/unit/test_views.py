"""Cells seen through random gene panels at reduced depth, and the vectors of what is seen."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cell2text.contracts import EMBEDDINGS
from cell2text.embedding import views
from cell2text.embedding.embed_genes import embed_genes, read_rows
from cell2text.embedding.ranked_cells import SCALE, RankedCells, RankedStore, read_measured, store_ranked
from cell2text.embedding.vectors import ComputedVectors, Embeddings
from cell2text.embedding.views import LEAST_DEPTH, LEAST_GENES, PANEL_CELLS, SMALLEST_PANEL, draw_view
from cell2text.finetuning.align import add_noise
from cell2text.finetuning.data import OTHER_NOISE, OWN_NOISE, Cells
from ranked_files import random_encoder, ranked_cells, write_studies

GENES = 400


def cells_with(counts, n_counts=None, median=None, **panels):
    """Return cells with the given counts of each gene, ranked by count over median."""
    counts = np.asarray(counts)
    total = counts.sum(axis=1) if n_counts is None else np.broadcast_to(n_counts, len(counts))
    quotient = counts / (1 if median is None else median)
    lists = [np.lexsort((np.arange(len(row)), -row))[: np.count_nonzero(row)] for row in quotient]
    values = [np.log1p(row[order] / n * SCALE) for row, order, n in zip(counts, lists, total, strict=True)]
    return ranked_cells(lists, values, counts.shape[1], total, **panels)


def random_counts(cells, genes=GENES, seed=0):
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.gamma(0.5, 8, (cells, genes)))


def counts_of(cells):
    """Return the counts of each gene, int64 (cells, genes)."""
    shares = np.expm1(cells.matrix(cells.expression.astype(float)).toarray()) / SCALE
    counts = shares * cells.n_counts[:, None]
    np.testing.assert_allclose(counts, np.rint(counts), atol=0.01)
    return np.rint(counts).astype(np.int64)


def own_panels(cells):
    """Return which genes the panel of each cell has, bool (cells, genes)."""
    return cells.panels[cells.panel]


def same(one, other):
    names = ("cell_ids", "tokens", "expression", "offsets", "n_counts", "panels", "panel")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def whole(monkeypatch, panel=True, depth=True):
    """Let views have all genes or all counts."""
    if panel:
        monkeypatch.setattr(views, "SMALLEST_PANEL", 1)
    if depth:
        monkeypatch.setattr(views, "LEAST_DEPTH", 1)


def test_a_view_of_everything_is_the_cell(monkeypatch):
    whole(monkeypatch)
    median = np.random.default_rng(0).random(GENES) + 0.1
    cells = cells_with(random_counts(100), median=median)
    view = draw_view(cells, median, [1])
    np.testing.assert_allclose(view.expression, cells.expression, rtol=1e-5)
    assert np.array_equal(view.tokens, cells.tokens) and np.array_equal(view.n_counts, cells.n_counts)
    assert np.array_equal(own_panels(view), own_panels(cells))


def test_thinning_is_binomial(monkeypatch):
    whole(monkeypatch, depth=False)
    found = counts_of(draw_view(cells_with(np.full((3000, 100), 50)), np.ones(100), [2]))
    depth = found.mean(axis=1) / 50
    # the depth is even from its minimum to 1
    assert LEAST_DEPTH - 0.02 < depth.min() < LEAST_DEPTH + 0.02 and 0.98 < depth.max() <= 1
    np.testing.assert_allclose(depth.mean(), (1 + LEAST_DEPTH) / 2, atol=0.02)
    np.testing.assert_allclose(depth.std(), (1 - LEAST_DEPTH) / np.sqrt(12), atol=0.01)
    # the genes of a cell are thinned independently, with the variance of a binomial distribution
    expected = 50 * depth * (1 - depth)
    for third in np.array_split(np.argsort(depth), 3):
        np.testing.assert_allclose(found[third].var(axis=1, ddof=1).mean(), expected[third].mean(), rtol=0.03)


def test_panels_are_shared_by_neighbours_and_have_measured_genes_only(monkeypatch):
    whole(monkeypatch, panel=False)
    measured = np.random.default_rng(1).random((2, GENES)) < 0.8
    panel = np.arange(1000) % 2
    counts = (random_counts(1000) + 1) * measured[panel]
    view = draw_view(cells_with(counts, panels=measured, panel=panel), np.ones(GENES), [3])
    found, panels = counts_of(view), own_panels(view)
    # exactly the counts of the genes in the panel remain, unless they are so few that the cell is seen as it is
    seen = np.where(panels, counts, 0)
    assert np.array_equal(found, seen)
    assert np.array_equal(view.n_counts, seen.sum(axis=1))
    entire = (panels == measured[panel]).all(axis=1)
    assert not (panels & ~measured[panel]).any() and 0 < entire.sum() < 400
    share = panels.sum(axis=1) / measured[panel].sum(axis=1)
    assert share.min() < 0.12 and np.median(share) < 0.5 and share[~entire].max() > 0.7
    blocks = np.arange(1000) // PANEL_CELLS
    for block in np.unique(blocks[~entire]):
        for study in range(2):
            assert len(np.unique(panels[(blocks == block) & (panel == study) & ~entire], axis=0)) == 1
        # two studies share the draw
        one, other = (panels[(blocks == block) & (panel == study) & ~entire][0] for study in range(2))
        both = measured.all(axis=0)
        assert np.array_equal(one[both], other[both])
    assert len(np.unique(panels[~entire], axis=0)) == 2 * len(np.unique(blocks[~entire]))
    assert len(view.panels) <= 2 * len(np.unique(blocks)) + 2


def test_the_shares_of_panels_are_even_on_a_logarithmic_scale():
    cells = cells_with(np.full((400 * PANEL_CELLS, 50), 9))
    shares = np.log(own_panels(draw_view(cells, np.ones(50), [4]))[::PANEL_CELLS].mean(axis=1))
    assert SMALLEST_PANEL == 0.02
    # panels of fewer than 20 of 50 genes are not used, and a quarter of the logarithmic scale is above them
    used = np.exp(shares) < 1
    expected = np.log(1 / 0.4) / np.log(1 / SMALLEST_PANEL)
    assert abs(used.mean() - expected) < 0.1


def test_genes_are_ranked_again():
    median = np.random.default_rng(5).choice([0.5, 1, 2], GENES)
    cells = cells_with(random_counts(200), median=median)
    view = draw_view(cells, median, [5])
    counts = counts_of(view)
    assert (counts <= counts_of(cells)).all() and (view.n_counts < cells.n_counts).mean() > 0.9
    for cell in range(200):
        tokens = view.tokens[view.offsets[cell] : view.offsets[cell + 1]]
        quotient = counts[cell] / median
        expected = sorted(np.flatnonzero(counts[cell]), key=lambda token, of=quotient: (-of[token], token))
        assert tokens.tolist() == expected
    kept = view.n_counts < cells.n_counts
    assert np.array_equal(view.n_counts[kept], counts.sum(axis=1)[kept])


def test_cells_with_few_genes_are_seen_whole():
    counts = np.zeros((130, GENES), dtype=int)
    counts[:, : LEAST_GENES - 1] = 40
    counts[7] = counts[100] = 0  # no genes at all
    counts[::2, :300] = 30
    cells = cells_with(counts, n_counts=20_000)  # most counts are of genes without a token
    view = draw_view(cells, np.ones(GENES), [6])
    rows = np.arange(1, 130, 2)
    small, same_cells = view.take(rows), cells.take(rows)
    assert np.array_equal(small.tokens, same_cells.tokens) and (small.n_counts == 20_000).all()
    np.testing.assert_allclose(small.expression, same_cells.expression, rtol=1e-5)
    assert own_panels(small).all()
    large = view.take(np.arange(0, 130, 2))
    assert (large.lengths >= LEAST_GENES).all() and (large.n_counts < 20_000).any()


def test_the_same_seed_gives_the_same_view():
    cells = cells_with(random_counts(150))
    views_ = [draw_view(cells, np.ones(GENES), seed) for seed in ([0, 1], [0, 1], [0, 2], [1, 1])]
    assert same(views_[0], views_[1])
    assert not any(same(views_[0], other) for other in views_[2:])


def test_no_cells_have_a_view():
    view = draw_view(ranked_cells([], [], GENES), np.ones(GENES), [0])
    assert len(view) == 0 and view.offsets.tolist() == [0] and view.panels.shape[1] == GENES
    assert random_encoder(GENES, 4).embed(view, 3)["pooled"].shape == (0, 8)


def test_special_tokens_have_no_median():
    counts = np.column_stack([np.zeros((10, 2), dtype=int), random_counts(10)])
    median = np.concatenate([[np.nan, np.nan], np.ones(GENES)])
    view = draw_view(cells_with(counts, panels=[~np.isnan(median)]), median, [0])
    assert np.isfinite(view.expression).all() and not own_panels(view)[:, :2].any()


@pytest.fixture
def embedded(tmp_path):
    """Vectors of 150 cells of two studies, stored in two shards per study and computed on the fly."""
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(GENES, 0.3), 150)
    expression = np.log1p(np.array([rng.multinomial(3000, own) for own in shares]) / 3000 * SCALE)
    expression[100:, ::3] = np.nan  # b measures two thirds of the genes
    studies = {"a": expression[:100], "b": expression[100:]}
    write_studies(tmp_path, studies, n_counts=3000.0, ends=[20, 40])
    encoder, genes = random_encoder(GENES, 8), tmp_path / "genes.parquet"
    (tmp_path / "encoder").mkdir()
    encoder.save(tmp_path / "encoder")

    def embed(folder, seed=0, shards=2, top_k=5):
        files = []
        for name in studies:
            for shard in range(shards):
                files.append(tmp_path / f"{folder}/{name}{shard}.safetensors")
                tokens = tmp_path / f"{name}.parquet"
                embed_genes(tmp_path / "encoder", tokens, genes, files[-1], shard, shards, top_k, 3, seed)
        return [str(file) for file in files]

    return SimpleNamespace(folder=tmp_path, encoder=encoder, genes=genes, embed=embed)


IDS = [f"a|{i}" for i in range(100)] + [f"b|{i}" for i in range(50)]
NAMES = [*EMBEDDINGS.tensors, *(f"view_{name}" for name in EMBEDDINGS.tensors)]


def test_views_are_stored_next_to_their_cells(embedded):
    files = embedded.embed("stored")
    read = [EMBEDDINGS.read(file, NAMES) for file in files]
    assert [cell for _, ids in read for cell in ids] == IDS
    tensors = {name: np.concatenate([own[name] for own, _ in read]) for name in NAMES}
    assert tensors["view_gene_vectors"].shape == (150, 3, 5, 8) and tensors["view_pooled"].shape == (150, 3, 16)
    # embedded again, or with another number of shards
    assert all(
        np.array_equal(EMBEDDINGS.read(file, NAMES)[0][name], own[name])
        for (own, _), file in zip(read, embedded.embed("again"), strict=True)
        for name in NAMES
    )
    own = EMBEDDINGS.read_cells(embedded.embed("one", shards=1), IDS, ["pooled"])["pooled"]
    np.testing.assert_allclose(tensors["pooled"], own, rtol=1e-5)
    other = EMBEDDINGS.read_cells(embedded.embed("other", seed=1), IDS, ["pooled", "view_pooled"])
    np.testing.assert_allclose(other["pooled"], own, rtol=1e-5)
    assert not np.allclose(other["view_pooled"], tensors["view_pooled"])
    # the views of a cell differ, unless it is seen as it is in both, and each is that of the cell
    seen = tensors["view_pooled"]
    entire = np.abs(seen - own[:, None]).max(axis=2) < 1e-4
    for one, two in ((0, 1), (1, 2)):
        differ = np.abs(seen[:, one] - seen[:, two]).max(axis=1) > 1e-3
        assert (differ | (entire[:, one] & entire[:, two])).all() and differ.mean() > 0.8
    measured = read_measured(embedded.genes, [embedded.folder / "b.parquet"])[0]
    start = 25  # the second shard of b
    for part in read_rows(embedded.folder / "b.parquet", measured, 25, 50):
        view = draw_view(part, np.ones(GENES), [0, 2, start])
        expected = embedded.encoder.embed(view, 5)
        rows = slice(100 + start, 100 + start + len(part))
        for name, values in expected.items():
            np.testing.assert_allclose(tensors[f"view_{name}"][rows, 2], values, rtol=1e-5, atol=1e-6)
        start += len(part)
    assert start == 50


def test_vectors_of_views_are_those_stored(embedded):
    embeddings = Embeddings(embedded.embed("stored"))
    assert embeddings.count_views() == 3
    tensors = EMBEDDINGS.read_cells(embeddings.files, IDS, NAMES)
    ids, rows, numbers = [IDS[i] for i in (140, 3, 99, 100, 20)], np.array([4, 0, 1, 2, 2]), np.array([-1, 2, 0, 1, -1])
    place = np.array([140, 3, 99, 100, 20])[rows]
    for reads in ("pooled", "gene_vectors"):
        vectors = embeddings.vectors(ids, reads, 3)
        assert vectors.views == 3 and len(vectors) == 5
        for found, name in zip(vectors.seen(rows, numbers), (reads, "lengths"), strict=True):
            expected = [
                tensors[name][cell] if view < 0 else tensors[f"view_{name}"][cell, view]
                for cell, view in zip(place, numbers, strict=True)
            ]
            np.testing.assert_array_equal(found.numpy(), np.array(expected))
        assert all(map(torch.equal, vectors[rows], vectors.seen(rows, np.full(5, -1))))
        fewer = embeddings.vectors(ids, reads)
        assert fewer.views == 0 and all(map(torch.equal, fewer[rows], vectors[rows]))


def test_vectors_of_views_computed_on_the_fly(embedded):
    files = embedded.embed("fresh", top_k=0)
    tokens = [str(embedded.folder / f"{name}.parquet") for name in "ab"]
    embeddings = Embeddings(files, str(embedded.folder / "encoder"), tokens, str(embedded.genes), top_k=300)
    with embeddings.with_store() as stocked:
        vectors = stocked.vectors(IDS, "gene_vectors", 3)
        rows, numbers = np.array([120, 7, 3, 140, 99, 8]), np.array([0, -1, 2, 1, -1, 2])
        own, own_lengths = vectors[rows]
        found, lengths = vectors.seen(rows, numbers)
        again, _ = vectors.seen(rows, numbers)
        other, _ = vectors.seen(rows, np.where(numbers >= 0, (numbers + 1) % 3, -1))
        assert torch.equal(found, again) and not torch.equal(found, other)
        kept = numbers < 0
        assert torch.equal(found[kept], own[kept]) and lengths[kept].tolist() == own_lengths[kept].tolist()
        assert (lengths[~kept] < own_lengths[~kept]).all()
        # a view's genes are among those of its own cell: directions of vectors identify genes
        directions = [torch.nn.functional.normalize(part, dim=-1) for part in (found, own)]
        for cell in np.flatnonzero(~kept):
            near = directions[0][cell, : lengths[cell]] @ directions[1][cell, : own_lengths[cell]].T
            assert (near.max(dim=1).values > 0.99).all()
        assert isinstance(vectors, ComputedVectors) and vectors.seen(rows[:0], numbers[:0])[0].shape == (0, 300, 8)


def test_single_cells_are_read_with_the_panels_of_their_studies(embedded):
    files = [embedded.folder / f"{name}.parquet" for name in "ab"]
    measured = read_measured(embedded.genes, files)
    (embedded.folder / "store").mkdir()
    store_ranked(files, measured, embedded.folder / "store")
    store = RankedStore(embedded.folder / "store")
    found = store.take(store.find(["b|3", "a|1", "b|49"]))
    assert np.array_equal(own_panels(found), measured[[1, 0, 1]]) and found.n_counts.tolist() == [3000] * 3
    assert isinstance(found, RankedCells) and len(store.take(store.find(["b|3"])).panels) == 1


@pytest.mark.parametrize(("share", "drawn"), [(0, 4), (0.5, 4), (1, 4), (1, 0)])
def test_a_share_of_the_cells_is_seen_through_views(share, drawn):
    cells = SimpleNamespace(vectors=SimpleNamespace(views=drawn))
    numbers, noise = Cells.draw_views(cells, 4000, share, torch.Generator().manual_seed(0))
    assert numbers.dtype == np.int64 and numbers.shape == (4000,)
    assert abs((numbers >= 0).mean() - share * (drawn > 0)) < (0.03 if share == 0.5 else 1e-9)
    for view in range(drawn):
        assert abs((numbers == view).mean() - share / drawn) < 0.03
    assert numbers.max() < max(drawn, 1) and numbers.min() >= -1
    displaced = noise != OWN_NOISE
    assert abs(displaced.float().mean() - share) < 0.03
    if drawn:
        assert np.array_equal(displaced.numpy(), numbers >= 0)
    if share:
        assert abs(noise[displaced].mean() - OTHER_NOISE / 2) < 0.05 and noise.max() <= OTHER_NOISE


def test_noise_is_that_of_each_cell_in_units_of_the_spread():
    projector = SimpleNamespace(spread=torch.tensor([3.0, 3.0]))
    for shape in ((3, 2), (3, 5000, 2)):
        vectors = torch.ones(shape)
        moved = add_noise(vectors, torch.tensor([0.0, 0.1, 2.0]), projector, torch.Generator().manual_seed(0)) - vectors
        assert not moved[0].any() and moved[2].any()
    assert moved[1].std() == pytest.approx(0.3, rel=0.03) and moved[2].std() == pytest.approx(6, rel=0.03)
