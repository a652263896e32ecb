"""The grammar of descriptions: renders slots as text and parses text into slots.

Names come first, in this order, because they distinguish cells; explanations follow, because names determine them::

    This is a {cell type}. The sample is {tissue} from a {sex} donor at the {stage}, with {disease}. Most active gene
    programmes: {name}; then {name}. Definitions. Cell type: {definition} Programme 1: {what it is}. Programme 2: ...

An unknown slot is omitted together with the words that introduce it; a stage or disease without tissue and sex is
that of "a donor". A name without a definition is not explained. Slots hold ontology ids; the text uses their names.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd

NORMAL = "PATO:0000461"  # the term that CELLxGENE uses for the absence of disease
PATHWAY = "pathway"
THEN = "; then "
DEFINITIONS = ". Definitions. "  # begins the explanations: no name contains it
_HEALTHY = "without known disease"
_NAMES = re.compile(
    r"(?:This is an? (?P<cell_type>.+?)\.(?= The sample is | Most active |$))?"
    r"(?: ?The sample is (?P<tissue>(?!from a |at the |with |without ).+?)?"
    r"(?: ?from a (?:(?P<sex>female|male) )?donor)?(?: ?at the (?P<stage>.+?))?"
    r"(?:, (?:with (?P<disease>.+?)|(?P<healthy>without known disease)))?\.(?= Most active |$))?"
    r"(?: ?Most active gene programmes: (?P<pathway>.+)\.)?"
)
_TEXT_ORDER = ("cell_type", "tissue", "sex", "stage", "disease", "healthy", PATHWAY)
_TERMINATOR = re.compile(r"(?:[.,;]| \w+)?")  # what ends a name: a mark, or the next word


@dataclass(frozen=True)
class Slots:
    """The content of a description: one ontology id per slot, or None if unknown.

    Parameters
    ----------
    cell_type, tissue, disease, sex, stage
        Ids from the Cell Ontology, UBERON, MONDO (or PATO:0000461, normal), PATO and HsapDv.
    pathways
        Ids of the most active gene sets, most active first.
    """

    cell_type: str | None = None
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
        ``"parsed"`` if the whole text follows the grammar, every name is a known term, and any explanations are those
        of the names; ``"partial"`` if something else is in it; ``"failed"`` if there is no cell type.
    names
        Slot, start and end of each known name in the text, in the order of the text; gene programmes, whose slot is
        ``"pathway"``, in the order of ``slots.pathways``.
    pieces
        Slot, start and end of the piece of each of these names, as :func:`pieces` cuts them.
    """

    slots: Slots
    status: str
    names: tuple[tuple[str, int, int], ...] = ()
    pieces: tuple[tuple[str, int, int], ...] = ()


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


def render(slots: Slots, terms: Terms) -> str:
    """Return the description of a cell: the names, then their explanations.

    Raises
    ------
    KeyError
        If an id is not among the terms of its slot.
    """
    return "".join(text for _, text in pieces(slots, terms)) + explanations(slots, terms)


def pieces(slots: Slots, terms: Terms) -> list[tuple[str, str]]:
    """Return the names part of a description, cut into one piece per name.

    A piece holds the words that introduce a name, the name, and what ends it: an article decides between names, and
    the full stop, comma or word after a name decides against longer names that begin with it. So the probability of a
    piece, given those before it, is that of its slot. Every piece but the first begins with a space, where tokens
    begin.

    Returns
    -------
    list of (str, str)
        Slot and text: the slots of ``contracts.TERM_SLOTS`` in the order of the text, then ``"pathway"`` for each gene
        programme. Together the texts are the names part of ``render(slots, terms)``.

    Raises
    ------
    KeyError
        If an id is not among the terms of its slot.

    Examples
    --------
    >>> [text for _, text in pieces(slots, terms)]
    ['This is a B cell.', ' The sample is blood from', ' a female donor at', ' the 45-year-old stage,',
     ' without known disease.', ' Most active gene programmes: hypoxia;', ' then glycolysis.']
    """
    cut: list[tuple[str, str]] = []
    for sentence in _sentences(slots, terms):
        for number, (slot, link, words) in enumerate(sentence):
            if number:
                cut[-1] = (cut[-1][0], cut[-1][1] + link)
                cut.append((slot, f" {words}"))
            else:
                cut.append((slot, f"{' ' if cut else ''}{link} {words}"))
        cut[-1] = (cut[-1][0], f"{cut[-1][1]}.")
    return cut


def _sentences(slots: Slots, terms: Terms) -> Iterator[list[tuple[str, str, str]]]:
    """Yield the sentences of the names part: for each name its slot, the words that link it to the last, and it."""
    if slots.cell_type:
        name = terms.name["cell_type"][slots.cell_type]
        yield [("cell_type", "This is", f"{_article(name)} {name}")]
    sample = []
    if slots.tissue:
        sample.append(("tissue", "", terms.name["tissue"][slots.tissue]))
    if slots.sex:
        sample.append(("sex", " from", f"a {terms.name['sex'][slots.sex]} donor"))
    donor = "" if sample else " from a donor"
    if slots.stage:
        sample.append(("stage", " at", f"the {terms.name['stage'][slots.stage]}"))
    if slots.disease:
        healthy = slots.disease == NORMAL
        sample.append(("disease", ",", _HEALTHY if healthy else f"with {terms.name['disease'][slots.disease]}"))
    if sample:
        slot, link, words = sample[0]
        yield [(slot, f"The sample is{donor}{link}", words), *sample[1:]]
    if slots.pathways:
        first, *others = (terms.name[PATHWAY][pathway] for pathway in slots.pathways)
        programmes = [(PATHWAY, ";", f"then {name}") for name in others]
        yield [(PATHWAY, "Most active gene programmes:", first), *programmes]


