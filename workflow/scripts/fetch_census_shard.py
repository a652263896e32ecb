"""Fetch the counts of one shard of the chosen cells of CELLxGENE Census."""

from cell2text.cells.fetch_census_shard import fetch_census_shard
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    fetch_census_shard(
        snakemake.input.cells,
        snakemake.params.source,
        shard=snakemake.params.shard,
        shards=snakemake.params.shards,
        path=snakemake.output.cells,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
