"""
The candidate names of each cell's slots are scored, calibrated on the validation cells, and written as a description.

Only `choose_thresholds` depends on `generate.confidence`, so that another one scores no cell again.

Inputs: <results>/finetuned/, <results>/embeddings/. Outputs: <results>/scores/{split}/{part}.safetensors,
<results>/confidence/, <results>/generations/{split}/{part}.jsonl.
"""

VALIDATION_SCORES = collect(
    "<results>/scores/validation/{part}.safetensors", part=PARTS
)
LEFT_OUT_STUDIES, LEFT_OUT_VECTORS = (
    [
        "<results>/scores/left_out_studies.safetensors",
        "<results>/scores/left_out_vectors.safetensors",
    ]
    if len(DATASETS) > 2
    else [[], []]
)


rule score_candidates:
    input:
        model="<results>/finetuned",
        language_model=LANGUAGE_MODEL,
        corpus="<results>/corpus/cells.parquet",
        terms="<results>/corpus/terms.parquet",
        embeddings=embeddings_of_part,
        encoder="<results>/encoder",
        tokens=TOKENS_ON_THE_FLY,
        genes=GENES_ON_THE_FLY,
        # tells which cells the language model need not read
        calibration=branch(
            lambda wildcards: config["generate"]["by"] == "cascade"
            and wildcards.split != "validation",
            then="<results>/confidence/calibration.json",
        ),
    output:
        # no rows if the part has no cell of the split
        scores="<results>/scores/{split}/{part}.safetensors",
    log:
        "<logs>/score_candidates/{split}/{part}.log",
    benchmark:
        "<benchmarks>/score_candidates/{split}/{part}.jsonl"
    conda:
        "../../envs/llm.yaml"
    threads: 8
    resources:
        mem_mb=mem_language_model(),
        runtime=hours(4),
        gpu=1,
    params:
        batch_cells=lookup("generate/batch_cells", within=config),
        by=lookup("generate/by", within=config),
        on_the_fly=on_the_fly,
        library=library_version("score_candidates.py"),
    message:
        "Scoring the names for the {wildcards.split} cells, part {wildcards.part}"
    script:
        "../scripts/score_candidates.py"


rule score_left_out_studies:
    input:
        language_model=LANGUAGE_MODEL,
        descriptions="<results>/corpus/descriptions.parquet",
        terms="<results>/corpus/terms.parquet",
        encoder="<results>/encoder",
        embeddings=EMBEDDINGS,
        corpus="<results>/corpus/cells.parquet",
        tokens=collect("<results>/tokens/{dataset}.parquet", dataset=DATASETS),
        genes=["<results>/genes.parquet"],
        pathways="<results>/corpus/pathways.json",
        gene_sets=config["pathways"]["gene_sets"],
        fetched=GENE_TEXTS,
    output:
        # no rows if fewer than three studies have training cells
        scores="<results>/scores/left_out_studies.safetensors",
        vectors="<results>/scores/left_out_vectors.safetensors",
    log:
        "<logs>/score_left_out_studies.log",
    benchmark:
        "<benchmarks>/score_left_out_studies.jsonl"
    conda:
        "../../envs/llm.yaml"
    threads: 8
    resources:
        mem_mb=mem_language_model(per_cell=5, cells_at_once=4096),
        runtime=hours(4),
        gpu=1,
    params:
        seed=lookup("seed", within=config),
        projector=lookup("projector", within=config),
        finetune=lookup("finetune", within=config),
        fitted=lookup("encoder", within=config),
        on_the_fly=on_the_fly,
        library=library_version("score_left_out_studies.py"),
    message:
        "Scoring the names for studies held out of alignment"
    script:
        "../scripts/score_left_out_studies.py"


rule calibrate:
    input:
        model="<results>/finetuned",
        scores=VALIDATION_SCORES,
        left_out=LEFT_OUT_STUDIES,
        descriptions="<results>/corpus/descriptions.parquet",
        embeddings=EMBEDDINGS,
    output:
        calibration="<results>/confidence/calibration.json",
        reference="<results>/confidence/reference.safetensors",
    log:
        "<logs>/calibrate.log",
    benchmark:
        "<benchmarks>/calibrate.jsonl"
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        # the pooled vectors of one file at a time
        mem_mb=mem(4000, POOLED / 64),
        runtime=hours(1),
    params:
        seed=lookup("seed", within=config),
        by=lookup("generate/by", within=config),
        agreement=lookup("generate/agreement", within=config),
        library=library_version("calibrate.py"),
    message:
        "Calibrating confidences on the validation cells"
    script:
        "../scripts/calibrate.py"


rule choose_thresholds:
    input:
        calibration="<results>/confidence/calibration.json",
        model="<results>/finetuned",
        scores=VALIDATION_SCORES,
        left_out=LEFT_OUT_STUDIES,
        descriptions="<results>/corpus/descriptions.parquet",
        terms="<results>/corpus/terms.parquet",
    output:
        confidence="<results>/confidence/confidence.json",
    log:
        "<logs>/choose_thresholds.log",
    benchmark:
        "<benchmarks>/choose_thresholds.jsonl"
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=hours(1),
    params:
        confidence=lookup("generate/confidence", within=config),
        library=library_version("choose_thresholds.py"),
    message:
        "Choosing from which probability on terms are reported"
    script:
        "../scripts/choose_thresholds.py"


# Only with `graph.refine`; see docs/neighbours.md.
rule fit_refinement:
    input:
        calibration="<results>/confidence/calibration.json",
        model="<results>/finetuned",
        scores=VALIDATION_SCORES,
        left_out=LEFT_OUT_STUDIES,
        descriptions="<results>/corpus/descriptions.parquet",
        terms="<results>/corpus/terms.parquet",
        embeddings=EMBEDDINGS,
        left_out_vectors=LEFT_OUT_VECTORS,
    output:
        refinement="<results>/confidence/refinement.json",
    log:
        "<logs>/fit_refinement.log",
    benchmark:
        "<benchmarks>/fit_refinement.jsonl"
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        # of 20,000 cells at most: the probabilities of some 700 cell types for each weight of the graph
        mem_mb=mem(5000, POOLED / 64),
        runtime=hours(2),
    params:
        confidence=lookup("generate/confidence", within=config),
        neighbours=lookup("graph/neighbours", within=config),
        seed=lookup("seed", within=config),
        library=library_version("fit_refinement.py"),
    message:
        "Choosing how much similar cells of a new file should agree"
    script:
        "../scripts/fit_refinement.py"


rule generate_descriptions:
    input:
        model="<results>/finetuned",
        scores="<results>/scores/{split}/{part}.safetensors",
        confidence="<results>/confidence/confidence.json",
        reference="<results>/confidence/reference.safetensors",
        terms="<results>/corpus/terms.parquet",
        embeddings=embeddings_of_part,
    output:
        # empty if the part has no cell of the split
        generations="<results>/generations/{split}/{part}.jsonl",
    log:
        "<logs>/generate_descriptions/{split}/{part}.log",
    benchmark:
        "<benchmarks>/generate_descriptions/{split}/{part}.jsonl"
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=mem_scores,
        runtime=hours(1),
    params:
        library=library_version("generate_descriptions.py"),
    message:
        "Describing the {wildcards.split} cells, part {wildcards.part}"
    script:
        "../scripts/generate_descriptions.py"
