"""The vectors that a projector reads: in memory, read from files on demand, or computed on the fly."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from torch import Tensor

from cell2text.contracts import EMBEDDINGS, TOKENS
from cell2text.embedding.encoders import Encoder, load_encoder
from cell2text.embedding.ranked_cells import RankedCells, join_cells
from cell2text.errors import InputError


class Vectors(Protocol):
    """Vectors of cells, by row."""

    def __len__(self) -> int:
        """Return the number of cells."""

    def __getitem__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return float32 vectors of the cells in ``rows`` (int64) and their lengths, int64 (cells,)."""


@dataclass(frozen=True)
class InMemoryVectors:
    """Pooled vectors in memory, about a kilobyte per cell."""

    vectors: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        return self.vectors[rows], self.lengths[rows]


class StoredVectors:
    """Gene vectors read from files on demand, because those of an atlas do not fit into memory.

    Parameters
    ----------
    files
        Files of ``contracts.EMBEDDINGS``.
    cell_ids
        Ids of the cells, in the order of their rows; each must be in one of the files.
    """

    def __init__(self, files: Sequence[str], cell_ids: Sequence[str]):
        known = [EMBEDDINGS.read(path, [])[1] for path in files]
        place = pd.Index([cell for cells in known for cell in cells]).get_indexer(cell_ids)
        starts = np.cumsum([0, *map(len, known)])
        self.file = np.searchsorted(starts, place, side="right") - 1
        self.row = place - starts[self.file]
        self.open = [safe_open(path, framework="pt") for path in files]
        self.lengths = torch.from_numpy(EMBEDDINGS.read_cells(files, cell_ids, ["lengths"])["lengths"]).long()

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        slices = [self.open[self.file[row]].get_slice("gene_vectors") for row in rows]
        stored = [tensor[int(self.row[row])] for tensor, row in zip(slices, rows, strict=True)]
        return torch.stack(stored).float(), self.lengths[rows]


class ComputedVectors:
    """Gene vectors that the encoder computes on each access, with the same rounding as stored ones.

    Parameters
    ----------
    encoder
        Computes the vectors.
    cells
        Ranked genes of the cells, in the order of their rows.
    top_k
        Gene vectors per cell.
    """

    def __init__(self, encoder: Encoder, cells: RankedCells, top_k: int):
        self.encoder, self.cells, self.top_k = encoder, cells, top_k

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        tensors = self.encoder.embed(self.cells.take(rows), self.top_k)
        return torch.from_numpy(tensors["gene_vectors"]).float(), torch.from_numpy(tensors["lengths"]).long()


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of a run.

    Parameters
    ----------
    files
        Files of ``contracts.EMBEDDINGS``.
    encoder, tokens, top_k
        Directory of the encoder, files of ``contracts.TOKENS`` and gene vectors per cell, if gene vectors are not
        stored but computed on the fly.
    """

    files: Sequence[str]
    encoder: str | None = None
    tokens: Sequence[str] = ()
    top_k: int = 0

    def dimensions(self) -> int:
        """Return the number of dimensions of a vector."""
        return EMBEDDINGS.read(self.files[0], ["pooled"])[0]["pooled"].shape[1]

    def vectors(self, cell_ids: Sequence[str], reads: str) -> Vectors:
        """Return the vectors of the given cells.

        Parameters
        ----------
        cell_ids
            The cells, in the order of the rows.
        reads
            ``pooled`` or ``gene_vectors``.

        Raises
        ------
        InputError
            If a cell is in none of the files.
        """
        if reads == "pooled":
            tensors = EMBEDDINGS.read_cells(self.files, cell_ids, ["pooled", "lengths"])
            return InMemoryVectors(torch.from_numpy(tensors["pooled"]), torch.from_numpy(tensors["lengths"]).long())
        if self.encoder is None:
            return StoredVectors(self.files, cell_ids)
        return ComputedVectors(load_encoder(self.encoder), read_ranked(self.tokens, cell_ids), self.top_k)


def read_ranked(files: Iterable[str | Path], cell_ids: Sequence[str]) -> RankedCells:
    """Return the ranked genes of the given cells, in that order.

    Raises
    ------
    InputError
        If a cell is in none of the files.
    """
    wanted, files = pd.Index(cell_ids), list(files)
    parts = [RankedCells.of(table) for path in files for table in TOKENS.read_arrow_parts(path)]
    found = join_cells([part.take(np.flatnonzero(wanted.get_indexer(part.cell_ids) >= 0)) for part in parts])
    row = pd.Index(found.cell_ids).get_indexer(wanted)
    if (row < 0).any():
        problem = f"{(row < 0).sum()} cells are missing, such as {wanted[row < 0][0]}"
        raise InputError(", ".join(map(str, files)), problem, "Delete the files and run the workflow again")
    return found.take(row)
