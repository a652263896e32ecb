"""Contracts of the files between the stages: tables, tensors and text.

A contract is checked when a file is written and when it is read. Files are written atomically.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa

from cell2text.contracts.table import TableContract
from cell2text.contracts.tensor import TensorContract

TEXT, TEXTS = pa.string(), pa.list_(pa.string())
# The slots of a description that take one ontology term each.
TERM_SLOTS = ("cell_type", "tissue", "disease", "sex", "stage")
SPLITS = ("train", "validation", "test")
QC = TableContract(
    "the QC metrics of every cell",
    {
        "cell_id": TEXT,
        "dataset_id": TEXT,
        "donor": TEXT,
        "n_counts": pa.float64(),
        "n_genes": pa.int32(),
        "mitochondrial_percent": pa.float32(),
        "ribosomal_percent": pa.float32(),
        "doublet_score": pa.float32(),  # missing if the cell was not scored
        "kept": pa.bool_(),
        "reason": TEXT,
    },
    key="cell_id",
)
# One row per cell to fetch; unknown labels are "unknown".
CENSUS_CELLS = TableContract(
    "the cells chosen from the Census",
    {
        "soma_joinid": pa.int64(),
        "dataset_id": TEXT,
        "collection_id": TEXT,  # the dataset if it has none
        "donor_id": TEXT,
        "assay_ontology_term_id": TEXT,
        "cell_type_ontology_term_id": TEXT,
        "tissue_ontology_term_id": TEXT,
        "disease_ontology_term_id": TEXT,
        "sex_ontology_term_id": TEXT,
        "development_stage_ontology_term_id": TEXT,
    },
    key="soma_joinid",
)
_LABELS = {f"{slot}{suffix}": TEXT for slot in TERM_SLOTS for suffix in ("_id", "")}
SAMPLED_CELLS = TableContract(
    "the sampled cells",
    {
        "cell_id": TEXT,
        "dataset_id": TEXT,
        "donor": TEXT,
        "assay_id": TEXT,
        **_LABELS,
        "counts_hash": TEXT,  # the same for cells with identical counts of the same genes
        "n_counts": pa.float64(),
    },
    key="cell_id",
)
CELLS = TableContract("the corpus", {**SAMPLED_CELLS.columns, "split": TEXT}, key="cell_id")
PATHWAY_SCORES = TableContract("gene set scores", {"cell_id": TEXT}, key="cell_id", rest=pa.float32())
TERMS = TableContract(
    "the terms of each slot",
    {
        "slot": TEXT,
        "id": TEXT,
        "name": TEXT,
        "definition": TEXT,
        # Of cell types, tissues and diseases; otherwise null and empty. By is_a, for tissues also by part_of.
        "depth": pa.int32(),  # steps to the root of the ontology, along the shortest path
        "ancestors": TEXTS,  # all ids above the term, nearest first
    },
)
_SLOTS = {**{f"{slot}_id": TEXT for slot in TERM_SLOTS}, "pathway_ids": TEXTS}
DESCRIPTIONS = TableContract(
    "reference descriptions",
    {"cell_id": TEXT, "split": TEXT, **_SLOTS, "text": TEXT},
    key="cell_id",
)
GENES = TableContract(
    "the tokens of genes",
    {
        "token": pa.int32(),  # from 0, in the order of gene_id
        "gene_id": TEXT,  # Ensembl id, or else symbol
        "symbol": TEXT,
        "median": pa.float64(),  # of the non-zero counts per 10,000 over the training cells
        "datasets": TEXTS,  # those that measure the gene, with or without counts; empty in a fetched dictionary
    },
    key="gene_id",
)
# Genes in the folder of an encoder that it can read although no training study measures them.
UNSEEN = "unseen_genes.parquet"
GENE_TEXTS = TableContract(
    "texts about genes",
    {**GENES.columns, "text": TEXT, "sources": TEXTS},
    key="gene_id",
)
TOKENS = TableContract(
    "ranked genes",
    {
        "cell_id": TEXT,
        "tokens": pa.list_(pa.int32()),
        "expression": pa.list_(pa.float32()),
        "n_counts": pa.float64(),  # of all genes that the dataset measures
    },
    key="cell_id",
)
EMBEDDINGS = TensorContract(
    "gene embeddings",
    {
        "gene_vectors": (np.dtype("float16"), 3),
        "lengths": (np.dtype("int32"), 1),
        "pooled": (np.dtype("float32"), 2),
    },
    # Each cell seen again through random gene panels and at reduced depth, in the second dimension.
    optional={
        "cls": (np.dtype("float32"), 2),
        "view_gene_vectors": (np.dtype("float16"), 4),
        "view_lengths": (np.dtype("int32"), 2),
        "view_pooled": (np.dtype("float32"), 3),
        "view_cls": (np.dtype("float32"), 3),
    },
)
# Log-probabilities of the candidate names of each slot, (cells, candidates), in the order of the labels in
# cell2text.json: the language model's and the projector's. Slots without labels have none.
SCORES = TensorContract(
    "scores of candidate names",
    optional={
        **{slot: (np.dtype("float32"), 2) for slot in TERM_SLOTS},
        "pathway": (np.dtype("float32"), 3),  # (cells, programmes in a text, candidates)
        **{f"projector_{slot}": (np.dtype("float32"), 2) for slot in (*TERM_SLOTS, "pathway")},
        "novelty": (np.dtype("float32"), 1),  # only of cells of left-out studies
    },
)
# Probabilities of the cell types, in the order of the labels in cell2text.json.
REFINED = TensorContract("refined cell types", {"cell_type": (np.dtype("float32"), 2)})
# Output of a method. Generated descriptions and baselines share it, so one evaluation scores them all. Methods that do
# not calibrate their confidences leave the columns after those empty.
PREDICTIONS = TableContract(
    "predicted descriptions",
    {
        "cell_id": TEXT,
        "split": TEXT,
        **_SLOTS,
        "text": TEXT,
        "status": TEXT,
        **{f"{slot}_confidence": pa.float32() for slot in TERM_SLOTS},
        # The most specific term that is probable enough, and its probability; null is "not determined".
        **{f"{slot}_reported_id": TEXT for slot in TERM_SLOTS},
        **{f"{slot}_reported_confidence": pa.float32() for slot in TERM_SLOTS},
        "pathway_confidences": pa.list_(pa.float32()),  # of pathway_ids, in their order
        "novelty": pa.float32(),
        "novel": pa.bool_(),
    },
    key="cell_id",
)
# Cells that a user has labelled, to add their types to a model.
EXAMPLES = TableContract("labelled cells", {"cell_id": TEXT, "cell_type_id": TEXT}, key="cell_id")
CLUSTERS = TableContract("the clusters of cells", {"cell_id": TEXT, "cluster": TEXT}, key="cell_id")
# Symbols of genes, the weightiest first.
EVIDENCE = TableContract(
    "the evidence for the cell types of cells",
    {"cell_id": TEXT, "for_genes": TEXTS, "against_genes": TEXTS},
    key="cell_id",
)
# What a term is called, one row per name, synonym and definition.
NAMES = TableContract("the names of terms", {"slot": TEXT, "id": TEXT, "name": TEXT})
HISTORY = TableContract(
    "the training history",
    {
        "stage": TEXT,  # pretrain, align, openings or finetune
        "step": pa.int32(),
        "epoch": pa.int32(),
        "loss": pa.float64(),  # training, nats per token of text, masked gene (pretrain) or cell (align)
        "align_loss": pa.float64(),
        "validation_loss": pa.float64(),  # at the end of an epoch, otherwise NaN
        "validation_accuracy": pa.float64(),  # of the cell type, with teacher forcing; as validation_loss
        "learning_rate": pa.float64(),
        "tokens": pa.int64(),  # of the step, including prompts and soft tokens
        "seconds": pa.float64(),  # since the start of pretraining, alignment or fine-tuning
    },
)
# Slots of metrics.tsv besides those of a description: the cells whose type has training cells, and the other ones. They
# are scored apart if there are others.
SEEN, HELD_OUT = "cell_type_seen", "cell_type_held_out"
# metrics.tsv, one row per split, method, slot and metric. low and high are the ends of the 95% interval; resampled says
# whether donors or cells were drawn for it. difference is the fine-tuned model's value minus this method's, on the same
# resamples. It is empty for the model itself, and for metrics that are not scored on the same cells for every method.
METRICS = (
    *("split", "method", "slot", "metric", "value", "low", "high", "n", "resampled"),
    *("difference", "difference_low", "difference_high"),
)

# few_shot.tsv, one row per number of labelled cells per type, method, slot and metric. value is the mean over draws of
# cells to label; 95% of the draws are between low and high.
FEW_SHOT = ("shots", "method", "slot", "metric", "value", "low", "high")

# retrieval.tsv, one row per method, direction, slot and metric. chance is the expected value of a random order.
RETRIEVAL = ("method", "direction", "slot", "metric", "value", "low", "high", "chance", "n")


def datasets_of(cell_ids: Sequence[str]) -> pd.Series:
    """Return the dataset of each cell id, the part before the first ``|``."""
    return pd.Series(cell_ids, dtype=object).str.split("|", n=1).str[0]
