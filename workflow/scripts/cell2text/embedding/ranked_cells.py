"""Cells as lists of ranked genes in flat arrays, read in parts and without a loop over cells."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import scipy.sparse

from cell2text.contracts import CELLS, TOKENS
from cell2text.contracts.table import among, hash_ids


@dataclass(frozen=True)
class RankedCells:
    """Some cells, with their ranked genes concatenated.

    Parameters
    ----------
    cell_ids
        str (cells,).
    tokens, expression
        Ranked genes of all cells, int32, and log1p of their counts per 10,000, float32; (total genes,).
    offsets
        Start of each cell in these arrays and end of the last one, int64 (cells + 1,).
    """

    cell_ids: np.ndarray
    tokens: np.ndarray
    expression: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, table: pa.Table) -> "RankedCells":
        """Return the cells of a table of ``contracts.TOKENS``."""
        ids = table["cell_id"].to_numpy()
        tokens, expression = (table[name].combine_chunks() for name in ("tokens", "expression"))
        offsets = np.asarray(tokens.offsets, dtype=np.int64)
        return cls(ids, np.asarray(tokens.flatten()), np.asarray(expression.flatten()), offsets - offsets[0])

    def __len__(self) -> int:
        return len(self.cell_ids)

    @property
    def lengths(self) -> np.ndarray:
        """Number of ranked genes of each cell, int64 (cells,)."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> "RankedCells":
        """Return the cells of the given rows (int64), in that order."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])])
        place = np.repeat(self.offsets[rows] - offsets[:-1], np.diff(offsets)) + np.arange(offsets[-1])
        return RankedCells(self.cell_ids[rows], self.tokens[place], self.expression[place], offsets)

    def matrix(self, genes: int) -> scipy.sparse.csr_matrix:
        """Return the expression as float32 (cells, genes), columns by token."""
        return scipy.sparse.csr_matrix((self.expression, self.tokens, self.offsets), shape=(len(self), genes))


def join_cells(parts: Sequence[RankedCells]) -> RankedCells:
    """Concatenate cells; there must be at least one part."""
    lengths = np.concatenate([part.lengths for part in parts])
    flat = [np.concatenate([getattr(part, name) for part in parts]) for name in ("cell_ids", "tokens", "expression")]
    return RankedCells(*flat, np.concatenate([[0], np.cumsum(lengths)]))


@dataclass(frozen=True)
class RankedSplit:
    """The cells of one split, read from files in parts; each iteration reads the files again.

    Parameters
    ----------
    files
        Files of ``contracts.TOKENS``.
    corpus
        File of ``contracts.CELLS``.
    split
        Split of the cells.
    genes
        Size of the vocabulary: tokens are below this number.
    """

    files: list[str | Path]
    corpus: str | Path
    split: str
    genes: int

    def __iter__(self) -> Iterator[RankedCells]:
        wanted = np.sort(hash_ids(self._corpus()["cell_id"].to_numpy()))
        for path in self.files:
            for table in TOKENS.read_arrow_parts(path):
                cells = RankedCells.of(table)
                rows = among(cells.cell_ids, wanted)
                if rows.any():
                    yield cells if rows.all() else cells.take(np.flatnonzero(rows))

    def __len__(self) -> int:
        return len(self._corpus())

    def cell_types(self) -> dict[str, str]:
        """Return cell id -> Cell Ontology id of the labelled cells."""
        known = self._corpus(["cell_type_id"]).to_pandas().dropna()
        return dict(zip(known["cell_id"], known["cell_type_id"], strict=True))

    def _corpus(self, columns: list[str] | None = None) -> pa.Table:
        table = CELLS.read_arrow(self.corpus, ["cell_id", "split", *(columns or [])])
        return table.filter(pa.compute.equal(table["split"], self.split)).drop_columns("split")


def pad(values: np.ndarray, offsets: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Truncate lists to ``width`` values, pad shorter ones with zeros, and return their lengths.

    Parameters
    ----------
    values, offsets
        Concatenated lists and their offsets, as in :class:`RankedCells`.
    width
        Number of values per list.

    Returns
    -------
    padded
        (lists, width), dtype of ``values``.
    lengths
        int32 (lists,), at most ``width``.
    """
    lengths = np.minimum(np.diff(offsets), width).astype(np.int32)
    mask = np.arange(width) < lengths[:, None]
    padded = np.zeros(mask.shape, dtype=values.dtype)
    padded[mask] = values[(offsets[:-1, None] + np.arange(width))[mask]]
    return padded, lengths
