"""The files between the stages: what each table, tensor file and text file holds.

A contract is checked when a file is written and when it is read, and a file appears whole or not at all.
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cell2text.errors import InputError

TEXT, TEXTS = pa.string(), pa.list_(pa.string())
# The slots of a description that hold one ontology term each, in the order in which they are told.
TERM_SLOTS = ("cell_type", "tissue", "disease", "sex", "stage")
SPLITS = ("train", "validation", "test")
ROWS_AT_ONCE = 1 << 17
OTHER_FOLDER = "Run in a folder that can be written"
UNWRITABLE = {
    errno.ENOSPC: "Free some space on that disk",
    errno.EDQUOT: "Free some space, the quota is used up",
    errno.EROFS: OTHER_FOLDER,
    errno.ENOTDIR: OTHER_FOLDER,
    errno.EEXIST: OTHER_FOLDER,  # a file where a folder should be
}


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and move it there when the block ends without an error.

    Raises
    ------
    InputError
        If the disk is full or cannot be written.
    """
    path = Path(path)
    # the same name each time, so that a job overwrites what a killed one has left
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise InputError(path, f"cannot be written: {os.strerror(error.errno)}", UNWRITABLE[error.errno]) from error
    finally:
        with suppress(OSError):  # where nothing could be written, nothing is left
            unfinished.unlink(missing_ok=True)


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


@dataclass(frozen=True)
class TensorContract:
    """Tensors of a safetensors file; row i of each belongs to the i-th of the ``cell_ids`` in its header.

    Parameters
    ----------
    what
        What the file holds, for messages.
    tensors
        Type and number of dimensions of each tensor.
    further
        Alike, of tensors that a file may hold or not.
    """

    what: str
    tensors: dict[str, tuple[np.dtype, int]] = field(default_factory=dict)
    further: dict[str, tuple[np.dtype, int]] = field(default_factory=dict)

    def write(self, tensors: dict[str, np.ndarray], cell_ids: list[str], path: str | Path) -> None:
        """Check tensors and write them whole.

        Raises
        ------
        ValueError
            If a tensor is missing, surplus, of another type or shape.
        """
        from safetensors.numpy import save_file

        self._check(tensors, len(cell_ids), path)
        # safetensors writes the memory as it lies: a matrix in Fortran order would come back scrambled
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        with whole_file(path) as unfinished:
            save_file(tensors, unfinished, metadata={"cell_ids": json.dumps(cell_ids)})

    def read(self, path: str | Path, names: Iterable[str] | None = None) -> tuple[dict[str, np.ndarray], list[str]]:
        """Return the named tensors (all of them by default) and the cell ids of their rows.

        Raises
        ------
        InputError
            If the file is not what this contract describes.
        """
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            cell_ids = json.loads((file.metadata() or {}).get("cell_ids", "[]"))
            wanted = list(self.tensors if names is None else names)
            missing = set(wanted) - set(file.keys())
            if missing:
                raise InputError(path, f"not {self.what}: missing {sorted(missing)}", "Delete it and run again")
            tensors = {name: file.get_tensor(name) for name in wanted}
        try:
            self._check(tensors, len(cell_ids), path, some=True)
        except ValueError as error:
            raise InputError(path, str(error), "Delete the file and run the workflow again") from error
        return tensors, cell_ids

    def read_cells(
        self, paths: Iterable[str | Path], cell_ids: Iterable[str], names: Iterable[str]
    ) -> dict[str, np.ndarray]:
        """Return the named tensors for the given cells, in their order, from any number of files.

        Raises
        ------
        InputError
            If a cell is in none of the files.
        """
        paths, names, cell_ids = sorted(map(str, paths)), list(names), pd.Index(cell_ids)
        parts = [self.read(path, names) for path in paths]
        row = pd.Index([cell for _, cells in parts for cell in cells]).get_indexer(cell_ids)
        if (row < 0).any():
            raise InputError(
                ", ".join(paths),
                f"{(row < 0).sum()} described cells are missing, such as {cell_ids[row < 0][0]}",
                "Delete the files and run the workflow again",
            )
        return {name: np.concatenate([tensors[name] for tensors, _ in parts])[row] for name in names}

    def _check(self, tensors: dict[str, np.ndarray], cells: int, path: str | Path, some: bool = False) -> None:
        known = self.tensors | self.further
        if not set(tensors) <= set(known) or not (some or set(self.tensors) <= set(tensors)):
            raise ValueError(f"{path}: not {self.what}: has {sorted(tensors)}, not {sorted(self.tensors)}")
        for name, tensor in tensors.items():
            dtype, dimensions = known[name]
            if tensor.dtype != dtype or tensor.ndim != dimensions or len(tensor) != cells:
                raise ValueError(
                    f"{path}: {name} is {tensor.dtype}{list(tensor.shape)}, not {dtype} with {dimensions} "
                    f"dimensions and {cells} cells"
                )


