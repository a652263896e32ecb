"""Genes are mapped to Ensembl ids and symbols, and every excluded gene is reported."""

import gzip

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cell2text.cells.fetch_dataset import fetch_dataset
from cell2text.cells.gene_names import MITOCHONDRIAL_IDS
from cell2text.cells.genes import map_genes, read_gene_table
from cell2text.cells.qc import is_mitochondrial, is_ribosomal
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
        ([f"{CD3D}.3", f"{CD3D}.3_PAR_Y", "LYZ"], {}, {(CD3D, CD3D): 3, ("LYZ", "LYZ"): 4}),
        ([CD3D, LYZ], {"feature_name": ["CD3D", f"LYZ_{LYZ}"]}, {(CD3D, "CD3D"): 1, (LYZ, "LYZ"): 2}),
        ([f"CD3D_{CD3D}", f"{LYZ}|LYZ"], {}, {(CD3D, "CD3D"): 1, (LYZ, "LYZ"): 2}),
        (["CD3D", "LYZ"], {"feature_id": [CD3D, ""]}, {(CD3D, "CD3D"): 1, ("LYZ", "LYZ"): 2}),
        (["0", "1"], {"gene_ids": [CD3D, LYZ], "gene_name": pd.Categorical(["CD3D", None])},
         {(CD3D, "CD3D"): 1, (LYZ, LYZ): 2}),
        (["GRCh38_CD3D", "mm10___Cd3d"], {"gene_ids": [f"GRCh38_{CD3D}", "mm10___ENSMUSG00000032094"]},
         {(CD3D, "CD3D"): 1}),
        (["hg19_LYZ", "mm10_Lyz2"], {}, {("LYZ", "LYZ"): 1}),
        (["GRCh38-LYZ", "mm10---Lyz2"], {}, {("LYZ", "LYZ"): 1}),
        ([f"{LYZ}.4"], {"gene_short_name": ["LYZ"]}, {(LYZ, "LYZ"): 1}),
        (["LYZ", "ENSMUSG00000032094", "ERCC-00002"], {}, {("LYZ", "LYZ"): 1}),
        (["CD3D", "CD3D_protein", "chr1:1-2"], {"feature_types": ["Gene Expression", "Antibody Capture", "Peaks"]},
         {("CD3D", "CD3D"): 1}),
    ],
    ids=["ids in a column", "versions", "CELLxGENE", "id and symbol in one", "a gene without id", "numbers as index",
         "10x mixture", "mixture with symbols", "mixture in Seurat", "Monocle", "spike-in and mouse", "multi-modal"],
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


PROTEINS = list(MITOCHONDRIAL_IDS)[:13]
BARE = {"MT-CO1": "COX1", "MT-CO2": "COX2", "MT-CO3": "COX3", "MT-CYB": "CYTB"}  # in NCBI's annotation


@pytest.mark.parametrize("with_table", [False, True], ids=["no table", "table"])
@pytest.mark.parametrize(
    "spell",
    [
        lambda name: name,
        lambda name: name.replace("-", "."),
        lambda name: name.replace("-", "_"),
        lambda name: name.replace("MT-", "MT"),
        lambda name: name.replace("-CO", "-COX").replace("CYB", "CYTB"),
        lambda name: name.lower(),
        lambda name: name.replace("MT-", "mt-").replace("ND", "Nd"),
        lambda name: f"GRCh38_{name}",
        lambda name: f"GRCh38-----{name}",
        lambda name: f"hg19.{name.replace('-', '.')}",
        lambda name: f"HUMAN_{name}",
        lambda name: f" {name}",
        lambda name: f'"{name}"',
        lambda name: BARE.get(name, name[3:]),
        lambda name: f"{name}_{MITOCHONDRIAL_IDS[name]}",
        lambda name: f"{MITOCHONDRIAL_IDS[name]}.4-{name}",
        lambda name: f"{MITOCHONDRIAL_IDS[name]}.4",
    ],
    ids=["usual", "R", "underscore", "no joint", "COX", "lower", "mouse", "10x", "Seurat", "10x and R", "CITE-seq",
         "space", "quotes", "NCBI", "CELLxGENE", "id first", "ids"],
)  # fmt: skip
def test_mitochondrial_genes_in_every_spelling(table, spell, with_table):
    symbols = mapped([*map(spell, PROTEINS), "LYZ", "NKX2-1", "CD3D"], table if with_table else None)[1].genes["symbol"]
    assert list(symbols) == [*PROTEINS, "LYZ", "NKX2-1", "CD3D"]
    assert is_mitochondrial(symbols).sum() == 13


