"""Copy the description of the nearest training cell."""

from cell2text.evaluation.baselines.nearest_text import predict_nearest_text
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    predict_nearest_text(
        snakemake.input.descriptions,
        snakemake.input.embeddings,
        snakemake.output.predictions,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
