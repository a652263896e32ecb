"""Write an h5ad file of simulated cells, to measure memory and speed of the stages at any size.

    .venv/bin/python tests/benchmarks/simulate_cells.py cells.h5ad --cells 1000000

Each cell type has its own gene means: log-normal, with a tenth of the genes regulated up or down. Counts are Poisson
with the mean of the cell type times a log-normal depth, so that most counts are one and about 2,000 of 20,000 genes
are expressed. Ten thousand cells are drawn in this way. The file repeats them in random order, each time with a tenth
of the values removed and a tenth increased by one, so that no two cells are identical. The columns are those of the
CELLxGENE schema. Only one block of cells is in memory.

With `--like real.h5ad` each cell is the sum of two cells of the same type of this file, half of the counts of each at
random, with its genes and without labels, to be described by a trained model. (Variants of single cells would be as
many clusters.)

    .venv/bin/python tests/benchmarks/simulate_cells.py cells.h5ad --cells 100000 --like pbmc3k.h5ad
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

sys.path.insert(0, str(Path(__file__).parents[2] / "workflow/scripts"))

from cell2text.cells.h5ad import write_cells
from cell2text.job import give_memory_back
from cell2text.progress import Progress

CELL_TYPES = {
    "CL:0000236": "B cell",
    "CL:0000623": "natural killer cell",
    "CL:0000624": "CD4-positive, alpha-beta T cell",
    "CL:0000625": "CD8-positive, alpha-beta T cell",
    "CL:0001054": "CD14-positive monocyte",
    "CL:0002397": "CD14-positive, CD16-positive monocyte",
    "CL:0000451": "dendritic cell",
    "CL:0000784": "plasmacytoid dendritic cell",
    "CL:0000786": "plasma cell",
    "CL:0000233": "platelet",
}
SAME_FOR_ALL = {
    "assay_ontology_term_id": "EFO:0009922",
    "assay": "10x 3' v3",
    "tissue_ontology_term_id": "UBERON:0000178",
    "tissue": "blood",
    "disease_ontology_term_id": "PATO:0000461",
    "disease": "normal",
    "suspension_type": "cell",
}
STAGES = ("HsapDv:0000123", "HsapDv:0000148")
SEXES = ("PATO:0000383", "PATO:0000384")
MEAN_COUNTS = 4_000  # per cell
BANK, AT_ONCE = 10_000, 4_096  # cells
MITOCHONDRIAL, RIBOSOMAL = 13, 40  # genes


def draw_bank(cells: int, genes: int, rng: np.random.Generator) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Return counts of ``cells`` cells over ``genes`` genes (CSR, float32) and the index of each cell's type."""
    mean = rng.lognormal(0, 1.9, genes)
    changed = rng.random((len(CELL_TYPES), genes)) < 0.1
    means = mean * np.exp(changed * rng.normal(0, 1.5, changed.shape))
    means *= MEAN_COUNTS / means.sum(axis=1, keepdims=True)
    types = rng.integers(len(CELL_TYPES), size=cells)
    depth = rng.lognormal(0, 0.4, (cells, 1))
    starts = range(0, cells, 500)
    blocks = [
        sparse.csr_matrix(rng.poisson(depth[start : start + 500] * means[types[start : start + 500]]), dtype=np.float32)
        for start in starts
    ]
    return sparse.vstack(blocks, format="csr"), types


def vary_blocks(bank: sparse.csr_matrix, picks: np.ndarray, rng: np.random.Generator) -> Iterator[sparse.csr_matrix]:
    """Yield the picked cells of the bank, with a tenth of their values removed and a tenth increased by one."""
    progress = Progress(len(picks), "cells")
    for start in range(0, len(picks), AT_ONCE):
        block = bank[picks[start : start + AT_ONCE]]
        chance = rng.random(block.nnz, dtype=np.float32)
        block.data += chance > 0.9
        block.data[chance < 0.1] = 0
        block.eliminate_zeros()
        progress.advance(block.shape[0])
        yield block


