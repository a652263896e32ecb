"""
From a study as its authors left it to filtered raw counts in one form.

Inputs: the sources named in the sheet of datasets. Outputs: <results>/cells/{dataset}.h5ad, <results>/qc/.
"""


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
