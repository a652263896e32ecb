"""
This part of the workflow converts studies in their authors' formats, and cells of CELLxGENE Census, to filtered raw
counts in a common format.

From here on, each Census shard is a dataset. The Census rules use the network unless the source is a copy on disk. If
the nodes of a cluster have no network, run the target `census` on a machine that has.

Inputs: the sources named in the datasets sheet.
Outputs: <results>/census/, <results>/raw/, <results>/cells/{dataset}.h5ad, <results>/qc/.
"""

# matches nothing if no row of the sheet has a Census source
CENSUS_NAMES = "|".join(map(re.escape, CENSUS)) or "(?!)"


# both rules could produce the file of a shard
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
        # 100 to 200 bytes per cell, for up to a hundred million cells in the Census
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
        # kept, unlike other raw counts, because fetching them again takes hours
        cells="<results>/raw/{census}-{shard}.h5ad",
    log:
        "<logs>/fetch_census_shard/{census}-{shard}.log",
    benchmark:
        "<benchmarks>/fetch_census_shard/{census}-{shard}.jsonl"
    wildcard_constraints:
        census=CENSUS_NAMES,
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
        orthologues=ORTHOLOGUES,
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
        # a block of counts, and the metadata of all cells
        mem_mb=lambda wildcards, input, attempt: (2000 + int(input.size_mb / 2))
        * attempt,
        runtime=hours(2),
    params:
        row=dataset_row,
        genes=READ_GENES,
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
        # a block of counts, or one part of the doublet scoring; independent of the number of cells
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
