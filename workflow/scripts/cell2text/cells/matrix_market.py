"""Matrix Market files of counts as Cell Ranger and STARsolo write them: one line per entry, genes by cells.

Format: https://math.nist.gov/MatrixMarket/formats.html
"""

import gzip
import itertools
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd
from scipy import sparse

from cell2text.cells import matrices
from cell2text.errors import InputError

FIELDS = ("integer", "unsigned-integer", "real", "double")
VELOCYTO = "Of STARsolo's output give the folder Gene or GeneFull, not Velocyto"
_GENERAL = 'In Python: scipy.io.mmwrite(file, matrix, symmetry="general")'
# Words of the header that announce something else than one count per line
_OTHER = {
    "array": ("a dense matrix (array)", "In Python: scipy.io.mmwrite(file, scipy.sparse.coo_matrix(matrix))"),
    "pattern": ("positions without counts (pattern)", "Give the matrix of counts"),
    "complex": ("complex numbers", "Give the matrix of counts"),
    "symmetric": ("one half of a symmetric matrix", _GENERAL),
    "skew-symmetric": ("one half of a skew-symmetric matrix", "Give the matrix of counts"),
    "hermitian": ("one half of a Hermitian matrix", "Give the matrix of counts"),
}
_CELL_RANGER = "Give a folder as Cell Ranger writes it"
_REWRITE = "Download or write the file again"
LONGEST_LINE = 1 << 16


@dataclass(frozen=True)
class EntryList:
    """A Matrix Market file: gene, cell and value in each line, both numbered from one."""

    path: Path
    shape: tuple[int, int]
    entries: int
    lines_before: int

    @classmethod
    def open(cls, path: Path) -> "EntryList":
        """Read the header of a file, which may be gzipped.

        Raises
        ------
        InputError
            If the file does not announce one real or whole number per line.
        """
        with _open_text(path) as file:
            _check_header(file.readline(LONGEST_LINE), path)
            for number in itertools.count(2):
                line = file.readline(LONGEST_LINE)
                if not line:
                    raise InputError(path, "no line with the numbers of genes, cells and entries", _REWRITE)
                if line.startswith("%") or not line.strip():
                    continue
                if not re.fullmatch(r"\s*\d{1,18}\s+\d{1,18}\s+\d{1,18}\s*", line, re.ASCII):
                    raise InputError(
                        f"{path} line {number}", f"{_short(line)} are not numbers of genes, cells and entries", _REWRITE
                    )
                genes, cells, entries = map(int, line.split())
                if entries > genes * cells:
                    raise InputError(f"{path} line {number}", f"{entries} entries in {genes} x {cells}", _REWRITE)
                return cls(path, (cells, genes), entries, number)

    def first_values(self) -> np.ndarray:
        """Return the values of the first lines."""
        _, _, values = next(self._read(matrices.FIRST_VALUES), (None, None, np.empty(0)))
        return values

    def blocks(self, scratch: Path) -> Iterator[sparse.csr_matrix]:
        """Sort the entries by cell on disk, then yield the cells."""
        entries = self._read(matrices.VALUES_AT_ONCE)
        return matrices.sort_by_cell(entries, self.entries, self.shape, scratch, self.path)

    def _read(self, lines: int) -> Iterator[matrices.Entries]:
        read = 0
        for table in self._tables(lines):
            genes, cells = (table[column].to_numpy() - 1 for column in ("gene", "cell"))
            matrices.check_range(genes, self.shape[1], "gene", self.path)
            matrices.check_range(cells, self.shape[0], "cell", self.path)
            read += len(table)
            yield cells, genes, table["value"].to_numpy()
        if read != self.entries:
            raise InputError(self.path, f"{read} entries, but the header says {self.entries}", _REWRITE)

    def _tables(self, lines: int) -> Iterator[pd.DataFrame]:
        types = {"gene": np.int64, "cell": np.int64, "value": np.float64, "more": str}
        options = {"sep": r"\s+", "header": None, "names": list(types), "dtype": types, "index_col": False,
                   "quoting": 3, "keep_default_na": False, "na_values": [""]}  # fmt: skip
        with _open_text(self.path) as file:
            next(itertools.islice(file, self.lines_before - 1, None))
            try:
                for table in pd.read_csv(file, chunksize=lines, **options) if self.entries else ():
                    if table["more"].notna().any() or table["value"].isna().any():
                        self._check_lines()
                    yield table
            except (ValueError, OverflowError):
                self._check_lines()
                raise

    def _check_lines(self) -> None:
        """Report the first line that is not gene, cell and value; slow, so only called if there may be one."""
        with _open_text(self.path) as file:
            for number, line in enumerate(itertools.islice(file, self.lines_before, None), self.lines_before + 1):
                numbers = [_is_number(field) for field in line.split()]
                where = f"{self.path} line {number}"
                if len(numbers) > 3 and all(numbers):
                    raise InputError(where, f"{len(numbers) - 2} values ({_short(line)}) in place of one", VELOCYTO)
                if numbers and (len(numbers) != 3 or not all(numbers)):
                    raise InputError(where, f"{_short(line)} is not the number of a gene, of a cell and a count",
                                     _REWRITE)  # fmt: skip


def _check_header(line: str, path: Path) -> None:
    words = line.lower().split()
    if not words or words[0] != "%%matrixmarket":
        raise InputError(f"{path} line 1", "no Matrix Market header (%%MatrixMarket)", _CELL_RANGER)
    for word in words:
        if word in _OTHER:
            raise InputError(f"{path} line 1", *_OTHER[word])
    if words[1:3] != ["matrix", "coordinate"] or words[3:4] not in [[f] for f in FIELDS] or words[4:] != ["general"]:
        raise InputError(f"{path} line 1", f"unknown header {_short(line)}", _CELL_RANGER)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _short(line: str) -> str:
    line = line.strip()
    return repr(line if len(line) <= 60 else f"{line[:57]}...")


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    try:
        with path.open("rb") as start:
            gzipped = start.read(2) == b"\x1f\x8b"  # browsers unpack a file and keep its name
        with (gzip.open if gzipped else open)(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except (OSError, EOFError, ValueError, OverflowError, zlib.error) as error:
        raise InputError(path, f"damaged ({error})", _REWRITE) from error
