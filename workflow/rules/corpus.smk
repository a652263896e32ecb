"""
The cells of the corpus, their split, and the reference text of each.

Inputs: <results>/cells/{dataset}.h5ad, gene sets. Outputs: <results>/corpus/.
"""


rule sample_cells:
    input:
        cells=collect("<results>/cells/{dataset}.h5ad", dataset=DATASETS),
    output:
        cells="<results>/corpus/sampled.parquet",
        diversity="<results>/corpus/diversity.json",
    log:
        "<logs>/sample_cells.log",
    benchmark:
        "<benchmarks>/sample_cells.jsonl"
    conda:
        "../../envs/cells.yaml"
    threads: 1
    resources:
        # one block of counts, and the labels of all cells
        mem_mb=lambda wildcards, input, attempt: (2000 + int(input.size_mb / 2))
        * attempt,
        runtime=hours(1),
    params:
        seed=lookup("seed", within=config),
        cells=lookup("sample/cells", within=config),
        shares=lookup("sample/shares", within=config),
        caps=lookup("sample/caps", within=config),
        library=library_version("sample_cells.py"),
    message:
        "Sampling the cells of the corpus"
    script:
        "../scripts/sample_cells.py"


rule split_donors:
    input:
        # a split given by the user is a table
        [config["split"]] if config["split"].endswith(".tsv") else [],
        cells="<results>/corpus/sampled.parquet",
        diversity="<results>/corpus/diversity.json",
    output:
        cells="<results>/corpus/cells.parquet",
        audit="<results>/corpus/audit.json",
    log:
        "<logs>/split_donors.log",
    benchmark:
        "<benchmarks>/split_donors.jsonl"
    conda:
        "../../envs/cells.yaml"
    threads: 1
    resources:
        # the labels of all cells, which are well compressed on disk
        mem_mb=lambda wildcards, input, attempt: (2000 + int(25 * input.size_mb))
        * attempt,
        runtime=hours(1),
    params:
        seed=lookup("seed", within=config),
        split=lookup("split", within=config),
        shares=lookup("split_shares", within=config),
        held_out=lookup("held_out_cell_types", within=config),
        library=library_version("split_donors.py"),
    message:
        "Splitting the corpus by {params.split}"
    script:
        "../scripts/split_donors.py"


rule score_pathways:
    input:
        cells="<results>/cells/{dataset}.h5ad",
        corpus="<results>/corpus/cells.parquet",
        gene_sets=config["pathways"]["gene_sets"],
    output:
        scores="<results>/corpus/pathways/{dataset}.parquet",
    log:
        "<logs>/score_pathways/{dataset}.log",
    benchmark:
        "<benchmarks>/score_pathways/{dataset}.jsonl"
    conda:
        "../../envs/cells.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=hours(2),
    params:
        min_genes=lookup("pathways/min_genes", within=config),
        library=library_version("score_pathways.py"),
    message:
        "Scoring gene sets in {wildcards.dataset}"
    script:
        "../scripts/score_pathways.py"


rule write_descriptions:
    input:
        corpus="<results>/corpus/cells.parquet",
        scores=collect("<results>/corpus/pathways/{dataset}.parquet", dataset=DATASETS),
        pathways=config["pathways"]["descriptions"] or [],
    output:
        descriptions="<results>/corpus/descriptions.parquet",
        terms="<results>/corpus/terms.parquet",
        pathways="<results>/corpus/pathways.json",
    log:
        "<logs>/write_descriptions.log",
    benchmark:
        "<benchmarks>/write_descriptions.jsonl"
    conda:
        "../../envs/cells.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=hours(1),
    params:
        min_active_share=lookup("pathways/min_active_share", within=config),
        per_cell=lookup("pathways/per_cell", within=config),
        library=library_version("write_descriptions.py"),
    message:
        "Writing the reference descriptions"
    script:
        "../scripts/write_descriptions.py"