def explanations(slots: Slots, terms: Terms) -> str:
    """Return the part of a description after the names: what the cell type and the gene programmes are.

    Returns
    -------
    str
        Begins with a space; empty if no name has a definition.
    """
    meanings = {"Cell type": terms.definition["cell_type"][slots.cell_type]} if slots.cell_type else {}
    for number, pathway in enumerate(slots.pathways, 1):
        meanings[f"Programme {number}"] = terms.definition[PATHWAY][pathway]
    sentences = [f"{what}: {meaning.removesuffix('.')}." for what, meaning in meanings.items() if meaning]
    return DEFINITIONS[1:] + " ".join(sentences) if sentences else ""


def _article(name: str) -> str:
    """Return ``a`` or ``an``, depending on pronunciation: an acinar cell, a unipolar neuron, an NK cell."""
    first = re.split(r"[\s\-,/]", name, maxsplit=1)[0]
    if first.isupper() or (len(first) > 1 and first[:2].isupper()) or len(first) == 1:
        return "an" if first[0] in "AEFHILMNORSX8" else "a"  # spelt out: "an M", "a B"
    if re.match(r"(?i)(uni|eu|us|ur[aeio]|ub|ut)", first):
        return "a"
    return "an" if first[0].lower() in "aeiou8" or first == "Fc" else "a"


def parse(text: str, terms: Terms) -> Parsed:
    """Parse the slots of a description, with or without its explanations, which may be truncated.

    ``parse(render(slots)).slots == slots`` for every term of the ontologies. A name that is not a term leaves its
    slot empty.
    """
    stripped = text.strip()
    opening = find_opening(stripped)
    match = _NAMES.fullmatch(opening)
    found, complete = _find(match, terms) if match else ([], False)
    if "cell_type" not in {name.slot for name in found}:
        found = _find_some(opening, terms) or found
    ids = {name.slot: name.id for name in found if name.slot != PATHWAY}
    slots = Slots(**ids, pathways=tuple(name.id for name in found if name.slot == PATHWAY))
    complete = complete and stripped[len(opening) :] in ("", explanations(slots, terms))
    shift = len(text) - len(text.lstrip())
    return Parsed(
        slots,
        "failed" if slots.cell_type is None else "parsed" if complete else "partial",
        tuple((name.slot, name.start + shift, name.end + shift) for name in found),
        tuple((name.slot, name.piece_start + shift, name.piece_end + shift) for name in found),
    )


def find_opening(text: str) -> str:
    """Return the opening of a description: all its names, without the explanations, which may be truncated.

    Examples
    --------
    >>> find_opening("This is a B cell. The sample is blood. Definitions. Cell type: A lymphocyte of B lineage.")
    'This is a B cell. The sample is blood.'
    """
    end = text.find(DEFINITIONS)
    if end < 0:
        end = text.rfind(". ")
        if end < 0 or not DEFINITIONS.startswith(text[end:]):
            return text
    return text[: end + 1]


def find_cell_type(text: str) -> str:
    """Return the first sentence of a description, which names the cell type; empty if there is no cell type.

    Examples
    --------
    >>> find_cell_type("This is a B cell. The sample is blood.")
    'This is a B cell.'
    """
    match = _NAMES.fullmatch(find_opening(text))
    return text[: match.end("cell_type") + 1] if match and match["cell_type"] else ""


class _Name(NamedTuple):
    """A known name in a text: its slot and id, and start and end of the name and of its piece."""

    slot: str
    id: str
    start: int
    end: int
    piece_start: int
    piece_end: int


def _find_some(text: str, terms: Terms) -> list[_Name]:
    """Return the known names of a text that violates the grammar; none without a cell type."""
    first = re.match(r"This is an? (.+?)\.(?= |$)", text)
    cell_type = terms.id["cell_type"].get(first[1]) if first else None
    if cell_type is None:
        return []
    rest = re.search(r" (The sample is|Most active gene programmes:) ", text)
    match = _NAMES.fullmatch(text, rest.start()) if rest else None
    others, _ = _find(match, terms) if match else ([], False)
    return [_Name("cell_type", cell_type, *first.span(1), 0, first.end()), *others]


def _find(match: re.Match[str], terms: Terms) -> tuple[list[_Name], bool]:
    """Return the known names in a match of ``_NAMES``, and whether all names in it are known."""
    found, complete, piece = [], True, match.start()
    for slot in filter(match.group, _TEXT_ORDER):
        start = match.start(slot)
        for name in match[slot].split(THEN) if slot == PATHWAY else [match[slot]]:
            end = start + len(name)
            piece_end = _TERMINATOR.match(match.string, end + (len(" donor") if slot == "sex" else 0)).end()
            term = NORMAL if slot == "healthy" else terms.id.get(slot, {}).get(name)
            if term is None:
                complete = False
            else:
                found.append(_Name("disease" if slot == "healthy" else slot, term, start, end, piece, piece_end))
            start, piece = end + len(THEN), piece_end
    return found, complete
