"""The rules by which tables of users are read: encodings, separators, quotes, comments, row names and lines."""

import gzip
import random

import pandas as pd
import pytest

from cell2text.errors import InputError
from cell2text.tables import read_columns, read_names, read_rows, read_table

KNOWN = {"label", "term", "note"}
TEXT = "label\tterm\nMüller 🧬\tNA\nCD4\tCL:1\n"
EXPECTED = [(2, "Müller 🧬", "NA"), (3, "CD4", "CL:1")]


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows(path, known=KNOWN, **options):
    return [tuple(row) for row in read_table(path, known, **options).itertuples()]


@pytest.mark.parametrize(
    "encode",
    [
        str.encode,
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
        lambda text: text.encode("utf-16-le"),
        lambda text: text.encode("utf-16-be"),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r").encode(),
        lambda text: text.removesuffix("\n").encode(),
        lambda text: b"\xef\xbb\xbf" + text.encode("utf-8-sig"),
    ],
    ids=[
        "utf-8",
        "BOM",
        "utf-16",
        "utf-16-be",
        "le-without-BOM",
        "be-without-BOM",
        "crlf",
        "cr",
        "no-last-newline",
        "two-BOMs",
    ],
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("separator", ["\t", ","], ids=["tabs", "commas"])
def test_encodings_and_line_ends(tmp_path, encode, compress, separator):
    path = write(tmp_path / "table.txt", compress(encode(TEXT.replace("\t", separator))))
    assert rows(path) == EXPECTED


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("label\tterm, old\nT, naive\tx\n", [["label", "term, old"], ["T, naive", "x"]]),
        ("label,term\nT\tnaive,x\n", [["label", "term"], ["T\tnaive", "x"]]),
        ('label,"term, old"\n"T, naive",x\n', [["label", "term, old"], ["T, naive", "x"]]),
        # R: write.table with one column, with a comma in its name, with quotes; write.csv
        ("term\nc1\tx\nc2\ty\n", [["", "term"], ["c1", "x"], ["c2", "y"]]),
        ("term (T, B)\nc1\tx\n", [["", "term (T, B)"], ["c1", "x"]]),
        ('"term"\n"c1"\t"x, y"\n', [["", "term"], ["c1", "x, y"]]),
        ('"term","note"\n"c1","x",5\n', [["", "term", "note"], ["c1", "x", "5"]]),
        ('"","term"\n"c1","x"\n', [["", "term"], ["c1", "x"]]),
        ('""\t"term"\n"c1"\t"x"\n', [["", "term"], ["c1", "x"]]),
        # the last value of the first rows is empty, so only a later row shows that there are row names
        ("term\tnote\nc1\tx\t\nc2\ty\tz\n", [["", "term", "note"], ["c1", "x", ""], ["c2", "y", "z"]]),
        ("label\tterm\n", [["label", "term"]]),
        ("label\tterm\n\n \t \n B \t x\n\t\n", [["label", "term"], ["B", "x"]]),
        # separators at the end of lines, in the header too
        ("label\tterm\nB\tx\t\nT\ty\t\t\t\nK\tz\n", [["label", "term"], ["B", "x"], ["T", "y"], ["K", "z"]]),
        ("label,term,,\nB,x\nT,y,,\n", [["label", "term"], ["B", "x"], ["T", "y"]]),
        ("label\tterm\nB\tx\t\nT\ty\t\n", [["label", "term"], ["B", "x"], ["T", "y"]]),
    ],
)  # fmt: skip
def test_columns_and_row_names(tmp_path, text, expected):
    table = read_table(write(tmp_path / "table.tsv", text), KNOWN)
    assert [[*table], *table.to_numpy().tolist()] == expected


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ('"naive ""T"""', 'naive "T"'),
        (r'"naive \"T\""', 'naive "T"'),
        ('"a\tb"', "a\tb"),
        ('""', ""),
        ('"naive" T', '"naive" T'),
        ('"half', '"half'),
        ('half"', 'half"'),
        ('3" and 5"', '3" and 5"'),
        ('"a" or "b"', '"a" or "b"'),
        ("5' end", "5' end"),
        (r"CD4\CD8", r"CD4\CD8"),
        ('"CD4\nnaive"', "CD4\nnaive"),
        ('"one\n\n""two""\n# three"', 'one\n\n"two"\n# three'),
        ("# 1", "# 1"),
        ("=1+1", "=1+1"),
        ("w\u2028x\x0by\x85z", "w\u2028x\x0by\x85z"),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_quotes(tmp_path, written, value, last):
    text = f"label\tterm\tnote\nx\t{'y' if last else written}\t{written if last else 'z'}\nnext\ta\tb\n"
    first, second = rows(write(tmp_path / "table.tsv", text))
    assert first == (2, "x", *(("y", value) if last else (value, "z")))
    assert second == (3 + value.count("\n"), "next", "a", "b")


