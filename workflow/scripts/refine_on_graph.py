"""Refine the predictions of a method on a graph of similar cells."""

from cell2text.evaluation.refine_on_graph import refine_on_graph
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    refine_on_graph(
        snakemake.input.descriptions,
        snakemake.input.terms,
        snakemake.input.embeddings,
        snakemake.input.predictions,
        snakemake.output.refined,
        snakemake.output.control,
        neighbours=snakemake.params.neighbours,
        seed=snakemake.params.seed,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
