"""Predict the slots by a vote of the nearest training cells."""

from cell2text.evaluation.baselines.knn import predict_knn
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    predict_knn(
        snakemake.input.descriptions,
        snakemake.input.terms,
        snakemake.input.embeddings,
        snakemake.output.predictions,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
