"""Fit the encoder on the training cells."""

from cell2text.embedding.fit_encoder import EncoderInputs, fit_encoder
from cell2text.job import run_job
from cell2text.settings import EncoderSettings


def main(snakemake):
    """Run the rule."""
    inputs = EncoderInputs(
        snakemake.input.corpus,
        snakemake.input.genes,
        snakemake.input.tokens,
        settings=EncoderSettings(**snakemake.params.encoder),
        seed=snakemake.params.seed,
        fetched=next(iter(snakemake.input.fetched), None),
        pathways=snakemake.input.pathways,
        gene_sets=snakemake.input.gene_sets,
    )
    fit_encoder(inputs, snakemake.output.encoder)


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
