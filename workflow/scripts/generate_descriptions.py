"""Describe the cells of one split and shard with the fine-tuned model."""

from cell2text.embedding.vectors import Embeddings
from cell2text.generation.generate_descriptions import generate_descriptions
from cell2text.job import run_job
from cell2text.settings import GenerateSettings


def main(snakemake):
    """Run the rule."""
    stored = Embeddings(snakemake.input.embeddings, **snakemake.params.on_the_fly)
    with stored.with_store() as embeddings:
        generate_descriptions(
            snakemake.input.model,
            snakemake.input.language_model,
            snakemake.input.corpus,
            snakemake.input.terms,
            embeddings,
            snakemake.output.generations,
            split=snakemake.wildcards.split,
            settings=GenerateSettings(**snakemake.params.generate),
        )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
