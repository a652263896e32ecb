"""The ontologies, offline: names, definitions, replaced ids, and the graph of live terms.

Source: the package cellxgene-ontology-guide, which carries the releases that the CELLxGENE schema names
(CL, UBERON, MONDO: CC-BY-4.0; UBERON: CC-BY-3.0; HsapDv: CC-BY-3.0; PATO: CC-BY-3.0).
"""

import re
from functools import cache

import pandas as pd
from cellxgene_ontology_guide.supported_versions import CXGSchema

from cell2text.descriptions import NORMAL
from cell2text.errors import InputError

# The ontology of each slot, and the ids that a slot may hold besides.
ONTOLOGIES = {"cell_type": "CL", "tissue": "UBERON", "disease": "MONDO", "sex": "PATO", "stage": "HsapDv"}
SEXES = {"PATO:0000383": "female", "PATO:0000384": "male"}
UNKNOWN = {"", "unknown", "na", "nan", "none"}


@cache
def live_terms(ontology: str) -> dict[str, dict]:
    """Return id -> entry (label, description, ancestors with distances) of an ontology's live terms."""
    terms = CXGSchema().ontology(ontology)
    return {
        key: entry
        for key, entry in sorted(terms.items())
        if key.startswith(f"{ontology}:") and not entry.get("deprecated")
    }


def slot_terms(slot: str) -> pd.DataFrame:
    """Return the terms that a slot may hold, as ``contracts.TERMS``."""
    if slot == "sex":
        rows = [(slot, key, name, "") for key, name in SEXES.items()]
    else:
        rows = [
            (
                slot,
                key,
                entry["label"],
                first_sentence(entry.get("description")) if slot == "cell_type" else "",
            )
            for key, entry in live_terms(ONTOLOGIES[slot]).items()
        ]
        if slot == "disease":
            rows.append((slot, NORMAL, "normal", ""))
    return pd.DataFrame(rows, columns=["slot", "id", "name", "definition"])


def first_sentence(definition: str | None) -> str:
    """Return the first sentence of a definition, with its full stop; empty where there is none.

    Examples
    --------
    >>> first_sentence("A cell of the islet, e.g. a beta cell. It secretes insulin.")
    'A cell of the islet, e.g. a beta cell.'
    """
    text = " ".join((definition or "").split())
    sentence = re.split(r"(?<=[^.][a-z0-9)\]]\.) (?=[A-Z])", text, maxsplit=1)[0]
    return sentence if not sentence or sentence.endswith(".") else f"{sentence}."


def name_of(slot: str, term: str | None, where: str) -> str | None:
    """Return the name of a slot's term; None for an unknown one.

    Raises
    ------
    InputError
        If the id is no live term of the slot's ontology.
    """
    if term is None or term.lower() in UNKNOWN:
        return None
    if slot == "sex" and term in SEXES:
        return SEXES[term]
    if slot == "disease" and term == NORMAL:
        return "normal"
    entry = live_terms(ONTOLOGIES[slot]).get(term)
    if entry is None:
        every = CXGSchema().ontology(ONTOLOGIES[slot]).get(term, {})
        now = every.get("replaced_by")
        fix = f"Use {now} instead" if now else f"Give a live {ONTOLOGIES[slot]} id"
        problem = f"{term} is deprecated" if every else f"{term} is no term of {ONTOLOGIES[slot]}"
        raise InputError(where, problem, fix)
    return entry["label"]
