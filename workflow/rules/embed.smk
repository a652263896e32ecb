"""
From counts to vectors: ranked genes of each cell, and one vector per gene.

Inputs: <results>/cells/, <results>/corpus/cells.parquet; for the encoder gene_text also files of texts about genes.
Outputs: <results>/genes.parquet, <results>/tokens/, <results>/encoder/, <results>/embeddings/.
"""


rule measure_genes:
    input:
        corpus="<results>/corpus/cells.parquet",
        cells=collect("<results>/cells/{dataset}.h5ad", dataset=DATASETS),
        encoder=FETCHED_ENCODER,
    output:
        genes="<results>/genes.parquet",
    log:
        "<logs>/measure_genes.log",
    benchmark:
        "<benchmarks>/measure_genes.jsonl"
    conda:
        "../../envs/cells.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=hours(1),
    params:
        library=library_version("measure_genes.py"),
    message:
        "Computing the median expression of each gene"
    script:
        "../scripts/measure_genes.py"


rule rank_genes:
    input:
        corpus="<results>/corpus/cells.parquet",
        cells="<results>/cells/{dataset}.h5ad",
        genes="<results>/genes.parquet",
    output:
        tokens="<results>/tokens/{dataset}.parquet",
    log:
        "<logs>/rank_genes/{dataset}.log",
    benchmark:
        "<benchmarks>/rank_genes/{dataset}.jsonl"
    conda:
        "../../envs/cells.yaml"
    threads: 2
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=hours(1),
    params:
        library=library_version("rank_genes.py"),
    message:
        "Ranking the genes of each cell of {wildcards.dataset}"
    script:
        "../scripts/rank_genes.py"


rule describe_genes:
    input:
        genes="<results>/genes.parquet",
        files=TEXT_FILES,
    output:
        texts="<results>/gene_texts.parquet",
    log:
        "<logs>/describe_genes.log",
    benchmark:
        "<benchmarks>/describe_genes.jsonl"
    conda:
        "../../envs/llm.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=hours(1),
    params:
        texts=lookup("encoder/texts", within=config),
        library=library_version("describe_genes.py"),
    message:
        "Joining texts about genes"
    script:
        "../scripts/describe_genes.py"


rule fit_encoder:
    input:
        corpus="<results>/corpus/cells.parquet",
        genes="<results>/genes.parquet",
        tokens=collect("<results>/tokens/{dataset}.parquet", dataset=DATASETS),
        pathways="<results>/corpus/pathways.json",
        gene_sets=config["pathways"]["gene_sets"],
        fetched=FETCHED_ENCODER + GENE_TEXTS,
    output:
        encoder=directory("<results>/encoder"),
    log:
        "<logs>/fit_encoder.log",
    benchmark:
        "<benchmarks>/fit_encoder.jsonl"
    conda:
        "../../envs/llm.yaml"
    threads: 2
    resources:
        # one part of the ranked genes; pre-training has the tokens of all training cells in memory
        mem_mb=mem(4000, 10 if config["encoder"]["kind"] == "pretrain" else 0.5),
        runtime=hours(12 if config["encoder"]["kind"] == "pretrain" else 1),
        gpu=int(config["encoder"]["kind"] == "pretrain"),
    params:
        seed=lookup("seed", within=config),
        encoder=lookup("encoder", within=config),
        library=library_version("fit_encoder.py"),
    message:
        "Fitting the {params.encoder[kind]} encoder"
    script:
        "../scripts/fit_encoder.py"


rule embed_genes:
    input:
        encoder="<results>/encoder",
        tokens="<results>/tokens/{dataset}.parquet",
        genes="<results>/genes.parquet",
    output:
        embeddings="<results>/embeddings/{dataset}/{shard}.safetensors",
    log:
        "<logs>/embed_genes/{dataset}/{shard}.log",
    benchmark:
        "<benchmarks>/embed_genes/{dataset}/{shard}.jsonl"
    group:
        group_if_many("embed_genes", CUTS)
    conda:
        "../../envs/llm.yaml"
    # on a GPU, all cores of a submission: several at a time would share its GPU
    threads: 8 if ENCODER_GPU else 2
    resources:
        mem_mb=mem_embeddings,
        runtime=hours(2, CUTS),
        gpu=ENCODER_GPU,
    params:
        shard=lambda wildcards: int(wildcards.shard),
        shards=lookup("shards", within=config),
        top_k=config["encoder"]["top_k"] if config["encoder"]["cache"] else 0,
        views=lookup("encoder/views", within=config),
        seed=lookup("seed", within=config),
        library=library_version("embed_genes.py"),
    message:
        "Computing gene vectors of {wildcards.dataset}, shard {wildcards.shard}"
    script:
        "../scripts/embed_genes.py"
