"""Write which genes argue for and against the cell types of clusters and cells."""

from cell2text.annotation.explain_query import explain_query
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    explain_query(
        snakemake.input.model,
        snakemake.input.language_model,
        snakemake.input.tokens,
        snakemake.input.genes,
        snakemake.input.descriptions,
        snakemake.input.clusters,
        snakemake.output.table,
        snakemake.output.cells,
        each_cell=snakemake.params.each_cell,
        seed=snakemake.params.seed,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
