"""
A trained model, packed with all that describing new cells takes, and put to work on the cells of new files.

Inputs: the stages of a run for `pack_model`; a packed model and the files of `query` for the other rules.
Outputs: <results>/model/; <annotated>/{query}/annotate.html, annotated.h5ad, cells.tsv.gz, clusters.tsv, evidence.tsv
and descriptions.jsonl.
"""


rule pack_model:
    input:
        finetuned="<results>/finetuned",
        encoder="<results>/encoder",
        genes="<results>/genes.parquet",
        terms="<results>/corpus/terms.parquet",
        confidence="<results>/confidence/confidence.json",
        reference="<results>/confidence/reference.safetensors",
        corpus="<results>/corpus/cells.parquet",
        card="<results>/model_card.md",
        retriever=RETRIEVER,
        refinement=REFINEMENT,
    output:
        model=directory("<results>/model"),
    log:
        "<logs>/pack_model.log",
    benchmark:
        "<benchmarks>/pack_model.jsonl"
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=hours(1),
    params:
        settings={
            "top_k": GENE_VECTORS and config["encoder"]["top_k"],
            "batch_cells": config["generate"]["batch_cells"],
            "qc": config["qc"],
        },
        library=library_version("pack_model.py"),
    message:
        "Packing the model"
    script:
        "../scripts/pack_model.py"


# Not a part of any result: a file to try `annotate` with, whose true labels are known.
rule hide_labels:
    input:
        counts="<results>/cells/{dataset}.h5ad",
        corpus="<results>/corpus/cells.parquet",
    output:
        unlabelled="<results>/unlabelled/{dataset}.h5ad",
    log:
        "<logs>/hide_labels/{dataset}.log",
    conda:
        "../../envs/cells.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=hours(1),
    params:
        library=library_version("hide_labels.py"),
    message:
        "The test cells of {wildcards.dataset} without their labels"
    script:
        "../scripts/hide_labels.py"


rule fetch_query:
    input:
        files=lambda wildcards: local_files(QUERIES[wildcards.query]),
        gene_table=config["genes"]["table"] or [],
        orthologues=ORTHOLOGUES,
    output:
        counts=temp("<annotated>/{query}/counts.h5ad"),
    log:
        "<annotated>/{query}/logs/fetch_query.log",
    wildcard_constraints:
        query=QUERY_NAMES,
    conda:
        "../../envs/cells.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, input, attempt: (2000 + int(input.size_mb / 2))
        * attempt,
        runtime=hours(2),
    params:
        row=lambda wildcards: QUERIES[wildcards.query],
        genes=READ_GENES,
        columns={key: config[key] for key in ("clusters", "own_labels")},
        library=library_version("fetch_query.py"),
    message:
        "Reading {wildcards.query}"
    script:
        "../scripts/fetch_query.py"


rule fetch_examples:
    input:
        files=lambda wildcards: local_files(EXAMPLES[wildcards.query]),
        gene_table=config["genes"]["table"] or [],
        orthologues=ORTHOLOGUES,
    output:
        counts=temp("<annotated>/{query}/counts.h5ad"),
        examples="<annotated>/{query}/examples.parquet",
    log:
        "<annotated>/{query}/logs/fetch_examples.log",
    wildcard_constraints:
        query=EXAMPLE_NAMES,
    conda:
        "../../envs/cells.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, input, attempt: (2000 + int(input.size_mb / 2))
        * attempt,
        runtime=hours(2),
    params:
        row=lambda wildcards: EXAMPLES[wildcards.query],
        genes=READ_GENES,
        library=library_version("fetch_examples.py"),
    message:
        "Reading the labelled cells of {wildcards.query}"
    script:
        "../scripts/fetch_examples.py"


rule flag_query:
    input:
        counts="<annotated>/{query}/counts.h5ad",
        model=MODEL,
    output:
        table="<annotated>/{query}/qc.parquet",
    log:
        "<annotated>/{query}/logs/flag_query.log",
    wildcard_constraints:
        query=QUERY_NAMES,
    conda:
        "../../envs/cells.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=hours(4),
    params:
        seed=lookup("seed", within=config),
        library=library_version("flag_query.py"),
    message:
        "QC of {wildcards.query}"
    script:
        "../scripts/flag_query.py"


