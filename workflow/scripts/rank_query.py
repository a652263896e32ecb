"""Rank the genes of all cells of a file to annotate, among those that the model knows."""

from cell2text.annotation.rank_query import rank_query
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    rank_query(
        snakemake.input.counts,
        snakemake.input.model,
        snakemake.params.source,
        snakemake.output.genes,
        snakemake.output.tokens,
        snakemake.output.fit,
        threads=snakemake.threads,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
