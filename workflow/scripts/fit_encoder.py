"""Fit the encoder on the training cells."""

from cell2text.embedding.fit_encoder import fit_encoder
from cell2text.job import run_job


def main(snakemake):
    """Run the rule."""
    fit_encoder(
        snakemake.input.corpus,
        snakemake.input.genes,
        snakemake.input.tokens,
        snakemake.output.encoder,
        settings=snakemake.params.encoder | {"directory": next(iter(snakemake.input.fetched), None)},
        seed=snakemake.params.seed,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
