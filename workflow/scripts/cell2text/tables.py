"""Tables that users give: text in lines and columns, read by the same rules everywhere.

Nothing is guessed that could be guessed wrong. What cannot be read is reported with its file and line.

- Text is UTF-8, with or without byte order mark, or UTF-16; plain or compressed with gzip, whatever its name.
- Columns are separated by tabs if the header has a tab, else by commas. If the header has a single name, as R writes it
  for one column with row names, or one with a comma in it, the first row decides.
- Values are text without surrounding spaces. None is read as missing: there is a gene called NA.
- Quotes around a whole value are removed. Inside them, separators and line breaks belong to the value, and a quotation
  mark is written twice, or after a backslash as in R. Any other quotation mark is a character like all others.
- ``#`` begins a comment only as the first character of a line. A label or donor may begin with it, too: below the
  header, such a line is a row if it has a separator, unless the first column cannot hold such values.
- Each row has as many values as the header has names. In all rows, a row name may precede them, as R writes it.
  Separators at the end of a line add nothing, and empty lines are skipped.
"""

import gzip
import re
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Set
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from cell2text.errors import InputError

SAVE_AS_TEXT = "Save it as tab-separated text in UTF-8"
QUOTES = "Put quotation marks around the whole value, and write those inside it twice"
# The first bytes of files that are not text.
OTHER_FORMATS = {
    b"PK\x03\x04": "an Excel workbook or a zip archive",
    b"\xd0\xcf\x11\xe0": "an Excel workbook",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\x89HDF": "an HDF5 file",
    b"PAR1": "a Parquet file",
}
LINES_PER_VALUE = 100  # beyond this, a quotation mark was not closed
ROWS_AT_ONCE = 256  # more would survive into older generations of the garbage collector, which is slower
SHARED = 1 << 16  # a column with more distinct values does not share their memory


class _Header(NamedTuple):
    line: int
    names: list[str]
    separator: str
    trailing: bool  # whether separators follow the last name


def read_table(
    path: str | Path,
    known: Set[str],
    *,
    only: Collection[str] | None = None,
    row_names: Literal["never", "maybe", "always"] = "maybe",
    without_hash: Collection[str] = (),
    headerless: Callable[[list[str]], list[str] | None] = lambda values: None,
) -> pd.DataFrame:
    """Read a table with a header.

    Parameters
    ----------
    path
        The file.
    known
        Names of columns that the table may have. A comment above the first row is the header, as in
        ``#barcode,donor_id``, if it has one of them and the line below it has none.
    only
        Columns to keep besides the first; None for all. For large tables.
    row_names
        Whether the first column may lack a name in the header. If it ``"always"`` holds the names of rows, a table is
        refused whose rows all end with a separator but not the header, because their last column could be empty.
    without_hash
        Names of columns whose values never begin with ``#``. In a table that starts with one of them, lines that begin
        with ``#`` are comments below the header, too.
    headerless
        Returns names for the columns if the first line is a row instead of a header, else None.

    Returns
    -------
    DataFrame
        Text (object), indexed by the number of each row's line in the file, from 1. A first column without name is
        called ``""``.

    Raises
    ------
    InputError
        If the file cannot be read, is empty or not text, has a single column, names of columns are missing or repeat,
        or a row has too many or too few values.
    """

    def read() -> tuple[_Header, Iterator[tuple[int, list[str]]]]:
        lines = _Lines(read_lines(path))
        header = _read_header(path, lines, known, headerless)
        return header, _split_lines(path, lines, header, without_hash)

    header, rows = read()
    where, width = f"{path} line {header.line}", len(header.names)
    if header.names[0] and not header.trailing and row_names != "never":
        named, line = _have_names(rows, width)
        if named is None and row_names == "always":
            problem = "every row has one more value than there are names, but the last is always empty"
            raise InputError(where, problem, "Name the first column, or remove the separators at the ends of the rows")
        header, rows = read()
        if named:
            expected = f"{width + 1}, as in line {line}: a row name and {width} named columns"
            return _collect(path, ["", *header.names], rows, only, expected)
    if width == 1:
        raise InputError(where, f"a single column, {header.names[0]!r}", "Separate the columns with tabs or commas")
    return _collect(path, header.names, rows, only, f"{width}, as in line {header.line}")


def read_names(path: str | Path, known: Set[str]) -> list[str]:
    """Return the names in the header of a table, found as in ``read_table``."""
    return _read_header(path, _Lines(read_lines(path)), known).names


