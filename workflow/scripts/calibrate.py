"""Calibrate the scores of names, and find the limit of novelty, on the validation cells."""

from cell2text.confidence.calibrate import calibrate
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    calibrate(
        snakemake.input.model,
        snakemake.input.scores,
        snakemake.input.left_out or None,
        snakemake.input.descriptions,
        snakemake.input.embeddings,
        snakemake.output.calibration,
        snakemake.output.reference,
        seed=snakemake.params.seed,
        by=snakemake.params.by,
        agreement=snakemake.params.agreement,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
