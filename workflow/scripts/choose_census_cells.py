"""Choose cells of CELLxGENE Census by their labels."""

from cell2text.cells.choose_census_cells import choose_census_cells
from cell2text.job import run_job
from cell2text.settings import CensusSettings, SampleSettings


def main(snakemake):
    """Run the rule."""
    choose_census_cells(
        snakemake.params.source,
        wanted=CensusSettings(**snakemake.params.wanted),
        sample=SampleSettings(**snakemake.params.sample),
        seed=snakemake.params.seed,
        path=snakemake.output.cells,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
