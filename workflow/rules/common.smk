import os
import re
import shlex
import sys
from functools import partial
from pathlib import Path
from uuid import uuid4

import pandas as pd

WORKFLOW = Path(str(workflow.current_basedir)).parent
sys.path.insert(0, str(WORKFLOW / "scripts"))
# Snakemake puts the path of Python into shell commands unquoted, where a space would split it
sys.executable = shlex.quote(sys.executable)

from cell2text.annotation.find_queries import (
    check_refinement,
    find_examples,
    find_queries,
    read_searched,
)
from cell2text.annotation.language_models import locate_language_model
from cell2text.annotation.pack_model import read_facts
from cell2text.config import check_config, check_files, cut_census, read_datasets
from cell2text.errors import InputError
from cell2text.evaluation.methods import (
    BASELINES,
    FEW_LABELS,
    FINE_TUNED,
    GREEDY,
    ON_GRAPH,
    REFINABLE,
)
from cell2text.files import check_ours
from cell2text.job import INVOCATION
from cell2text.models import fetch_encoder, fetch_language_model, fetch_resource
from cell2text.models.sources import check_target, fingerprint, is_local
from cell2text.provenance import hash_config, library_version

os.environ.setdefault(INVOCATION, uuid4().hex)

# Source and config key of the tables that `fetch_resource` brings, by their path below the folder of models.
RESOURCES = {}


def resource(source, where):
    """Return the path of a table, which is fetched unless it is local."""
    path = fetch_resource.locate_resource(source, "<resources>/models", where)
    if not is_local(source):
        RESOURCES[path.removeprefix("<resources>/models/")] = (source, where)
    return path


try:
    CONFIG_FILE = workflow.configfiles[-1]
    config |= check_config(config, WORKFLOW / "schemas/config.schema.yaml", CONFIG_FILE)
    check_files(config, CONFIG_FILE)
    models = Path(workflow.pathvars.apply("<resources>/models"))
    QUERIES, MODEL = find_queries(
        config, WORKFLOW / "schemas/datasets.schema.yaml", models
    )
    EXAMPLES = find_examples(config, QUERIES)
    SEARCHED = read_searched(config, MODEL)
    if QUERIES and config["annotate"]["graph"]:
        check_refinement(MODEL)
    QUERY_LANGUAGE_MODEL = []
    if MODEL:
        found = locate_language_model(read_facts(MODEL), models)
        if (models / found["name"]).exists():
            # absolute, like the model: it is used as it is, and its source may be gone
            QUERY_LANGUAGE_MODEL = str((models / found["name"]).resolve())
        else:
            config["language_model"] = found
            QUERY_LANGUAGE_MODEL = "<resources>/models/{}".format(found["name"])
    SHEET = read_datasets(config["datasets"], WORKFLOW / "schemas/datasets.schema.yaml")
    PIECES = cut_census(SHEET, config["shards"])
    # The table of orthologues: an input of all studies if one of them is of mice, or if the config names it.
    ORTHOLOGUES = []
    if "orthologues" in config["genes"] or any(
        row.get("species") == "mouse"
        for row in [*SHEET.values(), *QUERIES.values(), *EXAMPLES.values()]
    ):
        source = config["genes"].get("orthologues", fetch_resource.ORTHOLOGUES)
        ORTHOLOGUES = resource(source, fetch_resource.ORTHOLOGUES_KEY)
    # The files of texts about genes, for the encoder that reads them.
    TEXT_FILES = []
    if config["encoder"]["kind"] == "gene_text":
        TEXT_FILES = [
            resource(
                fetch_resource.TEXT_SOURCES.get(name, name), fetch_resource.TEXTS_KEY
            )
            for name in fetch_resource.sources_to_read(config["encoder"]["texts"])
        ]
except InputError as error:
    raise WorkflowError(str(error)) from None


pathvars:
    results="results/{}".format(config["run"]),
    logs="logs/{}".format(config["run"]),
    benchmarks="logs/{}/benchmarks".format(config["run"]),
    annotated=config["annotate"]["folder"],


NOTES = {name: row["notes"] for name, row in SHEET.items() if "notes" in row}
CENSUS = {name: SHEET[name]["source"] for name in PIECES}
# Files of gene vectors per row of the sheet. A Census is cut into datasets, which are cut again.
CUTS = config["shards"] ** (2 if len(PIECES) == len(SHEET) else 1)
for name, pieces in PIECES.items():
    SHEET |= dict.fromkeys(pieces, SHEET.pop(name))
