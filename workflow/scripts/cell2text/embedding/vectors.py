"""The vectors that a projector reads: in memory, read from files on demand, or computed on the fly."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from torch import Tensor

from cell2text.contracts import EMBEDDINGS
from cell2text.embedding.encoders import Encoder, load_encoder
from cell2text.embedding.ranked_cells import RankedStore, store_ranked


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
        Ranked genes of all cells of the run.
    cell_ids
        Ids of the cells, in the order of their rows.
    top_k
        Gene vectors per cell.
    """

    def __init__(self, encoder: Encoder, cells: RankedStore, cell_ids: Sequence[str], top_k: int):
        self.encoder, self.cells, self.top_k = encoder, cells, top_k
        self.rows = cells.find(cell_ids)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        tensors = self.encoder.embed(self.cells.take(self.rows[rows]), self.top_k)
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
    store
        The ranked genes in those files as :func:`store_ranked` wrote them; see :meth:`with_store`.
    """

    files: Sequence[str]
    encoder: str | None = None
    tokens: Sequence[str] = ()
    top_k: int = 0
    store: Path | None = None

    @contextmanager
    def with_store(self) -> Iterator["Embeddings"]:
        """Yield these embeddings with the ranked genes in a temporary folder, where several processes can read them.

        Nothing is written if gene vectors are not computed on the fly.
        """
        if self.encoder is None:
            yield self
            return
        with tempfile.TemporaryDirectory(prefix="tokens-") as folder:
            store_ranked(self.tokens, folder)
            yield replace(self, store=Path(folder))

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
        if self.store is None:
            raise ValueError("gene vectors are computed on the fly: use with_store")
        return ComputedVectors(load_encoder(self.encoder), RankedStore(self.store), cell_ids, self.top_k)
