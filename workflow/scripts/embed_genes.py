"""Compute the gene vectors of one shard of a dataset's cells."""

from cell2text.embedding.embed_genes import embed_genes
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    embed_genes(
        snakemake.input.encoder,
        snakemake.input.tokens,
        snakemake.input.genes,
        snakemake.output.embeddings,
        shard=snakemake.params.shard,
        shards=snakemake.params.shards,
        top_k=snakemake.params.top_k,
        views=snakemake.params.views,
        seed=snakemake.params.seed,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
