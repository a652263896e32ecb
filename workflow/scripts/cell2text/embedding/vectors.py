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
from cell2text.embedding.ranked_cells import RankedCells, RankedStore, read_measured, read_medians, store_ranked
from cell2text.embedding.views import draw_view
from cell2text.files import reading


class Vectors(Protocol):
    """Vectors of cells and of their views, by row.

    Attributes
    ----------
    views
        Number of views of each cell.
    """

    views: int

    def __len__(self) -> int:
        """Return the number of cells."""

    def __getitem__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return float32 vectors of the cells in ``rows`` (int64) and their lengths, int64 (cells,)."""

    def seen(self, rows: np.ndarray, views: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the same of one view of each cell; ``views`` is its number from 0, or -1 for the cell itself."""


@dataclass(frozen=True)
class InMemoryVectors:
    """Pooled vectors in memory, about a kilobyte per cell.

    Parameters
    ----------
    vectors
        The cell itself, then its views; float32 (cells, 1 + views, dimensions).
    lengths
        int64 (cells, 1 + views).
    """

    vectors: Tensor
    lengths: Tensor

    @property
    def views(self) -> int:
        """Number of views of each cell."""
        return self.vectors.shape[1] - 1

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        return self.vectors[rows, 0], self.lengths[rows, 0]

    def seen(self, rows: np.ndarray, views: np.ndarray) -> tuple[Tensor, Tensor]:
        """See :meth:`Vectors.seen`."""
        return self.vectors[rows, views + 1], self.lengths[rows, views + 1]


class StoredVectors:
    """Gene vectors read from files on demand, because those of an atlas do not fit into memory.

    Parameters
    ----------
    files
        Files of ``contracts.EMBEDDINGS``.
    cell_ids
        Ids of the cells, in the order of their rows; each must be in one of the files.
    views
        Number of views to read of each cell.
    """

    def __init__(self, files: Sequence[str], cell_ids: Sequence[str], views: int):
        known = [EMBEDDINGS.read(path, [])[1] for path in files]
        place = pd.Index([cell for cells in known for cell in cells]).get_indexer(cell_ids)
        starts = np.cumsum([0, *map(len, known)])
        self.file = np.searchsorted(starts, place, side="right") - 1
        self.row = place - starts[self.file]
        self.open = [safe_open(path, framework="pt") for path in files]
        self.views, self.lengths = views, _read_with_views(files, cell_ids, "lengths", views).long()

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        return self.seen(rows, np.full(len(rows), -1))

    def seen(self, rows: np.ndarray, views: np.ndarray) -> tuple[Tensor, Tensor]:
        """See :meth:`Vectors.seen`."""
        return torch.stack([self._read(*pair) for pair in zip(rows, views, strict=True)]), self.lengths[rows, views + 1]

    def _read(self, row: int, view: int) -> Tensor:
        file, place = self.open[self.file[row]], int(self.row[row])
        if view < 0:
            return file.get_slice("gene_vectors")[place].float()
        return file.get_slice("view_gene_vectors")[place, int(view)].float()


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
    median
        Median expression of each gene, see :func:`draw_view`.
    top_k
        Gene vectors per cell.
    views
        Number of views of each cell.
    """

    def __init__(
        self,
        encoder: Encoder,
        cells: RankedStore,
        cell_ids: Sequence[str],
        median: np.ndarray,
        top_k: int,
        views: int,
    ):
        self.encoder, self.cells, self.median, self.top_k, self.views = encoder, cells, median, top_k, views
        self.rows = cells.find(cell_ids)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        return self._embed(self.cells.take(self.rows[rows]))

    def seen(self, rows: np.ndarray, views: np.ndarray) -> tuple[Tensor, Tensor]:
        """See :meth:`Vectors.seen`; a view depends on the cells with which it is drawn."""
        if (views < 0).all():
            return self[rows]
        own, drawn = np.flatnonzero(views < 0), np.flatnonzero(views >= 0)
        cells = self.cells.take(self.rows[rows[drawn]])
        seed = [*views[drawn].tolist(), *self.rows[rows[drawn]].tolist()]
        both = self[rows[own]], self._embed(draw_view(cells, self.median, seed))
        back = np.argsort(np.concatenate([own, drawn]))
        return tuple(torch.cat(parts)[back] for parts in zip(*both, strict=True))

    def _embed(self, cells: RankedCells) -> tuple[Tensor, Tensor]:
        tensors = self.encoder.embed(cells, self.top_k)
        return torch.from_numpy(tensors["gene_vectors"]).float(), torch.from_numpy(tensors["lengths"]).long()


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of a run.

    Parameters
    ----------
    files
        Files of ``contracts.EMBEDDINGS``.
    encoder, tokens, genes, top_k
        Directory of the encoder, files of ``contracts.TOKENS``, the file of ``contracts.GENES`` and gene vectors per
        cell, if gene vectors are not stored but computed on the fly.
    store
        The ranked genes in those files as :func:`store_ranked` wrote them; see :meth:`with_store`.
    """

    files: Sequence[str]
    encoder: str | None = None
    tokens: Sequence[str] = ()
    genes: str | None = None
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
            store_ranked(self.tokens, read_measured(self.genes, self.tokens), folder)
            yield replace(self, store=Path(folder))

    def dimensions(self, reads: str) -> int:
        """Return the number of dimensions of a vector, ``pooled`` or ``gene_vectors``."""
        if reads == "gene_vectors" and self.encoder is not None:
            return load_encoder(self.encoder).dimensions
        with reading(self.files[0]), safe_open(self.files[0], framework="pt") as file:
            return file.get_slice(reads).get_shape()[-1]

    def count_views(self) -> int:
        """Return the number of views of each cell."""
        with reading(self.files[0]), safe_open(self.files[0], framework="pt") as file:
            names = list(file.keys())
            return file.get_slice("view_lengths").get_shape()[1] if "view_lengths" in names else 0

    def vectors(self, cell_ids: Sequence[str], reads: str, views: int = 0) -> Vectors:
        """Return the vectors of the given cells.

        Parameters
        ----------
        cell_ids
            The cells, in the order of the rows.
        reads
            ``pooled`` or ``gene_vectors``.
        views
            Number of views of each cell, at most :meth:`count_views`.

        Raises
        ------
        InputError
            If a cell is in none of the files.
        """
        if reads == "pooled":
            vectors, lengths = (_read_with_views(self.files, cell_ids, name, views) for name in ("pooled", "lengths"))
            return InMemoryVectors(vectors, lengths.long())
        if self.encoder is None:
            return StoredVectors(self.files, cell_ids, views)
        if self.store is None:
            raise ValueError("gene vectors are computed on the fly: use with_store")
        store, median = RankedStore(self.store), read_medians(self.genes)
        return ComputedVectors(load_encoder(self.encoder), store, cell_ids, median, self.top_k, views)


def _read_with_views(files: Sequence[str], cell_ids: Sequence[str], name: str, views: int) -> Tensor:
    """Return a tensor of the cells and of their views, (cells, 1 + views, ...)."""
    own = torch.from_numpy(EMBEDDINGS.read_cells(files, cell_ids, [name])[name])[:, None]
    if not views:
        return own
    seen = EMBEDDINGS.read_cells(files, cell_ids, [f"view_{name}"])[f"view_{name}"]
    return torch.cat([own, torch.from_numpy(seen[:, :views])], dim=1)