def mix_blocks(
    bank: sparse.csr_matrix, types: np.ndarray, picks: np.ndarray, rng: np.random.Generator
) -> Iterator[sparse.csr_matrix]:
    """Yield half of the counts of each picked cell together with half of those of another cell of its type."""
    progress = Progress(len(picks), "cells")
    by_type, counts = np.argsort(types, kind="stable"), np.bincount(types)
    first = np.cumsum(counts) - counts
    for start in range(0, len(picks), AT_ONCE):
        one = picks[start : start + AT_ONCE]
        other = by_type[first[types[one]] + rng.integers(counts[types[one]])]
        halves = [bank[cells] for cells in (one, other)]
        for half in halves:
            half.data = rng.binomial(half.data.astype(np.int64), 0.5).astype(np.float32)
        block = halves[0] + halves[1]
        block.eliminate_zeros()
        progress.advance(block.shape[0])
        yield block


def describe(types: np.ndarray, donors: int, rng: np.random.Generator) -> pd.DataFrame:
    """Return ``obs`` of the cells in the columns of the CELLxGENE schema."""
    cells = len(types)
    donor = rng.integers(donors, size=cells)
    columns = {
        "cell_type_ontology_term_id": pd.Categorical.from_codes(types, list(CELL_TYPES)),
        "cell_type": pd.Categorical.from_codes(types, list(CELL_TYPES.values())),
        "donor_id": pd.Categorical.from_codes(donor, [f"donor{i}" for i in range(donors)]),
        "sex_ontology_term_id": pd.Categorical.from_codes(donor % 2, SEXES),
        "development_stage_ontology_term_id": pd.Categorical.from_codes(donor // 2 % 2, STAGES),
        "is_primary_data": np.ones(cells, dtype=bool),
    }
    zeros = np.zeros(cells, dtype=np.int8)
    columns |= {name: pd.Categorical.from_codes(zeros, [value]) for name, value in SAME_FOR_ALL.items()}
    return pd.DataFrame(columns, index=pd.Index([f"cell{i}" for i in range(cells)], name="barcode"))


def name_genes(genes: int) -> pd.DataFrame:
    """Return ``var``: invented Ensembl ids and symbols, some of them mitochondrial or ribosomal."""
    symbols = [f"GENE{i}" for i in range(genes)]
    symbols[:MITOCHONDRIAL] = [f"MT-{i}" for i in range(MITOCHONDRIAL)]
    symbols[MITOCHONDRIAL : MITOCHONDRIAL + RIBOSOMAL] = [f"RPS{i}" for i in range(RIBOSOMAL)]
    ids = pd.Index([f"ENSG{i + 1:011d}" for i in range(genes)], name="gene_id")
    return pd.DataFrame({"feature_name": symbols, "symbol": symbols}, index=ids)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--donors", type=int, default=20)
    parser.add_argument("--like", type=Path, help="h5ad of real counts to vary")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    give_memory_back()
    rng = np.random.default_rng(given.seed)
    if given.like:
        real = ad.read_h5ad(given.like)
        bank, genes = sparse.csr_matrix(real.X, dtype=np.float32), real.var
        types = pd.factorize(real.obs["cell_type_ontology_term_id"])[0]
    else:
        bank, types = draw_bank(min(BANK, given.cells), given.genes, rng)
        genes = name_genes(given.genes)
    expressed = np.diff(bank.indptr)
    logging.info(
        "%d cells drawn: %.0f genes per cell, %.2f counts per expressed gene",
        len(types),
        expressed.mean(),
        bank.data.mean(),
    )
    picks = rng.integers(len(types), size=given.cells)
    if given.like:
        obs = pd.DataFrame(index=pd.Index([f"cell{i}" for i in range(given.cells)], name="barcode"))
        blocks = mix_blocks(bank, types, picks, rng)
    else:
        obs = describe(types[picks], given.donors, rng)
        blocks = vary_blocks(bank, picks, rng)
    write_cells(given.path, blocks, [obs.index], obs, genes, {"simulated": True})
    logging.info("%s: %d cells, %.2f GB", given.path, given.cells, given.path.stat().st_size / 1e9)


if __name__ == "__main__":
    main()