rule rank_query:
    input:
        counts="<annotated>/{query}/counts.h5ad",
        model=MODEL,
    output:
        genes="<annotated>/{query}/genes.parquet",
        tokens="<annotated>/{query}/tokens/{query}.parquet",
        fit="<annotated>/{query}/fit.json",
    log:
        "<annotated>/{query}/logs/rank_query.log",
    wildcard_constraints:
        query=STUDY_NAMES,
    conda:
        "../../envs/cells.yaml"
    threads: 2
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=hours(1),
    params:
        source=lambda wildcards: (QUERIES | EXAMPLES)[wildcards.query]["source"],
        library=library_version("rank_query.py"),
    message:
        "Ranking the genes of each cell of {wildcards.query}"
    script:
        "../scripts/rank_query.py"


rule embed_query:
    input:
        model=MODEL,
        tokens="<annotated>/{query}/tokens/{query}.parquet",
        genes="<annotated>/{query}/genes.parquet",
    output:
        embeddings="<annotated>/{query}/embeddings/{shard}.safetensors",
    log:
        "<annotated>/{query}/logs/embed_query/{shard}.log",
    wildcard_constraints:
        query=STUDY_NAMES,
    group:
        group_if_many("embed_query", len(QUERY_SHARDS))
    conda:
        "../../envs/llm.yaml"
    # all cores of a submission, see embed_genes
    threads: 8
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=hours(2, len(QUERY_SHARDS)),
        gpu=1,
    params:
        shard=lambda wildcards: int(wildcards.shard),
        shards=config["annotate"]["shards"],
        library=library_version("embed_query.py"),
    message:
        "Computing gene vectors of {wildcards.query}, shard {wildcards.shard}"
    script:
        "../scripts/embed_query.py"


rule score_query:
    input:
        model=MODEL,
        language_model=QUERY_LANGUAGE_MODEL,
        embeddings="<annotated>/{query}/embeddings/{shard}.safetensors",
    output:
        scores="<annotated>/{query}/scores/{shard}.safetensors",
    log:
        "<annotated>/{query}/logs/score_query/{shard}.log",
    wildcard_constraints:
        query=QUERY_NAMES,
    group:
        group_if_many("score_query", len(QUERY_SHARDS))
    conda:
        "../../envs/llm.yaml"
    threads: 8
    resources:
        mem_mb=lambda wildcards, attempt: 16000 * attempt,
        runtime=hours(4, len(QUERY_SHARDS)),
        gpu=1,
    params:
        library=library_version("score_query.py"),
    message:
        "Scoring the names for {wildcards.query}, shard {wildcards.shard}"
    script:
        "../scripts/score_query.py"


# Only with `annotate.graph`: cells of all shards are neighbours of each other.
rule refine_query:
    input:
        model=MODEL,
        scores=collect(
            "<annotated>/{{query}}/scores/{shard}.safetensors", shard=QUERY_SHARDS
        ),
        embeddings=collect(
            "<annotated>/{{query}}/embeddings/{shard}.safetensors", shard=QUERY_SHARDS
        ),
    output:
        refined=collect(
            "<annotated>/{{query}}/refined/{shard}.safetensors", shard=QUERY_SHARDS
        ),
    log:
        "<annotated>/{query}/logs/refine_query.log",
    wildcard_constraints:
        query=QUERY_NAMES,
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        # float64 probabilities of the cell types, several times
        mem_mb=lambda wildcards, input, attempt: (4000 + 10 * int(input.size_mb))
        * attempt,
        runtime=hours(4),
    params:
        library=library_version("refine_query.py"),
    message:
        "Refining the cell types of {wildcards.query} among similar cells"
    script:
        "../scripts/refine_query.py"


rule describe_query:
    input:
        model=MODEL,
        scores="<annotated>/{query}/scores/{shard}.safetensors",
        embeddings="<annotated>/{query}/embeddings/{shard}.safetensors",
        examples=collect("<annotated>/{name}/examples.parquet", name=EXAMPLES),
        example_embeddings=collect(
            "<annotated>/{name}/embeddings/{shard}.safetensors",
            name=EXAMPLES,
            shard=QUERY_SHARDS,
        ),
        refined=branch(
            config["annotate"]["graph"],
            then="<annotated>/{query}/refined/{shard}.safetensors",
            otherwise=[],
        ),
    output:
        descriptions="<annotated>/{query}/descriptions/{shard}.jsonl",
    log:
        "<annotated>/{query}/logs/describe_query/{shard}.log",
    wildcard_constraints:
        query=QUERY_NAMES,
    group:
        group_if_many("describe_query", len(QUERY_SHARDS))
    conda:
        "../../envs/report.yaml"
    threads: 2
    resources:
        mem_mb=mem_scores,
        runtime=hours(1, len(QUERY_SHARDS)),
    params:
        library=library_version("describe_query.py"),
    message:
        "Describing the cells of {wildcards.query}, shard {wildcards.shard}"
    script:
        "../scripts/describe_query.py"


