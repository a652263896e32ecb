"""Cells as lists of ranked genes, in flat arrays: read a part at a time, without a loop over cells."""

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
    """Some cells, the ranked genes of one after those of another.

    Parameters
    ----------
    cell_ids
        str (cells,).
    tokens, expression
        Ranked genes of all cells, int32, and log1p of their counts per 10,000, float32; (genes of all cells,).
    offsets
        Where each cell starts in them and the last one ends, int64 (cells + 1,).
    """

    cell_ids: np.ndarray
    tokens: np.ndarray
    expression: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, table: pa.Table) -> "RankedCells":
        """Return the rows of a table of ``contracts.TOKENS``."""
        ids = table["cell_id"].to_numpy()
        tokens, expression = (table[name].combine_chunks() for name in ("tokens", "expression"))
        offsets = np.asarray(tokens.offsets, dtype=np.int64)
        return cls(ids, np.asarray(tokens.flatten()), np.asarray(expression.flatten()), offsets - offsets[0])

    def __len__(self) -> int:
        return len(self.cell_ids)

    @property
    def lengths(self) -> np.ndarray:
        """Ranked genes of each cell, int64 (cells,)."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> "RankedCells":
        """Return the cells of some rows, int64, in their order."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])])
        place = np.repeat(self.offsets[rows] - offsets[:-1], np.diff(offsets)) + np.arange(offsets[-1])
        return RankedCells(self.cell_ids[rows], self.tokens[place], self.expression[place], offsets)

    def matrix(self, genes: int) -> scipy.sparse.csr_matrix:
        """Return the expression as float32 (cells, genes), columns by token."""
        return scipy.sparse.csr_matrix((self.expression, self.tokens, self.offsets), shape=(len(self), genes))


def join_cells(parts: Sequence[RankedCells]) -> RankedCells:
    """Return cells one part after another; there must be one."""
    lengths = np.concatenate([part.lengths for part in parts])
    flat = [np.concatenate([getattr(part, name) for part in parts]) for name in ("cell_ids", "tokens", "expression")]
    return RankedCells(*flat, np.concatenate([[0], np.cumsum(lengths)]))


@dataclass(frozen=True)
class RankedSplit:
    """The cells of one split, read from files a part at a time, as often as they are asked for.

    Parameters
    ----------
    files
        Of ``contracts.TOKENS``.
    corpus
        File of ``contracts.CELLS``.
    split
        Which cells to yield.
    genes
        Tokens count from 0 to one less than this.
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
        """Return the Cell Ontology id of each cell that has one, by cell id."""
        known = self._corpus(["cell_type_id"]).to_pandas().dropna()
        return dict(zip(known["cell_id"], known["cell_type_id"], strict=True))

    def _corpus(self, columns: list[str] | None = None) -> pa.Table:
        table = CELLS.read_arrow(self.corpus, ["cell_id", "split", *(columns or [])])
        return table.filter(pa.compute.equal(table["split"], self.split)).drop_columns("split")


def pad(values: np.ndarray, offsets: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first ``width`` values of each list, zeros behind shorter ones, and how many each has.

    Parameters
    ----------
    values, offsets
        All lists one after another, and where each starts, as in :class:`RankedCells`.
    width
        Values to keep a list.

    Returns
    -------
    padded
        (lists, width), dtype of ``values``.
    lengths
        int32 (lists,), at most ``width``.
    """
    lengths = np.minimum(np.diff(offsets), width).astype(np.int32)
    there = np.arange(width) < lengths[:, None]
    padded = np.zeros(there.shape, dtype=values.dtype)
    padded[there] = values[(offsets[:-1, None] + np.arange(width))[there]]
    return padded, lengths
