"""
The fine-tuned model and the baselines, scored on the same cells.

Inputs: <results>/generations/, <results>/corpus/, <results>/cells/, <results>/embeddings/.
Outputs: <results>/baselines/{name}.parquet, <results>/evaluation/.
"""


rule baseline_majority:
    input:
        descriptions="<results>/corpus/descriptions.parquet",
        terms="<results>/corpus/terms.parquet",
    output:
        predictions="<results>/baselines/majority.parquet",
    log:
        "<logs>/baseline_majority.log",
    benchmark:
        "<benchmarks>/baseline_majority.jsonl"
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=mem(2000, 1),
        runtime=hours(1),
    params:
        library=library_version("baseline_majority.py"),
    message:
        "Baseline: most frequent label"
    script:
        "../scripts/baseline_majority.py"


rule baseline_pca_logistic:
    input:
        descriptions="<results>/corpus/descriptions.parquet",
        terms="<results>/corpus/terms.parquet",
        corpus="<results>/corpus/cells.parquet",
        genes="<results>/genes.parquet",
        tokens=collect("<results>/tokens/{dataset}.parquet", dataset=DATASETS),
    output:
        predictions="<results>/baselines/pca_logistic.parquet",
    log:
        "<logs>/baseline_pca_logistic.log",
    benchmark:
        "<benchmarks>/baseline_pca_logistic.jsonl"
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        # the coordinates of all cells on 50 axes, twice
        mem_mb=mem(4000, 1.5),
        runtime=hours(1),
    params:
        seed=lookup("seed", within=config),
        library=library_version("baseline_pca_logistic.py"),
    message:
        "Baseline: logistic regression on principal components"
    script:
        "../scripts/baseline_pca_logistic.py"


rule baseline_knn:
    input:
        descriptions="<results>/corpus/descriptions.parquet",
        terms="<results>/corpus/terms.parquet",
        embeddings=EMBEDDINGS,
    output:
        predictions="<results>/baselines/knn.parquet",
    log:
        "<logs>/baseline_knn.log",
    benchmark:
        "<benchmarks>/baseline_knn.jsonl"
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        # copies of the pooled vectors, and the votes for each class
        mem_mb=mem(4000, 1.5 + POOLED / 64),
        runtime=hours(1),
    params:
        library=library_version("baseline_knn.py"),
    message:
        "Baseline: k nearest neighbours by pooled embedding"
    script:
        "../scripts/baseline_knn.py"


rule baseline_contrast:
    input:
        descriptions="<results>/corpus/descriptions.parquet",
        terms="<results>/corpus/terms.parquet",
        embeddings=EMBEDDINGS,
    output:
        lda="<results>/baselines/lda.parquet",
        contrast="<results>/baselines/contrast.parquet",
        permuted="<results>/baselines/contrast_permuted.parquet",
        head="<results>/contrast/head.safetensors",
    log:
        "<logs>/baseline_contrast.log",
    benchmark:
        "<benchmarks>/baseline_contrast.jsonl"
    conda:
        "../../envs/llm.yaml"
    threads: 1
    resources:
        # copies of the pooled vectors, and the probabilities of some 700 cell types
        mem_mb=mem(4000, 12 + POOLED / 32),
        runtime=hours(1),
    params:
        dimensions=lookup("few_labels/dimensions", within=config),
        temperature=lookup("few_labels/temperature", within=config),
        steps=lookup("few_labels/steps", within=config),
        seed=lookup("seed", within=config),
        library=library_version("baseline_contrast.py"),
    message:
        "Baselines: shrinkage LDA and contrastive head, with a control"
    script:
        "../scripts/baseline_contrast.py"


rule few_shot:
    input:
        descriptions="<results>/corpus/descriptions.parquet",
        embeddings=EMBEDDINGS,
    output:
        table="<results>/evaluation/few_shot.tsv",
    log:
        "<logs>/few_shot.log",
    benchmark:
        "<benchmarks>/few_shot.jsonl"
    # before the language model is trained: `few_labels.shots` may be refused
    priority: 1
    conda:
        "../../envs/llm.yaml"
    threads: 1
    resources:
        mem_mb=mem(4000, 12 + POOLED / 32),
        runtime=hours(4),
    params:
        shots=lookup("few_labels/shots", within=config),
        dimensions=lookup("few_labels/dimensions", within=config),
        temperature=lookup("few_labels/temperature", within=config),
        steps=lookup("few_labels/steps", within=config),
        seed=lookup("seed", within=config),
        library=library_version("few_shot.py"),
    message:
        "Scoring cell types from a few labelled cells per type"
    script:
        "../scripts/few_shot.py"


