"""Cells as ranked genes, after Geneformer (Theodoris et al., Nature 2023).

A gene's count per 10,000 is divided by the gene's typical expression, so that genes that set a cell apart
stand before those that every cell has.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import sparse

from cell2text.cell_files import find_cells, read_blocks, read_genes
from cell2text.contracts import GENES, TOKENS, whole_file
from cell2text.errors import InputError
from cell2text.progress import Progress

log = logging.getLogger("cell2text.rank_tokens")

SCALE = 1e4
FEWEST_KNOWN = 0.1  # of a dataset's genes, that an encoder must know
CELLS_A_RUN = 256  # that one thread ranks at a time: milliseconds
Values = tuple[np.ndarray, np.ndarray]  # genes by position, and a positive float32 of each


def measure_genes(corpus_file: str | Path, cell_files: Iterable[str | Path], path: str | Path) -> None:
    """Write each gene's token and its non-zero median of counts per 10,000 over the training cells.

    Genes of all datasets are counted in by id; one without a count in training is left out. Tokens count
    from 0 in the order of ids. The medians are exact for any number of cells; the files are read four times
    for it and never held (see ``median_of_each``).

    Parameters
    ----------
    corpus_file
        The corpus (``contracts.CELLS``).
    cell_files
        Filtered counts of each dataset.
    path
        Where to write the table (``contracts.GENES``), as TSV.
    """
    cell_files = list(cell_files)
    genes = name_genes(cell_files)
    training = {file: find_cells(file, corpus_file, "train") for file in cell_files}
    progress = Progress(4 * sum(int(rows.sum()) for rows in training.values()), "cells")

    def read() -> Iterator[Values]:
        for file in cell_files:
            position = genes.index.get_indexer(read_genes(file).index).astype(np.int32)
            for ids, counts in read_blocks(file, training[file]):
                yield position[counts.indices], scale_counts(counts).astype(np.float32)
                progress.advance(len(ids))

    median = median_of_each(read, len(genes))
    seen = genes.assign(median=median)[median > 0].reset_index(names="gene_id")
    log.info("%d of %d genes are seen in training", len(seen), len(genes))
    with whole_file(path) as unfinished:
        seen.assign(token=np.arange(len(seen)))[list(GENES)].to_csv(unfinished, sep="\t", index=False)


def look_up_genes(dictionary: str | Path, cell_files: Iterable[str | Path], path: str | Path) -> None:
    """Write the tokens and medians that an encoder's dictionary gives the genes of some files.

    Parameters
    ----------
    dictionary
        The encoder's gene table (``contracts.GENES``), with a row for each name of a gene.
    cell_files
        Filtered counts of each dataset.
    path
        Where to write the rows of the genes that any of them measures, under the names that it uses.

    Raises
    ------
    InputError
        If the encoder knows less than a tenth of a dataset's genes.
    """
    known = read_gene_tokens(dictionary)
    cell_files = list(cell_files)
    for file in cell_files:
        genes = read_genes(file).index
        share = genes.isin(known.index).mean()
        log.info("%s: the encoder knows %.1f%% of %d genes", Path(file).stem, 100 * share, len(genes))
        if share < FEWEST_KNOWN:
            raise InputError(
                f"{file}: var",
                f"the encoder knows {share:.1%} of the genes ({genes[0]}, ...)",
                "Give Ensembl ids, or a gene table under `genes` in the config",
            )
    measured = name_genes(cell_files)
    with whole_file(path) as unfinished:
        seen = known[known.index.isin(measured.index)].reset_index().sort_values(["token", "gene_id"])
        seen[list(GENES)].to_csv(unfinished, sep="\t", index=False)


def read_gene_tokens(path: str | Path) -> pd.DataFrame:
    """Return a gene table (``contracts.GENES``) indexed by ``gene_id``."""
    return pd.read_csv(path, sep="\t", keep_default_na=False, float_precision="round_trip").set_index("gene_id")


def name_genes(cell_files: Iterable[str | Path]) -> pd.DataFrame:
    """Return the ``symbol`` of each gene that any file measures, as the first of them has it, by gene id."""
    genes = pd.DataFrame({"symbol": pd.Series(dtype=str)})
    by_ensembl_id = set()
    for file in cell_files:
        table = read_genes(file)
        by_ensembl_id.add(table.index.str.startswith("ENSG").any())
        genes = pd.concat([genes, table[~table.index.isin(genes.index)]])
    if len(by_ensembl_id) > 1:
        log.warning("Some datasets name genes by Ensembl id, others by symbol: these are not matched")
    return genes.sort_index()


def scale_counts(counts: sparse.csr_matrix) -> np.ndarray:
    """Return each stored count as counts per 10,000 of its cell (float64), in stored order."""
    total = np.asarray(counts.sum(axis=1, dtype=float)).ravel()
    return counts.data / np.repeat(total, np.diff(counts.indptr)) * SCALE


def median_of_each(read: Callable[[], Iterable[Values]], genes: int) -> np.ndarray:
    """Return the exact median of each gene's values (float64); 0 for a gene without any.

    Radix selection, whose memory depends on the number of genes alone (3 kB each). The bits of positive floats
    sort as the floats do, so each reading settles one byte more of a gene's two middle values, the highest
    byte first: among the values that begin with the bytes settled before, it counts how many go on with which
    byte.

    Parameters
    ----------
    read
        Yields all values, some at a time; called four times. Zeros are passed over.
    genes
        How many genes there are.
    """
    middle = np.zeros((2, genes), dtype=np.uint32)  # of an odd number of values both are the same
    for shift in (24, 16, 8, 0):
        found = np.zeros((2, genes, 256), dtype=np.int32)
        for gene, value in read():
            _count_bytes(gene, value.view(np.uint32), middle, shift, found)
        upto = found.cumsum(axis=2, dtype=np.int32)
        if shift == 24:
            number = upto[0, :, -1].astype(np.int64)
            rank = np.stack([(number - 1) // 2, number // 2])
        byte = (upto <= rank[:, :, None]).sum(axis=2).clip(max=255)
        rank -= np.take_along_axis(upto - found, byte[:, :, None], axis=2)[:, :, 0]
        middle = (middle << np.uint32(8)) | byte.astype(np.uint32)
    return np.where(number > 0, middle.view(np.float32).astype(float).mean(axis=0), 0)


@numba.njit(cache=True)
def _count_bytes(gene, bits, middle, shift, found) -> None:
    for i in range(len(gene)):
        for side in range(2):
            rest = bits[i] >> shift
            if bits[i] and rest >> 8 == middle[side, gene[i]]:
                found[side, gene[i], rest & 255] += 1


def rank_genes(
    corpus_file: str | Path, cells_file: str | Path, genes_file: str | Path, path: str | Path, threads: int = 1
) -> None:
    """Write the ranked genes of each of a dataset's cells, in the order of the dataset, a block at a time.

    Parameters
    ----------
    corpus_file
        The corpus (``contracts.CELLS``).
    cells_file
        Filtered counts of the dataset.
    genes_file
        What ``measure_genes`` wrote.
    path
        Where to write the table (``contracts.TOKENS``). ``expression`` is log1p of counts per 10,000, the
        cell's total being that over all genes of the file.
    threads
        How many to rank with; they change nothing in the result.
    """
    genes = read_gene_tokens(genes_file)
    token = genes["token"].reindex(read_genes(cells_file).index).fillna(-1).to_numpy(dtype=np.int32)
    median = np.full(genes["token"].max() + 1, np.nan)
    median[genes["token"]] = genes["median"]

    def rank() -> Iterator[pa.Table]:
        cells = ranked = 0
        for ids, counts in read_blocks(cells_file, find_cells(cells_file, corpus_file)):
            tokens, expression, ends = rank_counts(join_genes(counts, token), token, median, threads)
            starts = pa.array(np.concatenate([[0], ends]), pa.int32())
            lists = [pa.ListArray.from_arrays(starts, values) for values in (tokens, expression)]
            yield pa.table([pa.array(ids, pa.string()), *lists], names=list(TOKENS.columns))
            cells, ranked = cells + len(ids), ranked + len(tokens)
        log.info("%d cells, %d ranked genes", cells, ranked)

    TOKENS.write_parts(rank(), path)


def join_genes(counts: sparse.csr_matrix, token: np.ndarray) -> sparse.csr_matrix:
    """Return counts in which the first of the genes of one token has the sum of all of them, and the others none.

    Old and new ids, or several symbols, may stand for one gene of an encoder's dictionary.

    Parameters
    ----------
    counts
        Cells by genes of the file.
    token
        Token of each gene of the file; -1 for one that has none.
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
    """Return the genes of each cell, the highest count per 10,000 over the gene's median first.

    This is the order of Geneformer's tokenizer: count / total * 10,000 / median in float64, in this order of
    operations. Of two genes with equal quotients, whose order that tokenizer leaves to chance, the one with the lower
    token stands first.

    Parameters
    ----------
    counts
        Raw counts (whole numbers), cells by genes of the file.
    token
        Token of each gene of the file; -1 for one that has none.
    median
        Non-zero median of each token.
    threads
        How many to rank with; they change nothing in the result.

    Returns
    -------
    tuple of three arrays
        Tokens (int32) and log1p of counts per 10,000 (float32), cell after cell, and where each cell ends.
    """
    typical = np.where(token >= 0, median[token], np.inf)  # without a token the quotient is nought
    known, total = np.empty(counts.shape[0], dtype=np.int64), np.empty(counts.shape[0])
    matrix = (counts.data, counts.indices, counts.indptr)
    runs = [range(first, min(first + CELLS_A_RUN, len(known))) for first in range(0, len(known), CELLS_A_RUN)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda cells: _measure_cells(cells.start, cells.stop, *matrix, token, known, total), runs))
        ends = np.concatenate([[0], np.cumsum(known)])
        tokens, scaled = np.empty(ends[-1], dtype=np.int32), np.empty(ends[-1], dtype=np.float32)

        def rank(cells: range) -> None:
            _rank_cells(cells.start, cells.stop, *matrix, total, token, typical, ends, tokens, scaled)
            part = scaled[ends[cells.start] : ends[cells.stop]]
            np.log1p(part, out=part)

        list(pool.map(rank, runs))
    return tokens, scaled, ends[1:]


