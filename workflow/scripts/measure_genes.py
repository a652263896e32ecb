"""Write the token and median expression of each gene, from the training cells or from a fetched encoder."""

from pathlib import Path

from cell2text.embedding.measure_genes import look_up_genes, measure_genes
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    if snakemake.input.encoder:
        look_up_genes(Path(snakemake.input.encoder[0], "genes.parquet"), snakemake.input.cells, snakemake.output.genes)
    else:
        measure_genes(snakemake.input.corpus, snakemake.input.cells, snakemake.output.genes)


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
