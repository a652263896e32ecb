"""Write texts about the genes of the run, and about those that no study measures."""

from cell2text.embedding.describe_genes import describe_genes
from cell2text.job import run_job
from cell2text.models.fetch_resource import sources_to_read


def main(snakemake):
    """Run the rule."""
    texts = snakemake.params.texts
    files = dict(zip(sources_to_read(texts), snakemake.input.files, strict=True))
    describe_genes(snakemake.input.genes, files, texts, snakemake.output.texts)


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
