"""Genes are measured in training alone and ranked as a plain loop would rank them."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from cell2text import rank_tokens
from cell2text.contracts import CELLS, GENES, TOKENS
from cell2text.rank_tokens import measure_genes, rank_counts, rank_genes


def write_cells(path, dataset, counts, genes):
    cells = ad.AnnData(
        sparse.csr_matrix(np.asarray(counts, dtype=np.float32)),
        obs=pd.DataFrame(index=[f"{dataset}|{i}" for i in range(len(counts))]),
        var=pd.DataFrame({"symbol": [f"S-{gene}" for gene in genes]}, index=genes),
    )
    cells.write_h5ad(path)
    return path


def write_corpus(path, splits):
    """Write the corpus of ``cell id -> split``."""
    table = pd.DataFrame({"cell_id": list(splits), "split": list(splits.values())})
    for column in CELLS.columns:
        table[column] = table.get(column)
    CELLS.write(table[list(CELLS.columns)], path)
    return path


def read_genes_table(path):
    return pd.read_csv(path, sep="\t", keep_default_na=False)


def rank_by_loop(counts, token, median):
    """Rank one cell after another, gene after gene."""
    ranked = []
    for row in counts.toarray().astype(float):
        scaled = {token[i]: row[i] * 1e4 / row.sum() for i in range(len(row)) if row[i] and token[i] >= 0}
        ranked.append(sorted(scaled, key=lambda gene: (-(scaled[gene] / median[gene]), gene)))
    return ranked


def test_medians_are_those_of_expressing_training_cells(tmp_path):
    a = write_cells(tmp_path / "a.h5ad", "a", [[1, 0, 3], [6, 2, 2], [5, 5, 0]], ["B", "A", "C"])
    b = write_cells(tmp_path / "b.h5ad", "b", [[1, 1], [0, 7]], ["D", "B"])
    splits = {"a|0": "train", "a|1": "train", "a|2": "test", "b|0": "train", "b|1": "validation"}
    measure_genes(write_corpus(tmp_path / "corpus.parquet", splits), [a, b], tmp_path / "genes.tsv")
    genes = read_genes_table(tmp_path / "genes.tsv")
    assert tuple(genes) == GENES
    assert genes["gene_id"].tolist() == ["A", "B", "C", "D"]
    assert genes["token"].tolist() == [0, 1, 2, 3]
    assert genes["symbol"].tolist() == ["S-A", "S-B", "S-C", "S-D"]
    # A: 2000. B: 2500, 6000, 5000. C: 7500 and 2000. D: 5000.
    assert genes["median"].tolist() == [2000, 5000, 4750, 5000]


def test_a_gene_without_a_count_in_training_has_no_token(tmp_path):
    cells = write_cells(tmp_path / "a.h5ad", "a", [[1, 0, 1], [1, 4, 0]], ["A", "B", "C"])
    corpus = write_corpus(tmp_path / "corpus.parquet", {"a|0": "train", "a|1": "test"})
    measure_genes(corpus, [cells], tmp_path / "genes.tsv")
    assert read_genes_table(tmp_path / "genes.tsv")["gene_id"].tolist() == ["A", "C"]
    rank_genes(corpus, cells, tmp_path / "genes.tsv", tmp_path / "tokens.parquet")
    ranked = TOKENS.read(tmp_path / "tokens.parquet")
    assert [list(tokens) for tokens in ranked["tokens"]] == [[0, 1], [0]]
    # The total of a cell counts genes without a token, too.
    assert ranked["expression"][1] == pytest.approx([np.log1p(2000)])


def test_ranks_by_hand():
    counts = sparse.csr_matrix(np.array([[4, 1, 0, 5], [1, 1, 1, 1]], dtype=np.float32))
    token, median = np.array([2, 0, 3, 1], dtype=np.int32), np.array([500.0, 5000, 1000, 2500])
    tokens, expression, ends = rank_counts(counts, token, median)
    # First cell: token 2 4000/1000 = 4, token 0 1000/500 = 2, token 1 5000/5000 = 1.
    assert tokens[: ends[0]].tolist() == [2, 0, 1]
    assert expression[: ends[0]] == pytest.approx(np.log1p([4000, 1000, 5000]), rel=1e-6)
    # Second cell: 2500 over 500, 1000, 2500, 5000.
    assert tokens[ends[0] :].tolist() == [0, 2, 3, 1]
    assert expression.dtype == np.float32 and tokens.dtype == np.int32


def test_of_equal_quotients_the_lower_token_stands_first():
    counts = sparse.csr_matrix(np.array([[2, 1, 2, 1]], dtype=np.float32))
    tokens, _, _ = rank_counts(counts, np.array([3, 1, 0, 2], dtype=np.int32), np.array([2.0, 1, 1, 2]))
    # 2/2 for token 3, 1/1 for token 1, 2/2 for token 0, 1/1 for token 2
    assert tokens.tolist() == [0, 1, 2, 3]


@settings(deadline=None)
@given(
    counts=hnp.arrays(np.float32, (5, 6), elements=st.integers(0, 4).map(float)),
    median=hnp.arrays(float, 6, elements=st.sampled_from([500.0, 1000, 2000])),
    token=st.permutations([0, 1, 2, 3, -1, -1]),
)
def test_ranks_are_those_of_a_plain_loop(counts, median, token):
    counts[:, 0] += 1
    matrix, token = sparse.csr_matrix(counts), np.array(token, dtype=np.int32)
    tokens, _, ends = rank_counts(matrix, token, median)
    found = [list(part) for part in np.split(tokens, ends[:-1])]
    assert found == rank_by_loop(matrix, token, median)


def test_real_cells_are_ranked_as_by_a_plain_loop_whatever_the_blocks(tmp_path, monkeypatch):
    logs = sc.datasets.pbmc68k_reduced()
    counts = np.rint(np.expm1(logs.raw.X[:60].toarray()) * logs.obs["n_counts"].to_numpy()[:60, None] / 1e4)
    cells = write_cells(tmp_path / "a.h5ad", "a", counts, list(logs.var_names))
    order = np.random.default_rng(0).permutation(60)
    corpus = write_corpus(tmp_path / "corpus.parquet", {f"a|{i}": "train" if i % 3 else "test" for i in order[:50]})
    measure_genes(corpus, [cells], tmp_path / "genes.tsv")
    rank_genes(corpus, cells, tmp_path / "genes.tsv", tmp_path / "tokens.parquet")
    ranked = TOKENS.read(tmp_path / "tokens.parquet")
    assert ranked["cell_id"].tolist() == [f"a|{i}" for i in order[:50]]

    genes = read_genes_table(tmp_path / "genes.tsv").set_index("gene_id")
    token = genes["token"].reindex(logs.var_names).fillna(-1).astype(int).to_numpy()
    expected = rank_by_loop(sparse.csr_matrix(counts), token, genes["median"].to_numpy())
    assert [list(tokens) for tokens in ranked["tokens"]] == [expected[i] for i in order[:50]]
    train = [i for i in order[:50] if i % 3]
    scaled = counts[train] * 1e4 / counts[train].sum(axis=1, keepdims=True)
    columns = dict(zip(logs.var_names, scaled.T, strict=True))
    medians = {gene: np.median(values[values > 0]) for gene, values in columns.items() if values.any()}
    assert genes["median"].to_dict() == pytest.approx(medians, rel=1e-6)

    monkeypatch.setattr(
        rank_tokens, "read_blocks", lambda path, ids, blocks=rank_tokens.read_blocks: blocks(path, ids, 7)
    )
    measure_genes(corpus, [cells], tmp_path / "genes2.tsv")
    rank_genes(corpus, cells, tmp_path / "genes2.tsv", tmp_path / "tokens2.parquet")
    assert (tmp_path / "genes.tsv").read_bytes() == (tmp_path / "genes2.tsv").read_bytes()
    assert (tmp_path / "tokens.parquet").read_bytes() == (tmp_path / "tokens2.parquet").read_bytes()


def test_a_dataset_without_cells_in_the_corpus_has_an_empty_table(tmp_path):
    cells = write_cells(tmp_path / "a.h5ad", "a", [[1, 2]], ["A", "B"])
    other = write_cells(tmp_path / "b.h5ad", "b", [[1, 2]], ["A", "B"])
    corpus = write_corpus(tmp_path / "corpus.parquet", {"a|0": "train"})
    measure_genes(corpus, [cells, other], tmp_path / "genes.tsv")
    rank_genes(corpus, other, tmp_path / "genes.tsv", tmp_path / "tokens.parquet")
    assert len(TOKENS.read(tmp_path / "tokens.parquet")) == 0


def test_a_gene_called_nan_keeps_its_name(tmp_path):
    cells = write_cells(tmp_path / "a.h5ad", "a", [[1, 2]], ["NA", "nan"])
    corpus = write_corpus(tmp_path / "corpus.parquet", {"a|0": "train"})
    measure_genes(corpus, [cells], tmp_path / "genes.tsv")
    rank_genes(corpus, cells, tmp_path / "genes.tsv", tmp_path / "tokens.parquet")
    assert [list(tokens) for tokens in TOKENS.read(tmp_path / "tokens.parquet")["tokens"]] == [[0, 1]]
