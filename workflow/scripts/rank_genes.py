"""Rank the genes of each cell of a dataset."""

from cell2text.embedding.rank_genes import rank_genes
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    rank_genes(
        snakemake.input.corpus,
        snakemake.input.cells,
        snakemake.input.genes,
        snakemake.output.tokens,
        threads=snakemake.threads,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
