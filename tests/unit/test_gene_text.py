"""Texts about genes become vectors, also for genes that no training study measures; permuted texts say nothing."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cell2text.annotation.rank_query import match_genes, read_known_genes
from cell2text.config import check_config, check_files
from cell2text.contracts import GENE_TEXTS, GENES
from cell2text.embedding.describe_genes import describe_genes
from cell2text.embedding.encoders import load_encoder
from cell2text.embedding.encoders.gene_text import GeneText, embed_texts
from cell2text.errors import InputError
from cell2text.files import whole_folder
from cell2text.models.fetch_resource import TEXT_SOURCES, sources_to_read
from default_settings import SCHEMA, encoder_settings
from ranked_files import ranked_cells, write_studies

COLUMNS = ["Approved symbol", "Approved name", "Status", "Alias symbols", "Previous symbols"]
COLUMNS = ["HGNC ID", *COLUMNS, "NCBI Gene ID(supplied by NCBI)", "Ensembl gene ID"]
HGNC = """
HGNC:1\tAAA\tfirst factor\tApproved\tOLD, TWICE\t\t11\tENSG00000000001
HGNC:2\tBBB\tsecond factor\tApproved\tTWICE\tBEFORE\t12\tENSG00000000002
HGNC:3\tCCC\tthird "B" factor\tApproved\t\t\t13\tENSG00000000003
HGNC:4\tDDD\tfourth factor\tApproved\t\t\t\tENSG00000000004
HGNC:5\tEEE\tgone\tEntry Withdrawn\t\t\t15\tENSG00000000005
HGNC:6\tFFF\twithout an id\tApproved\t\t\t\t
"""
NCBI = '''"""Genes."""
raise SystemExit("this file was run")
GENEID2NT = {
  11 : NtData(tax_id=9606, GeneID=11, description='first factor', other_designations='antigen T3|it\\'s  delta'),
  12 : NtData(tax_id=9606, GeneID=12, description='second', other_designations=''),
}
'''
FILES = {"names": "hgnc.tsv", "designations": "ncbi.py", "sets.gmt": "sets.gmt", "own.tsv": "own.tsv"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hgnc.tsv").write_text("\t".join(COLUMNS) + HGNC)
    (tmp_path / "ncbi.py").write_text(NCBI)
    (tmp_path / "sets.gmt").write_text("T_CELL_RECEPTOR\t-\tAAA\tXXX\nOther set\t-\tAAA\n")
    (tmp_path / "own.tsv").write_text("gene_id\ttext\nAAA\tmine\nENSG00000000003\tthis too\nNEW\tnot measured\n")
    ids = ["AAA", "BEFORE", "ENSG00000000003", "TWICE", "XXX"]
    genes = pd.DataFrame(
        {"token": range(5), "gene_id": ids, "symbol": [*ids[:2], "", *ids[3:]], "median": [1.0, 2, 3, 4, 5]}
    )
    GENES.write(genes.assign(datasets=[["a"]] * 5), tmp_path / "genes.parquet")
    return tmp_path


def describe(texts):
    files = {source: FILES[source] for source in sources_to_read(texts)}
    describe_genes("genes.parquet", files, texts, "texts.parquet")
    found = GENE_TEXTS.read("texts.parquet")
    assert found["token"].tolist() == list(range(len(found)))
    return found.set_index("gene_id")


def test_texts_are_found_by_id_and_by_approved_older_and_alias_symbols(folder):
    found = describe(["names", "designations", "sets.gmt"])
    assert found["text"].to_dict() == {
        "AAA": "first factor first factor antigen T3 it's delta T CELL RECEPTOR Other set",
        "BEFORE": "second factor second",
        "ENSG00000000003": 'third "B" factor',
        "TWICE": "",  # the alias of two genes
        "XXX": "T CELL RECEPTOR",  # HGNC does not list it
        "ENSG00000000004": "fourth factor",  # no study measures it
    }
    assert found["sources"].map(list)["AAA"] == ["names", "designations", "sets.gmt"]
    assert found["sources"].map(list)["XXX"] == ["sets.gmt"]
    assert found["median"]["ENSG00000000004"] == 3 and found["symbol"]["ENSG00000000004"] == "DDD"
    assert found["datasets"].map(list).tolist() == [["a"]] * 5 + [[]]


def test_a_table_of_the_users_own_needs_no_other_file(folder):
    found = describe(["own.tsv"])
    assert found["text"].to_dict() == {
        "AAA": "mine", "BEFORE": "", "ENSG00000000003": "this too", "TWICE": "", "XXX": "", "NEW": "not measured",
    }  # fmt: skip
    assert describe(["names", "own.tsv"])["text"]["AAA"] == "first factor mine"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("own.tsv", "gene\ttext\nA\tb\n", r"^own.tsv: no column gene_id\. Give the columns gene_id and text$"),
        ("own.tsv", "gene_id\tsummary\nA\tb\n", r"^own.tsv: no column text\. Give"),
        (
            "own.tsv",
            "gene_id\ttext\nA\tb\nC\td\nA\te\n",
            r"^own.tsv line 4: gene_id: A repeats\. Give each gene one row$",
        ),
        ("ncbi.py", "import os\n", r"^ncbi.py: no genes in it\. Delete it"),
        ("ncbi.py", "  1 : NtData(GeneID=print()),\n", r"^ncbi.py line 1: not a gene\. Delete it"),
        ("hgnc.tsv", "HGNC ID\tApproved symbol\n1\tA\n", r"^hgnc.tsv: no column Approved name, Status, "),
    ],
)
def test_files_that_are_no_texts_are_reported_in_one_line(folder, name, content, expected):
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=expected):
        describe(["names", "designations", "own.tsv"])
    assert not (folder / "texts.parquet").exists()


@pytest.mark.parametrize(
    ("encoder", "expected"),
    [
        ({"kind": "gene_text", "texts": ["names", "reactome"]}, r"c: encoder.texts: unknown source reactome\. Write n"),
        ({"kind": "gene_text", "texts": ["nowhere.tsv"]}, r"c: encoder.texts: no such file: nowhere.tsv\. Correct"),
        ({"kind": "gene_text", "texts": []}, r"c: encoder.texts: \[\] (is too short|should be non-empty)"),
        ({"kind": "gene_text", "dimensions": 32}, r"c: encoder.dimensions: 32 has no effect with encoder.kind: "),
        ({"texts": ["names"]}, r'c: encoder.texts: \["names"\] has no effect with encoder.kind: "coexpression"'),
    ],
)  # fmt: skip
def test_mistakes_in_the_config_are_reported_in_one_line(encoder, expected):
    with pytest.raises(InputError, match=f"^{expected}"):
        check_files(check_config({"run": "r", "encoder": encoder}, SCHEMA, "c"), "c")


def three_genes():
    """Return an encoder: two genes with a text and one without."""
    values = [[[1, 0], [0, 1], [0, 0]], [1, 3, 5], [0.5, 0.3, 0.2], [0.1, -0.1], [0.5, 2]]
    return GeneText(*(np.array(value, dtype=np.float32) for value in values))


def test_a_value_worked_out_by_hand():
    panels = [[True, True, True], [True, False, True], [False, False, True]]
    lists, expression = [[2, 0, 1], [0, 2], [2], []], [[4, 2, 1], [2, 1], [3], []]
    found = three_genes().embed(ranked_cells(lists, expression, 3, panels=panels, panel=[0, 1, 2, 0]), 2)
    # weights 2/3 and 1/3, typical of the panel 1/4 and 3/4; the third gene has no text and does not count
    np.testing.assert_allclose(found["pooled"][0], [(2 / 3 - 1 / 4 - 0.1) / 0.5, (1 / 3 - 3 / 4 + 0.1) / 2], atol=1e-6)
    # with the first gene alone, a cell is what is typical of its panel; counts per 10,000 fall to 70%
    np.testing.assert_allclose(found["pooled"][1], [-0.1 / 0.5, 0.1 / 2], atol=1e-6)
    np.testing.assert_allclose(found["gene_vectors"][1], [[np.log1p(0.7 * np.expm1(2)), 0], [0, 0]], atol=1e-3)
    np.testing.assert_array_equal(found["pooled"][2:], 0)
    assert found["lengths"].tolist() == [2, 2, 1, 0]
    # without vectors of genes, only a cell without genes has none
    cells = ranked_cells(lists, expression, 3, panels=panels, panel=[0, 1, 2, 0])
    assert three_genes().embed(cells, 0)["lengths"].tolist() == [3, 2, 1, 0]


def test_genes_share_out_the_pooled_vector():
    encoder = three_genes()
    cells = ranked_cells([[2, 0, 1], [1, 0], [2], []], [[4, 2, 1], [2, 1], [3], []], 3)
    gradients = np.random.default_rng(0).normal(size=(4, 2))
    shares = encoder.share_out(cells, gradients)
    assert len(shares) == 6 and shares[0] == 0
    whole = (gradients * encoder.embed(cells, 0)["pooled"]).sum(axis=1)
    np.testing.assert_allclose(np.bincount(cells.cell, shares, minlength=4), whole, atol=1e-6)


def test_vectors_of_texts_keep_the_products_of_tf_idf():
    # idf of a word in n of 4 texts is ln(5 / (n + 1)) + 1; "lonely" is in a single text and does not count
    texts = np.array(["red green", "red lonely", "green blue", "blue", "", "red unknown"], dtype=object)
    vectors = embed_texts(texts, 5, 0)
    assert vectors.shape == (6, 2) and not vectors[4].any()
    half = np.sqrt(0.5)  # all three words are in two texts
    weights = np.array([[0, half, half], [0, 0, 1], [half, half, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1]])
    axes = np.linalg.svd(weights[:4])[2][:2]
    np.testing.assert_allclose(vectors @ vectors.T, weights @ axes.T @ axes @ weights.T, atol=1e-6)


def test_texts_without_a_common_word_are_refused():
    for texts in (["a red", "blue"], ["the", "of"], ["", ""]):
        with pytest.raises(InputError, match="the texts of the genes have hardly a word in common"):
            embed_texts(np.array(texts, dtype=object), 2, 0)


PROGRAMMES = [
    "contraction muscle fibre",
    "antigen immune receptor",
    "synapse neuron channel",
    "insulin secretion hormone",
]


def simulate(directory, seed=0, genes=80, cells=80):
    """Return training cells of four types that measure half of the genes, test cells with the other half, and texts."""
    random = np.random.default_rng(seed)
    programme, types = random.integers(4, size=2 * genes), np.arange(2 * cells) % 4
    expression = random.poisson(0.5 + 3.0 * (programme == types[:, None])) * 1.0
    words = [random.permutation(PROGRAMMES[number].split())[:2] for number in programme]
    texts = np.array([f"{' '.join(pair)} protein" for pair in words], dtype=object)
    train, validation = write_studies(directory, {"a": expression[:cells, :genes]})
    panel = np.arange(2 * genes) >= genes
    rows = [np.flatnonzero(row * panel) for row in expression[cells:]]
    test = ranked_cells(
        rows, [row[own] for row, own in zip(expression[cells:], rows, strict=True)], 2 * genes, panels=[panel]
    )
    return train, test, types[:cells], types[cells:], texts


def write_texts(path, texts):
    ids = [f"G{i:05d}" for i in range(len(texts))]
    table = pd.DataFrame({"token": range(len(texts)), "gene_id": ids, "symbol": ids, "median": 1.0, "text": texts})
    table = table.assign(datasets=[[]] * len(texts), sources=[[]] * len(texts)).astype({"token": np.int32})
    GENE_TEXTS.write(table[list(GENE_TEXTS.columns)], path)
    return path


def fit(train, texts, path):
    return GeneText.fit(train, None, encoder_settings(kind="gene_text"), 0, None, write_texts(path, texts))


def accuracy(encoder, train, test, train_types, test_types):
    (cells,) = train
    vectors, others = encoder.embed(cells, 0)["pooled"], encoder.embed(test, 0)["pooled"]
    centres = np.stack([vectors[train_types == one].mean(axis=0) for one in range(4)])
    return (np.argmin(((others[:, None] - centres) ** 2).sum(axis=2), axis=1) == test_types).mean()


def test_genes_of_no_training_study_are_read_by_their_texts_and_not_by_permuted_ones(tmp_path):
    train, test, *types, texts = simulate(tmp_path)
    encoder = fit(train, texts, tmp_path / "texts.parquet")
    pooled = np.concatenate([encoder.embed(part, 0)["pooled"] for part in train])
    np.testing.assert_allclose(pooled.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(pooled.std(axis=0), 1, atol=1e-4)
    assert accuracy(encoder, train, test, *types) > 0.9
    random = np.random.default_rng(0)
    permuted = [fit(train, random.permutation(texts), tmp_path / "permuted.parquet") for _ in range(10)]
    assert np.mean([accuracy(one, train, test, *types) for one in permuted]) == pytest.approx(0.25, abs=0.12)


def test_the_order_of_the_genes_does_not_matter(tmp_path):
    train, _, *_, texts = simulate(tmp_path)
    encoder = fit(train, texts[:80], tmp_path / "texts.parquet")
    order = np.random.default_rng(1).permutation(80)
    (cells,) = train
    expression = cells.matrix().toarray()[:, order]
    again, _ = write_studies(tmp_path / "again", {"a": expression})
    other = fit(again, texts[:80][order], tmp_path / "other.parquet")
    (moved,) = again
    np.testing.assert_allclose(other.vectors, encoder.vectors[order], atol=1e-6)
    np.testing.assert_allclose(other.embed(moved, 0)["pooled"], encoder.embed(cells, 0)["pooled"], atol=1e-4)


def test_less_than_half_of_the_counts_with_a_text_is_refused(tmp_path, caplog):
    train, _, *_, texts = simulate(tmp_path)
    caplog.set_level("INFO")
    (cells,) = train
    counts = np.expm1(cells.matrix().toarray()).sum(axis=0)
    few = texts[:80].copy()
    few[np.argsort(counts)[:20]] = ""
    encoder = fit(train, few, tmp_path / "few.parquet")
    share = np.sort(counts)[20:].sum() / counts.sum()
    assert encoder.facts["without_text"] == 20 and encoder.facts["coverage"] == {"a": pytest.approx(share, abs=1e-6)}
    assert f"a: {share:.1%} of the counts are in genes with a text" in caplog.text
    assert "20 of 80 genes have no text" in caplog.text and not encoder.vectors[np.argsort(counts)[:20]].any()
    few = np.where(np.argsort(np.argsort(counts)) < 20, texts[:80], "")
    left = np.sort(counts)[:20].sum() / counts.sum()
    expected = rf"^config: encoder.texts: only {left:.1%} of the counts of a are in genes with a text\. Add sources to "
    with pytest.raises(InputError, match=expected):
        fit(train, few, tmp_path / "few.parquet")


def test_a_packed_model_reads_the_genes_that_no_training_study_measures(tmp_path):
    train, test, *_, texts = simulate(tmp_path)
    encoder = fit(train, texts, tmp_path / "texts.parquet")
    with whole_folder(tmp_path / "model/encoder", "encoder.json") as unfinished:
        encoder.save(unfinished)
    loaded = load_encoder(tmp_path / "model/encoder")
    for name, values in encoder.embed(test, 3).items():
        np.testing.assert_array_equal(loaded.embed(test, 3)[name], values)
    (tmp_path / "model/genes.parquet").write_bytes((tmp_path / "genes.parquet").read_bytes())
    known = read_known_genes(tmp_path / "model")
    assert known["token"].tolist() == list(range(160))
    measured = pd.DataFrame({"symbol": ["", ""]}, index=["G00003", "G00159"])
    found = match_genes(known, measured, "new")
    assert found.loc[found["datasets"].map(len) > 0, "token"].tolist() == [3, 159] and len(found) == 160


def test_a_cell_of_a_panel_does_not_depend_on_the_other_cells(tmp_path):
    train, test, *_, texts = simulate(tmp_path)
    encoder = fit(train, texts, tmp_path / "texts.parquet")
    whole, one = encoder.embed(test, 2), encoder.embed(test.take(np.array([7])), 2)
    np.testing.assert_allclose(whole["pooled"][7:8], one["pooled"], atol=1e-6)
    fewer = replace(test, panels=np.ones_like(test.panels))  # unmeasured genes are missing, not zero
    assert np.abs(encoder.embed(fewer, 2)["pooled"] - whole["pooled"]).max() > 0.1


def test_no_source_is_named_that_is_not_fetched_by_its_hash():
    named = r"pypi://\w+==[\d.]+/[\w./]+#sha256=[0-9a-f]{64}"
    assert all(re.fullmatch(named, source) for source in TEXT_SOURCES.values())