def test_the_ids_of_the_mitochondrial_genes_are_those_of_the_gene_list(request):
    path = request.config.rootpath.parent / "shared/data/genes/genes_homo_sapiens.csv.gz"
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    symbols = read_gene_table(path).symbols
    assert {symbol: gene for gene, symbol in symbols.items() if symbol.startswith("MT-")} == MITOCHONDRIAL_IDS
    # the number of ribosomal proteins on which the limits of QC depend
    assert is_ribosomal(pd.Series(symbols.unique())).sum() == 88


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # no name has a hyphen, so R has replaced them
        (["HLA.DRB1", "NKX2.1", "MIR4435.2HG", "RPS6", "AC000068.1", "RP11.34P13.7", "MATR3", "MATR3.1", "MT.TF"],
         ["HLA-DRB1", "NKX2-1", "MIR4435-2HG", "RPS6", "AC000068.1", "RP11.34P13.7", "MATR3", "MATR3.1", "MT-TF"]),
        # others do, so a dot may belong to the symbol
        (["HLA.DRB1", "NKX2-1", "RP11-34P13.7", "AC000068.1", "LYZ.X"],
         ["HLA-DRB1", "NKX2-1", "RP11-34P13.7", "AC000068.1", "LYZ.X"]),
        (["hla-a", "lyz", "c1orf112", "rps6"], ["HLA-A", "LYZ", "C1orf112", "RPS6"]),
        (["hla.a", "lyz", "rps6"], ["HLA-A", "LYZ", "RPS6"]),
        (["Hla.A", "LYZ", "RPS6"], ["HLA-A", "LYZ", "RPS6"]),
        # a name of another row is never taken
        (["HLA.A", "HLA-A", "mt-Nd1", "MT-ND1", "LYZ"], ["HLA.A", "HLA-A", "mt-Nd1", "MT-ND1", "LYZ"]),
        # genes with similar names: cyclooxygenases, a transfer protein, pseudogenes
        (["COX1", "COX2", "MTTP", "MTND1P23", "MTOR", "ND1"], ["COX1", "COX2", "MTTP", "MTND1P23", "MTOR", "ND1"]),
    ],
    ids=["R", "not R", "lower case", "lower case and R", "mixed case", "no merging", "similar names"],
)  # fmt: skip
def test_names_without_a_table_get_their_usual_spelling(names, expected):
    found, _ = mapped(names)
    assert found == {(symbol, symbol): 2**i for i, symbol in enumerate(expected)}


def test_symbols_are_those_of_the_table(table):
    found, _ = mapped(["LZM", "FIRRM", "NKX2.1", "c1orf112", "gene"], table, gene_ids=["", "", "", "", CD3D])
    assert found == {(LYZ, "LYZ"): 1, (C1ORF, "C1orf112"): 2 + 8, (NKX, "NKX2-1"): 4, (CD3D, "CD3D"): 16}


def test_a_symbol_is_not_an_id_or_a_number():
    assert mapped(["LYZ", "CD3D"], feature_name=[LYZ, CD3D])[0] == {(LYZ, "LYZ"): 1, (CD3D, "CD3D"): 2}
    assert mapped(["0", "1"], gene_ids=["LYZ", "CD3D"])[0] == {("LYZ", "LYZ"): 1, ("CD3D", "CD3D"): 2}


def numbered(form, rows=120):
    return [form.format(i, i + 500) for i in range(1000, 1000 + rows)]


