"""Cells as ranked genes, after Geneformer (Theodoris et al., Nature 2023).

A gene's counts per 10,000 are divided by its median expression, so that genes characteristic of a cell rank above
housekeeping genes.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import pyarrow as pa
from scipy import sparse

from cell2text.cells.h5ad import all_cells, find_cells, read_blocks, read_genes
from cell2text.contracts import GENES, TOKENS
from cell2text.embedding.ranked_cells import SCALE, read_medians

log = logging.getLogger("cell2text.embedding")

CELLS_PER_CHUNK = 256  # the work unit of a thread: milliseconds


def scale_counts(counts: sparse.csr_matrix) -> np.ndarray:
    """Return the stored counts as counts per 10,000 of their cell (float64), in stored order."""
    total = np.asarray(counts.sum(axis=1, dtype=float)).ravel()
    return counts.data / np.repeat(total, np.diff(counts.indptr)) * SCALE


def rank_genes(
    corpus_file: str | Path | None, cells_file: str | Path, genes_file: str | Path, path: str | Path, threads: int = 1
) -> None:
    """Write the ranked genes of a dataset's cells, in the order of the dataset, block by block.

    Parameters
    ----------
    corpus_file
        The corpus (``contracts.CELLS``), whose cells are ranked; None for all cells of the dataset.
    cells_file
        Filtered counts of the dataset.
    genes_file
        Output of ``measure_genes``.
    path
        Where to write the table (``contracts.TOKENS``). ``expression`` is log1p of counts per 10,000, relative to
        the total over all genes of the file.
    threads
        Number of threads; they do not change the result.
    """
    genes = GENES.read(genes_file, ["gene_id", "token"]).set_index("gene_id")
    token = genes["token"].reindex(read_genes(cells_file).index).fillna(-1).to_numpy(dtype=np.int32)
    median = read_medians(genes_file)

    def rank() -> Iterator[pa.Table]:
        cells = ranked = 0
        rows = find_cells(cells_file, corpus_file) if corpus_file else all_cells(cells_file)
        for ids, counts in read_blocks(cells_file, rows):
            tokens, expression, ends = rank_counts(join_genes(counts, token), token, median, threads)
            starts = pa.array(np.concatenate([[0], ends]), pa.int32())
            lists = [pa.ListArray.from_arrays(starts, values) for values in (tokens, expression)]
            total = pa.array(np.asarray(counts.sum(axis=1, dtype=float)).ravel())
            yield pa.table([pa.array(ids, pa.string()), *lists, total], names=list(TOKENS.columns))
            cells, ranked = cells + len(ids), ranked + len(tokens)
        log.info("%d cells, %d ranked genes", cells, ranked)

    TOKENS.write_parts(rank(), path)


def join_genes(counts: sparse.csr_matrix, token: np.ndarray) -> sparse.csr_matrix:
    """Sum the counts of genes with the same token into the first of these genes; the others get none.

    Old and new ids, or several symbols, may refer to the same gene in an encoder's dictionary.

    Parameters
    ----------
    counts
        Cells by genes of the file.
    token
        Token of each gene of the file, or -1.
    """
    _, first, own = np.unique(token, return_index=True, return_inverse=True)
    gene = np.where(token >= 0, first[own], np.arange(len(token))).astype(counts.indices.dtype)
    if (gene == np.arange(len(gene))).all():
        return counts
    joined = sparse.csr_matrix((counts.data, gene[counts.indices], counts.indptr), shape=counts.shape, copy=True)
    joined.sum_duplicates()
    return joined


def rank_counts(
    counts: sparse.csr_matrix, token: np.ndarray, median: np.ndarray, threads: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rank the genes of each cell by counts per 10,000 divided by the gene's median, highest first.

    This is the order of Geneformer's tokenizer: count / total * 10,000 / median in float64, in this order of
    operations. Ties, whose order that tokenizer leaves to chance, go to the lower token.

    Parameters
    ----------
    counts
        Raw counts (integers), cells by genes of the file.
    token
        Token of each gene of the file, or -1.
    median
        Median of the non-zero values of each token.
    threads
        Number of threads; they do not change the result.

    Returns
    -------
    tuple of three arrays
        Tokens (int32) and log1p of counts per 10,000 (float32), cell after cell, and where each cell ends.
    """
    typical = np.where(token >= 0, median[token], np.inf)  # without a token the quotient is zero
    known, total = np.empty(counts.shape[0], dtype=np.int64), np.empty(counts.shape[0])
    matrix = (counts.data, counts.indices, counts.indptr)
    chunks = [range(first, min(first + CELLS_PER_CHUNK, len(known))) for first in range(0, len(known), CELLS_PER_CHUNK)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda cells: _measure_cells(cells.start, cells.stop, *matrix, token, known, total), chunks))
        ends = np.concatenate([[0], np.cumsum(known)])
        tokens, scaled = np.empty(ends[-1], dtype=np.int32), np.empty(ends[-1], dtype=np.float32)

        def rank(cells: range) -> None:
            _rank_cells(cells.start, cells.stop, *matrix, total, token, typical, ends, tokens, scaled)
            part = scaled[ends[cells.start] : ends[cells.stop]]
            np.log1p(part, out=part)

        list(pool.map(rank, chunks))
    return tokens, scaled, ends[1:]


