"""Write the test cells of a dataset without their labels."""

from cell2text.annotation.hide_labels import hide_labels
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    hide_labels(snakemake.input.counts, snakemake.input.corpus, snakemake.output.unlabelled)


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
