"""Duplicate cells in a corpus: identical counts, or one cell published by two studies."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from cell2text.cells.h5ad import read_blocks, read_genes

# The barcode of a droplet or well, anywhere in a cell's name: 12 bases in Drop-seq, 14 or 16 in 10x.
BARCODE = "(?P<barcode>[ACGT]{12,})"
# There are only a few million barcodes, so among many cells some pairs share barcode and total counts by chance:
# one such pair does not prove that two donors are the same.
MIN_SHARED = 2


def hash_counts(path: str | Path, rows: np.ndarray) -> Iterator[pd.DataFrame]:
    """Yield the total counts of each cell and a hash of its expression, the same for cells with identical counts.

    The hash consists of two sums modulo 2**64 over the cell's expressed genes; each term mixes the gene id with its
    count. The order of genes in a file and genes without counts therefore do not matter, and no loop over cells is
    needed.

    Parameters
    ----------
    path
        Filtered counts, read one block at a time.
    rows
        Which cells of the file to hash: bool.

    Yields
    ------
    DataFrame
        ``cell_id``, ``counts_hash`` (32 hexadecimal digits) and ``n_counts`` of a block's cells, in the file's order.
    """
    genes = [hashlib.blake2b(gene.encode(), digest_size=16).digest() for gene in read_genes(path).index]
    codes = np.frombuffer(b"".join(genes), dtype="<u8").reshape(-1, 2).T
    for ids, counts in read_blocks(path, rows):
        counts.sum_duplicates()
        counts.eliminate_zeros()
        values = counts.data.astype("<f4").view("<u4").astype(np.uint64)
        sums = [_sum_rows(_mix(code[counts.indices] + _mix(values)), counts.indptr) for code in codes]
        digits = np.stack(sums, axis=1).astype(">u8").tobytes().hex().encode()
        totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
        hashes = np.frombuffer(digits, dtype="S32").astype(str)
        yield pd.DataFrame({"cell_id": ids, "counts_hash": hashes, "n_counts": totals})


def _mix(numbers: np.ndarray) -> np.ndarray:
    """Mix 64-bit numbers so that every output bit depends on every input bit (last step of splitmix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _sum_rows(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the sum of each row of a CSR matrix modulo 2**64; differences of cumulative sums handle empty rows."""
    running = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(values, out=running[1:])
    return np.diff(running[ends])


def find_pairs(cells: pd.DataFrame) -> pd.DataFrame:
    """Return pairs of likely duplicate cells.

    Either their counts are identical, or they come from two studies and have the same nucleotide barcode and total
    counts: one cell published twice, perhaps with different gene names.

    Parameters
    ----------
    cells
        ``cell_id``, ``dataset_id``, ``counts_hash`` and ``n_counts``.

    Returns
    -------
    DataFrame
        ``first`` and ``second``, positions of cells (a set of duplicates gives pairs with its first cell), and
        ``identical``: true for identical counts, false for the same barcode and total.
    """
    barcodes = pc.struct_field(pc.extract_regex(pa.array(cells["cell_id"], pa.large_string()), BARCODE), "barcode")
    codes = barcodes.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    named = pd.DataFrame({"barcode": codes, "total": cells["n_counts"].to_numpy(dtype=float)}).dropna()
    named["study"] = pd.factorize(cells["dataset_id"])[0][named.index]
    named = named[named.duplicated(["barcode", "total"], keep=False)]
    if len(named):
        named = named[named.groupby(["barcode", "total"])["study"].transform("nunique") > 1]
    hashed = pd.DataFrame({"hash": pd.factorize(cells["counts_hash"])[0]})
    hashed = hashed[hashed["hash"] >= 0]
    pairs = {True: _pair(hashed, ["hash"]), False: _pair(named, ["barcode", "total"])}
    return pd.concat([found.assign(identical=identical) for identical, found in pairs.items()], ignore_index=True)


def _pair(cells: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Pair each cell that repeats the columns of an earlier cell with the first such cell, by position."""
    cells = cells[cells.duplicated(columns, keep=False)].reset_index(names="second")
    if cells.empty:
        return pd.DataFrame({"first": [], "second": []}, dtype=np.int64)
    cells["first"] = cells.groupby(columns)["second"].transform("min")
    return cells.loc[cells["first"] < cells["second"], ["first", "second"]]


def join_cells(cells: int, pairs: pd.DataFrame) -> np.ndarray:
    """Return a number for each cell, the same for cells connected by pairs."""
    return _connect(cells, pairs["first"].to_numpy(), pairs["second"].to_numpy())


def join_groups(groups: np.ndarray, pairs: pd.DataFrame) -> np.ndarray:
    """Return a number for each group (donor or study), the same for groups that share cells.

    Two groups share cells if two of their cells have identical counts, or if at least ``MIN_SHARED`` pairs of their
    cells have the same barcode and total counts.

    Parameters
    ----------
    groups
        Code of each cell's group, from 0.
    pairs
        Output of ``find_pairs``.
    """
    links = pd.DataFrame({"a": groups[pairs["first"]], "b": groups[pairs["second"]]})
    links = pd.DataFrame({"low": links.min(axis=1), "high": links.max(axis=1)})
    links["weight"] = np.where(pairs["identical"], MIN_SHARED, 1)
    links = links[links["low"] != links["high"]].groupby(["low", "high"], as_index=False)["weight"].sum()
    links = links[links["weight"] >= MIN_SHARED]
    return _connect(int(groups.max(initial=-1)) + 1, links["low"].to_numpy(), links["high"].to_numpy())


def _connect(nodes: int, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    links = sparse.coo_matrix((np.ones(len(starts), dtype=bool), (starts, ends)), shape=(nodes, nodes))
    return connected_components(links, directed=False)[1]