def read_rows(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the values of each line of a tab-separated file without header, except empty lines.

    Raises
    ------
    InputError
        If the file cannot be read or is not text.
    """
    for number, line in read_lines(path):
        values = [value.strip() for value in _split(line, "\t")]
        if any(values):
            yield number, values


def read_columns(path: str | Path) -> pd.DataFrame:
    """Read a tab-separated file without header, comments and quotes; columns are numbered from 0.

    Raises
    ------
    InputError
        If the file cannot be read, is empty or not text, or a line has too many or too few values.
    """
    rows = ((number, line.split("\t")) for number, line in read_lines(path))
    first = next(((number, values) for number, values in rows if any(values)), None)
    if first is None:
        raise InputError(path, "empty", "Fetch or write the file again")
    number, values = first
    return _collect(path, [*range(len(values))], chain([first], rows), None, f"{len(values)}, as in line {number}")


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    r"""Yield the number, from 1, and the text of each line, without its end (``\n``, ``\r\n`` or ``\r``).

    Raises
    ------
    InputError
        If the file cannot be read or is not text.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(path, "a folder, not a file" if path.is_dir() else "no such file", "Correct the path")
    try:
        with path.open("rb") as file:
            start = file.read(8)
        kind = next((kind for magic, kind in OTHER_FORMATS.items() if start.startswith(magic)), None)
        if kind:
            raise InputError(path, f"not a table but {kind}", SAVE_AS_TEXT)
        opened = gzip.open if start.startswith(b"\x1f\x8b") else Path.open
        with opened(path, "rb") as file:
            encoding = _encoding(file.read(2))
        try:
            with opened(path, "rt", encoding=encoding) as file:
                for number, line in enumerate(file, start=1):
                    if "\0" in line:
                        raise InputError(f"{path} line {number}", "a NUL byte: not text, or damaged", SAVE_AS_TEXT)
                    yield number, line.rstrip("\n")
        except UnicodeError as error:
            raise _report_encoding(path, opened, encoding) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(path, f"a damaged gzip file ({error})", "Compress or download it again") from error
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror or error})", "Make it readable") from error


def _encoding(start: bytes) -> str:
    if start in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    # a table begins with an ASCII character, one of whose two bytes is zero in UTF-16
    if len(start) == 2 and (start[0] == 0) != (start[1] == 0):
        return "utf-16-be" if start[0] == 0 else "utf-16-le"
    return "utf-8-sig"


def _report_encoding(path: Path, opened: Callable, encoding: str) -> InputError:
    """Return the error for a file that is not text in this encoding, with the first wrong line."""
    if encoding != "utf-8-sig":
        return InputError(path, "cut or damaged UTF-16", SAVE_AS_TEXT)
    with opened(path, "rt", encoding=encoding, errors="surrogateescape") as file:
        searched = ((number, line, re.search("[\udc80-\udcff]", line)) for number, line in enumerate(file, start=1))
        number, line, found = next(entry for entry in searched if entry[2])
    before = line[max(0, found.start() - 20) : found.start()].lstrip()
    return InputError(
        f"{path} line {number}",
        f"not UTF-8 (byte 0x{ord(found[0]) - 0xDC00:x} after {before!r})",
        "Save it as UTF-8, for example with `iconv -f latin1 -t utf-8`",
    )


class _Lines:
    """Numbered lines, with a look ahead."""

    def __init__(self, lines: Iterator[tuple[int, str]]):
        self._lines, self._ahead = lines, deque[tuple[int, str]]()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        while self._ahead:
            yield self._ahead.popleft()
        for line in self._lines:
            yield line
            while self._ahead:
                yield self._ahead.popleft()

    def ahead(self) -> Iterator[tuple[int, str]]:
        """Yield the next lines, which will be yielded again."""
        yield from list(self._ahead)
        for line in self._lines:
            self._ahead.append(line)
            yield line

    def skip(self, count: int) -> None:
        for _ in range(count):
            self._ahead.popleft()

    def put_back(self, line: tuple[int, str]) -> None:
        self._ahead.appendleft(line)


def _read_header(
    path: str | Path,
    lines: _Lines,
    known: Set[str],
    headerless: Callable[[list[str]], list[str] | None] = lambda values: None,
) -> _Header:
    """Read the lines up to the header: the first line that is not a comment, or else a comment above it."""
    header, since = None, []  # lines since a comment that may be the header
    for number, line in lines:
        line = line.lstrip("\ufeff")
        if not line.strip():
            continue
        below = next((text for _, text in lines.ahead() if text.strip() and text[0] != "#"), "")
        found = _split_header(number, line.lstrip("#"), below)
        named = bool(known & set(found.names))
        since.append((number, line))
        if named or (header is None and line[0] != "#"):
            header, since = found, []
        if line[0] != "#":
            break
    if header is None:
        raise InputError(path, "empty: no line with names of columns", "Give a header and rows")
    for passed in reversed(since):
        lines.put_back(passed)
    if names := headerless(header.names):
        lines.put_back((number, line))
        return header._replace(names=names, trailing=False)
    where = f"{path} line {header.line}"
    if "" in header.names[1:]:
        problem = f"column {header.names.index('', 1) + 1} has no name"
        raise InputError(where, problem, "Name it, or remove the column")
    twice = next((name for name in header.names if header.names.count(name) > 1), None)
    if twice is not None:
        raise InputError(where, f"two columns are named {twice!r}", "Give each its own name, or remove one")
    return header


