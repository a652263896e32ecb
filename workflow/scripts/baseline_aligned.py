"""Predict the labels that are nearest to each cell's soft tokens."""

from cell2text.contracts import SPLITS
from cell2text.embedding.vectors import Embeddings
from cell2text.evaluation.baselines.aligned import predict_aligned
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    stored = Embeddings(snakemake.input.embeddings, **snakemake.params.on_the_fly)
    with stored.with_store() as embeddings:
        predict_aligned(
            snakemake.input.model,
            snakemake.input.language_model,
            snakemake.input.corpus,
            snakemake.input.terms,
            embeddings,
            snakemake.output.predictions,
            splits=SPLITS[1:],
        )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
