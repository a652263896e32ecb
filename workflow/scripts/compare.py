"""Plot the scores of all methods."""

from cell2text.evaluation.compare import compare
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    compare(snakemake.input.metrics, snakemake.input.provenance, snakemake.output.plot)


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
