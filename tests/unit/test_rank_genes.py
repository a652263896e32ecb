"""Medians come from training cells only, and genes are ranked as in a plain loop."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from cell2text.contracts import CELLS, GENES, TOKENS
from cell2text.embedding import measure_genes as measuring
from cell2text.embedding import rank_genes as ranking
from cell2text.embedding.measure_genes import look_up_genes, measure_genes, median_of_each
from cell2text.embedding.rank_genes import join_genes, rank_counts, rank_genes
from cell2text.embedding.ranked_cells import read_measured, read_medians
from cell2text.errors import InputError


def write_cells(path, dataset, counts, genes):
    cells = ad.AnnData(
        sparse.csr_matrix(np.asarray(counts, dtype=np.float32)),
        obs=pd.DataFrame(index=[f"{dataset}|{i}" for i in range(len(counts))]),
        var=pd.DataFrame({"symbol": [f"S-{gene}" for gene in genes]}, index=genes),
    )
    cells.write_h5ad(path)
    return path


def write_corpus(path, splits):
    """Write a corpus with the given ``cell id -> split``."""
    table = pd.DataFrame({"cell_id": list(splits), "split": list(splits.values())})
    for column in CELLS.columns:
        table[column] = table.get(column)
    CELLS.write(table[list(CELLS.columns)], path)
    return path


def read_genes_table(path):
    return GENES.read(path)


def rank_by_loop(counts, token, median):
    """Rank the genes of each cell with plain Python loops."""
    ranked = []
    for row in counts.toarray().astype(float):
        scaled = {token[i]: row[i] / row.sum() * 1e4 for i in range(len(row)) if row[i] and token[i] >= 0}
        ranked.append(sorted(scaled, key=lambda gene: (-(scaled[gene] / median[gene]), gene)))
    return ranked


def test_medians_are_over_training_cells_that_express_the_gene(tmp_path):
    a = write_cells(tmp_path / "a.h5ad", "a", [[1, 0, 3], [6, 2, 2], [5, 5, 0]], ["B", "A", "C"])
    b = write_cells(tmp_path / "b.h5ad", "b", [[1, 1], [0, 7]], ["D", "B"])
    splits = {"a|0": "train", "a|1": "train", "a|2": "test", "b|0": "train", "b|1": "validation"}
    measure_genes(write_corpus(tmp_path / "corpus.parquet", splits), [a, b], tmp_path / "genes.parquet")
    genes = read_genes_table(tmp_path / "genes.parquet")
    assert list(genes) == list(GENES.columns)
    assert genes["gene_id"].tolist() == ["A", "B", "C", "D"]
    assert genes["token"].tolist() == [0, 1, 2, 3]
    assert genes["symbol"].tolist() == ["S-A", "S-B", "S-C", "S-D"]
    # A: 2000. B: 2500, 6000, 5000. C: 7500 and 2000. D: 5000.
    assert genes["median"].tolist() == [2000, 5000, 4750, 5000]
    assert [list(datasets) for datasets in genes["datasets"]] == [["a"], ["a", "b"], ["a"], ["b"]]


def test_a_gene_without_counts_in_training_has_no_token(tmp_path):
    cells = write_cells(tmp_path / "a.h5ad", "a", [[1, 0, 1], [1, 4, 0]], ["A", "B", "C"])
    corpus = write_corpus(tmp_path / "corpus.parquet", {"a|0": "train", "a|1": "test"})
    measure_genes(corpus, [cells], tmp_path / "genes.parquet")
    assert read_genes_table(tmp_path / "genes.parquet")["gene_id"].tolist() == ["A", "C"]
    rank_genes(corpus, cells, tmp_path / "genes.parquet", tmp_path / "tokens.parquet")
    ranked = TOKENS.read(tmp_path / "tokens.parquet")
    assert [list(tokens) for tokens in ranked["tokens"]] == [[0, 1], [0]]
    # The total of a cell includes genes without a token.
    assert ranked["expression"][1] == pytest.approx([np.log1p(2000)])
    assert ranked["n_counts"].tolist() == [2, 5]


def test_ranks_by_hand():
    counts = sparse.csr_matrix(np.array([[4, 1, 0, 5], [1, 1, 1, 1]], dtype=np.float32))
    token, median = np.array([2, 0, 3, 1], dtype=np.int32), np.array([500.0, 5000, 1000, 2500])
    tokens, expression, ends = rank_counts(counts, token, median)
    # First cell: token 2 4000/1000 = 4, token 0 1000/500 = 2, token 1 5000/5000 = 1.
    assert tokens[: ends[0]].tolist() == [2, 0, 1]
    assert expression[: ends[0]] == pytest.approx(np.log1p([4000, 1000, 5000]), rel=1e-6)
    # Second cell: 2500 divided by 500, 1000, 2500, 5000.
    assert tokens[ends[0] :].tolist() == [0, 2, 3, 1]
    assert expression.dtype == np.float32 and tokens.dtype == np.int32


def test_ties_go_to_the_lower_token():
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
def test_ranks_equal_those_of_a_plain_loop(counts, median, token):
    counts[:, 0] += 1
    matrix, token = sparse.csr_matrix(counts), np.array(token, dtype=np.int32)
    tokens, _, ends = rank_counts(matrix, token, median)
    found = [list(part) for part in np.split(tokens, ends[:-1])]
    assert found == rank_by_loop(matrix, token, median)


@settings(deadline=None)
@given(
    quotients=st.lists(
        st.one_of(st.floats(1e-30, 1e30), st.floats(1, 1 + 1e-9), st.sampled_from([1.0, 2.0, 1e-300])), max_size=300
    ),
    seed=st.integers(0, 9),
)
def test_distant_and_nearly_equal_quotients_are_in_order(quotients, seed):
    medians = 1 / np.array(quotients, dtype=float)
    counts = sparse.csr_matrix(np.ones((1, len(medians)), dtype=np.float32))
    token = np.random.default_rng(seed).permutation(len(medians)).astype(np.int32)
    tokens, _, _ = rank_counts(counts, token, medians)
    scaled = 1e4 / max(len(medians), 1)
    assert tokens.tolist() == sorted(range(len(medians)), key=lambda gene: (-(scaled / medians[gene]), gene))


def test_the_number_of_threads_does_not_change_the_result(monkeypatch):
    monkeypatch.setattr(ranking, "CELLS_PER_CHUNK", 7)
    rng = np.random.default_rng(0)
    counts = sparse.random(300, 500, 0.3, "csr", np.float32, rng, lambda size: rng.integers(1, 9, size))
    token, median = rng.permutation(500).astype(np.int32), rng.integers(1, 4, 500).astype(float)
    found = [rank_counts(counts, token, median, threads) for threads in (1, 3)]
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_stored_zeros_are_ignored():
    counts = sparse.csr_matrix(np.array([[2, 1, 3], [4, 5, 6]], dtype=np.float32))
    counts.data[[1, 3]] = 0
    tokens, _, ends = rank_counts(counts, np.arange(3, dtype=np.int32), np.ones(3))
    assert tokens.tolist() == [2, 0, 2, 1] and ends.tolist() == [2, 4]
    # 4000, 0 and 6000; 0, 5/11 and 6/11 of 10,000
    values = [(counts.indices, ranking.scale_counts(counts).astype(np.float32))]
    assert median_of_each(lambda: values, 3) == pytest.approx([4000, 50000 / 11, (6000 + 60000 / 11) / 2])


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.one_of(st.floats(2**-10, 2**14, width=32), st.sampled_from([1.0, 2.0])), max_size=9), max_size=6
    ),
    st.integers(1, 7),
)
def test_medians_are_exact_for_any_blocks(values, at_once):
    gene = np.repeat(np.arange(len(values), dtype=np.int32), [len(of_one) for of_one in values])
    flat = np.array([value for of_one in values for value in of_one], dtype=np.float32)
    order = np.random.default_rng(0).permutation(len(flat))

    def read():
        for start in range(0, len(flat), at_once):
            rows = order[start : start + at_once]
            yield gene[rows], flat[rows]

    expected = [np.median(np.array(of_one, dtype=np.float32).astype(float)) if of_one else 0 for of_one in values]
    assert median_of_each(read, len(values)).tolist() == expected


def test_real_cells_are_ranked_as_in_a_plain_loop_for_any_blocks(tmp_path, monkeypatch):
    logs = sc.datasets.pbmc68k_reduced()
    counts = np.rint(np.expm1(logs.raw.X[:60].toarray()) * logs.obs["n_counts"].to_numpy()[:60, None] / 1e4)
    cells = write_cells(tmp_path / "a.h5ad", "a", counts, list(logs.var_names))
    order = np.random.default_rng(0).permutation(60)
    corpus = write_corpus(tmp_path / "corpus.parquet", {f"a|{i}": "train" if i % 3 else "test" for i in order[:50]})
    measure_genes(corpus, [cells], tmp_path / "genes.parquet")
    rank_genes(corpus, cells, tmp_path / "genes.parquet", tmp_path / "tokens.parquet")
    ranked = TOKENS.read(tmp_path / "tokens.parquet")
    in_file = sorted(order[:50])
    assert ranked["cell_id"].tolist() == [f"a|{i}" for i in in_file]

    genes = read_genes_table(tmp_path / "genes.parquet").set_index("gene_id")
    token = genes["token"].reindex(logs.var_names).fillna(-1).astype(int).to_numpy()
    expected = rank_by_loop(sparse.csr_matrix(counts), token, genes["median"].to_numpy())
    assert [list(tokens) for tokens in ranked["tokens"]] == [expected[i] for i in in_file]
    train = [i for i in order[:50] if i % 3]
    scaled = counts[train] / counts[train].sum(axis=1, keepdims=True) * 1e4
    columns = dict(zip(logs.var_names, scaled.T, strict=True))
    medians = {gene: np.median(values[values > 0]) for gene, values in columns.items() if values.any()}
    assert genes["median"].to_dict() == pytest.approx(medians, rel=1e-6)

    monkeypatch.setattr(ranking, "read_blocks", lambda path, ids, blocks=ranking.read_blocks: blocks(path, ids, 7))
    measure_genes(corpus, [cells], tmp_path / "genes2.parquet")
    rank_genes(corpus, cells, tmp_path / "genes2.parquet", tmp_path / "tokens2.parquet")
    assert (tmp_path / "genes.parquet").read_bytes() == (tmp_path / "genes2.parquet").read_bytes()
    pd.testing.assert_frame_equal(TOKENS.read(tmp_path / "tokens2.parquet"), ranked)
    assert [len(part) for part in TOKENS.read_parts(tmp_path / "tokens2.parquet")] == [
        sum(i // 7 == block for i in in_file) for block in range(9)
    ]


def test_a_dataset_without_cells_in_the_corpus_gives_an_empty_table(tmp_path):
    cells = write_cells(tmp_path / "a.h5ad", "a", [[1, 2]], ["A", "B"])
    other = write_cells(tmp_path / "b.h5ad", "b", [[1, 2]], ["A", "B"])
    corpus = write_corpus(tmp_path / "corpus.parquet", {"a|0": "train"})
    measure_genes(corpus, [cells, other], tmp_path / "genes.parquet")
    rank_genes(corpus, other, tmp_path / "genes.parquet", tmp_path / "b.parquet")
    assert len(TOKENS.read(tmp_path / "b.parquet")) == 0
    assert read_measured(tmp_path / "genes.parquet", [tmp_path / "b.parquet"]).tolist() == [[True, True]]


def test_genes_named_na_or_nan_keep_their_names(tmp_path):
    cells = write_cells(tmp_path / "a.h5ad", "a", [[1, 2]], ["NA", "nan"])
    corpus = write_corpus(tmp_path / "corpus.parquet", {"a|0": "train"})
    measure_genes(corpus, [cells], tmp_path / "genes.parquet")
    rank_genes(corpus, cells, tmp_path / "genes.parquet", tmp_path / "tokens.parquet")
    assert [list(tokens) for tokens in TOKENS.read(tmp_path / "tokens.parquet")["tokens"]] == [[0, 1]]


def test_measured_genes_and_medians_by_token(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "GENES_AT_ONCE", 2)
    files = [
        write_cells(tmp_path / f"{name}.h5ad", name, [[1] * len(genes)], list(genes))
        for name, genes in (("b", "ACDE"), ("a", "CB"), ("c.1", "EX"))
    ]
    rows = [(7, "E", "E", 2.0), (2, "A", "A", 3.0), (7, "D", "E", 2.0), (4, "B", "B", 1.0), (3, "C", "C", 5.0)]
    look_up_genes(write_dictionary(tmp_path / "d.tsv", *rows), files, tmp_path / "genes.parquet")
    ranked = [tmp_path / f"{name}.parquet" for name in ("a", "c.1", "unknown", "b")]
    measured = read_measured(tmp_path / "genes.parquet", ranked)
    assert measured.shape == (4, 8) and measured.dtype == bool
    assert [np.flatnonzero(own).tolist() for own in measured] == [[3, 4], [7], [], [2, 3, 7]]  # D and E are one gene
    median = [np.nan, np.nan, 3, 5, 1, np.nan, np.nan, 2]
    np.testing.assert_array_equal(read_medians(tmp_path / "genes.parquet"), median)


def write_dictionary(path, *rows):
    names = [name for name in GENES.columns if name != "datasets"]
    GENES.write(pd.DataFrame(rows, columns=names).assign(datasets=[[]] * len(rows)), path)
    return path


def test_genes_with_the_same_token_are_summed_and_the_total_is_unchanged(tmp_path):
    cells = write_cells(tmp_path / "a.h5ad", "a", [[1, 4, 3, 2, 0], [0, 5, 0, 5, 9]], ["old", "B", "new", "C", "none"])
    rows = [(7, "new", "N", 2.0), (7, "old", "N", 2.0), (4, "B", "B", 1.0), (5, "C", "C", 1.0), (6, "D", "D", 9.0)]
    look_up_genes(write_dictionary(tmp_path / "d.tsv", *rows), [cells], tmp_path / "genes.parquet")
    genes = read_genes_table(tmp_path / "genes.parquet")
    assert genes["gene_id"].tolist() == ["B", "C", "new", "old"]
    assert [list(datasets) for datasets in genes["datasets"]] == [["a"]] * 4
    write_corpus(tmp_path / "corpus.parquet", {"a|0": "train", "a|1": "test"})
    rank_genes(tmp_path / "corpus.parquet", cells, tmp_path / "genes.parquet", tmp_path / "tokens.parquet")
    ranked = TOKENS.read(tmp_path / "tokens.parquet").set_index("cell_id")
    # (1 + 3) / 2 ties with 2 / 1, so the lower token comes first; the total includes the counts of "none"
    assert ranked["tokens"]["a|0"].tolist() == [4, 5, 7] and ranked["tokens"]["a|1"].tolist() == [4, 5]
    assert ranked["expression"]["a|0"] == pytest.approx(np.log1p([4e3, 2e3, 4e3]))
    assert ranked["expression"]["a|1"][0] == pytest.approx(np.log1p(5e4 / 19))


def test_genes_with_unique_tokens_are_unchanged():
    counts = sparse.random(20, 9, 0.5, "csr", random_state=0)
    assert join_genes(counts, np.array([3, -1, 2, -1, 0, 7, 9, -1, 1])) is counts
    joined = join_genes(counts, np.array([3, -1, 2, -1, 3, 7, 2, -1, 3]))
    dense, whole = joined.toarray(), counts.toarray()
    assert np.allclose(dense[:, 0], whole[:, [0, 4, 8]].sum(1)) and np.allclose(dense[:, 2], whole[:, [2, 6]].sum(1))
    assert not dense[:, [4, 6, 8]].any() and np.array_equal(dense[:, [1, 3, 5, 7]], whole[:, [1, 3, 5, 7]])


def test_a_dataset_with_too_few_known_genes_is_an_error(tmp_path):
    cells = write_cells(tmp_path / "a.h5ad", "a", [[1] * 12], [f"mouse{i}" for i in range(12)])
    dictionary = write_dictionary(tmp_path / "d.tsv", (0, "mouse3", "mouse3", 1.0))
    with pytest.raises(InputError, match=r"a.h5ad: var: the encoder knows only 8.3% of the genes \(mouse0"):
        look_up_genes(dictionary, [cells], tmp_path / "genes.parquet")
    assert not (tmp_path / "genes.parquet").exists()
