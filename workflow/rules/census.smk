"""
Cells of CELLxGENE Census: chosen by their labels alone, then their counts fetched in shards.

Each shard is a dataset of its own from here on. These jobs use the network, unless the source is a copy on
disk: where the nodes of a cluster have none, run the target `census` on a machine that has.

Inputs: the Census. Outputs: <results>/census/{census}.parquet, <results>/raw/{census}-{shard}.h5ad.
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