# The sum of whole numbers is the same in any order, so several may be added at a time.
@numba.njit(nogil=True, cache=True, fastmath={"reassoc"})
def _measure_cells(first, last, data, genes, starts, token, known, total) -> None:
    """Fill in how many ranked genes each cell expresses, and its total count."""
    for cell in range(first, last):
        number, summed = 0, 0.0
        for i in range(starts[cell], starts[cell + 1]):
            number += (token[genes[i]] >= 0) & (data[i] > 0)
            summed += data[i]
        known[cell], total[cell] = number, summed


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _rank_cells(first, last, data, genes, starts, total, token, typical, ends, tokens, scaled) -> None:
    """Fill ``tokens`` and ``scaled`` of each cell, from its end in ``ends`` to the next."""
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
        for rank in range(len(out_tokens)):  # the noughts come last and are left out
            i = keys[rank] & _POSITION
            its_token, its_quotient = token[gene[i]], quotient[i]
            out_tokens[rank], out_scaled[rank] = its_token, share[i]
            # what the keys do not tell apart is seldom in the wrong order
            if (last_quotient < its_quotient) | ((last_quotient == its_quotient) & (last_token > its_token)):
                _insert(rank, keys, quotient, out_tokens, out_scaled)
            else:
                last_quotient, last_token = its_quotient, its_token


