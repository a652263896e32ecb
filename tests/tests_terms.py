"""A few terms, for tests that need no ontology."""

import pandas as pd

from cell2text.grammar import Terms

ROWS = [
    ("cell_type", "CL:0000236", "B cell", "A lymphocyte of B lineage."),
    ("cell_type", "CL:0000623", "natural killer cell", "A lymphocyte that can kill."),
    ("cell_type", "CL:0001054", "CD14-positive monocyte", "A monocyte that expresses CD14."),
    ("tissue", "UBERON:0000178", "blood", ""),
    ("disease", "PATO:0000461", "normal", ""),
    ("sex", "PATO:0000383", "female", ""),
    ("stage", "HsapDv:0000123", "29-year-old stage", ""),
    ("pathway", "INTERFERON", "interferon response", "genes that answer interferons"),
]
MORE_ROWS = [
    ("cell_type", "CL:1", "B cell, mature", ""),
    ("tissue", "UBERON:1", "bone marrow", ""),
    ("disease", "MONDO:1", "lupus", ""),
    ("sex", "PATO:0000384", "male", ""),
    ("stage", "HsapDv:1", "45-year-old stage", ""),
    ("pathway", "CYTOTOXICITY", "cytotoxicity", ""),
    ("pathway", "HYPOXIA", "hypoxia", "genes that answer a lack of oxygen"),
]


def small_table() -> pd.DataFrame:
    return pd.DataFrame(ROWS, columns=["slot", "id", "name", "definition"]).assign(depth=None, ancestors=None)


def small_terms() -> Terms:
    return Terms(small_table())


def two_names_per_slot() -> pd.DataFrame:
    """Return the terms of a small table and more, so that there is a choice in every slot."""
    return pd.DataFrame(ROWS + MORE_ROWS, columns=["slot", "id", "name", "definition"]).assign(depth=None)
