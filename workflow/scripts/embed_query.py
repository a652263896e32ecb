"""Compute the gene vectors of one shard of the cells of a file to annotate."""

from cell2text.annotation.embed_query import embed_query
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    embed_query(
        snakemake.input.model,
        snakemake.input.tokens,
        snakemake.input.genes,
        snakemake.output.embeddings,
        shard=snakemake.params.shard,
        shards=snakemake.params.shards,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
