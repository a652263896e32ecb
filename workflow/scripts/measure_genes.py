"""Give each gene a token and measure its typical expression in the training cells."""

from cell2text.job import run_job
from cell2text.rank_tokens import measure_genes


def main(snakemake):
    """Run the rule."""
    measure_genes(snakemake.input.corpus, snakemake.input.cells, snakemake.output.genes)


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
