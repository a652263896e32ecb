"""Files of described cells, as several tests use them."""

import numpy as np
import pandas as pd

from cell2text.contracts import DESCRIPTIONS, EMBEDDINGS, TERMS
from cell2text.grammar import Slots, Terms, render
from cell2text.ontology import slot_terms

SLOTS = ("cell_type", "tissue", "disease", "sex", "stage")
BLOOD, LUNG, NORMAL, FEMALE, ADULT = (
    "UBERON:0000178",
    "UBERON:0002048",
    "PATO:0000461",
    "PATO:0000383",
    "HsapDv:0000258",
)
B_CELL, NK_CELL = "CL:0000236", "CL:0000623"


def write_corpus(folder, cell_types, splits, pathways, **slots):
    """Write descriptions and terms; slots that are not passed are unknown."""
    terms = pd.concat(
        [slot_terms(slot) for slot in SLOTS]
        + [
            pd.DataFrame(
                [("pathway", key, f"programme {key}", f"It does {key}.") for key in ("P1", "P2", "P3")],
                columns=["slot", "id", "name", "definition"],
            )
        ],
        ignore_index=True,
    )
    TERMS.write(terms, folder / "terms.parquet")
    n, names = len(cell_types), Terms(terms)
    table = pd.DataFrame({"cell_id": [f"study|{i}" for i in range(n)], "split": splits})
    for slot in SLOTS:
        table[f"{slot}_id"] = pd.Series(slots.get(slot, [None] * n), dtype=object)
    table["cell_type_id"], table["pathway_ids"] = pd.Series(cell_types, dtype=object), pathways
    filled = [Slots(*row[2:7], tuple(row.pathway_ids)) for row in table.itertuples(index=False)]
    table["text"] = [render(one, names) for one in filled]
    DESCRIPTIONS.write(table[list(DESCRIPTIONS.columns)], folder / "descriptions.parquet")
    return table, names


def write_embeddings(path, cell_ids, pooled):
    n = len(cell_ids)
    tensors = {
        "gene_vectors": np.zeros((n, 1, 1), np.float16),
        "lengths": np.ones(n, np.int32),
        "pooled": np.ascontiguousarray(pooled, dtype=np.float32),
    }
    EMBEDDINGS.write(tensors, list(cell_ids), path)
