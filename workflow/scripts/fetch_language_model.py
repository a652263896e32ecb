"""Fetch the language model that the config names and store it with safetensors weights."""

from cell2text.job import run_job
from cell2text.models.fetch_language_model import fetch_language_model


def main(snakemake):
    """Run the rule."""
    fetch_language_model(snakemake.params.source, snakemake.output[0])


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
