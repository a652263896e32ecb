"""Score how well texts find cells, and cells their texts."""

from cell2text.embedding.vectors import Embeddings
from cell2text.job import run_job
from cell2text.retrieval.score_retrieval import score_retrieval


def main(snakemake):
    """Run the rule."""
    stored = Embeddings(snakemake.input.embeddings, **snakemake.params.on_the_fly)
    with stored.with_store() as embeddings:
        score_retrieval(
            snakemake.input.retriever,
            snakemake.input.model,
            snakemake.input.language_model,
            snakemake.input.corpus,
            snakemake.input.descriptions,
            snakemake.input.terms,
            embeddings,
            snakemake.input.generations,
            snakemake.output.table,
            bootstrap=snakemake.params.bootstrap,
            seed=snakemake.params.seed,
        )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
