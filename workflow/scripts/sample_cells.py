"""Draw the cells of the corpus."""

from cell2text.corpus.sample_cells import sample_cells
from cell2text.job import run_job
from cell2text.settings import SampleSettings


def main(snakemake):
    """Run the rule."""
    sample_cells(
        snakemake.input.cells,
        settings=SampleSettings(snakemake.params.cells, snakemake.params.shares, snakemake.params.caps),
        seed=snakemake.params.seed,
        path=snakemake.output.cells,
        diversity_file=snakemake.output.diversity,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