def _split_header(number: int, line: str, row: str) -> _Header:
    """Split a header into names; the row below it decides about the separator where the header cannot."""
    separator = "\t" if "\t" in line else _choose_separator(line, row)
    names = [name.strip() for name in _split(line, separator)]
    full = len(names)
    while len(names) > 1 and not names[-1]:
        names.pop()
    return _Header(number, names, separator, len(names) < full)


def _choose_separator(header: str, row: str) -> str:
    candidates = ",\t" if "," in header else "\t,"
    for separator in candidates:
        names, values = (len(_split(line, separator)) for line in (header, row))
        if values > 1 and values in (names, names + 1):
            return separator
    return candidates[0]


@cache
def _patterns(separator: str) -> tuple[re.Pattern, ...]:
    """Return patterns of a value, of a row whose quoted values are closed, and of one whose last value is open."""
    doubled, escaped = r'(?:[^"]++|"")*+', r'(?:[^"\\]++|\\.)*+'
    value = f'(?:"({doubled})"|"({escaped})"|([^{separator}]*)){separator}'
    closed = rf'(?:(?:"{doubled}"|"{escaped}"|(?!")[^{separator}\n]*){separator})'
    still_open = f'{closed}*+"(?:{doubled}|{escaped})'
    return tuple(re.compile(pattern, re.DOTALL) for pattern in (value, f"{closed}++", still_open))


def _split(line: str, separator: str) -> list[str]:
    if '"' not in line:
        return line.split(separator)
    values = line[1:-1].split(f'"{separator}"')
    if line.count('"') == 2 * len(values) and line[0] == line[-1] == '"':  # a fast path: each value is in quotes
        return values
    found = _patterns(separator)[0].findall(line + separator)
    return [doubled.replace('""', '"') or escaped.replace('\\"', '"') or plain for doubled, escaped, plain in found]


def _split_lines(
    path: str | Path, lines: _Lines, header: _Header, without_hash: Collection[str]
) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the values of each row; an empty line is a row without values."""
    separator, comments = header.separator, header.names[0] in without_hash
    for number, line in lines:
        if line.startswith("#") and (comments or separator not in line):
            continue
        if '"' not in line:  # a fast path
            yield number, line.split(separator)
            continue
        if line.count('"') % 2 or '\\"' in line:
            line = _add_lines(path, number, line, lines, header)
        yield number, _split(line, separator)


def _add_lines(path: str | Path, number: int, line: str, lines: _Lines, header: _Header) -> str:
    """Return a line with the lines below it over which a quoted value extends."""
    _, closed, still_open = _patterns(header.separator)
    row = line
    for count in range(LINES_PER_VALUE):
        below = next(islice(lines.ahead(), count, None), None) if still_open.fullmatch(row) else None
        if below is None:
            break
        row += f"\n{below[1]}"
        if closed.fullmatch(row + header.separator):
            if all(part.count(header.separator) + 1 >= len(header.names) for part in row.split("\n")):
                problem = f"a quoted value ends in line {below[0]}, but each of these lines could be a row"
                raise InputError(f"{path} line {number}", problem, QUOTES)
            lines.skip(count + 1)
            return row
    return line


def _have_names(rows: Iterator[tuple[int, list[str]]], width: int) -> tuple[bool | None, int]:
    """Return whether rows have one more value than the header has names, and in which line this shows.

    None if all rows have one more, but it is always empty.
    """
    named, line = False, 0
    for line, values in rows:
        if len(values) <= width and any(values):
            return False, line
        if any(values[width:]):
            return True, line
        named = None if any(values) else named
    return named, line


def _collect(
    path: str | Path, names: list, rows: Iterator[tuple[int, list[str]]], only: Collection[str] | None, expected: str
) -> pd.DataFrame:
    """Return the rows as a table, after checking their number of values."""
    kept = [i for i, name in enumerate(names) if not i or only is None or name in only]
    columns, distinct = {i: [] for i in kept}, {i: {} for i in kept}
    numbers, block = [], []

    def store() -> None:
        for i, values in enumerate(zip(*block, strict=True)):
            if i in columns:
                values = list(map(str.strip, values))
                if len(distinct[i]) < SHARED:  # equal values share memory
                    values = map(distinct[i].setdefault, values, values)
                columns[i].extend(values)
        block.clear()

    for number, values in rows:
        if len(values) != len(names) or not values[0].strip():
            if not any(map(str.strip, values)):
                continue
            while len(values) > len(names) and not values[-1].strip():
                values.pop()
            if len(values) != len(names):
                fix = QUOTES if any('"' in value for value in values) else "Correct the line"
                count = f"{len(values)} value{'s' * (len(values) != 1)}"
                raise InputError(f"{path} line {number}", f"{count} instead of {expected}", fix)
        block.append(values)
        numbers.append(number)
        if len(block) == ROWS_AT_ONCE:
            store()
    store()
    lines = pd.Index(np.array(numbers, dtype=int), name="line")
    return pd.DataFrame({names[i]: pd.Series(columns[i], lines, dtype=object) for i in kept})
