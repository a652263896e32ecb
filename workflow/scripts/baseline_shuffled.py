"""Describe each cell from another cell's embedding: what a model that does not read its cells would score."""

from cell2text.contracts import SPLITS
from cell2text.embedding.vectors import Embeddings
from cell2text.evaluation.baselines.shuffled import predict_shuffled
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    predict_shuffled(
        snakemake.input.model,
        snakemake.input.language_model,
        snakemake.input.corpus,
        snakemake.input.terms,
        Embeddings(snakemake.input.embeddings, **snakemake.params.on_the_fly),
        snakemake.output.predictions,
        splits=SPLITS[1:],
        settings=snakemake.params.generate,
        seed=snakemake.params.seed,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
