"""Let the fine-tuned model describe each cell freely."""

from cell2text.contracts import SPLITS
from cell2text.embedding.vectors import Embeddings
from cell2text.evaluation.baselines.greedy import predict_greedy
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    stored = Embeddings(snakemake.input.embeddings, **snakemake.params.on_the_fly)
    with stored.with_store() as embeddings:
        predict_greedy(
            snakemake.input.model,
            snakemake.input.language_model,
            snakemake.input.corpus,
            snakemake.input.terms,
            embeddings,
            snakemake.output.predictions,
            splits=SPLITS[1:],
            batch_cells=snakemake.params.batch_cells,
            max_new_tokens=snakemake.params.max_new_tokens,
        )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
