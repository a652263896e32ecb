"""Cells as lists of ranked genes in flat arrays, read in parts and without a loop over cells."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse

from cell2text.contracts import CELLS, GENES, TOKENS
from cell2text.contracts.table import among, hash_ids
from cell2text.errors import InputError
from cell2text.files import writing

SCALE = 1e4  # expression is log1p of counts per so many counts of the cell


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
    n_counts
        Counts of each cell, of all genes that were measured, float64 (cells,).
    panels
        Gene panels: which genes are measured, by token, bool (panels, genes).
    panel
        Panel of each cell, int64 (cells,).
    """

    cell_ids: np.ndarray
    tokens: np.ndarray
    expression: np.ndarray
    offsets: np.ndarray
    n_counts: np.ndarray
    panels: np.ndarray
    panel: np.ndarray

    @classmethod
    def of(cls, table: pa.Table, measured: np.ndarray) -> "RankedCells":
        """Return the cells of a table of ``contracts.TOKENS`` and the genes that their dataset measures."""
        ids = table["cell_id"].to_numpy()
        tokens, expression = (table[name].combine_chunks() for name in ("tokens", "expression"))
        offsets = np.asarray(tokens.offsets, dtype=np.int64)
        ranked = np.asarray(tokens.flatten()), np.asarray(expression.flatten()), offsets - offsets[0]
        return cls(ids, *ranked, table["n_counts"].to_numpy(), measured[None], np.zeros(len(ids), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.cell_ids)

    @property
    def lengths(self) -> np.ndarray:
        """Number of ranked genes of each cell, int64 (cells,)."""
        return np.diff(self.offsets)

    @property
    def cell(self) -> np.ndarray:
        """Row of the cell of each ranked gene, int64 (total genes,)."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def take(self, rows: np.ndarray) -> "RankedCells":
        """Return the cells of the given rows (int64), in that order."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])])
        place = np.repeat(self.offsets[rows] - offsets[:-1], np.diff(offsets)) + np.arange(offsets[-1])
        ranked = self.tokens[place], self.expression[place], offsets
        return RankedCells(self.cell_ids[rows], *ranked, self.n_counts[rows], self.panels, self.panel[rows])

    def matrix(self, values: np.ndarray | None = None) -> scipy.sparse.csr_matrix:
        """Return the expression, or other values of the ranked genes, as (cells, genes), columns by token."""
        values = self.expression if values is None else values
        shape = (len(self), self.panels.shape[1])
        return scipy.sparse.csr_matrix((values, self.tokens, self.offsets), shape=shape)


def read_measured(genes_file: str | Path, files: Iterable[str | Path]) -> np.ndarray:
    """Return which genes the dataset of each file of ranked genes measures, by token, bool (files, genes).

    Parameters
    ----------
    genes_file
        File of ``contracts.GENES``.
    files
        Files of ``contracts.TOKENS``, named after their datasets.
    """
    names = pa.array([Path(path).stem for path in files], pa.string())
    measured = np.zeros((len(names), GENES.read(genes_file, ["token"])["token"].max() + 1), dtype=bool)
    for part in GENES.read_arrow_parts(genes_file, ["token", "datasets"]):
        number = pc.index_in(pc.list_flatten(part["datasets"]), value_set=names).to_numpy()  # NaN for other datasets
        token = np.repeat(part["token"].to_numpy(), pc.list_value_length(part["datasets"]).to_numpy())
        known = np.isfinite(number)
        measured[number[known].astype(np.int64), token[known]] = True
    return measured


def read_medians(genes_file: str | Path) -> np.ndarray:
    """Return the median of each token's non-zero counts per 10,000, float64 (genes,); NaN for tokens without a gene."""
    genes = GENES.read(genes_file, ["token", "median"])
    median = np.full(genes["token"].max() + 1, np.nan)
    median[genes["token"]] = genes["median"]
    return median


def store_ranked(files: Iterable[str | Path], measured: np.ndarray, folder: str | Path) -> None:
    """Copy ranked genes from compressed files to flat ones, from which single cells can be read; 8 bytes per gene.

    Parameters
    ----------
    files
        Files of ``contracts.TOKENS``, read in parts.
    measured
        Genes that the dataset of each file measures, from :func:`read_measured`.
    folder
        An existing folder.

    Raises
    ------
    InputError
        If the disk is full.
    """
    folder = Path(folder)
    ids, lengths = [np.empty(0, dtype=np.uint64)], [np.zeros(1, dtype=np.int64)]
    n_counts, panel = [np.empty(0)], [np.empty(0, dtype=np.int64)]
    with writing(folder), (folder / "tokens").open("wb") as tokens, (folder / "expression").open("wb") as expression:
        for number, path in enumerate(files):
            for table in TOKENS.read_arrow_parts(path):
                part = RankedCells.of(table, measured[number])
                tokens.write(part.tokens.astype(np.int32).data)
                expression.write(part.expression.astype(np.float32).data)
                ids.append(hash_ids(part.cell_ids))
                lengths.append(part.lengths)
                n_counts.append(part.n_counts)
                panel.append(np.full(len(part), number))
        for name, values in {"ids": ids, "n_counts": n_counts, "panel": panel}.items():
            np.save(folder / f"{name}.npy", np.concatenate(values))
        np.save(folder / "panels.npy", measured)
        np.save(folder / "offsets.npy", np.cumsum(np.concatenate(lengths)))


class RankedStore:
    """Ranked genes of many cells in the files of :func:`store_ranked`, read by row and never in memory as a whole.

    Parameters
    ----------
    folder
        The folder given to :func:`store_ranked`.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.folder, self.hashes = folder, np.load(folder / "ids.npy")
        self.n_counts, self.panel, self.panels = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("n_counts", "panel", "panels")
        )
        self.offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        genes = int(self.offsets[-1])
        self.tokens, self.expression = (
            np.memmap(folder / name, dtype, "r", shape=(genes,)) if genes else np.empty(0, dtype)
            for name, dtype in (("tokens", np.int32), ("expression", np.float32))
        )

    def find(self, cell_ids: Sequence[str]) -> np.ndarray:
        """Return the row of each cell, int64.

        Raises
        ------
        InputError
            If a cell is not stored.
        """
        cell_ids = np.asarray(cell_ids, dtype=object)
        row = pd.Index(self.hashes).get_indexer(hash_ids(cell_ids))
        if (row < 0).any():
            problem = f"{(row < 0).sum()} cells have no ranked genes, such as {cell_ids[row < 0][0]}"
            raise InputError("tokens", problem, "Delete the folder and run the workflow again")
        return row

    def take(self, rows: np.ndarray) -> RankedCells:
        """Return the cells of the given rows (int64), in that order; their ids are empty."""
        starts, ends = self.offsets[rows], self.offsets[rows + 1]
        offsets = np.concatenate([[0], np.cumsum(ends - starts)])
        place = np.repeat(starts - offsets[:-1], np.diff(offsets)) + np.arange(offsets[-1])
        ranked = self.tokens[place], self.expression[place], offsets
        numbers, panel = np.unique(self.panel[rows], return_inverse=True)  # those of all datasets take megabytes
        return RankedCells(np.full(len(rows), ""), *ranked, self.n_counts[rows], self.panels[numbers], panel)


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
    measured
        Genes that the dataset of each file measures, from :func:`read_measured`.
    """

    files: list[str | Path]
    corpus: str | Path
    split: str
    measured: np.ndarray

    @property
    def genes(self) -> int:
        """Size of the vocabulary: tokens are below this number."""
        return self.measured.shape[1]

    def __iter__(self) -> Iterator[RankedCells]:
        for number in range(len(self.files)):
            yield from self.of_file(number)

    def of_file(self, number: int) -> Iterator[RankedCells]:
        """Yield the cells of one of the files, in parts."""
        wanted = np.sort(hash_ids(self._corpus()["cell_id"].to_numpy()))
        for table in TOKENS.read_arrow_parts(self.files[number]):
            cells = RankedCells.of(table, self.measured[number])
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


def scale_vectors(cells: RankedCells, expression: np.ndarray, vectors: np.ndarray, top_k: int) -> dict[str, np.ndarray]:
    """Return the vectors of each cell's highest ranked genes, multiplied by the expression of the genes.

    Parameters
    ----------
    cells
        Ranked genes of the cells.
    expression
        Of these genes, (total genes,).
    vectors
        Vector of each gene, (genes, dimensions).
    top_k
        Vectors per cell; cells with fewer genes are padded with zeros.

    Returns
    -------
    dict
        ``gene_vectors`` float16 (cells, top_k, dimensions), ``lengths`` int32 (cells,), see :func:`count_read`.
    """
    tokens, _ = pad(cells.tokens, cells.offsets, top_k)
    scale, _ = pad(expression, cells.offsets, top_k)
    gene_vectors = (vectors[tokens] * scale[:, :, None]).astype(np.float16)
    return {"gene_vectors": gene_vectors, "lengths": count_read(cells.lengths, top_k)}


def count_read(lengths: np.ndarray, top_k: int) -> np.ndarray:
    """Return the number of vectors of each cell, int32; of its genes if no vector is wanted, so that 0 is no gene."""
    return (np.minimum(lengths, top_k) if top_k else lengths).astype(np.int32)