rule cluster_query:
    input:
        counts="<annotated>/{query}/counts.h5ad",
        descriptions=collect(
            "<annotated>/{{query}}/descriptions/{shard}.jsonl", shard=QUERY_SHARDS
        ),
        tokens="<annotated>/{query}/tokens/{query}.parquet",
        qc="<annotated>/{query}/qc.parquet",
        embeddings=collect(
            "<annotated>/{{query}}/embeddings/{shard}.safetensors", shard=QUERY_SHARDS
        ),
        model=MODEL,
    output:
        clusters="<annotated>/{query}/clusters.parquet",
        table="<annotated>/{query}/clusters.tsv",
    log:
        "<annotated>/{query}/logs/cluster_query.log",
    wildcard_constraints:
        query=QUERY_NAMES,
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        # the counts twice
        mem_mb=lambda wildcards, input, attempt: (4000 + 16 * int(input.size_mb))
        * attempt,
        runtime=hours(4),
    params:
        seed=lookup("seed", within=config),
        library=library_version("cluster_query.py"),
    message:
        "Describing the clusters of {wildcards.query}"
    script:
        "../scripts/cluster_query.py"


rule explain_query:
    input:
        model=MODEL,
        language_model=QUERY_LANGUAGE_MODEL,
        tokens="<annotated>/{query}/tokens/{query}.parquet",
        genes="<annotated>/{query}/genes.parquet",
        descriptions=collect(
            "<annotated>/{{query}}/descriptions/{shard}.jsonl", shard=QUERY_SHARDS
        ),
        clusters="<annotated>/{query}/clusters.parquet",
    output:
        table="<annotated>/{query}/evidence.tsv",
        cells="<annotated>/{query}/evidence.parquet",
    log:
        "<annotated>/{query}/logs/explain_query.log",
    wildcard_constraints:
        query=QUERY_NAMES,
    conda:
        "../../envs/llm.yaml"
    threads: 2
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=hours(4),
    params:
        each_cell=config["annotate"]["evidence"],
        seed=lookup("seed", within=config),
        library=library_version("explain_query.py"),
    message:
        "Finding the genes that argue for the cell types of {wildcards.query}"
    script:
        "../scripts/explain_query.py"


rule annotate_query:
    input:
        files=lambda wildcards: local_files(QUERIES[wildcards.query]),
        descriptions=collect(
            "<annotated>/{{query}}/descriptions/{shard}.jsonl", shard=QUERY_SHARDS
        ),
        tokens="<annotated>/{query}/tokens/{query}.parquet",
        qc="<annotated>/{query}/qc.parquet",
        fit="<annotated>/{query}/fit.json",
        clusters="<annotated>/{query}/clusters.parquet",
        cluster_table="<annotated>/{query}/clusters.tsv",
        evidence="<annotated>/{query}/evidence.parquet",
        model=MODEL,
    output:
        annotated="<annotated>/{query}/annotated.h5ad",
        table="<annotated>/{query}/cells.tsv.gz",
        texts="<annotated>/{query}/descriptions.jsonl",
    log:
        "<annotated>/{query}/logs/annotate_query.log",
    wildcard_constraints:
        query=QUERY_NAMES,
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        # formats other than h5ad are in memory as a whole
        mem_mb=lambda wildcards, input, attempt: (4000 + 8 * int(input.size_mb))
        * attempt,
        runtime=hours(1),
    params:
        source=lambda wildcards: QUERIES[wildcards.query]["source"],
        graph=lookup("annotate/graph", within=config),
        library=library_version("annotate_query.py"),
    message:
        "Adding the descriptions to {wildcards.query}"
    script:
        "../scripts/annotate_query.py"


rule render_query:
    input:
        annotated="<annotated>/{query}/annotated.h5ad",
        qc="<annotated>/{query}/qc.parquet",
        fit="<annotated>/{query}/fit.json",
        cluster_table="<annotated>/{query}/clusters.tsv",
        evidence_table="<annotated>/{query}/evidence.tsv",
        embeddings=collect(
            "<annotated>/{{query}}/embeddings/{shard}.safetensors", shard=QUERY_SHARDS
        ),
        model=MODEL,
    output:
        page="<annotated>/{query}/annotate.html",
    log:
        "<annotated>/{query}/logs/render_query.log",
    wildcard_constraints:
        query=QUERY_NAMES,
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=hours(1),
    params:
        source=lambda wildcards: QUERIES[wildcards.query]["source"],
        seed=lookup("seed", within=config),
        library=library_version("render_query.py"),
    message:
        "Rendering the page of {wildcards.query}"
    script:
        "../scripts/render_query.py"
