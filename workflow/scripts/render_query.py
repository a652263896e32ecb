"""Write the page of an annotated file, one HTML file that opens offline."""

from cell2text.annotation.render_query import render_query
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    render_query(
        snakemake.params.source,
        snakemake.input.annotated,
        snakemake.input.qc,
        snakemake.input.fit,
        snakemake.input.cluster_table,
        snakemake.input.evidence_table,
        snakemake.input.embeddings,
        snakemake.input.model,
        snakemake.output.page,
        seed=snakemake.params.seed,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
