"""Refine the cell types of a file to annotate among its similar cells."""

from cell2text.annotation.refine_query import refine_query
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    refine_query(snakemake.input.model, snakemake.input.scores, snakemake.input.embeddings, snakemake.output.refined)


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
