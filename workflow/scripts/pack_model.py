"""Gather a trained model and all that describing new cells takes in one folder."""

from cell2text.annotation.pack_model import pack_model
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    pack_model(**dict(snakemake.input.items()), model=snakemake.output.model, settings=snakemake.params.settings)


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
