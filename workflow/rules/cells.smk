"""
This part of the workflow turns studies as their authors left them, and cells of CELLxGENE Census, into filtered
raw counts of one form.

Each Census shard is a dataset of its own from here on. The Census rules use the network, unless the source is a
copy on disk: where the nodes of a cluster have none, run the target `census` on a machine that has.

Inputs: the sources named in the sheet of datasets.
Outputs: <results>/census/, <results>/raw/, <results>/cells/{dataset}.h5ad, <results>/qc/.
"""


# matches nothing where no row of the sheet is of the Census
CENSUS_NAMES = "|".join(CENSUS) or "(?!)"


# both rules could make the file of a shard
ruleorder: fetch_census_shard > fetch_dataset


rule choose_census_cells:
    output:
        cells="<results>/census/{census}.parquet",
    log:
        "<logs>/choose_census_cells/{census}.log",
    benchmark:
        "<benchmarks>/choose_census_cells/{census}.jsonl"
    wildcard_constraints:
        census=CENSUS_NAMES,
    conda:
        "../../envs/census.yaml"
    threads: 4
    resources:
        # a hundred bytes or two for each cell of the Census, of which there may be a hundred million
        mem_mb=lambda wildcards, attempt: 24000 * attempt,
        runtime=hours(2),
    params:
        source=lambda wildcards: CENSUS[wildcards.census],
        wanted=lookup("census", within=config),
        sample=lookup("sample", within=config),
        seed=lookup("seed", within=config),
        library=library_version("choose_census_cells.py"),
    message:
        "Choosing cells of {params.source}"
    script:
        "../scripts/choose_census_cells.py"


rule fetch_census_shard:
    input:
        cells="<results>/census/{census}.parquet",
    output:
        # kept, unlike other raw counts: they cost hours to fetch again
        cells="<results>/raw/{census}-{shard}.h5ad",
    log:
        "<logs>/fetch_census_shard/{census}-{shard}.log",
    benchmark:
        "<benchmarks>/fetch_census_shard/{census}-{shard}.jsonl"
    wildcard_constraints:
        census=CENSUS_NAMES,
    # for the network: mistakes end the choice of cells before
    retries: 2
    conda:
        "../../envs/census.yaml"
    threads: 4
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=hours(12),
    params:
        source=lambda wildcards: CENSUS[wildcards.census],
        shard=lambda wildcards: int(wildcards.shard),
        shards=lookup("shards", within=config),
        library=library_version("fetch_census_shard.py"),
    message:
        "Fetching {wildcards.census}, shard {wildcards.shard}"
    script:
        "../scripts/fetch_census_shard.py"



rule fetch_dataset:
    input:
        files=dataset_files,
        gene_table=config["genes"]["table"] or [],
    output:
        cells=temp("<results>/raw/{dataset}.h5ad"),
    log:
        "<logs>/fetch_dataset/{dataset}.log",
    benchmark:
        "<benchmarks>/fetch_dataset/{dataset}.jsonl"
    conda:
        "../../envs/cells.yaml"
    threads: 1
    resources:
        # a block of cells, and what is known of each
        mem_mb=lambda wildcards, input, attempt: (2000 + int(input.size_mb / 2))
        * attempt,
        runtime=hours(2),
    params:
        row=dataset_row,
        genes={
            "gene_table": config["genes"]["table"],
            "min_counts_kept": config["genes"]["min_counts_kept"],
        },
        library=library_version("fetch_dataset.py"),
    message:
        "Reading {wildcards.dataset}"
    script:
        "../scripts/fetch_dataset.py"


rule filter_cells:
    input:
        cells="<results>/raw/{dataset}.h5ad",
    output:
        cells="<results>/cells/{dataset}.h5ad",
        table="<results>/qc/{dataset}.parquet",
        summary="<results>/qc/{dataset}.json",
        plot=report(
            "<results>/qc/{dataset}.svg",
            caption="../report/qc.rst",
            category="QC",
            labels={"dataset": "{dataset}"},
        ),
    log:
        "<logs>/filter_cells/{dataset}.log",
    benchmark:
        "<benchmarks>/filter_cells/{dataset}.jsonl"
    conda:
        "../../envs/cells.yaml"
    threads: 1
    resources:
        # a block of cells or those of one search for doublets, however many cells there are
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=hours(4),
    params:
        seed=lookup("seed", within=config),
        limits=lookup("qc", within=config),
        own_limits=own_limits,
        library=library_version("filter_cells.py"),
    message:
        "QC of {wildcards.dataset}"
    script:
        "../scripts/filter_cells.py"
