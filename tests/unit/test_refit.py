"""Encoders fitted again without some datasets: what they are fitted to, and what does not matter to them."""

import numpy as np
import pytest

from cell2text.contracts import EMBEDDINGS, TOKENS
from cell2text.embedding.fit_encoder import EncoderInputs, fit_on_cells
from cell2text.embedding.ranked_cells import RankedSplit, read_measured
from cell2text.embedding.refit import refit_without
from default_settings import encoder_settings
from ranked_files import rank, write_corpus, write_genes

CELLS, GENES = 20, 30
SETTINGS = encoder_settings(dimensions=4, views=2, top_k=3)


def draw(seed):
    """Return the expression of cells, of which about half of the genes are expressed, float (cells, genes)."""
    return np.maximum(np.random.default_rng(seed).normal(size=(CELLS, GENES)), 0)


def write(folder, studies, files=None):
    """Write studies, name -> expression, one per file or as ``files`` groups them; a tenth is validation cells."""
    folder.mkdir()
    tables = {name: rank(expression, name) for name, expression in studies.items()}
    paths = []
    for file, names in (files or {name: [name] for name in studies}).items():
        paths.append(str(folder / f"{file}.parquet"))
        TOKENS.write_parts([tables[name] for name in names], paths[-1])
    # the last study has ten genes that the others do not measure
    measured = {file: np.arange(GENES) < (GENES if file == "c" else GENES - 10) for file in files or studies}
    ids = [one for table in tables.values() for one in table["cell_id"]]
    splits = ["validation" if i % 10 == 9 else "train" for i in range(len(ids))]
    types = ["CL:0000236" if i % 2 else "CL:0000623" for i in range(len(ids))]
    genes = write_genes(folder / "genes.parquet", measured)
    corpus = write_corpus(folder / "corpus.parquet", ids, splits, types)
    trained = [one for one, split in zip(ids, splits, strict=True) if split == "train"]
    return EncoderInputs(str(corpus), str(genes), paths, SETTINGS, seed=1), trained


@pytest.fixture
def studies():
    known = np.arange(GENES) < GENES - 10
    return {"a": draw(0) * known, "b": draw(1) * known, "c": draw(2)}


def read(inputs, datasets, cells, names=("pooled", "view_pooled", "lengths")):
    with refit_without(inputs, datasets, cells, gene_vectors=False) as embeddings:
        return EMBEDDINGS.read_cells(embeddings.files, cells, names)


def test_the_encoder_is_that_of_the_other_datasets_and_sees_all_cells(studies, tmp_path):
    inputs, cells = write(tmp_path / "all", studies)
    alone, _ = write(tmp_path / "alone", {name: studies[name] for name in ("a", "c")})
    encoder = fit_on_cells(alone, tmp_path / "checkpoints")
    found = read(inputs, ["b"], cells)
    split = RankedSplit(inputs.tokens, inputs.corpus, "train", read_measured(inputs.genes, inputs.tokens))
    parts = list(split)
    expected = np.concatenate([encoder.embed(part, 0)["pooled"] for part in parts])
    assert [one for part in parts for one in part.cell_ids] == cells
    np.testing.assert_allclose(found["pooled"], expected, atol=1e-5)
    assert found["view_pooled"].shape == (len(cells), 2, expected.shape[1]) and found["lengths"].min() > 0


def test_cells_of_the_dataset_change_nothing_but_their_own_vectors(studies, tmp_path):
    inputs, cells = write(tmp_path / "before", studies)
    before = read(inputs, ["b"], cells)
    changed, _ = write(tmp_path / "after", studies | {"b": draw(7) * (np.arange(GENES) < GENES - 10)})
    after = read(changed, ["b"], cells)
    own = np.array([one.startswith("b|") for one in cells])
    for name in ("pooled", "view_pooled"):
        assert np.array_equal(before[name][~own], after[name][~own])
    assert not np.isclose(before["pooled"][own], after["pooled"][own]).all(axis=1).any()


def test_cells_that_are_not_given_are_neither_fitted_nor_embedded(studies, tmp_path):
    inputs, cells = write(tmp_path / "all", studies)
    some = cells[::2]
    with refit_without(inputs, ["b"], some, gene_vectors=False) as embeddings:
        assert sorted(one for path in embeddings.files for one in EMBEDDINGS.read(path)[1]) == sorted(some)
        found = EMBEDDINGS.read_cells(embeddings.files, some, ["pooled"])["pooled"]
    left = {name: table.copy() for name, table in studies.items()}
    left["a"][1] = draw(8)[1] * (np.arange(GENES) < GENES - 10)  # a|1 is not among them
    changed, _ = write(tmp_path / "changed", left)
    assert np.array_equal(read(changed, ["b"], some)["pooled"], found)


def test_datasets_are_told_apart_by_cell_ids_if_a_file_has_several(studies, tmp_path):
    """As in the Census: a and b are in one file, and measure the same genes."""
    inputs, cells = write(tmp_path / "files", studies)
    together, _ = write(tmp_path / "together", studies, {"shard": ["a", "b"], "c": ["c"]})
    for inside in ("a", "b"):
        own = read(inputs, [inside], cells)["pooled"]
        np.testing.assert_allclose(read(together, [inside], cells)["pooled"], own, atol=1e-5)
    assert not np.allclose(read(together, ["a"], cells)["pooled"], read(together, ["b"], cells)["pooled"], atol=1e-2)


def test_gene_vectors_are_computed_on_the_fly(studies, tmp_path):
    inputs, cells = write(tmp_path / "all", studies)
    alone, _ = write(tmp_path / "alone", {name: studies[name] for name in ("a", "c")})
    encoder = fit_on_cells(alone, tmp_path / "checkpoints")
    with refit_without(inputs, ["b"], cells, gene_vectors=True) as embeddings:
        assert embeddings.dimensions("gene_vectors") == encoder.dimensions
        vectors, lengths = embeddings.vectors(cells[:5], "gene_vectors")[np.arange(5)]
    split = RankedSplit(inputs.tokens, inputs.corpus, "train", read_measured(inputs.genes, inputs.tokens))
    first = encoder.embed(next(iter(split)), SETTINGS.top_k)
    np.testing.assert_allclose(vectors.numpy(), first["gene_vectors"][:5].astype(np.float32), atol=1e-2)
    assert lengths.tolist() == first["lengths"][:5].tolist()
