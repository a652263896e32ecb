"""Describe the clusters of the cells of a file to annotate."""

from cell2text.annotation.cluster_query import cluster_query
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    cluster_query(
        snakemake.input.counts,
        snakemake.input.descriptions,
        snakemake.input.tokens,
        snakemake.input.qc,
        snakemake.input.embeddings,
        snakemake.input.model,
        snakemake.output.clusters,
        snakemake.output.table,
        seed=snakemake.params.seed,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
