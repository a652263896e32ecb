"""
The fine-tuned model describes each cell of a split.

Inputs: <results>/model/, <results>/embeddings/. Outputs: <results>/generations/{split}/{shard}.jsonl.
"""


rule generate_descriptions:
    input:
        model="<results>/model",
        language_model=LANGUAGE_MODEL,
        corpus="<results>/corpus/cells.parquet",
        terms="<results>/corpus/terms.parquet",
        embeddings=collect(
            "<results>/embeddings/{dataset}/{{shard}}.safetensors", dataset=DATASETS
        ),
        encoder="<results>/encoder",
        tokens=TOKENS_ON_THE_FLY,
        genes=GENES_ON_THE_FLY,
    output:
        # empty if the shard has no cell of the split
        generations="<results>/generations/{split}/{shard}.jsonl",
    log:
        "<logs>/generate_descriptions/{split}/{shard}.log",
    benchmark:
        "<benchmarks>/generate_descriptions/{split}/{shard}.jsonl"
    conda:
        "../../envs/llm.yaml"
    threads: 8
    resources:
        mem_mb=mem_language_model(),
        runtime=hours(4),
        gpu=1,
    params:
        seed=lookup("seed", within=config),
        generate=lookup("generate", within=config),
        on_the_fly=on_the_fly,
        library=library_version("generate_descriptions.py"),
    message:
        "Describing the {wildcards.split} cells, shard {wildcards.shard}"
    script:
        "../scripts/generate_descriptions.py"
