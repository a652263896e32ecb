"""The grammar of descriptions: renders slots as text and parses text into slots.

A description has up to seven slots, in this order::

    This is a {cell type}. By definition: {definition} The sample is {tissue} from a {sex} donor at the
    {stage}, with {disease}. Most active gene programmes: {name} ({what it is}); then {name} ({what it is}).

An unknown slot is omitted together with the words that introduce it; a stage or disease without tissue and sex is
that of "a donor". Slots hold ontology ids; the text uses their names.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pandas as pd

from cell2text.contracts import TERM_SLOTS

NORMAL = "PATO:0000461"  # the term that CELLxGENE uses for the absence of disease
PATHWAY = "pathway"
_HEALTHY = "without known disease"
_THEN = "; then "
_GRAMMAR = re.compile(
    r"(?:This is an? (?P<cell_type>.+?)\."
    r"(?: By definition: (?P<definition>.+?\.))?(?= The sample | Most active |$))?"
    r"(?: ?The sample is (?P<tissue>(?!from a |at the |with |without ).+?)?"
    r"(?: ?from a (?:(?P<sex>female|male) )?donor)?(?: ?at the (?P<stage>.+?))?"
    r"(?:, (?:with (?P<disease>.+?)|(?P<healthy>without known disease)))?\.(?= Most active |$))?"
    r"(?: ?Most active gene programmes: (?P<pathways>.+)\.)?"
)


@dataclass(frozen=True)
class Slots:
    """The content of a description: one ontology id per slot, or None if unknown.

    Parameters
    ----------
    cell_type, tissue, disease, sex, stage
        Ids from the Cell Ontology, UBERON, MONDO (or PATO:0000461, normal), PATO and HsapDv.
    definition
        Definition of the cell type.
    pathways
        Ids of the most active gene sets, most active first.
    """

    cell_type: str | None = None
    definition: str | None = None
    tissue: str | None = None
    disease: str | None = None
    sex: str | None = None
    stage: str | None = None
    pathways: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parsed:
    """A parsed text.

    Parameters
    ----------
    slots
        The slots that could be read.
    status
        ``"parsed"`` if the whole text follows the grammar and every name is a known term; ``"partial"`` if some
        slot could not be read; ``"failed"`` if there is no cell type.
    spans
        Start and end of each term's name in the text, by slot.
    """

    slots: Slots
    status: str
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)


class Terms:
    """The terms of each slot: id, name and definition.

    Parameters
    ----------
    table
        Rows of ``contracts.TERMS``. The definition of a pathway is the phrase that explains the gene set.
    """

    def __init__(self, table: pd.DataFrame):
        self.name: dict[str, dict[str, str]] = {}
        self.id: dict[str, dict[str, str]] = {}
        self.definition: dict[str, dict[str, str | None]] = {}
        for slot, rows in table.groupby("slot", sort=True):
            self.name[slot] = dict(zip(rows["id"], rows["name"], strict=True))
            self.id[slot] = dict(zip(rows["name"], rows["id"], strict=True))
            self.definition[slot] = {
                key: text if isinstance(text, str) and text else None
                for key, text in zip(rows["id"], rows["definition"], strict=True)
            }
        # Longest first: "Regulation of TP53 Activity" must not be read as "Regulation of TP53".
        self.pathways_by_length = sorted(self.id.get(PATHWAY, {}), key=lambda name: (-len(name), name))


def with_definition(slots: Slots, terms: Terms) -> Slots:
    """Return the slots with the definition of their cell type filled in."""
    return replace(slots, definition=terms.definition["cell_type"].get(slots.cell_type))


def render(slots: Slots, terms: Terms) -> str:
    """Return the description of a cell.

    Raises
    ------
    KeyError
        If an id is not among the terms of its slot.
    """
    sentences = []
    if slots.cell_type:
        name = terms.name["cell_type"][slots.cell_type]
        sentences.append(f"This is {_article(name)} {name}.")
        if slots.definition:
            sentences.append(f"By definition: {slots.definition}")
    sample = _render_sample(slots, terms)
    if sample:
        sentences.append(f"The sample is {sample}.")
    if slots.pathways:
        pathways = _THEN.join(_render_pathway(pathway, terms) for pathway in slots.pathways)
        sentences.append(f"Most active gene programmes: {pathways}.")
    return " ".join(sentences)


def _render_sample(slots: Slots, terms: Terms) -> str:
    words = []
    if slots.tissue:
        words.append(terms.name["tissue"][slots.tissue])
    if slots.sex:
        words.append(f"from a {terms.name['sex'][slots.sex]} donor")
    elif not slots.tissue and (slots.stage or slots.disease):
        words.append("from a donor")
    if slots.stage:
        words.append(f"at the {terms.name['stage'][slots.stage]}")
    clauses = [" ".join(words)]
    if slots.disease:
        clauses.append(_HEALTHY if slots.disease == NORMAL else f"with {terms.name['disease'][slots.disease]}")
    return ", ".join(clauses)


def _render_pathway(pathway: str, terms: Terms) -> str:
    meaning = terms.definition[PATHWAY][pathway]
    return terms.name[PATHWAY][pathway] + (f" ({meaning})" if meaning else "")


def _article(name: str) -> str:
    """Return ``a`` or ``an``, depending on pronunciation: an acinar cell, a unipolar neuron, an NK cell."""
    first = re.split(r"[\s\-,/]", name, maxsplit=1)[0]
    if first.isupper() or (len(first) > 1 and first[:2].isupper()) or len(first) == 1:
        return "an" if first[0] in "AEFHILMNORSX8" else "a"  # spelt out: "an M", "a B"
    if re.match(r"(?i)(uni|eu|us|ur[aeio]|ub|ut)", first):
        return "a"
    return "an" if first[0].lower() in "aeiou8" or first == "Fc" else "a"


def parse(text: str, terms: Terms) -> Parsed:
    """Parse the slots of a description.

    ``parse(render(slots)).slots == slots`` for every term of the ontologies. A name that is not a term leaves its
    slot empty.
    """
    stripped = text.strip()
    match = _GRAMMAR.fullmatch(stripped)
    parsed = _parse_pieces(stripped, terms) if match is None else _read(match, terms)
    return replace(parsed, spans=_shift(parsed.spans, len(text) - len(text.lstrip())))


def find_deciding_words(text: str, slot: str, span: tuple[int, int]) -> tuple[int, int]:
    """Return start and end of the words that decide a slot: its name, and what introduces and ends it.

    An article decides between names, and "with" or "without" between a disease and none. The full stop, comma or word
    after a name decides against longer names that begin with it.

    Parameters
    ----------
    text
        A description.
    slot
        Name of the slot.
    span
        Start and end of its name, as in ``Parsed.spans``.

    Examples
    --------
    >>> text = "This is a B cell. The sample is blood from a donor, without known disease."
    >>> [text[slice(*find_deciding_words(text, *found))] for found in parse(text, terms).spans.items()]
    ['a B cell.', 'blood from', 'without known disease.']
    """
    start, end = span
    if slot in ("cell_type", "disease") and text[start:end] != _HEALTHY:
        start = text.rindex(" ", 0, start - 1) + 1
    after = re.compile(r"[.,]| \w+").match(text, end)
    return start, after.end() if after else end


def find_opening(text: str) -> str:
    """Return the first sentence of a description, which names the cell type; empty if there is no cell type.

    Examples
    --------
    >>> find_opening("This is a B cell. The sample is blood.")
    'This is a B cell.'
    """
    match = _GRAMMAR.fullmatch(text)
    return text[: match.end("cell_type") + 1] if match and match["cell_type"] else ""


def _parse_pieces(text: str, terms: Terms) -> Parsed:
    """Parse what is readable in a text that violates the grammar, if its first sentence names a cell type."""
    first = re.match(r"This is an? (?P<cell_type>.+?)\.(?= |$)", text)
    cell_type = terms.id["cell_type"].get(first["cell_type"]) if first else None
    if cell_type is None:
        return Parsed(Slots(), "failed")
    rest = re.search(r"The sample is .*", text)
    match = _GRAMMAR.fullmatch(rest[0]) if rest else None
    read = _read(match, terms) if match else Parsed(Slots(), "partial")
    spans = _shift(read.spans, rest.start()) if rest else {}
    spans["cell_type"] = first.span("cell_type")
    return Parsed(replace(read.slots, cell_type=cell_type), "partial", spans)


def _shift(spans: dict[str, tuple[int, int]], by: int) -> dict[str, tuple[int, int]]:
    return {slot: (start + by, end + by) for slot, (start, end) in spans.items()}


def _read(match: re.Match[str], terms: Terms) -> Parsed:
    found: dict[str, str | None] = {"definition": match["definition"]}
    spans: dict[str, tuple[int, int]] = {}
    complete = True
    for slot in TERM_SLOTS:
        name = match[slot]
        if name is None:
            continue
        found[slot] = terms.id.get(slot, {}).get(name)
        spans[slot] = match.span(slot)
        complete &= found[slot] is not None
    if match["healthy"]:
        found["disease"] = NORMAL
        spans["disease"] = match.span("healthy")
    pathways = _read_pathways(match["pathways"], terms) if match["pathways"] else ()
    complete &= None not in pathways
    slots = Slots(**found, pathways=tuple(pathway for pathway in pathways if pathway))
    if slots.cell_type is None:
        return Parsed(slots, "failed", spans)
    return Parsed(slots, "parsed" if complete else "partial", spans)


def _read_pathways(text: str, terms: Terms) -> Iterable[str | None]:
    """Return the id of each named gene set, or None if it is unknown."""
    return tuple(_read_pathway(piece, terms) for piece in text.split(_THEN))


def _read_pathway(piece: str, terms: Terms) -> str | None:
    if piece in terms.id.get(PATHWAY, {}):
        return terms.id[PATHWAY][piece]
    for name in terms.pathways_by_length:
        if piece.startswith(f"{name} ("):
            return terms.id[PATHWAY][name]
    return None
