"""Convert a study to the common format: raw counts, columns of the CELLxGENE schema, one id per cell."""

from cell2text.cells.fetch_dataset import fetch_dataset
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    fetch_dataset(
        snakemake.params.row,
        snakemake.output.cells,
        orthologues=snakemake.input.orthologues or None,
        **snakemake.params.genes,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
