"""Write the run's report, one HTML page that opens offline, and the model card."""

from cell2text.job import run_job
from cell2text.report.render_report import render_report
from cell2text.report.results import RunFiles


def main(snakemake):
    """Run the rule."""
    render_report(
        RunFiles(**dict(snakemake.input.items())),
        snakemake.output.report,
        snakemake.output.card,
        run=snakemake.params.run,
        seed=snakemake.params.seed,
        notes=snakemake.params.notes,
        benchmarks=snakemake.params.benchmarks,
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
