"""Fetch a Geneformer checkpoint."""

from cell2text.job import run_job
from cell2text.models.fetch_encoder import fetch_encoder


def main(snakemake):
    """Run the rule."""
    fetch_encoder(snakemake.params.source, snakemake.output[0])


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