WRONG = {
    "peaks": (numbered("chr1:{}-{}"), "rows are genomic regions, such as ATAC peaks, not genes (chr1:1000-1500"),
    "peaks by Signac": (numbered("chrX-{}-{}"), "genomic regions"),
    "peaks of Ensembl": (numbered("1_{}_{}"), "genomic regions"),
    "peaks of a contig": (numbered("KI270728.1:{}-{}"), "genomic regions"),
    "bins by R": (numbered("chr1.{}.{}"), "genomic regions"),
    "antibodies": (numbered("CD{}_TotalSeqB"), "rows are antibodies or hashtags, not genes"),
    "antibodies with a prefix": (numbered("ADT-CD{}"), "antibodies"),
    "antibodies without a mark": (["CD3", "CD4", "CD8a", "CD16", "CD45RA", "CD19"], "antibodies"),
    "guides": (numbered("sgTP53_{}"), "rows are CRISPR guides, not genes"),
    "transcripts": (numbered("ENST0000000{}.2"), "rows are transcripts, not genes"),
    "transcripts of RefSeq": (numbered("NM_00{}"), "transcripts"),
    "transcripts of GENCODE": ([f"ENST0000000{i}.2|{LYZ}.3|-|-|LYZ-201|LYZ|956|" for i in range(1000, 1100)], "trans"),
    "proteins": (numbered("ENSP0000000{}"), "rows are proteins, not genes"),
    "UniProt": (numbered("P{}2"), "proteins"),
    "Entrez": (numbered("{}"), "gene names are numbers"),
    "Entrez as float": (numbered("{}.0"), "gene names are numbers"),
    "HGNC": (numbered("HGNC:{}"), "ids of HGNC or NCBI, but no symbols"),
    "Illumina": (numbered("ILMN_{}"), "rows are probes of a microarray"),
    "Affymetrix": (numbered("{}_s_at"), "microarray"),
    "mouse": (numbered("ENSMUSG0000000{}"), "genes are from other species (ENSMUSG00000001000"),
    "zebrafish": (numbered("ENSDARG0000000{}.3"), "other species"),
    "fruit fly": (numbered("FBgn000{}"), "other species"),
    "worm": (numbered("WBGene0000{}"), "other species"),
    "zebrafish symbols": (["si:dkey-1", "actb1", "rpl3", "hbaa1"], "symbols look like zebrafish genes"),
    "made-up names": (numbered("gene_{}"), "none of the 120 names is that of a usual human gene (gene_1000"),
    "columns of R": (numbered("V{}"), "none of the 120 names"),
}


@pytest.mark.parametrize("with_table", [False, True], ids=["no table", "table"])
@pytest.mark.parametrize("kind", WRONG)
def test_rows_that_are_no_genes_are_refused_for_what_they_are(table, kind, with_table):
    names, expected = WRONG[kind]
    if kind == "transcripts of GENCODE" and with_table:
        assert mapped(names, table)[1].genes["symbol"].to_list() == ["LYZ"]
        return
    with pytest.raises(InputError) as error:
        mapped(names, table if with_table else None)
    assert str(error.value).startswith("file: var: ") and expected in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        (["Peaks"] * 3, "genomic regions"),
        (["Antibody Capture"] * 3, "antibodies"),
        (["CRISPR Guide Capture", "CRISPR Guide Capture", "Custom"], "CRISPR guides"),
    ],
)
def test_feature_types_without_genes(types, expected):
    with pytest.raises(InputError, match=f"rows are {expected}.*Give the counts of genes"):
        mapped(["CD4", "CD19", "LYZ"], feature_types=types)


def test_ids_without_symbols_need_a_table(table, caplog):
    """Gene sets name symbols, so the run could not succeed."""
    ids = [f"ENSG{i:011d}" for i in range(1, 100)]
    with pytest.raises(InputError, match=r"ids but no symbols.*\(ENSG00000000001, .*Set `genes: table`"):
        mapped(ids)
    with pytest.raises(InputError, match="no symbols"):
        mapped([str(i) for i in range(99)], gene_ids=ids, feature_name=ids)
    assert mapped([*ids, LYZ], table)[1].genes["symbol"].iloc[-1] == "LYZ"
    assert "99 of 100 genes have an Ensembl id without a symbol in the table" in caplog.text
    # novel genes among others have none
    assert len(mapped([*ids[:50], *(f"S100A{i}" for i in range(50))])[0]) == 100


def test_genes_among_other_features_are_kept():
    peaks, antibodies = numbered("chr1:{}-{}", 300), numbered("CD{}_TotalSeqB", 20)
    names = [*(f"S100A{i}" for i in range(100)), *peaks, *antibodies, "__no_feature", "ERCC.00002"]
    genes = mapped(names)[1]
    assert list(genes.genes["symbol"]) == names[:100] and genes.excluded["not genes"] == 322
    types = ["Gene Expression"] * 100 + ["Peaks"] * 300 + ["Antibody Capture"] * 20 + ["Gene Expression"] * 2
    assert list(mapped(names, feature_types=types)[1].genes["symbol"])[:100] == names[:100]
