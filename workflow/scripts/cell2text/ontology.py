"""Ontologies, offline: names, definitions, replaced ids, and the graph of live (not deprecated) terms.

Source: the package cellxgene-ontology-guide, which ships the releases that the CELLxGENE schema requires
(CL, UBERON, MONDO: CC-BY-4.0; UBERON: CC-BY-3.0; HsapDv, MmusDv: CC-BY-3.0; PATO: CC-BY-3.0).
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

# The ontology of each slot, and the ids that a slot may take from elsewhere.
ONTOLOGIES = {"cell_type": "CL", "tissue": "UBERON", "disease": "MONDO", "sex": "PATO", "stage": "HsapDv"}
# Slots with an ontology of their own in mice. Their names follow "mouse ", because many are those of humans, too.
MOUSE = {"stage": "MmusDv"}
SEXES = {"PATO:0000383": "female", "PATO:0000384": "male"}
UNKNOWN = {"", "unknown", "na", "nan", "none"}
# The root of each ontology with terms of different depth: cell, anatomical entity, disease.
ROOTS = {"cell_type": "CL:0000000", "tissue": "UBERON:0001062", "disease": "MONDO:0000001"}


@cache
def live_terms(ontology: str) -> dict[str, dict]:
    """Return id -> entry (label, description, ancestors with distances) for the live terms of an ontology."""
    terms = CXGSchema().ontology(ontology)
    return {
        key: entry
        for key, entry in sorted(terms.items())
        if key.startswith(f"{ontology}:") and not entry.get("deprecated")
    }


def slot_terms(slot: str, species: str = "human") -> pd.DataFrame:
    """Return the terms that a slot may take in cells of ``"human"`` or ``"mouse"``, as ``contracts.TERMS``."""
    if slot == "sex":
        rows = [(slot, key, name, "", None, []) for key, name in SEXES.items()]
    else:
        ontology = _ontology(slot, species)
        rows = [
            (
                slot,
                key,
                _label(ontology, entry),
                first_sentence(entry.get("description")) if slot == "cell_type" else "",
                *_place(slot, entry["ancestors"]),
            )
            for key, entry in live_terms(ontology).items()
        ]
        if slot == "disease":
            rows.append((slot, NORMAL, "normal", "", None, []))
    return pd.DataFrame(rows, columns=list(TERMS.columns)).astype({"depth": "Int32"})


def _ontology(slot: str, species: str) -> str:
    return MOUSE.get(slot, ONTOLOGIES[slot]) if species == "mouse" else ONTOLOGIES[slot]


def _label(ontology: str, entry: dict) -> str:
    return f"mouse {entry['label']}" if ontology in MOUSE.values() else entry["label"]


def _place(slot: str, distances: dict[str, int]) -> tuple[int | None, list[str]]:
    """Return depth and ancestors of a term, as in ``contracts.TERMS``.

    Parameters
    ----------
    slot
        The slot of the term.
    distances
        Steps to each ancestor, along the shortest path, by is_a, and by part_of in UBERON.
    """
    if slot not in ROOTS:
        return None, []
    # some terms are not below the root, such as the susceptibility to a disease
    depth = distances.get(ROOTS[slot], max(distances.values(), default=0))
    return depth, sorted(distances, key=lambda term: (distances[term], term))


def first_sentence(definition: str | None) -> str:
    """Return the first sentence of a definition, with its full stop; empty if there is no definition.

    Examples
    --------
    >>> first_sentence("A cell of the islet, e.g. a beta cell. It secretes insulin.")
    'A cell of the islet, e.g. a beta cell.'
    """
    text = " ".join((definition or "").split())
    sentence = re.split(r"(?<=[^.][a-z0-9)\]]\.) (?=[A-Z])", text, maxsplit=1)[0]
    return sentence if not sentence or sentence.endswith(".") else f"{sentence}."


def live_id(slot: str, term: str, where: str, species: str = "human") -> str:
    """Resolve an id to a live term; ``"unknown"`` if it carries no information.

    A deprecated id is followed to its replacement. CELLxGENE's conventions are resolved as well: the first of
    several diseases (``A || B``) is used, ``UBERON:… (organoid)`` becomes that tissue, and a cell type given as
    tissue (cell culture) becomes unknown. Each of these is logged.

    Parameters
    ----------
    slot
        One of ``contracts.TERM_SLOTS``.
    term
        An ontology id, or a word for unknown.
    where
        The file and its column, for messages.
    species
        ``"human"`` or ``"mouse"``.

    Raises
    ------
    InputError
        If the id is not a term of the slot's ontology, or is deprecated without a replacement.
    """
    given, ontology = term, _ontology(slot, species)
    term = re.sub(r" \([a-z ]+\)$", "", term.split(" || ")[0].strip())
    if term.lower() in UNKNOWN:
        return "unknown"
    if slot == "tissue" and re.match(r"(CL:|CVCL_)", term):
        log.warning("%s: %s is a cultured cell, not a tissue; set to unknown", where, given)
        return "unknown"
    entries, seen = CXGSchema().ontology(ontology), {term}
    while entries.get(term, {}).get("deprecated") and entries[term].get("replaced_by") not in {None, *seen}:
        term = entries[term]["replaced_by"]
        seen.add(term)
    if not _is_live(slot, term, ontology):
        problem = f"{given} is not a term of {ontology}"
        if entries.get(given, {}).get("deprecated"):
            problem = f"{given} is deprecated and {ontology} names no replacement"
        live = " or ".join(SEXES) if slot == "sex" else f"a {ontology} id that is not deprecated"
        raise InputError(where, problem, f"Use {live}")
    if term != given:
        log.warning("%s: %s is replaced by %s (%s)", where, given, term, name_of(slot, term, species=species))
    return term


def _is_live(slot: str, term: str, ontology: str) -> bool:
    if slot == "sex":
        return term in SEXES
    return term in live_terms(ontology) or (slot == "disease" and term == NORMAL)


def name_of(slot: str, term: str, where: str = "", species: str = "human") -> str:
    """Return the name of a slot's term, or of its replacement; ``"unknown"`` for an unknown term.

    Raises
    ------
    InputError
        As in ``live_id``.
    """
    term = live_id(slot, term, where, species)
    if term == "unknown":
        return term
    if slot == "disease" and term == NORMAL:
        return "normal"
    ontology = _ontology(slot, species)
    return SEXES[term] if slot == "sex" else _label(ontology, live_terms(ontology)[term])
