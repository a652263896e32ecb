"""Write the reference description of each cell from its labels and its most active gene sets."""

from cell2text.corpus.write_descriptions import write_descriptions
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    write_descriptions(
        snakemake.input.corpus,
        snakemake.input.scores,
        snakemake.input.pathways or None,
        min_active_share=snakemake.params.min_active_share,
        per_cell=snakemake.params.per_cell,
        descriptions_file=snakemake.output.descriptions,
        terms_file=snakemake.output.terms,
        kept_file=snakemake.output.pathways,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
