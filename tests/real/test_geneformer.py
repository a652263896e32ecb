"""Real cells with the real dictionaries of Geneformer's 30M series."""

import gzip
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from cell2text.cells.h5ad import write_cells
from cell2text.contracts import CELLS, GENES, TOKENS
from cell2text.embedding.measure_genes import look_up_genes
from cell2text.embedding.rank_genes import rank_genes
from cell2text.models.gene_dictionaries import find_dictionaries
from tiny_geneformer import V1

DATA = Path(__file__).parents[3] / "shared/data"
pytestmark = pytest.mark.skipif(not (DATA / "geneformer").is_dir(), reason="the real data is not available")
VOCABULARY = 25_426
LONGEST = 2048


@pytest.fixture(scope="module")
def dictionaries():
    return find_dictionaries(DATA / "geneformer", VOCABULARY)


def test_the_dictionaries_equal_those_of_the_series(dictionaries):
    assert dictionaries.special == V1
    with gzip.open(DATA / "geneformer/geneformer30M_genes.tsv.gz", "rt") as file:
        expected = pd.read_csv(file, sep="\t", float_precision="round_trip")[2:]
    assert dictionaries.tokens == {"<pad>": 0, "<mask>": 1} | dict(
        zip(expected.ensembl_id, expected.token, strict=True)
    )
    assert dictionaries.medians == dict(zip(expected.ensembl_id, expected.nonzero_median.astype(float), strict=True))


def write_some(path, study, cells, rng):
    """Write a sample of a study's cells; return their ids, dense counts and genes."""
    whole = ad.read_h5ad(study)
    rows = np.sort(rng.choice(whole.n_obs, min(cells, whole.n_obs), replace=False))
    counts = sparse.csr_matrix(whole.X[rows], dtype=np.float32)
    ids = [f"{study.stem}|{name}" for name in whole.obs_names[rows]]
    var = pd.DataFrame({"symbol": whole.var_names.to_numpy()}, index=pd.Index(whole.var_names, name="gene_id"))
    write_cells(path, [counts], [ids], pd.DataFrame(index=ids), var, {})
    return ids, counts.toarray().astype(np.float64), whole.var_names


def rank_by_loop(counts, genes, dictionaries):
    """Rank each cell's genes like Geneformer's tokenizer, gene by gene in float64."""
    ranked = []
    for cell in counts:
        total, values = cell.sum(), {}
        for gene, count in zip(genes, cell, strict=True):
            if count and gene in dictionaries.tokens:
                values[dictionaries.tokens[gene]] = count / total * 10_000 / dictionaries.medians[gene]
        ranked.append(sorted(values, key=lambda token, values=values: (-values[token], token))[:LONGEST])
    return ranked


def test_a_thousand_real_cells_have_the_same_tokens_as_a_plain_loop(tmp_path, dictionaries):
    GENES.write(dictionaries.table(), tmp_path / "dictionary.parquet")
    rng, tested, longest = np.random.default_rng(0), 0, 0
    for study in sorted((DATA / "studies").glob("*.h5ad")):
        ids, counts, genes = write_some(tmp_path / study.name, study, 130, rng)
        corpus = pd.DataFrame({"cell_id": ids, "split": "train"})
        for column in CELLS.columns:
            corpus[column] = corpus.get(column)
        CELLS.write(corpus[list(CELLS.columns)], tmp_path / "corpus.parquet")
        look_up_genes(tmp_path / "dictionary.parquet", [tmp_path / study.name], tmp_path / "genes.parquet")
        files = [tmp_path / name for name in ("corpus.parquet", study.name, "genes.parquet", "tokens.parquet")]
        rank_genes(*files, threads=2)
        ranked = TOKENS.read(tmp_path / "tokens.parquet").set_index("cell_id")["tokens"].loc[ids]
        expected = rank_by_loop(counts, genes, dictionaries)
        assert [list(tokens[:LONGEST]) for tokens in ranked] == expected
        tested, longest = tested + len(expected), max(longest, *map(len, expected))
    assert tested >= 1000 and longest == LONGEST


def test_published_cells_have_tokens_of_the_dictionary(dictionaries):
    cells = pq.read_table(DATA / "geneformer/genecorpus_500_samples.parquet")["input_ids"].to_pylist()
    own = set(dictionaries.special.values())
    assert len(cells) == 500
    for tokens in cells:
        assert len(tokens) <= LONGEST and len(set(tokens)) == len(tokens)
        assert max(tokens) < VOCABULARY and not own & set(tokens)
