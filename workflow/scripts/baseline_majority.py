"""Predict the most frequent training label for every cell."""

from cell2text.evaluation.baselines.majority import predict_majority
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    predict_majority(
        snakemake.input.descriptions,
        snakemake.input.terms,
        snakemake.output.predictions,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
