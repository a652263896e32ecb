"""What people call the terms of the training cells: names and synonyms, those of more general terms included."""

import re

import pandas as pd
from cellxgene_ontology_guide.supported_versions import CXGSchema

from cell2text.contracts import NAMES, TERM_SLOTS, TERMS
from cell2text.evaluation.baselines.slots import read_slots, training_rows
from cell2text.grammar import NORMAL, PATHWAY

HEALTHY = ("healthy", "without known disease")  # what a normal sample is called, besides normal


def collect_names(descriptions: str, terms: str, names: str) -> None:
    """Write names, synonyms and definitions of the labels of the training cells and of all terms above these.

    Parameters
    ----------
    descriptions, terms
        Files of ``contracts.DESCRIPTIONS`` and ``contracts.TERMS``.
    names
        File of ``contracts.NAMES`` to write.
    """
    training = training_rows(read_slots(descriptions))
    rows: list[tuple[str, str, str]] = []
    for slot, known in TERMS.read(terms).groupby("slot"):
        known = known.set_index("id")
        labels = training["pathway_ids"].explode() if slot == PATHWAY else training[f"{slot}_id"]
        labels = sorted(set(labels.dropna()))
        wanted = sorted({*labels, *known.loc[labels, "ancestors"].explode().dropna()} & set(known.index))
        for term in wanted:
            name, definition = known.loc[term, ["name", "definition"]]
            called = [name, *_synonyms(slot, term), definition]
            rows += [(slot, term, name) for name in dict.fromkeys(called) if isinstance(name, str) and name]
    NAMES.write(pd.DataFrame(rows, columns=list(NAMES.columns)), names)


def _synonyms(slot: str, term: str) -> list[str]:
    """Return the synonyms of a term, without what an ontology adds in brackets, such as ``(disease)``."""
    if term == NORMAL:
        return list(HEALTHY)
    if slot not in TERM_SLOTS:
        return []
    entry = CXGSchema().ontology(term.split(":")[0]).get(term, {})
    return [re.sub(r" \([a-z ]+\)$", "", name) for name in entry.get("synonyms", [])]
