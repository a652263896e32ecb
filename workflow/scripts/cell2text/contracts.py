"""The files between the stages: what each table, tensor file and text file holds.

A contract is checked when a file is written and when it is read, and a file appears whole or not at all.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and move it there when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
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
        if self.key and table[self.key].duplicated().any():
            raise ValueError(f"{path}: {self.key} repeats in {self.what}")
        schema = pa.schema([(name, self.columns.get(name, self.rest)) for name in table.columns])
        arrow = pa.Table.from_pandas(table, schema=schema, preserve_index=False)
        with whole_file(path) as unfinished:
            pq.write_table(arrow, unfinished, compression="zstd")

    def read(self, path: str | Path, columns: list[str] | None = None) -> pd.DataFrame:
        """Read a table, or some of its columns, and check it.

        Raises
        ------
        InputError
            If the file is not the table that this contract describes.
        """
        schema = pq.read_schema(path)
        try:
            self._check_names(schema.names, path)
            for name, expected in self.columns.items():
                if schema.field(name).type != expected:
                    raise ValueError(f"{path}: column {name} holds {schema.field(name).type}, not {expected}")
        except ValueError as error:
            raise InputError(path, str(error), "Delete the file and run the workflow again") from error
        # read_table would take a path such as split=test/ for a column
        return pq.ParquetFile(path).read(columns=columns).to_pandas()

    def _check_names(self, names: list[str], path: str | Path) -> None:
        missing = [name for name in self.columns if name not in names]
        surplus = [name for name in names if name not in self.columns]
        if missing or (surplus and self.rest is None):
            raise ValueError(f"{path}: not {self.what}: missing {missing}, surplus {surplus}")


@dataclass(frozen=True)
class TensorContract:
    """Tensors of a safetensors file; row i of each belongs to the i-th of the ``cell_ids`` in its header.

    Parameters
    ----------
    what
        What the file holds, for messages.
    tensors
        Type and number of dimensions of each tensor.
    """

    what: str
    tensors: dict[str, tuple[np.dtype, int]] = field(default_factory=dict)

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

    def _check(self, tensors: dict[str, np.ndarray], cells: int, path: str | Path, some: bool = False) -> None:
        if not some and set(tensors) != set(self.tensors):
            raise ValueError(f"{path}: not {self.what}: has {sorted(tensors)}, not {sorted(self.tensors)}")
        for name, tensor in tensors.items():
            dtype, dimensions = self.tensors[name]
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
        "n_counts": pa.float64(),
        "n_genes": pa.int32(),
        "mitochondrial_percent": pa.float32(),
        "kept": pa.bool_(),
        "reason": TEXT,
    },
    key="cell_id",
)
_LABELS = {f"{slot}{suffix}": TEXT for slot in TERM_SLOTS for suffix in ("_id", "")}
SAMPLED_CELLS = TableContract(
    "the sampled cells",
    {"cell_id": TEXT, "dataset_id": TEXT, "donor": TEXT, "assay_id": TEXT, **_LABELS, "counts_hash": TEXT},
    key="cell_id",
)
CELLS = TableContract("the corpus", {**SAMPLED_CELLS.columns, "split": TEXT}, key="cell_id")
PATHWAY_SCORES = TableContract("AUCell scores", {"cell_id": TEXT}, key="cell_id", rest=pa.float32())
TERMS = TableContract(
    "the terms that a slot may hold",
    {"slot": TEXT, "id": TEXT, "name": TEXT, "definition": TEXT},
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
        "stage": TEXT,  # align or finetune
        "step": pa.int32(),
        "epoch": pa.int32(),
        "loss": pa.float64(),  # nats a token of text (finetune) or a cell (align), on training cells
        "align_loss": pa.float64(),
        "validation_loss": pa.float64(),  # at the end of an epoch, else NaN
        "learning_rate": pa.float64(),
        "tokens": pa.int64(),  # of the step, prompts and soft tokens counted in
        "seconds": pa.float64(),  # since the stage began
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