def test_quoted_values_as_pandas_writes_them_come_back(tmp_path):
    draw = random.Random(0)
    letters = ["a", "B", '"', ",", "\t", "\n", "\\", "é", " x", "#"]
    values = [["v" + "".join(draw.choices(letters, k=draw.randrange(7))).strip() for _ in range(3)] for _ in range(300)]
    # without those whose lines could each be a row
    values = [row for row in values if not any("\n" in value and ("\t" in value or "," in value) for value in row)]
    table = pd.DataFrame(values, columns=["label", "term", "note"])
    for separator in "\t,":
        table.to_csv(tmp_path / "table.txt", sep=separator, index=False)
        read = read_table(tmp_path / "table.txt", KNOWN)
        assert read.to_numpy().tolist() == values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# by me, 2024\n\n#\tx\nlabel\tterm\nB\tx\n", [(5, "B", "x")]),
        ("#label\tterm\nB\tx\n", [(2, "B", "x")]),
        ("# by me\n# label\tterm\nB\tx\n", [(3, "B", "x")]),
        ("#label,term\nB,x\n", [(2, "B", "x")]),
        ("#label\told\nlabel\tterm\nB\tx\n", [(3, "B", "x")]),
        ("\ufeff#label\tterm\nB\tx\n", [(2, "B", "x")]),
        ("#label\tterm\n#1\tx\n", [(2, "#1", "x")]),
        ("label\tterm\n#1\tx\n# T cells\nCluster #2\t#y\n", [(2, "#1", "x"), (4, "Cluster #2", "#y")]),
        ("label,term\n#1,x\n", [(2, "#1", "x")]),
        ('label\tterm\n# say "x\nB\ty"\n', [(3, "B", 'y"')]),
    ],
)
def test_comments(tmp_path, text, expected):
    assert rows(write(tmp_path / "table.tsv", text)) == expected


def test_comments_among_rows_whose_first_values_have_no_hash(tmp_path):
    path = write(tmp_path / "table.tsv", "term\tnote\n#x\t1\nx\t#2\n")
    assert rows(path, without_hash={"term"}) == [(3, "x", "#2")]
    path.write_text("note\tterm\n#1\tx\n")
    assert rows(path, without_hash={"term"}) == [(2, "#1", "x")]


ERRORS = {
    "": "table.tsv: empty: no line with names of columns",
    "# nothing\n\n": "table.tsv: empty: no line with names of columns",
    "label;term\nB;x\n": "line 1: a single column, 'label;term'. Separate the columns with tabs or commas",
    '"label" "term"\n"B" "x"\n': "line 1: a single column",
    "label\tterm\nB\tx\ty\nT\tz\n": "line 2: 3 values instead of 2, as in line 1",
    "# 1\n\n\nlabel\tterm\nB\tx\nT\ty\tz\n": "line 6: 3 values instead of 2, as in line 4",
    "label\tterm\nB\n": "line 2: 1 value instead of 2, as in line 1",
    "term\tnote\nc1\tx\ty\nc2\tx\n": "line 3: 2 values instead of 3, as in line 2: a row name and 2 named columns",
    'label\tterm\n"a\nb"\tx\nT\tx\ty\n': "line 4: 3 values instead of 2",
    'label,term\nB,x\n"naive, T" cells,x\n': "line 3: 3 values instead of 2, as in line 1. Put quotation marks around",
    'label\tterm\nB\t"open\nT\tclosed"\n': "line 2: a quoted value ends in line 3, but each of these",
    "label\tterm\tlabel\nB\tx\ty\n": "line 1: two columns are named 'label'",
    "label\t\tterm\nB\tx\ty\n": "line 1: column 2 has no name",
    "label\tterm\nB\tx\0\n": "line 2: a NUL byte",
    "label\tterm\nB\tx\nT\té\n".encode("latin-1"): "line 3: not UTF-8 (byte 0xe9 after 'T\\t'). Save it as UTF-8",
    "label\tterm\nB\tx\n".encode("utf-16")[:-1]: "table.tsv: cut or damaged UTF-16",
    gzip.compress(TEXT.encode() * 99)[:-9]: "table.tsv: a damaged gzip file",
    gzip.compress(TEXT.encode())[:12] + b"\xff" * 30: "table.tsv: a damaged gzip file",
    b"PK\x03\x04 xlsx": "table.tsv: not a table but an Excel workbook",
    b"\x28\xb5\x2f\xfdxx": "table.tsv: not a table but compressed with zstd",
    bytes(100): "table.tsv line 1: a NUL byte",
}  # fmt: skip


