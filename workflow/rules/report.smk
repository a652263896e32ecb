"""
The run's report, one HTML page that opens offline, and the model card.

Inputs: results of all other stages. Outputs: <results>/report.html, <results>/model_card.md.
"""


rule render_report:
    input:
        metrics="<results>/evaluation/metrics.tsv",
        per_class="<results>/evaluation/per_class.tsv",
        confusion="<results>/evaluation/confusion.tsv",
        calibration="<results>/evaluation/calibration.tsv",
        provenance="<results>/evaluation/provenance.json",
        comparison="<results>/evaluation/comparison.svg",
        confidence="<results>/confidence/confidence.json",
        generations=collect("<results>/generations/test/{part}.jsonl", part=PARTS),
        corpus="<results>/corpus/cells.parquet",
        descriptions="<results>/corpus/descriptions.parquet",
        terms="<results>/corpus/terms.parquet",
        audit="<results>/corpus/audit.json",
        qc=collect("<results>/qc/{dataset}.json", dataset=DATASETS),
        qc_plots=collect("<results>/qc/{dataset}.svg", dataset=DATASETS),
        embeddings=EMBEDDINGS,
        encoder="<results>/encoder",
        model="<results>/finetuned",
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
