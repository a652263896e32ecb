"""Describe the cells of one split and shard from the scores of their names."""

from cell2text.generation.generate_descriptions import generate_descriptions
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    generate_descriptions(
        snakemake.input.model,
        snakemake.input.scores,
        snakemake.input.confidence,
        snakemake.input.reference,
        snakemake.input.terms,
        snakemake.input.embeddings,
        snakemake.output.generations,
        split=snakemake.wildcards.split,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