DATASETS = sorted(SHEET)
library_version = partial(library_version, encoder=config["encoder"]["kind"])
READ_GENES = {"gene_table": config["genes"]["table"]} | {
    key: value
    for key, value in config["genes"].items()
    if key in ("min_counts_kept", "orthologue_sources")
}
SHARDS = [str(shard) for shard in range(config["shards"])]
EMBEDDINGS = collect(
    "<results>/embeddings/{dataset}/{shard}.safetensors", dataset=DATASETS, shard=SHARDS
)
SPLITS = ["validation", "test"]
# Jobs with a language model load it once for several shards if there are more than this.
MOST_PARTS = 16
PARTS = SHARDS[:MOST_PARTS]
GENERATIONS = collect(
    "<results>/generations/{split}/{part}.jsonl", split=SPLITS, part=PARTS
)
# each matches nothing without a query
QUERY_NAMES, EXAMPLE_NAMES, STUDY_NAMES = (
    "|".join(map(re.escape, names)) or "(?!)"
    for names in (QUERIES, EXAMPLES, QUERIES | EXAMPLES)
)
QUERY_SHARDS = [str(shard) for shard in range(config["annotate"]["shards"])]
COMPARED = [
    name for name in BASELINES if name != GREEDY or config["evaluate"]["greedy"]
]
REFINED = REFINABLE if config["graph"]["refine"] else ()
COMPARED += ON_GRAPH if REFINED else []
COMPARED += FEW_LABELS if config["few_labels"]["compare"] else []
FEW_SHOT = (
    ["<results>/evaluation/few_shot.tsv"] if config["few_labels"]["compare"] else []
)
RETRIEVER = (
    ["<results>/retrieval/retriever.safetensors"]
    if config["retrieval"]["train"]
    else []
)
REFINEMENT = ["<results>/confidence/refinement.json"] if REFINED else []
LANGUAGE_MODEL = "<resources>/models/{}".format(config["language_model"]["name"])
# Texts about genes, or nothing if the encoder reads none.
GENE_TEXTS = ["<results>/gene_texts.parquet"] if TEXT_FILES else []
# The folder of the fetched encoder, or nothing if the encoder is fitted.
FETCHED_ENCODER = [
    "<resources>/models/{}".format(Path(config["encoder"]["source"]).name)
    for kind in [config["encoder"]["kind"]]
    if kind == "geneformer"
]
# Snakemake deletes a folder before the job that writes it, so what is in its place is checked here.
try:
    if LANGUAGE_MODEL in FETCHED_ENCODER:
        raise InputError(
            f"{CONFIG_FILE}: language_model.name",
            f"the folder of the encoder is named {config['language_model']['name']}, too",
            "Set another name",
        )
    for folder, key in [
        (LANGUAGE_MODEL, "language_model"),
        *((folder, "encoder") for folder in FETCHED_ENCODER),
    ]:
        check_target(
            workflow.pathvars.apply(folder),
            config[key]["source"],
            f"{CONFIG_FILE}: {key}.source",
        )
    for folder in ("<results>/encoder", "<results>/finetuned", "<results>/model"):
        check_ours(workflow.pathvars.apply(folder))
except InputError as error:
    raise WorkflowError(str(error)) from None
# Ranked genes from which later rules compute gene vectors on the fly; nothing if the vectors are stored, or if the
# projector reads only pooled vectors, which are always stored.
TOKENS_ON_THE_FLY = (
    []
    if config["encoder"]["cache"] or config["projector"]["kind"] == "pooled"
    else collect("<results>/tokens/{dataset}.parquet", dataset=DATASETS)
)
GENES_ON_THE_FLY = ["<results>/genes.parquet"] if TOKENS_ON_THE_FLY else []
# Whether the encoder is a neural network; fitting and embedding by coexpression is numpy's work.
ENCODER_GPU = int(config["encoder"]["kind"] in ("geneformer", "pretrain"))
# Dimensions of a gene vector: at most the config's, those of gene texts, or those of the largest Geneformer. Those of a
# pooled vector: the coexpression encoder's holds two places of its cell. Values in a cell's gene vectors.
DIMENSIONS = {"coexpression": config["encoder"]["dimensions"], "gene_text": 128}.get(
    config["encoder"]["kind"], 1152
)
POOLED = DIMENSIONS * (2 if config["encoder"]["kind"] == "coexpression" else 1)
GENE_VECTORS = (
    0
    if config["projector"]["kind"] == "pooled"
    else config["encoder"]["top_k"] * DIMENSIONS
)


wildcard_constraints:
    dataset="|".join(map(re.escape, DATASETS)),
    shard=r"\d+",
    part=r"\d+",
    split="|".join(SPLITS),


def on_the_fly(wildcards, input):
    """Return the arguments for computing gene vectors on the fly; empty if no rule does."""
    if not TOKENS_ON_THE_FLY:
        return {}
    top_k = config["encoder"]["top_k"]
    return {
        "encoder": input.encoder,
        "tokens": list(input.tokens),
        "genes": input.genes[0],
        "top_k": top_k,
    }


def corpus_cells(input):
    """Return the number of cells of the corpus, at most: the config's, or what fits into the table of cells."""
    # a cell takes at least this many bytes: the hash of its counts, or its id and codes of its labels
    file, smallest = (
        (input.corpus, 18) if "corpus" in input.keys() else (input.descriptions, 4)
    )
    return min(config["sample"]["cells"], os.path.getsize(file) / smallest)


