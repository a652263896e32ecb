"""Every table of a user's is read by the same rules: nothing is cut, dropped or guessed, and messages name the line."""

from pathlib import Path

import pandas as pd
import pytest

from cell2text.cells.genes import read_gene_table
from cell2text.cells.labels import join_cell_table, label_cells, read_label_table
from cell2text.config import read_datasets
from cell2text.corpus.gene_sets import name_pathways, read_gene_sets
from cell2text.corpus.splits import read_split
from cell2text.errors import InputError

SCHEMA = Path(__file__).parents[2] / "workflow/schemas/datasets.schema.yaml"
B, T = "CL:0000236", "CL:0000084"
HEADER = "dataset\tsource\tnotes\ttissue\tdonor\n"


@pytest.fixture
def sheet(tmp_path):
    """Write a sheet of datasets whose study is a file that exists, and read it."""
    (tmp_path / "s.h5ad").touch()

    def read(text, encoding="utf-8"):
        path = tmp_path / "sheet.tsv"
        path.write_bytes(text.replace("{s}", str(tmp_path / "s.h5ad")).encode(encoding))
        return read_datasets(path, SCHEMA)

    return read


def test_a_hash_inside_a_sheet_is_a_character(sheet):
    rows = sheet(HEADER + "x\t{s}\tSample #2 excluded\tUBERON:0000178\t#1\n#y\t{s}\t\t\t\n  \nz\t{s}\t#3\t\t#\n")
    assert {name: {**row, "source": ""} for name, row in rows.items()} == {
        "x": {
            "dataset": "x",
            "source": "",
            "notes": "Sample #2 excluded",
            "tissue": "UBERON:0000178",
            "donor": "#1",
        },
        "z": {"dataset": "z", "source": "", "notes": "#3", "donor": "#"},
    }
    assert sheet("dataset\tsource\tlabel_column\nx\t{s}\tCluster #\n")["x"]["label_column"] == "Cluster #"
    # a note may begin with # even where notes come first
    assert sheet("notes\tdataset\tsource\n#1 in the paper\tx\t{s}\n")["x"]["notes"] == "#1 in the paper"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", ["\t", ","])
def test_sheets_from_a_spreadsheet(sheet, encoding, ends, separator):
    text = '# of 2024\ndataset\tsource\tnotes\none\t{s}\t"naive"" T"\t\ntwo\t{s}\tUniversité\t\n'
    rows = sheet(text.replace("\t", separator).replace("\n", ends), encoding)
    assert [row["notes"] for row in rows.values()] == ['naive" T', "Université"]


def test_a_lone_quotation_mark_in_a_sheet_is_a_character(sheet):
    rows = sheet('dataset\tsource\tnotes\none\t{s}\t"naive" cells only\ntwo\t{s}\t"half a quote\nthree\t{s}\tfine\n')
    assert [row["notes"] for row in rows.values()] == ['"naive" cells only', '"half a quote', "fine"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dataset\tsource\nx\t{s}\n\n# y\ny\t{s}\tA\tB\n", "line 5: 4 values instead of 2, as in line 1"),
        ("dataset\tsource\nx\t{s}\tA\n", "line 2: 3 values instead of 2"),
        ("dataset\tsource\tnotes\nx\t{s}\n", "line 2: 2 values instead of 3"),
        ("# 1\n\ndataset\tsource\ttissue\nx\t{s}\tblood\n", "line 4: tissue: 'blood' does not match"),
        ("# 1\n\ndataset\tsource\nx\t{s}\n# 2\nx\t{s}\n", "line 6: dataset: x repeats"),
        ("dataset;source\nx;{s}\n", "line 1: a single column, 'dataset;source'"),
        ("dataset\tsource\tsource\nx\t{s}\t{s}\n", "line 1: two columns are named 'source'"),
        ("", "empty"),
    ],
)
def test_mistakes_in_a_sheet_are_reported_with_their_line(sheet, text, expected):
    with pytest.raises(InputError) as error:
        sheet(text)
    assert f"sheet.tsv {expected}" in str(error.value) or f"sheet.tsv: {expected}" in str(error.value)


def test_a_sheet_in_latin_1_is_refused_with_its_line(sheet):
    with pytest.raises(InputError, match=r"line 3: not UTF-8 \(byte 0xe9 after '.*Cells of Universit'\). Save it as"):
        sheet("dataset\tsource\tnotes\nx\t{s}\t\ny\t{s}\tCells of Université de Liège\n", "latin-1")


