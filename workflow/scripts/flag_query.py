"""Flag the cells of a file to annotate that QC would exclude."""

from cell2text.annotation.pack_model import read_facts
from cell2text.cells.filter_cells import flag_cells
from cell2text.job import run_job
from cell2text.settings import QcSettings


def main(snakemake):
    """Run the rule."""
    limits = QcSettings(**read_facts(snakemake.input.model)["settings"]["qc"])
    flag_cells(snakemake.input.counts, snakemake.output.table, limits, snakemake.params.seed)


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
