"""Contract of a safetensors file, checked on write and on read."""

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from cell2text.errors import InputError
from cell2text.files import reading, whole_file


@dataclass(frozen=True)
class TensorContract:
    """Tensors of a safetensors file; row i of each belongs to the i-th of the ``cell_ids`` in the header.

    Parameters
    ----------
    what
        Name of the content, for messages.
    tensors
        Type and number of dimensions of each tensor.
    optional
        The same for tensors that may be absent.
    """

    what: str
    tensors: dict[str, tuple[np.dtype, int]] = field(default_factory=dict)
    optional: dict[str, tuple[np.dtype, int]] = field(default_factory=dict)

    def write(self, tensors: dict[str, np.ndarray], cell_ids: list[str], path: str | Path) -> None:
        """Check tensors and write them atomically.

        Raises
        ------
        ValueError
            If a tensor is missing, surplus, or of the wrong type or shape.
        """
        from safetensors.numpy import save_file

        self._check(tensors, len(cell_ids), path)
        # safetensors writes raw memory: a matrix in Fortran order would be read back scrambled
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        ids = json.dumps(cell_ids)
        sums = {name: _crc32(tensor) for name, tensor in tensors.items()} | {"cell_ids": zlib.crc32(ids.encode())}
        # in one entry, because safetensors writes several in any order
        metadata = {"cells": json.dumps({"cell_ids": ids, "crc32": sums})}
        with whole_file(path) as unfinished:
            save_file(tensors, unfinished, metadata=metadata)

    def read(self, path: str | Path, names: Iterable[str] | None = None) -> tuple[dict[str, np.ndarray], list[str]]:
        """Return the named tensors (by default all required ones) and the cell ids of their rows.

        Raises
        ------
        InputError
            If the file violates this contract.
        """
        from safetensors import safe_open

        with reading(path), safe_open(path, framework="numpy") as file:
            metadata = json.loads(file.metadata()["cells"])
            cell_ids, sums = json.loads(metadata["cell_ids"]), metadata["crc32"]
            wanted = list(self.tensors if names is None else names)
            missing = set(wanted) - set(file.keys())
            if missing:
                raise ValueError(f"not {self.what}: missing {sorted(missing)}")
            tensors = {name: file.get_tensor(name) for name in wanted}
            self._check(tensors, len(cell_ids), path, partial=True)
            found = {name: _crc32(tensor) for name, tensor in tensors.items()}
            found["cell_ids"] = zlib.crc32(metadata["cell_ids"].encode())
            changed = [name for name, value in found.items() if sums.get(name) != value]
            if changed:
                raise ValueError(f"{', '.join(changed)} changed after writing (CRC-32)")
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
        wanted: dict[str, np.ndarray] = {}
        absent = np.ones(len(cell_ids), dtype=bool)
        for path in paths:  # one file in memory at a time
            tensors, cells = self.read(path, names)
            row = pd.Index(cells).get_indexer(cell_ids)
            found = row >= 0
            for name, tensor in tensors.items():
                wanted.setdefault(name, np.empty((len(cell_ids), *tensor.shape[1:]), tensor.dtype))
                wanted[name][found] = tensor[row[found]]
            absent &= ~found
        if absent.any():
            raise InputError(
                ", ".join(paths),
                f"{absent.sum()} described cells are missing, such as {cell_ids[absent][0]}",
                "Delete the files and run the workflow again",
            )
        return wanted

    def _check(self, tensors: dict[str, np.ndarray], cells: int, path: str | Path, partial: bool = False) -> None:
        known = self.tensors | self.optional
        if not set(tensors) <= set(known) or not (partial or set(self.tensors) <= set(tensors)):
            raise ValueError(f"{path}: not {self.what}: has {sorted(tensors)}, not {sorted(self.tensors)}")
        for name, tensor in tensors.items():
            dtype, dimensions = known[name]
            if tensor.dtype != dtype or tensor.ndim != dimensions or len(tensor) != cells:
                raise ValueError(
                    f"{path}: {name} is {tensor.dtype}{list(tensor.shape)}, not {dtype} with {dimensions} "
                    f"dimensions and {cells} cells"
                )


def _crc32(tensor: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(tensor).view(np.uint8).data) if tensor.size else 0
