"""Genes are mapped to Ensembl ids and symbols, and every excluded gene is reported."""

import gzip

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cell2text.cells.fetch_dataset import fetch_dataset
from cell2text.cells.genes import map_genes, read_gene_table
from cell2text.errors import InputError

CD3D, MATR3, MATR3_OTHER, LYZ = "ENSG00000167286", "ENSG00000015479", "ENSG00000280987", "ENSG00000090382"
NKX, TBXT, C1ORF = "ENSG00000136352", "ENSG00000164458", "ENSG00000000460"
TABLE = f"""gene_id\tsymbol\taliases
{CD3D}.12\tCD3D\tT3D
{MATR3}\tMATR3\t
{MATR3_OTHER}\tMATR3\t
{LYZ}\tLYZ\tLZM|SHARED
{NKX}\tNKX2-1\tTTF1|SHARED
{TBXT}\tTBXT\tT|CD3D
{C1ORF}\tC1orf112\tFIRRM
"""


@pytest.fixture
def table(tmp_path):
    (tmp_path / "genes.tsv").write_text(TABLE)
    return read_gene_table(tmp_path / "genes.tsv")


def mapped(index, table=None, **var):
    genes = map_genes(pd.DataFrame(var, index=index), "file", table)
    counts = sparse.csr_matrix(2.0 ** np.arange(len(index), dtype=np.float32)[None])
    row = genes.gather(counts).toarray()[0]
    return dict(zip(zip(genes.genes.index, genes.genes["symbol"], strict=True), row.tolist(), strict=True)), genes


def test_symbols_become_ids_and_rows_of_one_gene_are_summed(table):
    found, genes = mapped(["CD3D", "T3D", "LYZ", "MATR3", "MATR3-1", "NKX2-1", "tdTomato"], table)
    # counts are 1, 2, 4, 8, 16, 32 and 64; the symbol is that of the first row
    assert found == {
        (CD3D, "CD3D"): 1 + 2, (LYZ, "LYZ"): 4, (MATR3, "MATR3"): 8 + 16, (NKX, "NKX2-1"): 32,
    }  # fmt: skip
    assert genes.excluded == {"not genes": 0, "from other species": 0, "not in the gene table": 1}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LZM", LYZ),
        ("SHARED", None),  # alias of two genes
        ("T", TBXT),
        ("NKX2.1", NKX),  # as written by R
        ("FIRRM", C1ORF),
        ("lyz", LYZ),
        ("LYZ-1", None),  # the file has no LYZ
        ("", None),
    ],
)
def test_other_spellings_of_a_symbol(table, name, expected):
    found, _ = mapped([name], table)
    assert [gene for gene, _ in found] == ([expected] if expected else [])


def test_a_symbol_takes_precedence_over_an_alias(table):
    assert table.ids["CD3D"] == CD3D
    assert table.ids["MATR3"] == MATR3  # the first of two ids


def test_without_a_table_symbols_are_kept_and_duplicates_are_summed():
    found, _ = mapped(["CD3D", "LYZ", "CD3D", "MATR3", "MATR3-1"])
    expected = {"CD3D": 1 + 4, "LYZ": 2, "MATR3": 8, "MATR3-1": 16}
    assert found == {(symbol, symbol): count for symbol, count in expected.items()}


@pytest.mark.parametrize(
    ("index", "var", "expected"),
    [
        (["A", "B"], {"gene_ids": [CD3D, LYZ]}, {(CD3D, "A"): 1, (LYZ, "B"): 2}),
        ([f"{CD3D}.3", f"{CD3D}.3_PAR_Y"], {}, {(CD3D, CD3D): 3}),
        ([CD3D, LYZ], {"feature_name": ["CD3D", f"LYZ_{LYZ}"]}, {(CD3D, "CD3D"): 1, (LYZ, "LYZ"): 2}),
        ([f"CD3D_{CD3D}", f"{LYZ}|LYZ"], {}, {(CD3D, "CD3D"): 1, (LYZ, "LYZ"): 2}),
        (["CD3D", "LYZ"], {"feature_id": [CD3D, ""]}, {(CD3D, "CD3D"): 1, ("LYZ", "LYZ"): 2}),
        (["0", "1"], {"gene_ids": [CD3D, LYZ], "gene_name": pd.Categorical(["CD3D", None])},
         {(CD3D, "CD3D"): 1, (LYZ, "1"): 2}),
        (["GRCh38_CD3D", "mm10___Cd3d"], {"gene_ids": [f"GRCh38_{CD3D}", "mm10___ENSMUSG00000032094"]},
         {(CD3D, "CD3D"): 1}),
        (["hg19_LYZ", "mm10_Lyz2"], {}, {("LYZ", "LYZ"): 1}),
        ([CD3D, "ENSMUSG00000032094", "ERCC-00002"], {}, {(CD3D, CD3D): 1}),
        (["CD3D", "CD3D_protein", "chr1:1-2"], {"feature_types": ["Gene Expression", "Antibody Capture", "Peaks"]},
         {("CD3D", "CD3D"): 1}),
    ],
    ids=["ids in a column", "versions", "CELLxGENE", "id and symbol in one", "a gene without id", "numbers as index",
         "10x mixture", "mixture with symbols", "spike-in and mouse", "multi-modal"],
)  # fmt: skip
def test_files_without_a_gene_table(index, var, expected):
    assert mapped(index, **var)[0] == expected