@pytest.mark.parametrize("text", ERRORS, ids=range(len(ERRORS)))
def test_what_cannot_be_read_is_reported_with_its_line(tmp_path, text):
    with pytest.raises(InputError) as error:
        if isinstance(text, str) and text.startswith("label\tterm\nB\tx\ty\nT"):
            read_table(write(tmp_path / "table.tsv", text), KNOWN, row_names="never")
        else:
            read_table(write(tmp_path / "table.tsv", text), KNOWN)
    assert ERRORS[text] in str(error.value) and str(tmp_path / "table.tsv") in str(error.value)


def test_no_file_and_a_folder(tmp_path):
    for path, problem in {tmp_path / "none": "no such file", tmp_path: "a folder, not a file"}.items():
        with pytest.raises(InputError, match=problem):
            read_table(path, KNOWN)


def test_row_names_that_cannot_be_told_from_empty_values_are_refused(tmp_path):
    path = write(tmp_path / "table.tsv", "cell\tterm\nc1\tx\t\nc2\ty\t\n")
    assert rows(path) == [(2, "c1", "x"), (3, "c2", "y")]
    with pytest.raises(InputError, match="line 1: every row has one more value .* Name the first column"):
        read_table(path, KNOWN, row_names="always")
    path.write_text("cell\tterm\t\nc1\tx\t\n")
    assert rows(path, row_names="always") == [(2, "c1", "x")]


def test_only_some_columns_are_kept(tmp_path):
    path = write(tmp_path / "table.tsv", "term\tother\tnote\nc1\tx\ty\tz\n")
    assert read_table(path, KNOWN, only={"note"}).to_dict("list") == {"": ["c1"], "note": ["z"]}
    assert read_names(path, KNOWN) == ["term", "other", "note"]


def test_tables_larger_than_a_block(tmp_path):
    names = [f"c{i}" for i in range(40_000)]
    path = write(
        tmp_path / "table.tsv", "label\tterm\n" + "".join(f"{name}\t x{i % 3}\n" for i, name in enumerate(names))
    )
    table = read_table(path, KNOWN)
    assert table["label"].tolist() == names and table.index.tolist() == [*range(2, 40_002)]
    assert table["term"].tolist() == [f"x{i % 3}" for i in range(40_000)]
    assert len({id(value) for value in table["term"]}) == 3  # equal values share memory


def test_files_without_header(tmp_path):
    path = write(tmp_path / "sets.gmt", '# x\nA\t"a, b"\tCD3D\t\n\nB\t\tNA\n')
    assert [*read_rows(path)] == [(1, ["# x"]), (2, ["A", "a, b", "CD3D", ""]), (4, ["B", "", "NA"])]
    path = write(tmp_path / "features.tsv.gz", gzip.compress(b'#1\tNA\n\n"2"\t5\' "x\n'))
    assert read_columns(path).to_dict("list") == {0: ["#1", '"2"'], 1: ["NA", "5' \"x"]}
    with pytest.raises(InputError, match="line 3: 1 value instead of 2, as in line 1"):
        read_columns(write(path, "a\tb\n\nc\n"))
    with pytest.raises(InputError, match="empty"):
        read_columns(write(path, "\n"))
