"""Choose how much the cell types of a new file are refined among its similar cells."""

from cell2text.confidence.refinement import fit_refinement
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    fit_refinement(
        snakemake.input.calibration,
        snakemake.input.model,
        snakemake.input.scores,
        snakemake.input.left_out or None,
        snakemake.input.descriptions,
        snakemake.input.terms,
        snakemake.input.embeddings,
        snakemake.input.left_out_vectors or None,
        snakemake.output.refinement,
        confidence=snakemake.params.confidence,
        neighbours=snakemake.params.neighbours,
        seed=snakemake.params.seed,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
