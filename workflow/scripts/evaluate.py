"""Score every method on the same cells."""

from cell2text.evaluation.evaluate import evaluate
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    evaluate(
        snakemake.input.descriptions,
        snakemake.input.terms,
        snakemake.input.corpus,
        snakemake.input.generations,
        snakemake.input.baselines,
        snakemake.input.model,
        snakemake.input.language_model,
        dict(snakemake.output.items()),
        seed=snakemake.params.seed,
        replicates=snakemake.params.bootstrap,
        config=dict(snakemake.config),
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
