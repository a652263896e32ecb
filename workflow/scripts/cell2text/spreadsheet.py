r"""TSV files that are safe to open in a spreadsheet or a terminal, and read back as they were.

A spreadsheet runs a value that begins with ``=``, ``+``, ``-`` or ``@``, and a terminal obeys control characters,
although both may be part of a label, a gene or a gene set of a user's. Text of the first kind gets an apostrophe, as a
spreadsheet's own users write it; control characters become ``\x1b`` and the like. Numbers are not touched.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from cell2text.files import whole_file

# with the full-width forms, which Japanese spreadsheets take for the same
FORMULA = r"\s*[=+\-@＝＋－＠]"
CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"
ESCAPED = r"\\\\|\\x[0-9a-f]{2}|\\u202[89]"


def write_tsv(
    table: pd.DataFrame, path: str | Path, float_format: str | None = None, compression: dict[str, Any] | None = None
) -> None:
    """Write a table without its index, atomically; ``restore_text`` is the inverse for its text.

    Parameters
    ----------
    table
        One row per line. Text is neutralised, other values are written as they are, missing ones as nothing.
    path
        The file.
    float_format
        Format of floats, such as ``"%.6f"``; by default, all digits.
    compression
        As in ``DataFrame.to_csv``; none by default.

    Raises
    ------
    InputError
        If the disk is full or not writable.
    """
    with whole_file(path) as unfinished:
        safe = _map_text(table, _neutralise)
        safe.to_csv(unfinished, sep="\t", index=False, float_format=float_format, compression=compression)


def read_tsv(path: str | Path) -> pd.DataFrame:
    """Return a table of ``write_tsv``, all as the text that it was; a value may be named ``NA``."""
    return restore_text(pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False))


def restore_text(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table that was read from a file of ``write_tsv`` with its text as it was before."""
    return _map_text(table, _restore)


def _map_text(table: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    changed = {}
    for name, values in table.items():
        if isinstance(values.dtype, pd.CategoricalDtype):  # few texts of many rows
            changed[name] = values.cat.rename_categories(lambda one: change(one) if isinstance(one, str) else one)
        elif any(isinstance(value, str) for value in values):
            changed[name] = [change(value) if isinstance(value, str) else value for value in values]
    return table.assign(**changed)


def _neutralise(text: str) -> str:
    if re.search(f"{CONTROL}|{ESCAPED}", text):
        text = re.sub(CONTROL, _escape, text.replace("\\", "\\\\"))
    # an apostrophe before a formula gets another, so that removing one gives the text back
    return f"'{text}" if re.match(f"'*{FORMULA}", text) else text


def _escape(found: re.Match) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def _restore(text: str) -> str:
    text = text[1:] if re.match(f"'+{FORMULA}", text) else text
    return re.sub(ESCAPED, lambda found: "\\" if found[0] == r"\\" else chr(int(found[0][2:], 16)), text)
