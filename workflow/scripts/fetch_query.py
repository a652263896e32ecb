"""Write the counts of all cells of a file to annotate in the common format."""

from cell2text.annotation.fetch_query import fetch_query
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    fetch_query(
        snakemake.params.row,
        snakemake.output.counts,
        orthologues=snakemake.input.orthologues or None,
        **snakemake.params.genes,
        **snakemake.params.columns,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
