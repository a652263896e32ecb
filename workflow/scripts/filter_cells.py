"""Exclude low-quality and unlabelled cells, and record why."""

from cell2text.cells.filter_cells import filter_cells
from cell2text.job import run_job
from cell2text.settings import QcSettings


def main(snakemake):
    """Run the rule."""
    filter_cells(
        snakemake.input.cells,
        snakemake.output.cells,
        snakemake.output.table,
        snakemake.output.summary,
        snakemake.output.plot,
        limits=QcSettings(**snakemake.params.limits),
        own_limits=snakemake.params.own_limits,
        seed=snakemake.params.seed,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
