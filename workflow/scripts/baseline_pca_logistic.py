"""Predict the slots by logistic regression on principal components."""

from cell2text.evaluation.baselines.pca_logistic import predict_pca_logistic
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    predict_pca_logistic(
        snakemake.input.descriptions,
        snakemake.input.terms,
        snakemake.input.corpus,
        snakemake.input.genes,
        snakemake.input.tokens,
        snakemake.output.predictions,
        seed=snakemake.params.seed,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
