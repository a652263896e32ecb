"""Add the descriptions of all cells to a copy of the user's file."""

from cell2text.annotation.annotate_query import annotate_query
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    annotate_query(
        snakemake.params.source,
        snakemake.input.descriptions,
        snakemake.input.tokens,
        snakemake.input.qc,
        snakemake.input.fit,
        snakemake.input.clusters,
        snakemake.input.cluster_table,
        snakemake.input.evidence,
        snakemake.input.model,
        snakemake.output.annotated,
        snakemake.output.table,
        snakemake.output.texts,
        graph=snakemake.params.graph,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
