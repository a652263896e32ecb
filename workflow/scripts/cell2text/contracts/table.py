"""Contract of a Parquet table, checked on write and on read."""

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cell2text.files import reading, whole_file

ROWS_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class TableContract:
    """Columns and types of a Parquet table.

    Parameters
    ----------
    what
        Name of the table, for messages.
    columns
        Arrow type of each column, in order.
    key
        Column with unique values, or None.
    rest
        Type of any additional columns; None if there may be none.
    """

    what: str
    columns: dict[str, pa.DataType]
    key: str | None = None
    rest: pa.DataType | None = None

    def write(self, table: pd.DataFrame, path: str | Path) -> None:
        """Check a table and write it atomically.

        Raises
        ------
        ValueError
            If a column is missing, surplus or of the wrong type, or a key repeats.
        """
        self._check_names(list(table.columns), path)
        rest = [name for name in table.columns if name not in self.columns]
        starts = range(0, len(table), ROWS_AT_ONCE)
        self.write_parts((table.iloc[start : start + ROWS_AT_ONCE] for start in starts), path, rest)

    def write_parts(self, parts: Iterable[pd.DataFrame | pa.Table], path: str | Path, rest: Iterable[str] = ()) -> None:
        """Check a table given in parts and write it atomically; only one part and a hash of each key are in memory.

        Parameters
        ----------
        parts
            Rows of the table, in pandas or Arrow; each part becomes a row group of the file.
        path
            Where to write.
        rest
            Names of additional columns, if the contract allows them.

        Raises
        ------
        ValueError
            If a column is missing, surplus or of the wrong type, or a key repeats.
        """
        rest = list(rest)
        self._check_names([*self.columns, *rest], path)
        schema = pa.schema([*self.columns.items(), *((name, self.rest) for name in rest)])
        keys = [np.empty(0, dtype=np.uint64)]
        options = {"compression": "zstd", "write_page_checksum": True}
        with whole_file(path) as unfinished, pq.ParquetWriter(unfinished, schema, **options) as writer:
            # pages have checksums of their own, names and numbers of rows in the footer have none
            rows_written = 0
            for part in parts:
                if set(part.columns if isinstance(part, pd.DataFrame) else part.column_names) != set(schema.names):
                    raise ValueError(f"{path}: the parts of {self.what} differ in their columns")
                rows = _as_arrow(part, schema)
                writer.write_table(rows)
                rows_written += len(rows)
                if self.key:
                    # ten million distinct keys have a 64-bit collision in one of 400,000 tables
                    keys.append(hash_ids(rows[self.key].to_numpy()))
            hashes = np.concatenate(keys)
            keys.clear()
            hashes.sort()
            if (hashes[1:] == hashes[:-1]).any():
                raise ValueError(f"{path}: {self.key} repeats in {self.what}")
            writer.add_key_value_metadata({"crc32": _crc32(schema, rows_written)})

    def read(
        self, path: str | Path, columns: list[str] | None = None, categories: list[str] | None = None
    ) -> pd.DataFrame:
        """Read a table or some of its columns, and check the schema.

        Parameters
        ----------
        path
            The file.
        columns
            The columns to read; all by default.
        categories
            Text columns to read as categories, in sorted order; saves memory in tables with millions of rows.

        Raises
        ------
        InputError
            If the file violates this contract.
        """
        # text that is not categorical stays in Arrow, which takes a third of the memory of Python strings
        text = {pa.string(): pd.StringDtype("pyarrow")}.get if categories else None
        table = self.read_arrow(path, columns, categories).to_pandas(types_mapper=text)
        for name in categories or []:
            # Arrow orders them by first occurrence
            table[name] = table[name].cat.reorder_categories(table[name].cat.categories.sort_values())
        return table

    def read_arrow(
        self, path: str | Path, columns: list[str] | None = None, categories: list[str] | None = None
    ) -> pa.Table:
        """Read a table as an Arrow table; see :meth:`read`."""
        with self._open(path, read_dictionary=categories) as file:
            return file.read(columns=columns)

    def read_parts(self, path: str | Path, columns: list[str] | None = None) -> Iterator[pd.DataFrame]:
        """Check a table and yield it, or some of its columns, in the parts that were written.

        Raises
        ------
        InputError
            If the file violates this contract.
        """
        for part in self.read_arrow_parts(path, columns):
            yield part.to_pandas()

    def read_arrow_parts(self, path: str | Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Yield the parts as Arrow tables; see :meth:`read_parts`."""
        with self._open(path) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=columns)

    @contextmanager
    def _open(self, path: str | Path, **options: Any) -> Iterator[pq.ParquetFile]:
        # read_table would parse a path such as split=test/ as a partition column
        with reading(path), pq.ParquetFile(path, page_checksum_verification=True, **options) as file:
            schema = file.schema_arrow
            self._check_names(schema.names, path)
            for name in schema.names:
                expected, found = self.columns.get(name, self.rest), schema.field(name).type
                found = found.value_type if pa.types.is_dictionary(found) else found  # read as categories
                if found != expected:
                    raise ValueError(f"{path}: column {name} has type {found}, not {expected}")
            if (file.metadata.metadata or {}).get(b"crc32", b"").decode() != _crc32(schema, file.metadata.num_rows):
                raise ValueError("the footer changed after writing (CRC-32)")
            yield file

    def _check_names(self, names: list[str], path: str | Path) -> None:
        missing = [name for name in self.columns if name not in names]
        surplus = [name for name in names if name not in self.columns]
        if missing or (surplus and self.rest is None):
            raise ValueError(f"{path}: not {self.what}: missing columns {missing}, surplus columns {surplus}")


def _crc32(schema: pa.Schema, rows: int) -> str:
    return str(zlib.crc32(f"{schema.names} {rows}".encode()))


def hash_ids(ids: np.ndarray | pd.Series) -> np.ndarray:
    """Return a 64-bit hash of each id (uint64), the same on every machine."""
    return pd.util.hash_array(np.asarray(ids), categorize=False)


def among(ids: np.ndarray | pd.Series, hashes: np.ndarray) -> np.ndarray:
    """Return whether the hash of each id is among sorted hashes from ``hash_ids``: bool.

    For ten million ids and ten million hashes of other ids, the probability of any false positive is 1 in 180,000.
    """
    if not len(hashes):
        return np.zeros(len(ids), dtype=bool)
    hashed = hash_ids(ids)
    return hashes[np.minimum(np.searchsorted(hashes, hashed), len(hashes) - 1)] == hashed


def _as_arrow(rows: pd.DataFrame | pa.Table, schema: pa.Schema) -> pa.Table:
    if isinstance(rows, pa.Table):
        return rows.select(schema.names).cast(schema)
    # converted to text one part at a time: categories of millions of rows are small, their text is not
    rows = rows.astype(dict.fromkeys(rows.select_dtypes("category"), object))
    # columns that are all missing may have any type, such as those that pandas' reindex adds
    rows = rows.astype({name: object for name in rows if rows[name].isna().all()})
    return pa.Table.from_pandas(rows, schema=schema, preserve_index=False).replace_schema_metadata()
