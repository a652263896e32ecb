"""Score the candidate names of the cells of one split and shard with the fine-tuned model."""

from cell2text.embedding.vectors import Embeddings
from cell2text.generation.score_candidates import score_candidates
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    stored = Embeddings(snakemake.input.embeddings, **snakemake.params.on_the_fly)
    with stored.with_store() as embeddings:
        score_candidates(
            snakemake.input.model,
            snakemake.input.language_model,
            snakemake.input.corpus,
            snakemake.input.terms,
            embeddings,
            snakemake.output.scores,
            split=snakemake.wildcards.split,
            batch_cells=snakemake.params.batch_cells,
            by=snakemake.params.by,
            calibration=snakemake.input.calibration or None,
        )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
