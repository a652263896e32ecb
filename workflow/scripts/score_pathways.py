"""Score the gene sets in each cell of a dataset."""

from cell2text.corpus.score_pathways import score_pathways
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    score_pathways(
        snakemake.input.cells,
        snakemake.input.corpus,
        snakemake.input.gene_sets,
        min_genes=snakemake.params.min_genes,
        path=snakemake.output.scores,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
