"""TSV files hold no value that a spreadsheet or a terminal would execute, and read back as they were written."""

import random
import re

import numpy as np
import pandas as pd
import pytest

from cell2text.report.results import _read_test_rows
from cell2text.spreadsheet import restore_text, write_tsv


def written(path, value):
    """Return the text in the file for one value."""
    write_tsv(pd.DataFrame({"name": [value], "n": [1]}), path)
    return path.read_text().split("\n", 1)[1].removesuffix("\t1\n")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"),
        ("+1", "'+1"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        (" =1", "' =1"),
        ("＝1", "'＝1"),
        ("\t=1", r"\x09=1"),
        ("\r=1", r"\x0d=1"),
        ("a\nb", r"a\x0ab"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\u2028", r"\u2028"),
        ("'=1", "''=1"),
        ("'", "'"),
        # as they are
        *((text, text) for text in ("CL:0000236", "CD4+ T", "HLA-A", "a=b", "NA", "", "5' end", r"a\b", "Müller 🧬")),
    ],
)
def test_formulas_and_control_characters_are_neutralised(tmp_path, value, expected):
    assert written(tmp_path / "table.tsv", value) == expected


def test_any_text_reads_back_and_is_safe(tmp_path):
    draw = random.Random(0)
    letters = [
        "=",
        "+",
        "-",
        "@",
        "'",
        "\\",
        "x",
        "1",
        "b",
        "\t",
        "\n",
        "\r",
        "\x1b",
        "\x85",
        '"',
        " ",
        "u2028",
        "\u2028",
    ]
    values = ["".join(draw.choices(letters, k=draw.randrange(1, 8))) for _ in range(5000)]
    table = pd.DataFrame({"name": pd.Categorical(values), "value": np.linspace(-1, 1, 5000), "other": values[::-1]})
    write_tsv(table, tmp_path / "table.tsv")
    text = (tmp_path / "table.tsv").read_bytes().decode()
    assert not re.search(r"[^\n\t -~]", text) and text.count("\n") == 5001
    read = pd.read_csv(tmp_path / "table.tsv", sep="\t", keep_default_na=False, float_precision="round_trip")
    assert not read["name"].str.match(r"\s*[=+@-]").any()
    pd.testing.assert_frame_equal(restore_text(read), table.astype({"name": object}))


def test_numbers_and_missing_values_are_not_touched(tmp_path):
    table = pd.DataFrame({"a": [-1.5, np.nan], "b": [-1, 2], "c": [None, -2.25], "d": ["-", None]})
    write_tsv(table, tmp_path / "table.tsv", float_format="%.3f")
    assert (tmp_path / "table.tsv").read_text() == "a\tb\tc\td\n-1.500\t-1\t\t'-\n\t2\t-2.250\t\n"
    expected = table.drop(columns="d").to_csv(sep="\t", index=False, float_format="%.3f")
    write_tsv(table.drop(columns="d"), tmp_path / "table.tsv", float_format="%.3f")
    assert (tmp_path / "table.tsv").read_text() == expected


def test_tables_of_the_pipeline_read_back(tmp_path):
    names = ["=cmd|' /C calc'!A0", "-", "HLA-A", "a\x1bb", "NA"]
    rows = pd.DataFrame({"split": "test", "id": names, "name": names[::-1], "n": range(5)})
    write_tsv(rows, tmp_path / "per_class.tsv", float_format="%.6f")
    pd.testing.assert_frame_equal(_read_test_rows(tmp_path / "per_class.tsv", tuple(rows)), rows)
