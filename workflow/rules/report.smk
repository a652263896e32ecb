"""
The run's report, one HTML page that opens offline, and the model card.

Inputs: results of all other stages. Outputs: <results>/report.html, <results>/model_card.md.
"""


def benchmarks_of_this_run(wildcards):
    """Return the benchmark files of each rule. The folder can have files of jobs that the config no longer has."""
    values = {
        "dataset": DATASETS,
        "shard": SHARDS,
        "split": SPLITS,
        "census": sorted(CENSUS),
        "name": [Path(model).name for model in [LANGUAGE_MODEL, *FETCHED_ENCODER]],
    }
    names = [one.name for one in workflow.rules if one.benchmark]
    names.remove("render_report")  # its own cost is known only afterwards
    return {name: expand(getattr(rules, name).benchmark, **values) for name in names}


rule render_report:
    input:
        metrics="<results>/evaluation/metrics.tsv",
        per_class="<results>/evaluation/per_class.tsv",
        confusion="<results>/evaluation/confusion.tsv",
        calibration="<results>/evaluation/calibration.tsv",
        provenance="<results>/evaluation/provenance.json",
        comparison="<results>/evaluation/comparison.svg",
        generations=collect("<results>/generations/test/{shard}.jsonl", shard=SHARDS),
        corpus="<results>/corpus/cells.parquet",
        descriptions="<results>/corpus/descriptions.parquet",
        terms="<results>/corpus/terms.parquet",
        audit="<results>/corpus/audit.json",
        qc=collect("<results>/qc/{dataset}.json", dataset=DATASETS),
        qc_plots=collect("<results>/qc/{dataset}.svg", dataset=DATASETS),
        embeddings=EMBEDDINGS,
        encoder="<results>/encoder",
        model="<results>/model",
    output:
        report=report(
            "<results>/report.html",
            caption="../report/report.rst",
            category="Report",
        ),
        card="<results>/model_card.md",
    log:
        "<logs>/render_report.log",
    benchmark:
        "<benchmarks>/render_report.jsonl"
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=mem(3000, 4),
        runtime=hours(1),
    params:
        seed=lookup("seed", within=config),
        run=lookup("run", within=config),
        notes=NOTES,
        benchmarks=benchmarks_of_this_run,
        library=library_version("render_report.py"),
    message:
        "Rendering the report"
    script:
        "../scripts/render_report.py"