# Sums of integers are exact in any order, so reassociation is safe.
@numba.njit(nogil=True, cache=True, fastmath={"reassoc"})
def _measure_cells(first, last, data, genes, starts, token, known, total) -> None:
    """Fill in the number of ranked genes and the total counts of each cell."""
    for cell in range(first, last):
        number, summed = 0, 0.0
        for i in range(starts[cell], starts[cell + 1]):
            number += (token[genes[i]] >= 0) & (data[i] > 0)
            summed += data[i]
        known[cell], total[cell] = number, summed


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _rank_cells(first, last, data, genes, starts, total, token, typical, ends, tokens, scaled) -> None:
    """Fill ``tokens`` and ``scaled`` of each cell, between its two entries in ``ends``."""
    for cell in range(first, last):
        count, gene = data[starts[cell] : starts[cell + 1]], genes[starts[cell] : starts[cell + 1]]
        share, quotient, whole = np.empty(len(count), dtype=np.float32), np.empty(len(count)), total[cell]
        for i in range(len(count)):
            scale = count[i] / whole * SCALE
            share[i] = scale
            quotient[i] = scale / typical[gene[i]]
        keys = _sort_descending(quotient)
        out_tokens, out_scaled = tokens[ends[cell] : ends[cell + 1]], scaled[ends[cell] : ends[cell + 1]]
        last_quotient, last_token = np.inf, np.int32(-1)
        for rank in range(len(out_tokens)):  # zeros sort last and are not reached
            i = keys[rank] & _POSITION
            this_token, this_quotient = token[gene[i]], quotient[i]
            out_tokens[rank], out_scaled[rank] = this_token, share[i]
            # quotients with the same key are rarely in the wrong order
            if (last_quotient < this_quotient) | ((last_quotient == this_quotient) & (last_token > this_token)):
                _insert(rank, keys, quotient, out_tokens, out_scaled)
            else:
                last_quotient, last_token = this_quotient, this_token


# A sort key consists of two digits, which encode how far the bits of a quotient are below those of the highest, and
# of 20 lower bits with the position of the quotient.
_SHIFT, _POSITION = np.uint64(20), np.uint64((1 << 20) - 1)


@numba.njit(inline="always")
def _sort_descending(values) -> np.ndarray:
    """Return the sorted keys of non-negative values, highest first: radix sort by the 14 to 22 most useful bits."""
    bits = values.view(np.uint64)
    top = np.uint64(0)
    for i in range(len(bits)):
        top = max(top, bits[i])
    low = top
    for i in range(len(bits)):
        low = min(low, bits[i] if bits[i] else top)  # zeros would use up the range of the key
    width = np.uint64(7)  # bits of a digit: about one bucket per value, but no more buckets than fit in a near cache
    while width < 11 and len(bits) >> width:
        width += np.uint64(1)
    digit = np.uint64((1 << width) - 1)
    zero_key = np.uint64((1 << 2 * width) - 1)
    lost = np.uint64(0)
    while (top - low) >> lost >= zero_key:
        lost += np.uint64(1)
    second = _SHIFT + width
    keys, others = np.empty(len(bits), dtype=np.uint64), np.empty(len(bits), dtype=np.uint64)
    places = np.zeros((2, 1 << width), dtype=np.int32)
    for i in range(len(bits)):
        key = min((top - bits[i]) >> lost, zero_key) << _SHIFT | np.uint64(i)
        keys[i] = key
        places[0, key >> _SHIFT & digit] += 1
        places[1, key >> second] += 1
    for half in range(2):
        place = 0
        for i in range(1 << width):
            place, places[half, i] = place + places[half, i], place
    for i in range(len(keys)):
        here = keys[i] >> _SHIFT & digit
        others[places[0, here]] = keys[i]
        places[0, here] += 1
    for i in range(len(keys)):
        here = others[i] >> second
        keys[places[1, here]] = others[i]
        places[1, here] += 1
    return keys


@numba.njit
def _insert(rank, keys, quotient, tokens, scaled) -> None:
    """Move a gene up to its place among the sorted genes: by quotient, ties by token."""
    key, token, share = keys[rank], tokens[rank], scaled[rank]
    mine = quotient[key & _POSITION]
    while rank:
        other = quotient[keys[rank - 1] & _POSITION]
        if other > mine or (other == mine and tokens[rank - 1] < token):
            break
        keys[rank], tokens[rank], scaled[rank] = keys[rank - 1], tokens[rank - 1], scaled[rank - 1]
        rank -= 1
    keys[rank], tokens[rank], scaled[rank] = key, token, share
