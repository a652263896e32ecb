"""Write counts and types of the labelled cells whose types are added to a model."""

from cell2text.annotation.fetch_examples import fetch_examples
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    fetch_examples(
        snakemake.params.row,
        snakemake.output.counts,
        snakemake.output.examples,
        orthologues=snakemake.input.orthologues or None,
        **snakemake.params.genes,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
