"""
The projector is aligned to the words for a cell, then trained with the language model's adapter to write descriptions.

Inputs: <resources>/models/, <results>/embeddings/, <results>/corpus/descriptions.parquet.
Outputs: <results>/finetuned/. Checkpoints are in <results>/finetuned.checkpoints/ until training is finished.
"""

NODES, GPUS = config["finetune"]["nodes"], config["finetune"]["gpus"]
# The executor plugin then runs the job on the first node without srun, and the script starts srun itself.
ON_NODES = {
    "mpi": "srun",
    "tasks": NODES * GPUS,
    "tasks_per_gpu": 0,  # it would otherwise be that of tasks
    "slurm_extra": f"--ntasks-per-node={GPUS} --gpus-per-node={GPUS}",
}


rule finetune:
    input:
        language_model=LANGUAGE_MODEL,
        descriptions="<results>/corpus/descriptions.parquet",
        terms="<results>/corpus/terms.parquet",
        encoder="<results>/encoder",
        embeddings=EMBEDDINGS,
        tokens=TOKENS_ON_THE_FLY,
        genes=GENES_ON_THE_FLY,
    output:
        model=directory("<results>/finetuned"),
    log:
        "<logs>/finetune.log",
    benchmark:
        "<benchmarks>/finetune.jsonl"
    conda:
        "../../envs/llm.yaml"
    threads: 8
    resources:
        **(ON_NODES if NODES > 1 else {}),
        mem_mb=mem_language_model(
            GPUS,
            per_cell=5,
            cells_at_once=4096,
            optimiser=config["finetune"]["mode"] == "full",
        ),
        runtime=hours(12),
        gpu=NODES * GPUS,
        # only SLURM uses these
        cpus_per_gpu=8,
        nodes=NODES,
    params:
        seed=lookup("seed", within=config),
        projector=lookup("projector", within=config),
        finetune=lookup("finetune", within=config),
        on_the_fly=on_the_fly,
        library=library_version("finetune.py"),
    message:
        "Fine-tuning {input.language_model}"
    script:
        "../scripts/finetune.py"
