"""The ontologies, offline: names, definitions, replaced ids, and the graph of live terms.

Source: the package cellxgene-ontology-guide, which carries the releases that the CELLxGENE schema names
(CL, UBERON, MONDO: CC-BY-4.0; UBERON: CC-BY-3.0; HsapDv: CC-BY-3.0; PATO: CC-BY-3.0).
"""

import logging
import re
from functools import cache

import pandas as pd
from cellxgene_ontology_guide.supported_versions import CXGSchema

from cell2text.contracts import TERMS
from cell2text.errors import InputError
from cell2text.grammar import NORMAL

log = logging.getLogger("cell2text.ontology")

# The ontology of each slot, and the ids that a slot may hold besides.
ONTOLOGIES = {"cell_type": "CL", "tissue": "UBERON", "disease": "MONDO", "sex": "PATO", "stage": "HsapDv"}
SEXES = {"PATO:0000383": "female", "PATO:0000384": "male"}
UNKNOWN = {"", "unknown", "na", "nan", "none"}
ANY_CELL = "CL:0000000"  # the root of the Cell Ontology


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
        rows = [(slot, key, name, "", None) for key, name in SEXES.items()]
    else:
        rows = [
            (
                slot,
                key,
                entry["label"],
                first_sentence(entry.get("description")) if slot == "cell_type" else "",
                # the package counts the shortest way to each ancestor
                entry["ancestors"].get(ANY_CELL, 0) if slot == "cell_type" else None,
            )
            for key, entry in live_terms(ONTOLOGIES[slot]).items()
        ]
        if slot == "disease":
            rows.append((slot, NORMAL, "normal", "", None))
    return pd.DataFrame(rows, columns=list(TERMS.columns)).astype({"depth": "Int32"})


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


def live_id(slot: str, term: str, where: str) -> str:
    """Return the live term that an id stands for; ``"unknown"`` where it tells nothing.

    A deprecated id is followed to its replacement. CELLxGENE's other ways are understood, too: of several
    diseases (``A || B``) the first is taken, ``UBERON:… (organoid)`` is that tissue, and a cell type in the place
    of a tissue (cell culture) is no tissue. Each of these is told in the log.

    Parameters
    ----------
    slot
        As in ``contracts.TERM_SLOTS``.
    term
        An ontology id, or a word for unknown.
    where
        The file and its column, for messages.

    Raises
    ------
    InputError
        If the id is no term of the slot's ontology, or a deprecated one without replacement.
    """
    given, ontology = term, ONTOLOGIES[slot]
    term = re.sub(r" \([a-z ]+\)$", "", term.split(" || ")[0].strip())
    if term.lower() in UNKNOWN:
        return "unknown"
    if slot == "tissue" and re.match(r"(CL:|CVCL_)", term):
        log.warning("%s: %s is a cultured cell and no tissue: unknown", where, given)
        return "unknown"
    every, seen = CXGSchema().ontology(ontology), {term}
    while every.get(term, {}).get("deprecated") and every[term].get("replaced_by") not in {None, *seen}:
        term = every[term]["replaced_by"]
        seen.add(term)
    if not _fits(slot, term):
        problem = f"{given} is no term of {ontology}"
        if every.get(given, {}).get("deprecated"):
            problem = f"{given} is deprecated and nothing in {ontology} replaces it"
        live = " or ".join(SEXES) if slot == "sex" else f"a live {ontology} id"
        raise InputError(where, problem, f"Give {live}")
    if term != given:
        log.warning("%s: %s is read as %s (%s)", where, given, term, name_of(slot, term))
    return term


def _fits(slot: str, term: str) -> bool:
    if slot == "sex":
        return term in SEXES
    return term in live_terms(ONTOLOGIES[slot]) or (slot == "disease" and term == NORMAL)


def name_of(slot: str, term: str, where: str = "") -> str:
    """Return the name of a slot's term, or of what replaces it; ``"unknown"`` for an unknown one.

    Raises
    ------
    InputError
        As ``live_id`` does.
    """
    term = live_id(slot, term, where)
    if term == "unknown":
        return term
    if slot == "disease" and term == NORMAL:
        return "normal"
    return SEXES[term] if slot == "sex" else live_terms(ONTOLOGIES[slot])[term]["label"]