rule baseline_nearest_text:
    input:
        descriptions="<results>/corpus/descriptions.parquet",
        embeddings=EMBEDDINGS,
    output:
        predictions="<results>/baselines/nearest_text.parquet",
    log:
        "<logs>/baseline_nearest_text.log",
    benchmark:
        "<benchmarks>/baseline_nearest_text.jsonl"
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=mem(4000, 7 + POOLED / 64),
        runtime=hours(1),
    params:
        library=library_version("baseline_nearest_text.py"),
    message:
        "Baseline: text of the nearest training cell"
    script:
        "../scripts/baseline_nearest_text.py"


rule baseline_shuffled:
    input:
        model="<results>/finetuned",
        language_model=LANGUAGE_MODEL,
        corpus="<results>/corpus/cells.parquet",
        terms="<results>/corpus/terms.parquet",
        confidence="<results>/confidence/confidence.json",
        embeddings=EMBEDDINGS,
        encoder="<results>/encoder",
        tokens=TOKENS_ON_THE_FLY,
        genes=GENES_ON_THE_FLY,
    output:
        predictions="<results>/baselines/shuffled.parquet",
    log:
        "<logs>/baseline_shuffled.log",
    benchmark:
        "<benchmarks>/baseline_shuffled.jsonl"
    conda:
        "../../envs/llm.yaml"
    threads: 8
    resources:
        mem_mb=mem_language_model(),
        runtime=hours(4),
        gpu=1,
    params:
        seed=lookup("seed", within=config),
        batch_cells=lookup("generate/batch_cells", within=config),
        on_the_fly=on_the_fly,
        library=library_version("baseline_shuffled.py"),
    message:
        "Baseline: fine-tuned model with shuffled embeddings"
    script:
        "../scripts/baseline_shuffled.py"


rule baseline_greedy:
    input:
        model="<results>/finetuned",
        language_model=LANGUAGE_MODEL,
        corpus="<results>/corpus/cells.parquet",
        terms="<results>/corpus/terms.parquet",
        embeddings=EMBEDDINGS,
        encoder="<results>/encoder",
        tokens=TOKENS_ON_THE_FLY,
        genes=GENES_ON_THE_FLY,
    output:
        predictions="<results>/baselines/greedy.parquet",
    log:
        "<logs>/baseline_greedy.log",
    benchmark:
        "<benchmarks>/baseline_greedy.jsonl"
    conda:
        "../../envs/llm.yaml"
    threads: 8
    resources:
        mem_mb=mem_language_model(),
        runtime=hours(4),
        gpu=1,
    params:
        batch_cells=lookup("generate/batch_cells", within=config),
        max_new_tokens=lookup("generate/max_new_tokens", within=config),
        on_the_fly=on_the_fly,
        library=library_version("baseline_greedy.py"),
    message:
        "Comparison: fine-tuned model writes freely"
    script:
        "../scripts/baseline_greedy.py"


rule baseline_aligned:
    input:
        model="<results>/finetuned",
        language_model=LANGUAGE_MODEL,
        corpus="<results>/corpus/cells.parquet",
        terms="<results>/corpus/terms.parquet",
        embeddings=EMBEDDINGS,
        encoder="<results>/encoder",
        tokens=TOKENS_ON_THE_FLY,
        genes=GENES_ON_THE_FLY,
    output:
        predictions="<results>/baselines/aligned.parquet",
    log:
        "<logs>/baseline_aligned.log",
    benchmark:
        "<benchmarks>/baseline_aligned.jsonl"
    conda:
        "../../envs/llm.yaml"
    threads: 1
    resources:
        mem_mb=mem_language_model(cells_at_once=4096),
        runtime=hours(1),
        # the projector is small, but gene vectors computed on the fly need the encoder
        gpu=ENCODER_GPU if TOKENS_ON_THE_FLY else 0,
    params:
        on_the_fly=on_the_fly,
        library=library_version("baseline_aligned.py"),
    message:
        "Baseline: label nearest to the projector's soft tokens"
    script:
        "../scripts/baseline_aligned.py"


