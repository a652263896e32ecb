"""Score the names for one shard of the cells of a file to annotate."""

from cell2text.annotation.score_query import score_query
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    score_query(
        snakemake.input.model,
        snakemake.input.language_model,
        snakemake.input.embeddings,
        snakemake.output.scores,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
