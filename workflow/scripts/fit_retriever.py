"""Train the towers that place cells and texts in one space."""

from cell2text.embedding.vectors import Embeddings
from cell2text.job import run_job
from cell2text.retrieval.fit_retriever import fit_retriever


def main(snakemake):
    """Run the rule."""
    fit_retriever(
        snakemake.input.language_model,
        snakemake.input.descriptions,
        snakemake.input.terms,
        snakemake.input.names,
        Embeddings(snakemake.input.embeddings),
        snakemake.output.retriever,
        dimensions=snakemake.params.dimensions,
        seed=snakemake.params.seed,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
