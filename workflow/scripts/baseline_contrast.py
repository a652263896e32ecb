"""Predict the slots by shrinkage LDA and the cell type by a contrastive head, with a control."""

from cell2text.evaluation.baselines.contrast import predict_contrast
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    predict_contrast(
        snakemake.input.descriptions,
        snakemake.input.terms,
        snakemake.input.embeddings,
        snakemake.output.lda,
        snakemake.output.contrast,
        snakemake.output.permuted,
        snakemake.output.head,
        dimensions=snakemake.params.dimensions,
        temperature=snakemake.params.temperature,
        steps=snakemake.params.steps,
        seed=snakemake.params.seed,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
