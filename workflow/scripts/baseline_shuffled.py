"""Describe each cell from another cell's embedding, as a negative control."""

from cell2text.contracts import SPLITS
from cell2text.embedding.vectors import Embeddings
from cell2text.evaluation.baselines.shuffled import predict_shuffled
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    stored = Embeddings(snakemake.input.embeddings, **snakemake.params.on_the_fly)
    with stored.with_store() as embeddings:
        predict_shuffled(
            snakemake.input.model,
            snakemake.input.language_model,
            snakemake.input.corpus,
            snakemake.input.terms,
            snakemake.input.confidence,
            embeddings,
            snakemake.output.predictions,
            splits=SPLITS[1:],
            batch_cells=snakemake.params.batch_cells,
            seed=snakemake.params.seed,
        )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
