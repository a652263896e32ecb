"""Predict the cell type by a classifier of genes and one of cells that teach each other, with a control."""

from cell2text.embedding.vectors import Embeddings
from cell2text.evaluation.baselines.bilevel import predict_bilevel
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    stored = Embeddings(snakemake.input.embeddings, **snakemake.params.on_the_fly)
    with stored.with_store() as embeddings:
        predict_bilevel(
            snakemake.input.descriptions,
            snakemake.input.terms,
            embeddings,
            snakemake.output.predictions,
            snakemake.output.control,
            neighbours=snakemake.params.neighbours,
            seed=snakemake.params.seed,
        )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
