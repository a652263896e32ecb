"""
Search in words: a retriever fitted on the training cells, its scores, and the cells of an annotated file that fit a query.

Inputs: <results>/corpus/, <results>/embeddings/; a packed model and the annotated file for `search_cells`.
Outputs: <results>/retrieval/, <results>/evaluation/retrieval.tsv; <annotated>/{query}/search/results.tsv.
"""


rule collect_names:
    input:
        descriptions="<results>/corpus/descriptions.parquet",
        terms="<results>/corpus/terms.parquet",
    output:
        names="<results>/retrieval/names.parquet",
    log:
        "<logs>/collect_names.log",
    benchmark:
        "<benchmarks>/collect_names.jsonl"
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=mem(4000, 1),
        runtime=hours(1),
    params:
        library=library_version("collect_names.py"),
    message:
        "Collecting the names and synonyms of terms"
    script:
        "../scripts/collect_names.py"


rule fit_retriever:
    input:
        language_model=LANGUAGE_MODEL,
        descriptions="<results>/corpus/descriptions.parquet",
        terms="<results>/corpus/terms.parquet",
        names="<results>/retrieval/names.parquet",
        embeddings=EMBEDDINGS,
    output:
        retriever="<results>/retrieval/retriever.safetensors",
    log:
        "<logs>/fit_retriever.log",
    benchmark:
        "<benchmarks>/fit_retriever.jsonl"
    conda:
        "../../envs/llm.yaml"
    threads: 1
    resources:
        # pooled vectors of the training cells and of their views, twice while they are read
        mem_mb=mem_language_model(
            per_cell=2 + POOLED / 128 * (1 + config["encoder"]["views"])
        ),
        runtime=hours(1),
    params:
        dimensions=lookup("retrieval/dimensions", within=config),
        seed=lookup("seed", within=config),
        library=library_version("fit_retriever.py"),
    message:
        "Fitting the retriever"
    script:
        "../scripts/fit_retriever.py"


rule score_retrieval:
    input:
        retriever="<results>/retrieval/retriever.safetensors",
        model="<results>/finetuned",
        language_model=LANGUAGE_MODEL,
        corpus="<results>/corpus/cells.parquet",
        descriptions="<results>/corpus/descriptions.parquet",
        terms="<results>/corpus/terms.parquet",
        embeddings=EMBEDDINGS,
        generations=collect("<results>/generations/test/{part}.jsonl", part=PARTS),
        encoder="<results>/encoder",
        tokens=TOKENS_ON_THE_FLY,
        genes=GENES_ON_THE_FLY,
    output:
        table="<results>/evaluation/retrieval.tsv",
    log:
        "<logs>/score_retrieval.log",
    benchmark:
        "<benchmarks>/score_retrieval.jsonl"
    conda:
        "../../envs/llm.yaml"
    threads: 1
    resources:
        mem_mb=mem_language_model(per_cell=5, cells_at_once=1000),
        runtime=hours(1),
    params:
        bootstrap=lookup("evaluate/bootstrap", within=config),
        seed=lookup("seed", within=config),
        on_the_fly=on_the_fly,
        library=library_version("score_retrieval.py"),
    message:
        "Scoring the retriever"
    script:
        "../scripts/score_retrieval.py"


rule search_cells:
    input:
        model=MODEL,
        language_model=QUERY_LANGUAGE_MODEL,
        embeddings=collect(
            "<annotated>/{{query}}/embeddings/{shard}.safetensors", shard=QUERY_SHARDS
        ),
        cells="<annotated>/{query}/cells.tsv.gz",
    output:
        results="<annotated>/{query}/search/results.tsv",
    log:
        "<annotated>/{query}/logs/search_cells.log",
    wildcard_constraints:
        query=QUERY_NAMES,
    conda:
        "../../envs/llm.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=hours(1),
    params:
        # a function, because Snakemake reads braces in text as wildcards
        queries=lambda wildcards: SEARCHED,
        library=library_version("search_cells.py"),
    message:
        "Searching the cells of {wildcards.query}"
    script:
        "../scripts/search_cells.py"
