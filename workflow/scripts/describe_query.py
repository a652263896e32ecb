"""Describe one shard of the cells of a file to annotate from the scores of their names."""

from cell2text.annotation.describe_query import describe_query
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    describe_query(
        snakemake.input.model,
        snakemake.input.scores,
        snakemake.input.embeddings,
        snakemake.output.descriptions,
        next(iter(snakemake.input.examples), None),
        snakemake.input.example_embeddings,
        snakemake.input.refined or None,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
