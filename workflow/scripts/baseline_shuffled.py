"""Describe each cell from another cell's embedding: what a model that does not read its cells would score."""

from cell2text.contracts import SPLITS
from cell2text.generation.describe import describe_shuffled
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    describe_shuffled(
        snakemake.input.model,
        snakemake.input.language_model,
        snakemake.input.corpus,
        snakemake.input.terms,
        snakemake.input.embeddings,
        snakemake.output.predictions,
        splits=SPLITS[1:],
        settings=snakemake.params.generate,
        seed=snakemake.params.seed,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
