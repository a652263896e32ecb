"""Score cell types predicted from a few labelled cells per type."""

from cell2text.evaluation.few_shot import few_shot
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    few_shot(
        snakemake.input.descriptions,
        snakemake.input.embeddings,
        snakemake.output.table,
        shots=snakemake.params.shots,
        dimensions=snakemake.params.dimensions,
        temperature=snakemake.params.temperature,
        steps=snakemake.params.steps,
        seed=snakemake.params.seed,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
