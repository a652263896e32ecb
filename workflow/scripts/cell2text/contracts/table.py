"""What a Parquet table must hold, checked on write and on read."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cell2text.errors import InputError
from cell2text.files import whole_file

ROWS_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class TableContract:
    """Columns and types of a Parquet table.

    Parameters
    ----------
    what
        What the table holds, for messages.
    columns
        Arrow type of each column, in order.
    key
        Column whose values are unique; None where there is no such column.
    rest
        Type of any further columns; None where there may be none.
    """

    what: str
    columns: dict[str, pa.DataType]
    key: str | None = None
    rest: pa.DataType | None = None

    def write(self, table: pd.DataFrame, path: str | Path) -> None:
        """Check a table and write it whole.

        Raises
        ------
        ValueError
            If a column is missing, surplus or of another type, or the key repeats.
        """
        self._check_names(list(table.columns), path)
        rest = [name for name in table.columns if name not in self.columns]
        starts = range(0, len(table), ROWS_AT_ONCE)
        self.write_parts((table.iloc[start : start + ROWS_AT_ONCE] for start in starts), path, rest)

    def write_parts(self, parts: Iterable[pd.DataFrame | pa.Table], path: str | Path, rest: Iterable[str] = ()) -> None:
        """Check a table that comes in parts and write it whole; only one part and a hash of each key are held.

        Parameters
        ----------
        parts
            Rows of the table, of either library; each becomes a row group of the file.
        path
            Where to write.
        rest
            Names of the further columns, where the contract allows any.

        Raises
        ------
        ValueError
            If a column is missing, surplus or of another type, or the key repeats.
        """
        rest = list(rest)
        self._check_names([*self.columns, *rest], path)
        schema = pa.schema([*self.columns.items(), *((name, self.rest) for name in rest)])
        keys = [np.empty(0, dtype=np.uint64)]
        with whole_file(path) as unfinished, pq.ParquetWriter(unfinished, schema, compression="zstd") as writer:
            for part in parts:
                if set(part.columns if isinstance(part, pd.DataFrame) else part.column_names) != set(schema.names):
                    raise ValueError(f"{path}: the parts of {self.what} differ in their columns")
                rows = _as_arrow(part, schema)
                writer.write_table(rows)
                if self.key:
                    # of ten million different keys two have the same 64 bits once in 400,000 tables
                    keys.append(hash_ids(rows[self.key].to_numpy()))
            hashes = np.concatenate(keys)
            keys.clear()
            hashes.sort()
            if (hashes[1:] == hashes[:-1]).any():
                raise ValueError(f"{path}: {self.key} repeats in {self.what}")

    def read(
        self, path: str | Path, columns: list[str] | None = None, categories: list[str] | None = None
    ) -> pd.DataFrame:
        """Read a table, or some of its columns, and check it.

        Parameters
        ----------
        path
            The file.
        columns
            The columns to read; all by default.
        categories
            Columns of text to hold as categories, in sorted order, for tables of millions of rows.

        Raises
        ------
        InputError
            If the file is not the table that this contract describes.
        """
        # beside categories, other text stays in Arrow, at a third of the memory of Python's strings
        text = {pa.string(): pd.StringDtype("pyarrow")}.get if categories else None
        table = self.read_arrow(path, columns, categories).to_pandas(types_mapper=text)
        for name in categories or []:
            # Arrow has them in the order of the rows
            table[name] = table[name].cat.reorder_categories(table[name].cat.categories.sort_values())
        return table

    def read_arrow(
        self, path: str | Path, columns: list[str] | None = None, categories: list[str] | None = None
    ) -> pa.Table:
        """Read a table as Arrow has it; see :meth:`read`."""
        self._check_file(path)
        # read_table would take a path such as split=test/ for a column
        with pq.ParquetFile(path, read_dictionary=categories) as file:
            return file.read(columns=columns)

    def read_parts(self, path: str | Path, columns: list[str] | None = None) -> Iterator[pd.DataFrame]:
        """Check a table and yield it, or some of its columns, in the parts in which it was written.

        Raises
        ------
        InputError
            If the file is not the table that this contract describes.
        """
        for part in self.read_arrow_parts(path, columns):
            yield part.to_pandas()

    def read_arrow_parts(self, path: str | Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Yield the parts as Arrow has them; see :meth:`read_parts`."""
        self._check_file(path)
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=columns)

    def _check_file(self, path: str | Path) -> None:
        schema = pq.read_schema(path)
        try:
            self._check_names(schema.names, path)
            for name, expected in self.columns.items():
                if schema.field(name).type != expected:
                    raise ValueError(f"{path}: column {name} holds {schema.field(name).type}, not {expected}")
        except ValueError as error:
            raise InputError(path, str(error), "Delete the file and run the workflow again") from error

    def _check_names(self, names: list[str], path: str | Path) -> None:
        missing = [name for name in self.columns if name not in names]
        surplus = [name for name in names if name not in self.columns]
        if missing or (surplus and self.rest is None):
            raise ValueError(f"{path}: not {self.what}: missing {missing}, surplus {surplus}")


def hash_ids(ids: np.ndarray | pd.Series) -> np.ndarray:
    """Return 64 bits of each id (uint64), the same on every machine."""
    return pd.util.hash_array(np.asarray(ids), categorize=False)


def among(ids: np.ndarray | pd.Series, hashes: np.ndarray) -> np.ndarray:
    """Return which ids have one of some hashes, sorted ones of ``hash_ids``: bool.

    Of ten million ids that are not among ten million others, one is taken for one of them once in 180,000 times.
    """
    if not len(hashes):
        return np.zeros(len(ids), dtype=bool)
    hashed = hash_ids(ids)
    return hashes[np.minimum(np.searchsorted(hashes, hashed), len(hashes) - 1)] == hashed


def _as_arrow(rows: pd.DataFrame | pa.Table, schema: pa.Schema) -> pa.Table:
    if isinstance(rows, pa.Table):
        return rows.select(schema.names).cast(schema)
    # as text only a part at a time: categories of millions of rows are small, their text is not
    rows = rows.astype(dict.fromkeys(rows.select_dtypes("category"), object))
    return pa.Table.from_pandas(rows, schema=schema, preserve_index=False).replace_schema_metadata()