def test_symbols_of_ids_come_from_the_table(table):
    assert mapped([LYZ, "ENSG00000999999"], table)[0] == {(LYZ, "LYZ"): 1, ("ENSG00000999999",) * 2: 2}


@pytest.mark.parametrize(
    "text",
    [
        f"gene_id,symbol\n{CD3D},CD3D\n{LYZ},LYZ\n",
        f"{CD3D},CD3D,12,protein_coding\n{LYZ},LYZ,7,protein_coding\n",
        f"hgnc_id\tsymbol\talias_symbol\tprev_symbol\tensembl_gene_id\nHGNC:1\tCD3D\t\t\t{CD3D}\nHGNC:2\tNA\t\tLYZ\t{LYZ}\n",
    ],
    ids=["csv", "no header", "HGNC"],
)
@pytest.mark.parametrize("gzipped", [False, True])
def test_gene_tables_in_several_formats(tmp_path, text, gzipped):
    path = tmp_path / ("genes.txt.gz" if gzipped else "genes.txt")
    path.write_bytes(gzip.compress(text.encode()) if gzipped else text.encode())
    table = read_gene_table(path)
    assert table.ids["CD3D"] == CD3D and table.ids["LYZ"] == LYZ
    assert table.symbols[CD3D] == "CD3D"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "symbol\tlength\nCD3D\t1\n",
            ["required columns missing (found: symbol, length)", "Give the columns gene_id (Ensembl) and symbol"],
        ),
        ("gene_id\tsymbol\nENSMUSG00000032094\tCd3d\n", ["gene_id", "no human Ensembl id"]),
        ("", ["genes.tsv: empty", "Give a header and rows"]),
        (None, ["config: genes: table", "no such file", "Correct the path"]),
    ],
)
def test_an_invalid_gene_table(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "genes.tsv").write_text(text)
    with pytest.raises(InputError) as error:
        read_gene_table(tmp_path / "genes.tsv")
    for part in ["genes.tsv", *expected]:
        assert part in str(error.value)


def test_the_share_of_counts_that_is_kept_is_recorded_and_has_a_minimum(tmp_path, caplog):
    (tmp_path / "genes.tsv").write_text(TABLE)
    counts = np.array([[6, 1, 0], [0, 1, 2]], dtype=np.float32)
    cells = ad.AnnData(counts, pd.DataFrame(index=["a", "b"]), pd.DataFrame(index=["CD3D", "LYZ", "not-a-gene"]))
    cells.write_h5ad(tmp_path / "in.h5ad")
    row = {"dataset": "s", "source": str(tmp_path / "in.h5ad")}
    with caplog.at_level("INFO"):
        fetch_dataset(row, tmp_path / "s.h5ad", tmp_path / "genes.tsv", min_counts_kept=0.8)
    written = ad.read_h5ad(tmp_path / "s.h5ad")
    assert written.uns["counts_kept"] == pytest.approx(8 / 10)
    assert "2 genes kept, with 80.00% of the counts; rows excluded: 1 not in the gene table" in caplog.text
    assert written.X.toarray().tolist() == [[6, 1], [0, 1]]
    with pytest.raises(InputError, match=r"only 80.0% of the counts .* or lower genes: min_counts_kept") as error:
        fetch_dataset(row, tmp_path / "t.h5ad", tmp_path / "genes.tsv", min_counts_kept=0.81)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*t.h5ad*"))