QC = TableContract(
    "the QC figures of every cell",
    {
        "cell_id": TEXT,
        "dataset_id": TEXT,
        "donor": TEXT,
        "n_counts": pa.float64(),
        "n_genes": pa.int32(),
        "mitochondrial_percent": pa.float32(),
        "ribosomal_percent": pa.float32(),
        "doublet_score": pa.float32(),  # missing where the cell was not scored
        "kept": pa.bool_(),
        "reason": TEXT,
    },
    key="cell_id",
)
# One row for each cell to fetch; what is not known is "unknown".
CENSUS_CELLS = TableContract(
    "the cells chosen from the Census",
    {
        "soma_joinid": pa.int64(),
        "dataset_id": TEXT,
        "donor_id": TEXT,
        "assay_ontology_term_id": TEXT,
        "cell_type_ontology_term_id": TEXT,
        "tissue_ontology_term_id": TEXT,
        "disease_ontology_term_id": TEXT,
        "sex_ontology_term_id": TEXT,
        "development_stage_ontology_term_id": TEXT,
    },
    key="soma_joinid",
)
_LABELS = {f"{slot}{suffix}": TEXT for slot in TERM_SLOTS for suffix in ("_id", "")}
SAMPLED_CELLS = TableContract(
    "the sampled cells",
    {
        "cell_id": TEXT,
        "dataset_id": TEXT,
        "donor": TEXT,
        "assay_id": TEXT,
        **_LABELS,
        "counts_hash": TEXT,  # equal where two cells have the same counts of the same genes
        "n_counts": pa.float64(),
    },
    key="cell_id",
)
CELLS = TableContract("the corpus", {**SAMPLED_CELLS.columns, "split": TEXT}, key="cell_id")
PATHWAY_SCORES = TableContract("AUCell scores", {"cell_id": TEXT}, key="cell_id", rest=pa.float32())
TERMS = TableContract(
    "the terms that a slot may hold",
    # depth: is_a steps from a cell type to the root of the Cell Ontology; null for other slots
    {"slot": TEXT, "id": TEXT, "name": TEXT, "definition": TEXT, "depth": pa.int32()},
)
_SLOTS = {**{f"{slot}_id": TEXT for slot in TERM_SLOTS}, "pathway_ids": TEXTS}
DESCRIPTIONS = TableContract(
    "reference descriptions",
    {"cell_id": TEXT, "split": TEXT, **_SLOTS, "definition": TEXT, "text": TEXT},
    key="cell_id",
)
# genes.tsv: token (from 0, in order of gene_id), Ensembl id or else symbol, symbol, non-zero median of
# counts per 10,000 over the training cells
GENES = ("token", "gene_id", "symbol", "median")
TOKENS = TableContract(
    "ranked genes",
    {"cell_id": TEXT, "tokens": pa.list_(pa.int32()), "expression": pa.list_(pa.float32())},
    key="cell_id",
)
EMBEDDINGS = TensorContract(
    "gene embeddings",
    {
        "gene_vectors": (np.dtype("float16"), 3),
        "lengths": (np.dtype("int32"), 1),
        "pooled": (np.dtype("float32"), 2),
    },
    further={"cls": (np.dtype("float32"), 2)},
)
# What a method says of a cell. Generations and baselines share it, so one evaluation scores them all.
PREDICTIONS = TableContract(
    "predicted descriptions",
    {
        "cell_id": TEXT,
        "split": TEXT,
        **_SLOTS,
        "text": TEXT,
        "status": TEXT,
        **{f"{slot}_confidence": pa.float32() for slot in TERM_SLOTS},
    },
    key="cell_id",
)
HISTORY = TableContract(
    "the course of fine-tuning",
    {
        "stage": TEXT,  # align, openings or finetune
        "step": pa.int32(),
        "epoch": pa.int32(),
        "loss": pa.float64(),  # nats a token of text, or a cell (align), on training cells
        "align_loss": pa.float64(),
        "validation_loss": pa.float64(),  # at the end of an epoch, else NaN
        "validation_accuracy": pa.float64(),  # of the cell type, by teacher forcing; as validation_loss
        "learning_rate": pa.float64(),
        "tokens": pa.int64(),  # of the step, prompts and soft tokens counted in
        "seconds": pa.float64(),  # since alignment, or fine-tuning, began
    },
)
METRICS = ("split", "method", "slot", "metric", "value", "low", "high", "n")


def write_jsonl(rows: Iterable[dict[str, Any]], path: str | Path) -> None:
    """Write one JSON object a line, whole."""
    with whole_file(path) as unfinished, unfinished.open("w") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, one a line."""
    with Path(path).open() as file:
        for line in file:
            yield json.loads(line)


def write_json(value: Any, path: str | Path) -> None:
    """Write a JSON file, whole, with sorted keys."""
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Return what a JSON file holds."""
    return json.loads(Path(path).read_text())