def test_labels_of_every_kind_are_mapped(tmp_path):
    names = ["Müller-like 🧬 B", 'CD4+ T "naïve" / 5\'', "Mono|cyte, CD14+", "#1", "# 2", "NA", '"x" or "y"', "CD8\nT"]
    text = "author_label\tcell_type_ontology_term_id\r\n# ignored\r\n"
    text += "".join(f"{name}\t{B}\r\n" for name in names[:-1]) + f'"{names[-1]}"\t{B}\r\n'
    (tmp_path / "labels.tsv").write_bytes(text.encode("utf-8-sig"))
    assert read_label_table(tmp_path / "labels.tsv") == dict.fromkeys(names, B)
    frame = pd.DataFrame({"author_label": names, "cell_type_ontology_term_id": B})
    frame.to_csv(tmp_path / "labels.csv", index=False)
    assert read_label_table(tmp_path / "labels.csv") == dict.fromkeys(names, B)
    row = {"dataset": "d", "source": "s", "label_column": "Cluster #", "label_table": str(tmp_path / "labels.csv")}
    names.remove("NA")  # among labels, this is unknown
    obs = pd.DataFrame({"Cluster #": names}, index=[f"c{i}" for i in range(len(names))])
    known = label_cells(obs, {**row, "donor": "#1"}, [*obs])
    assert set(known["cell_type_ontology_term_id"]) == {B} and set(known["donor_id"]) == {"#1"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"B\t{B}\nT\tCL:1\n", "line 5: cell_type_ontology_term_id: CL:1 is not a term"),
        (f"B\t{B}\n\nB\t{T}\n", r"label B occurs twice \(lines 4 and 6\)"),
        (f"B\t{B}\nT\t{T}\told\n", "line 5: 3 values instead of 2, as in line 3"),
        (f"B {B}\n", "line 4: 1 value instead of 2, as in line 3"),
    ],
)
def test_lines_of_a_label_table_are_the_lines_of_the_file(tmp_path, text, expected):
    path = tmp_path / "labels.tsv"
    path.write_text("# by hand\n\nauthor_label\tcell_type_ontology_term_id\n" + text)
    with pytest.raises(InputError, match=expected):
        read_label_table(path)


CELLS = {
    "R, two columns": f"cell_type_ontology_term_id\tdonor_id\nc1\t{B}\t#1\nc2\t{T}\td2\n",
    "R, quoted": f'"cell_type_ontology_term_id"\t"donor_id"\n"c1"\t"{B}"\t"#1"\n"c2"\t"{T}"\t"d2"\n',
    "R, col.names=NA": f'""\t"cell_type_ontology_term_id"\t"donor_id"\n"c1"\t"{B}"\t"#1"\n"c2"\t"{T}"\t"d2"\n',
    "R, write.csv": f'"","cell_type_ontology_term_id","donor_id"\n"c1","{B}","#1"\n"c2","{T}","d2"\n',
    "a comma in a name": f"barcode\tcell_type_ontology_term_id\tdonor_id\ta (T, B)\nc1\t{B}\t#1\t1\nc2\t{T}\td2\t2\n",
    "a commented header": f"#barcode\tcell_type_ontology_term_id\tdonor_id\nc1\t{B}\t#1\nc2\t{T}\td2\n",
    "commas": f"# x, y\nbarcode,cell_type_ontology_term_id,donor_id,a\nc1,{B},#1,\nc2,{T},d2,\n",
    "other cells": f"x\tcell_type_ontology_term_id\tdonor_id\nc2\t{T}\td2\n#c1\t{T}\td9\nc1\t{B}\t#1\n",
}


@pytest.mark.parametrize("kind", CELLS)
def test_cell_tables_from_r_and_elsewhere(tmp_path, kind):
    (tmp_path / "cells.tsv").write_text(CELLS[kind])
    obs = pd.DataFrame({"donor_id": ["old"] * 2}, index=["c1", "c2"])
    joined = join_cell_table(obs, {"cell_table": str(tmp_path / "cells.tsv")})
    assert joined[["cell_type_ontology_term_id", "donor_id"]].to_numpy().tolist() == [[B, "#1"], [T, "d2"]]


def test_a_cell_table_with_one_column_from_r(tmp_path):
    for text in (
        "donor_id\nc1\t#1\nc2\tNA\n",
        '"donor_id"\n"c1","#1"\n"c2","NA"\n',
        "my label (a, b)\nc1\t#1\nc2\tNA\n",
    ):
        (tmp_path / "cells.tsv").write_text(text)
        column = text.splitlines()[0].strip('"')
        row = {"cell_table": str(tmp_path / "cells.tsv"), "label_column": column}
        joined = join_cell_table(pd.DataFrame(index=["c1", "c2"]), row)
        assert joined[column].tolist() == ["#1", "NA"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("barcode\tdonor_id\nc1\td\nc2\n", "line 3: 1 value instead of 2"),
        ("barcode\tdonor_id\nc1\td\n\nc1\te\n", r"cell c1 occurs twice \(lines 2 and 4\)"),
        ("c1\td\nc2\te\n", r"none of its columns \(c1, d\) is used"),
        ("donor_id\tcell_type\nc1\td\t\nc2\te\t\n", "every row has one more value"),
    ],
)
def test_mistakes_in_a_cell_table(tmp_path, text, expected):
    (tmp_path / "cells.tsv").write_text(text)
    with pytest.raises(InputError, match=expected):
        join_cell_table(pd.DataFrame(index=["c1", "c2"]), {"cell_table": str(tmp_path / "cells.tsv")})