# A sort key holds how far the bits of a quotient lie below the bits of the highest, in two digits, and in the 20
# bits behind that the quotient's position.
_PLACE, _POSITION = np.uint64(20), np.uint64((1 << 20) - 1)


@numba.njit(inline="always")
def _sort_descending(values) -> np.ndarray:
    """Return a key for each value (none negative), highest first: radix sort by the 14 to 22 bits that tell most."""
    bits = values.view(np.uint64)
    top = np.uint64(0)
    for i in range(len(bits)):
        top = max(top, bits[i])
    low = top
    for i in range(len(bits)):
        low = min(low, bits[i] if bits[i] else top)  # noughts lie so far below that they would take all the room
    width = np.uint64(7)  # of a digit: as many places as there are values, but not more than a near cache holds
    while width < 11 and len(bits) >> width:
        width += np.uint64(1)
    digit = np.uint64((1 << width) - 1)
    nought = np.uint64((1 << 2 * width) - 1)
    lost = np.uint64(0)
    while (top - low) >> lost >= nought:
        lost += np.uint64(1)
    second = _PLACE + width
    keys, others = np.empty(len(bits), dtype=np.uint64), np.empty(len(bits), dtype=np.uint64)
    places = np.zeros((2, 1 << width), dtype=np.int32)
    for i in range(len(bits)):
        key = min((top - bits[i]) >> lost, nought) << _PLACE | np.uint64(i)
        keys[i] = key
        places[0, key >> _PLACE & digit] += 1
        places[1, key >> second] += 1
    for half in range(2):
        place = 0
        for i in range(1 << width):
            place, places[half, i] = place + places[half, i], place
    for i in range(len(keys)):
        here = keys[i] >> _PLACE & digit
        others[places[0, here]] = keys[i]
        places[0, here] += 1
    for i in range(len(keys)):
        here = others[i] >> second
        keys[places[1, here]] = others[i]
        places[1, here] += 1
    return keys


@numba.njit
def _insert(rank, keys, quotient, tokens, scaled) -> None:
    """Move a gene up to its place among those that are in order: by quotient, equal ones by token."""
    key, token, share = keys[rank], tokens[rank], scaled[rank]
    mine = quotient[key & _POSITION]
    while rank:
        other = quotient[keys[rank - 1] & _POSITION]
        if other > mine or (other == mine and tokens[rank - 1] < token):
            break
        keys[rank], tokens[rank], scaled[rank] = keys[rank - 1], tokens[rank - 1], scaled[rank - 1]
        rank -= 1
    keys[rank], tokens[rank], scaled[rank] = key, token, share
