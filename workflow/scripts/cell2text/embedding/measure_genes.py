"""Token and median expression of each gene, from the training cells or from a fetched encoder."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numba
import numpy as np
import pandas as pd

from cell2text.cells.h5ad import find_cells, read_blocks, read_genes
from cell2text.contracts import GENES
from cell2text.embedding.rank_genes import scale_counts
from cell2text.errors import InputError
from cell2text.progress import Progress

log = logging.getLogger("cell2text.embedding")

GENES_AT_ONCE = 4096
MIN_KNOWN_SHARE = 0.1  # of a dataset's genes that an encoder must know
Values = tuple[np.ndarray, np.ndarray]  # positions of genes, and a positive float32 for each


def measure_genes(corpus_file: str | Path, cell_files: Iterable[str | Path], path: str | Path) -> None:
    """Write each gene's token and the median of its non-zero counts per 10,000 over the training cells.

    Genes of all datasets are pooled by id; genes without counts in training are excluded. Tokens start at 0, in the
    order of ids. The medians are exact for any number of cells: the files are streamed four times (see
    ``median_of_each``).

    Parameters
    ----------
    corpus_file
        The corpus (``contracts.CELLS``).
    cell_files
        Filtered counts of each dataset.
    path
        Where to write the table (``contracts.GENES``).
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
    log.info("%d of %d genes are expressed in training cells", len(seen), len(genes))
    write_genes(seen.assign(token=np.arange(len(seen))), path)


def look_up_genes(dictionary: str | Path, cell_files: Iterable[str | Path], path: str | Path) -> None:
    """Write the tokens and medians of the datasets' genes from an encoder's dictionary.

    Parameters
    ----------
    dictionary
        The encoder's gene table (``contracts.GENES``), with one row per id or symbol of a gene.
    cell_files
        Filtered counts of each dataset.
    path
        Where to write the rows of genes measured in any file, under the names used there.

    Raises
    ------
    InputError
        If the encoder knows less than 10% of a dataset's genes.
    """
    known = GENES.read(dictionary).set_index("gene_id")
    cell_files = list(cell_files)
    for file in cell_files:
        genes = read_genes(file).index
        share = genes.isin(known.index).mean()
        log.info("%s: the encoder knows %.1f%% of %d genes", Path(file).stem, 100 * share, len(genes))
        if share < MIN_KNOWN_SHARE:
            raise InputError(
                f"{file}: var",
                f"the encoder knows only {share:.1%} of the genes ({genes[0]}, ...)",
                "Use Ensembl ids, or set a gene table under `genes` in the config",
            )
    measured = name_genes(cell_files)
    seen = known[known.index.isin(measured.index)].rename_axis("gene_id").reset_index()
    seen["datasets"] = measured["datasets"].loc[seen["gene_id"]].to_list()
    write_genes(seen.sort_values(["token", "gene_id"]), path)


def write_genes(genes: pd.DataFrame, path: str | Path) -> None:
    """Write ``contracts.GENES`` in parts, because the names of a thousand datasets per gene are gigabytes of text."""
    GENES.write_parts((genes[start : start + GENES_AT_ONCE] for start in range(0, len(genes), GENES_AT_ONCE)), path)


def name_genes(cell_files: Sequence[str | Path]) -> pd.DataFrame:
    """Return each gene measured in any file, by gene id: ``symbol`` in the first such file, and all their datasets."""
    genes, places, by_ensembl_id = pd.DataFrame({"symbol": pd.Series(dtype=str)}), [], set()
    for file in cell_files:
        table = read_genes(file)
        by_ensembl_id.add(table.index.str.startswith("ENSG").any())
        genes = pd.concat([genes, table[~table.index.isin(genes.index)]])
        places.append(genes.index.get_indexer(table.index).astype(np.int32))
    place = np.concatenate(places)
    names = np.array([Path(file).stem for file in cell_files], dtype=object)
    dataset = np.repeat(names, [len(own) for own in places])  # of millions of pairs: references to a few strings
    by_gene = dataset[np.argsort(place, kind="stable")]
    genes["datasets"] = np.split(by_gene, np.cumsum(np.bincount(place))[:-1])
    if len(by_ensembl_id) > 1:
        log.warning("Some datasets use Ensembl ids and others gene symbols: their genes are not matched")
    return genes.sort_index()


def median_of_each(read: Callable[[], Iterable[Values]], genes: int) -> np.ndarray:
    """Return the exact median of each gene's values (float64); 0 for genes without values.

    This is radix selection; its memory depends only on the number of genes (3 kB each). The bits of positive floats
    sort like the floats, so each pass determines one more byte of a gene's two middle values, from the highest byte:
    it counts the next byte of all values that start with the bytes already known.

    Parameters
    ----------
    read
        Yields all values in parts; called four times. Zeros are ignored.
    genes
        Number of genes.
    """
    middle = np.zeros((2, genes), dtype=np.uint32)  # the same for an odd number of values
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
