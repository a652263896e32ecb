from snakemake.utils import min_version

min_version("9.20")


# Without --configfile, the demo runs. It is not the base of other runs: their defaults come from the schema.
if not workflow.configfiles:
    if "datasets" in config:
        raise WorkflowError(
            "--config datasets: other studies would inherit the demo's split. Write `run` and `datasets` to a file and "
            "add --configfile"
        )

    configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/cells.smk"
include: "workflow/rules/corpus.smk"
include: "workflow/rules/embed.smk"
include: "workflow/rules/finetune.smk"
include: "workflow/rules/generate.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/annotate.smk"
include: "workflow/rules/retrieval.smk"


localrules:
    all,
    models,
    census,
    corpus,
    embeddings,
    annotate,
    search,


rule all:
    default_target: True
    input:
        # All results for the user: a deleted one is recreated, with everything that depends on it.
        GENERATIONS,
        "<results>/model",
        "<results>/evaluation/metrics.tsv",
        FEW_SHOT,
        "<results>/report.html",
        ["<results>/evaluation/retrieval.tsv"] if config["retrieval"]["train"] else [],


rule models:
    input:
        LANGUAGE_MODEL,
        FETCHED_ENCODER,
        collect("<resources>/models/{resource}", resource=RESOURCES),


rule census:
    input:
        collect("<results>/raw/{dataset}.h5ad", dataset=sum(PIECES.values(), [])),


rule corpus:
    input:
        "<results>/corpus/descriptions.parquet",
        "<results>/corpus/audit.json",


rule embeddings:
    input:
        EMBEDDINGS,


rule annotate:
    input:
        annotated_files,


rule search:
    input:
        searched_files,
