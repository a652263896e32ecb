"""Rank the cells of an annotated file by how well they fit queries in words."""

from cell2text.job import run_job
from cell2text.retrieval.search_cells import search_cells


def main(snakemake):
    """Run the rule."""
    search_cells(
        snakemake.params.queries,
        snakemake.input.model,
        snakemake.input.language_model,
        snakemake.input.embeddings,
        snakemake.input.cells,
        snakemake.output.results,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
