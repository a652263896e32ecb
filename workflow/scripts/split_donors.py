"""Split the corpus into training, validation and test, and audit the split."""

from cell2text.corpus.split_donors import split_donors
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    split_donors(
        snakemake.input.cells,
        split=snakemake.params.split,
        shares=snakemake.params.shares,
        seed=snakemake.params.seed,
        path=snakemake.output.cells,
        audit_file=snakemake.output.audit,
        held_out=snakemake.params.held_out,
        diversity_file=snakemake.input.diversity,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
