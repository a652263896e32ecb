"""Collect the names and synonyms of the terms of the training cells."""

from cell2text.job import run_job
from cell2text.retrieval.collect_names import collect_names


def main(snakemake):
    """Run the rule."""
    collect_names(snakemake.input.descriptions, snakemake.input.terms, snakemake.output.names)


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
