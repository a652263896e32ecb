"""Score training cells by projectors that have not seen their study."""

from cell2text.embedding.vectors import Embeddings
from cell2text.finetuning.left_out import score_left_out_studies
from cell2text.job import run_job
from cell2text.settings import FinetuneSettings, ProjectorSettings


def main(snakemake):
    """Run the rule."""
    stored = Embeddings(snakemake.input.embeddings, **snakemake.params.on_the_fly)
    with stored.with_store() as embeddings:
        score_left_out_studies(
            snakemake.input.language_model,
            snakemake.input.descriptions,
            snakemake.input.terms,
            embeddings,
            snakemake.output.scores,
            projector=ProjectorSettings(**snakemake.params.projector),
            settings=FinetuneSettings(**snakemake.params.finetune),
            seed=snakemake.params.seed,
        )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
