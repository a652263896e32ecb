"""Score training cells by encoders and projectors that have not seen their study."""

from cell2text.embedding.fit_encoder import EncoderInputs
from cell2text.embedding.refit import QUICK
from cell2text.embedding.vectors import Embeddings
from cell2text.finetuning.left_out import score_left_out_studies
from cell2text.job import run_job
from cell2text.settings import EncoderSettings, FinetuneSettings, ProjectorSettings


def main(snakemake):
    """Run the rule."""
    encoder = EncoderInputs(
        snakemake.input.corpus,
        snakemake.input.genes[0],
        snakemake.input.tokens,
        settings=EncoderSettings(**snakemake.params.fitted),
        seed=snakemake.params.seed,
        fetched=next(iter(snakemake.input.fetched), None),
        pathways=snakemake.input.pathways,
        gene_sets=snakemake.input.gene_sets,
    )
    stored = Embeddings(snakemake.input.embeddings, **snakemake.params.on_the_fly)
    with stored.with_store() as embeddings:
        score_left_out_studies(
            snakemake.input.language_model,
            snakemake.input.descriptions,
            snakemake.input.terms,
            embeddings,
            snakemake.output.scores,
            snakemake.output.vectors,
            projector=ProjectorSettings(**snakemake.params.projector),
            settings=FinetuneSettings(**snakemake.params.finetune),
            seed=snakemake.params.seed,
            encoder=encoder if encoder.settings.kind in QUICK else None,
        )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