def mem(base, per_cell=0):
    """Return the memory in MB: a base, and some kB per cell of the corpus (docs/memory.md); more at each retry."""
    return (
        lambda wildcards, input, attempt: int(
            base + per_cell * corpus_cells(input) / 1024
        )
        * attempt
    )


def mem_embeddings(wildcards, input, attempt):
    """Return the memory in MB of jobs that have the vectors of one shard of a dataset in memory."""
    # a cell with 450 genes takes a kilobyte in the file of ranked genes
    cells = min(config["sample"]["cells"], os.path.getsize(input.tokens) / 1000)
    top_k = config["encoder"]["top_k"] if config["encoder"]["cache"] else 0
    views = 1 + config["encoder"]["views"]
    vectors = cells / config["shards"] * views * (2 * top_k * DIMENSIONS + 8 * POOLED)
    return int(4000 + vectors / 1e6) * attempt


def mem_scores(wildcards, input, attempt):
    """Return the memory in MB of jobs with the scores of one shard, and the descriptions of its cells."""
    return int(4000 + os.path.getsize(input.scores) / 5e4) * attempt


def mem_language_model(processes=1, per_cell=2, cells_at_once=0, optimiser=False):
    """Return the memory in MB of jobs with a language model.

    Each process loads the model through the host's memory, and reads the gene vectors of ``cells_at_once`` cells, if
    the projector takes any. Masters, moments, sums of gradients and the best weights take 12 times the model's file.
    """

    def amount(wildcards, input, attempt):
        model = sum(file.stat().st_size for file in os.scandir(input.language_model))
        vectors = cells_at_once * GENE_VECTORS * 4
        each = 6000 + per_cell * corpus_cells(input) / 1024
        each += (2 * model + 3 * vectors) / 1e6
        return int(processes * each + optimiser * 12 * model / 1e6) * attempt

    return amount


def hours(amount, shards=1):
    """Return a run time limit in minutes, doubled at each retry; of one of many shards, which is small, less."""
    minutes = 60 * amount
    if shards > 16:
        minutes = 10 + minutes * 16 / shards
    return lambda wildcards, attempt: int(minutes * 2 ** (attempt - 1))


def group_if_many(rule, jobs):
    """Return the group of a rule's jobs, so that a cluster gets several at once, or None if there are few."""
    return rule if jobs > 200 else None


def embeddings_of_part(wildcards):
    """Return the files of gene vectors of one part of the cells: every ``len(PARTS)``-th shard of each dataset."""
    shards = SHARDS[int(wildcards.part) :: len(PARTS)]
    return collect(
        "<results>/embeddings/{dataset}/{shard}.safetensors",
        dataset=DATASETS,
        shard=shards,
    )


def dataset_row(wildcards):
    return SHEET[wildcards.dataset]


def dataset_files(wildcards):
    return local_files(SHEET[wildcards.dataset])


def local_files(row):
    """Return the local files named in a row of the sheet."""
    return [
        row[key]
        for key in ("source", "label_table", "cell_table")
        if key in row and "://" not in row[key]
    ]


def annotated_files(wildcards):
    """Return all results for the user of each query."""
    if not QUERIES:
        raise WorkflowError(
            "config: query: is missing. Add query=my.h5ad model=results/pbmc68k/model to --config"
        )
    files = ("annotate.html", "annotated.h5ad", "cells.tsv.gz")
    files += ("clusters.tsv", "evidence.tsv", "descriptions.jsonl")
    return collect("<annotated>/{query}/{file}", query=QUERIES, file=files)


def searched_files(wildcards):
    """Return the result of the search in each query."""
    if not SEARCHED:
        raise WorkflowError(
            "config: input: is missing. Add input=my.h5ad model=results/pbmc68k/model to --config; query is then what to "
            "search for"
        )
    return collect("<annotated>/{query}/search/results.tsv", query=QUERIES)


def own_limits(wildcards):
    """Return the QC limits in the dataset's row of the sheet, which override those of the run."""
    row = SHEET[wildcards.dataset]
    return {key: float(row[key]) for key in config["qc"] if key in row}


def benchmarks_of_this_run(wildcards):
    """Return the benchmark files of each rule. The folder can have files of jobs that the config no longer has."""
    values = {
        "dataset": DATASETS,
        "shard": SHARDS,
        "part": PARTS,
        "split": SPLITS,
        "census": sorted(CENSUS),
        "method": REFINED,
        "name": [Path(model).name for model in [LANGUAGE_MODEL, *FETCHED_ENCODER]],
        "resource": list(RESOURCES),
    }
    names = [one.name for one in workflow.rules if one.benchmark]
    names.remove("render_report")  # its own cost is known only afterwards
    if not GENE_TEXTS:
        names.remove("describe_genes")
    return {name: expand(getattr(rules, name).benchmark, **values) for name in names}
