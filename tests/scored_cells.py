"""Scores of candidate names drawn from known probabilities, and the other files that calibration reads."""

import numpy as np
import pandas as pd
from scipy.special import log_softmax

from cell2text.confidence.calibrate import calibrate
from cell2text.confidence.choose_thresholds import choose_thresholds
from cell2text.contracts import DESCRIPTIONS, EMBEDDINGS, SCORES, TERM_SLOTS, TERMS
from cell2text.files import write_json

LYMPHOCYTES = ["L"]
B_CELLS, T_CELLS = ["B", *LYMPHOCYTES], ["T", *LYMPHOCYTES]
ROWS = [
    ("cell_type", "BM", "memory B cell", "A B cell that remembers.", B_CELLS),
    ("cell_type", "BN", "naive B cell", "", B_CELLS),
    ("cell_type", "T4", "helper T cell", "", T_CELLS),
    ("cell_type", "T8", "cytotoxic T cell", "", T_CELLS),
    ("cell_type", "B", "B cell", "", LYMPHOCYTES),
    ("cell_type", "T", "T cell", "", LYMPHOCYTES),
    ("cell_type", "L", "lymphocyte", "", []),
    ("tissue", "UBERON:0000178", "blood", "", None),
    *[("pathway", f"P{i}", f"programme {i}", "", None) for i in range(8)],
]
LABELS = {
    "cell_type": ["BM", "BN", "T4", "T8"],
    "pathway": [f"P{i}" for i in range(8)],
    "tissue": ["UBERON:0000178"],
}


def terms_table():
    return pd.DataFrame(ROWS, columns=["slot", "id", "name", "definition", "ancestors"]).assign(depth=None)


def draw(cells, seed):
    """Return scores, true cell types and true gene programmes of cells.

    The language model is too confident by a temperature of 2, and the projector knows nothing of them. Programmes are
    drawn without replacement, and the language model knows their probabilities.
    """
    random = np.random.default_rng(seed)
    logits, programmes = random.normal(0, 2, (cells, 4)), random.normal(0, 2, (cells, 8))
    later = programmes.copy()
    later[np.arange(cells), programmes.argmax(axis=1)] = -np.inf
    scores = {
        "cell_type": log_softmax(2 * logits, axis=1),
        "tissue": np.zeros((cells, 1)),
        "pathway": log_softmax(np.stack([programmes, later], axis=1), axis=2),
        "projector_cell_type": log_softmax(random.normal(size=logits.shape), axis=1),
        "projector_tissue": np.zeros((cells, 1)),
        "projector_pathway": log_softmax(random.normal(size=programmes.shape), axis=1),
    }
    true = np.array(LABELS["cell_type"], dtype=object)[(logits + random.gumbel(size=logits.shape)).argmax(axis=1)]
    order = np.argsort(-(programmes + random.gumbel(size=programmes.shape)), axis=1)[:, :2]
    named = np.array(LABELS["pathway"], dtype=object)[order]
    return {name: tensor.astype(np.float32) for name, tensor in scores.items()}, true, named


def write_embeddings(path, cell_ids, pooled):
    tensors = {
        "gene_vectors": np.zeros((len(cell_ids), 0, pooled.shape[1]), np.float16),
        "lengths": np.zeros(len(cell_ids), np.int32),
        "pooled": pooled.astype(np.float32),
    }
    EMBEDDINGS.write(tensors, list(cell_ids), path)
    return str(path)


def write_run(folder, scores, true, named, training=50, labels=LABELS):
    """Write what ``calibrate`` reads: validation cells among training cells, with scores in two files."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    write_json({"labels": labels, "programmes_per_cell": 2}, folder / "model/cell2text.json")
    TERMS.write(terms_table(), folder / "terms.parquet")
    cells, random = len(true), np.random.default_rng(0)
    table = pd.DataFrame({"cell_id": [f"s|v{i}" for i in range(cells)], "cell_type_id": true}, dtype=object)
    table["pathway_ids"] = [list(one) for one in named]
    table["split"] = "validation"
    rest = pd.DataFrame({"cell_id": [f"s|t{i}" for i in range(training)], "cell_type_id": "BM", "split": "train"})
    rest["pathway_ids"] = [["P0"]] * training
    table = pd.concat([table, rest]).assign(text="", tissue_id="UBERON:0000178")
    table = table.iloc[random.permutation(len(table))].reindex(columns=list(DESCRIPTIONS.columns)).astype(object)
    slots = [f"{slot}_id" for slot in TERM_SLOTS]
    table[slots] = table[slots].where(table[slots].notna(), None)
    third = len(table) // 3
    DESCRIPTIONS.write_parts([table[:third], table[third:]], folder / "descriptions.parquet")
    order = random.permutation(cells)
    for name, rows in (("0", order[: cells // 2]), ("1", order[cells // 2 :])):
        part = {slot: tensor[rows] for slot, tensor in scores.items()}
        SCORES.write(part, [f"s|v{i}" for i in rows], folder / f"scores{name}.safetensors")
    pooled = random.normal(size=(len(table), 4))
    write_embeddings(folder / "embeddings.safetensors", table["cell_id"], pooled)
    return folder


def run_calibrate(folder, confidence=0.8, scores=("scores1", "scores0"), left_out=None, **settings):
    """Calibrate and choose thresholds, and return the paths of confidence and reference."""
    calibration, reference = str(folder / "calibration.json"), str(folder / "reference.safetensors")
    files = [str(folder / f"{name}.safetensors") for name in scores]
    model, descriptions = str(folder / "model"), str(folder / "descriptions.parquet")
    embeddings = [str(folder / "embeddings.safetensors")]
    calibrate(model, files, left_out, descriptions, embeddings, calibration, reference, seed=0, **settings)
    terms, output = str(folder / "terms.parquet"), str(folder / "confidence.json")
    choose_thresholds(calibration, model, files, left_out, descriptions, terms, output, confidence)
    return output, reference