@pytest.mark.parametrize("column", ["donor", "cell_id"])
def test_donors_and_cells_with_a_hash_in_a_split(tmp_path, column):
    names = ["s|#1", "s|a #2", "#3|x", "#"]
    cells = pd.DataFrame({"donor": names, "cell_id": names, "dataset_id": "s"})
    rows = list(zip(names, ["train", "test", "validation", "train"], strict=True))
    for first in (0, 1):  # which of the two columns comes first
        header = [column, "split"]
        lines = ["\t".join(row[::-1] if first else row) for row in [header, *rows]]
        (tmp_path / "split.tsv").write_text("# mine\n" + "\n".join(lines) + "\n# end\n")
        assert read_split(tmp_path / "split.tsv", cells).tolist() == [0, 2, 1, 0]
    (tmp_path / "split.tsv").write_text(f"# mine\n\n{column}\tsplit\ns|#1\ttrain\n#3|x\tTrain\n")
    with pytest.raises(InputError, match="line 5: split: unknown split 'Train'"):
        read_split(tmp_path / "split.tsv", cells)


def test_gene_sets_with_comments_and_quotes(tmp_path):
    path = tmp_path / "sets.gmt"
    path.write_bytes('# mine\r\nA #1\t"a, b"\tCD3D\tNA\t\r\n\r\n#B\t\tLYZ\r\n'.encode("utf-8-sig"))
    assert read_gene_sets(path) == {"A #1": ["CD3D", "NA"]}
    path.write_bytes("A\tname\tCD3D\nB\tna\xefve\tLYZ\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"sets.gmt line 2: not UTF-8 \(byte 0xef after"):
        read_gene_sets(path)


def test_descriptions_of_gene_sets(tmp_path):
    path = tmp_path / "sets.tsv"
    path.write_text('# mine\nid\tname\tdescription\n#1\tfirst #1\t"a ""b"""\nNA\t5\' end\tnone\n', encoding="utf-16")
    rows = name_pathways(["NA", "#1"], path)
    assert rows[["name", "definition"]].to_numpy().tolist() == [["5' end", "none"], ["first #1", 'a "b"']]
    path.write_text("id\tname\tdescription\nA\tx\n")
    with pytest.raises(InputError, match="sets.tsv line 2: 2 values instead of 3"):
        name_pathways(["A"], path)


def test_gene_tables_with_comments_and_commas_in_names(tmp_path):
    path = tmp_path / "genes.txt"
    for text in (
        "# of 2024\n#gene_id\tsymbol\n# x\ty\nENSG00000167286\tCD3D\n",
        "# of 2024\n\nENSG00000167286\tCD3D\textra, more\n",
        'symbol\tname (a, b)\tgene_id\n"CD3D"\t"CD3, d"\tENSG00000167286\n',
    ):
        path.write_text(text, encoding="utf-8-sig")
        assert read_gene_table(path).ids.to_dict() == {"CD3D": "ENSG00000167286"}
    path.write_text("gene_id\tsymbol\nENSG00000167286\tCD3D\nENSG00000167287\n")
    with pytest.raises(InputError, match="genes.txt line 3: 1 value instead of 2, as in line 1"):
        read_gene_table(path)


def test_a_large_cell_table_keeps_only_what_is_used(tmp_path):
    cells = [f"AAAC{i}-1" for i in range(20_000)]
    lines = ["barcode\tdonor_id\tnoise\n", *(f"{cell}\td{i % 7}\t{i}\n" for i, cell in enumerate(cells))]
    (tmp_path / "cells.tsv").write_text("".join(lines))
    joined = join_cell_table(pd.DataFrame(index=cells[::-1]), {"cell_table": str(tmp_path / "cells.tsv")})
    assert [*joined] == ["donor_id"] and joined["donor_id"].tolist() == [f"d{i % 7}" for i in range(20_000)][::-1]


def test_features_are_read_as_they_are(tmp_path):
    from cell2text.cells.studies import open_study

    (tmp_path / "matrix.mtx").write_text("%%MatrixMarket matrix coordinate integer general\n2 2 1\n1 1 5\n")
    (tmp_path / "barcodes.tsv").write_text("#c1\nNA\n")
    (tmp_path / "features.tsv").write_text('"A"\t#5\nB\tNA\n')
    with open_study(str(tmp_path)) as study:
        assert study.obs.index.tolist() == ["#c1", "NA"]
        assert study.matrices["X"][1]["gene_ids"].tolist() == ['"A"', "B"]
    (tmp_path / "features.tsv").write_text("A\tx\nB\n")
    with pytest.raises(InputError, match="features.tsv line 2: 1 value instead of 2"), open_study(str(tmp_path)):
        pass
