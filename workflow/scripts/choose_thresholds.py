"""Choose from which probability on a term is reported."""

from cell2text.confidence.choose_thresholds import choose_thresholds
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    choose_thresholds(
        snakemake.input.calibration,
        snakemake.input.model,
        snakemake.input.scores,
        snakemake.input.left_out or None,
        snakemake.input.descriptions,
        snakemake.input.terms,
        snakemake.output.confidence,
        confidence=snakemake.params.confidence,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