rule refine_on_graph:
    input:
        descriptions="<results>/corpus/descriptions.parquet",
        terms="<results>/corpus/terms.parquet",
        embeddings=EMBEDDINGS,
        predictions=branch(
            lambda wildcards: wildcards.method == FINE_TUNED,
            then=GENERATIONS,
            otherwise=["<results>/baselines/{method}.parquet"],
        ),
    output:
        refined="<results>/baselines/{method}_graph.parquet",
        control="<results>/baselines/{method}_random_graph.parquet",
    log:
        "<logs>/refine_on_graph/{method}.log",
    benchmark:
        "<benchmarks>/refine_on_graph/{method}.jsonl"
    wildcard_constraints:
        method="|".join(REFINABLE),
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        # three copies of the probabilities of some 700 cell types
        mem_mb=mem(4000, 20 + POOLED / 64),
        runtime=hours(4),
    params:
        neighbours=lookup("graph/neighbours", within=config),
        seed=lookup("seed", within=config),
        library=library_version("refine_on_graph.py"),
    message:
        "Refining the predictions of {wildcards.method} on a graph of cells"
    script:
        "../scripts/refine_on_graph.py"


rule baseline_bilevel:
    input:
        descriptions="<results>/corpus/descriptions.parquet",
        terms="<results>/corpus/terms.parquet",
        embeddings=EMBEDDINGS,
        encoder="<results>/encoder",
        tokens=TOKENS_ON_THE_FLY,
        genes=GENES_ON_THE_FLY,
    output:
        predictions="<results>/baselines/bilevel.parquet",
        control="<results>/baselines/bilevel_random_graph.parquet",
    log:
        "<logs>/baseline_bilevel.log",
    benchmark:
        "<benchmarks>/baseline_bilevel.jsonl"
    conda:
        "../../envs/llm.yaml"
    threads: 1
    resources:
        # three copies of the gene vectors of 1,024 cells, and as baseline_contrast
        mem_mb=mem(4000 + GENE_VECTORS / 80, 12 + POOLED / 32),
        runtime=hours(4),
        # both classifiers are small, but gene vectors computed on the fly need the encoder
        gpu=ENCODER_GPU if TOKENS_ON_THE_FLY else 0,
    params:
        neighbours=lookup("graph/neighbours", within=config),
        seed=lookup("seed", within=config),
        on_the_fly=on_the_fly,
        library=library_version("baseline_bilevel.py"),
    message:
        "Baseline: classifiers of genes and of cells that teach each other, with a control"
    script:
        "../scripts/baseline_bilevel.py"


rule evaluate:
    input:
        descriptions="<results>/corpus/descriptions.parquet",
        terms="<results>/corpus/terms.parquet",
        corpus="<results>/corpus/cells.parquet",
        generations=GENERATIONS,
        baselines=collect("<results>/baselines/{name}.parquet", name=COMPARED),
        model="<results>/finetuned",
        language_model=LANGUAGE_MODEL,
    output:
        metrics=ensure("<results>/evaluation/metrics.tsv", non_empty=True),
        per_class="<results>/evaluation/per_class.tsv",
        confusion="<results>/evaluation/confusion.tsv",
        calibration="<results>/evaluation/calibration.tsv",
        provenance="<results>/evaluation/provenance.json",
        config="<results>/config.json",
    log:
        "<logs>/evaluate.log",
    benchmark:
        "<benchmarks>/evaluate.jsonl"
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=mem(4000, 5),
        runtime=hours(1),
    params:
        seed=lookup("seed", within=config),
        bootstrap=lookup("evaluate/bootstrap", within=config),
        config_hash=hash_config(config),
        library=library_version("evaluate.py"),
    message:
        "Scoring all methods"
    script:
        "../scripts/evaluate.py"


rule compare:
    input:
        metrics="<results>/evaluation/metrics.tsv",
        provenance="<results>/evaluation/provenance.json",
    output:
        plot=report(
            "<results>/evaluation/comparison.svg",
            caption="../report/comparison.rst",
            category="Evaluation",
        ),
    log:
        "<logs>/compare.log",
    benchmark:
        "<benchmarks>/compare.jsonl"
    localrule: True
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=hours(1),
    params:
        library=library_version("compare.py"),
    message:
        "Plotting the scores of all methods"
    script:
        "../scripts/compare.py"
