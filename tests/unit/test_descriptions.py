"""parse inverts render for every term."""

import itertools
import random

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cell2text.contracts import TERM_SLOTS
from cell2text.grammar import (
    DEFINITIONS,
    NORMAL,
    Slots,
    Terms,
    explanations,
    find_cell_type,
    find_opening,
    parse,
    pieces,
    render,
)
from cell2text.ontology import first_sentence, slot_terms

PATHWAYS = [
    ("pathway", "A", "interferon response", "genes that answer interferons"),
    ("pathway", "B", "Regulation of TP53", ""),
    ("pathway", "C", "Regulation of TP53 Activity", "what regulates it (in part)."),
    ("pathway", "D", "E. coli: entry; then. (a; b).", "Entry; then exit. Definitions. Most active: none"),
    ("pathway", "E", "E", ""),
    ("pathway", "F", "Definitions. The sample is E;", "with lung."),
]
TABLE = pd.concat(
    [slot_terms(slot) for slot in TERM_SLOTS] + [pd.DataFrame(PATHWAYS, columns=["slot", "id", "name", "definition"])]
)
TERMS = Terms(TABLE)
TEXT_ORDER = ("cell_type", "tissue", "sex", "stage", "disease")
IDS = {slot: sorted(TERMS.name[slot]) for slot in TERM_SLOTS}


def cut(text: str, spans) -> list[tuple[str, str]]:
    return [(slot, text[start:end]) for slot, start, end in spans]


def assert_inverse(slots: Slots):
    text, named, rest = render(slots, TERMS), pieces(slots, TERMS), explanations(slots, TERMS)
    opening = "".join(piece for _, piece in named)
    assert text == opening + rest
    for read in (text, opening):
        parsed = parse(read, TERMS)
        assert parsed.slots == slots, read
        assert parsed.status == ("parsed" if slots.cell_type else "failed")
        assert cut(read, parsed.pieces) == named
        assert find_opening(read) == opening
        assert find_cell_type(read) == (named[0][1] if slots.cell_type else "")
    names = [
        "without known disease" if term == NORMAL else TERMS.name[slot][term]
        for slot, term in [(slot, getattr(slots, slot)) for slot in TEXT_ORDER]
        + [("pathway", p) for p in slots.pathways]
        if term
    ]
    assert [name for _, name in cut(text, parse(text, TERMS).names)] == names


@pytest.mark.parametrize("slot", TERM_SLOTS)
def test_every_term_survives_alone_and_with_other_slots(slot):
    others = Slots("CL:0000236", "UBERON:0000178", "MONDO:0005105", "PATO:0000384", "HsapDv:0000003", ("B",))
    for term in IDS[slot]:
        assert_inverse(Slots(**{"cell_type": "CL:0000236", slot: term}))
        assert_inverse(Slots(**{**vars(others), slot: term}))


def test_every_combination_of_missing_slots_survives():
    chosen = random.Random(0)
    for known in itertools.product([False, True], repeat=len(TERM_SLOTS) + 1):
        for _ in range(50):
            terms = {
                slot: chosen.choice(IDS[slot]) for slot, present in zip(TERM_SLOTS, known, strict=False) if present
            }
            assert_inverse(Slots(**terms, pathways=("A", "C") if known[-1] else ()))


COMPLETE = Slots("CL:0000895", "UBERON:0000178", NORMAL, "PATO:0000383", "HsapDv:0000123", ("A", "B"))


def test_a_complete_description():
    assert [slot for slot, _ in pieces(COMPLETE, TERMS)] == [*TEXT_ORDER, "pathway", "pathway"]
    assert [text for _, text in pieces(COMPLETE, TERMS)] == [
        "This is a naive thymus-derived CD4-positive, alpha-beta T cell.",
        " The sample is blood from",
        " a female donor at",
        " the 29-year-old stage,",
        " without known disease.",
        " Most active gene programmes: interferon response;",
        " then Regulation of TP53.",
    ]
    assert explanations(COMPLETE, TERMS) == (
        f" Definitions. Cell type: {TERMS.definition['cell_type']['CL:0000895']} "
        "Programme 1: genes that answer interferons."
    )
    assert explanations(Slots(pathways=("B", "E", "C")), TERMS) == (
        " Definitions. Programme 3: what regulates it (in part)."
    )
    assert explanations(Slots(None, "UBERON:0000178", pathways=("B",)), TERMS) == ""
    assert_inverse(COMPLETE)


def test_explanations_may_be_truncated_or_wrong():
    text, names = render(COMPLETE, TERMS), len(find_opening(render(COMPLETE, TERMS)))
    for end in range(names, len(text)):
        parsed = parse(text[:end], TERMS)
        assert (parsed.slots, len(find_opening(text[:end]))) == (COMPLETE, names)
        assert parsed.status == ("parsed" if len(text[:end].strip()) == names else "partial")
    for wrong in (text.replace("interferons.", "interferon."), text + " more", text.replace(": A", ": B")):
        assert (parse(wrong, TERMS).slots, parse(wrong, TERMS).status) == (COMPLETE, "partial")


def test_no_name_of_an_ontology_contains_the_words_between_parts():
    ontology = TABLE[TABLE["slot"] != "pathway"]
    for words in (DEFINITIONS, " The sample is ", " Most active gene programmes: "):
        assert not ontology["name"].str.contains(words, regex=False).any()


@pytest.mark.parametrize(
    ("term", "start"),
    [
        ("CL:0000622", "This is an acinar cell."),
        ("CL:0000106", "This is a unipolar neuron."),
        ("CL:0000623", "This is a natural killer cell."),
        ("CL:0000682", "This is an M cell of gut."),
        ("CL:0000084", "This is a T cell."),
        ("CL:0000598", "This is a pyramidal neuron."),
        ("CL:0000232", "This is an erythrocyte."),
        ("CL:0000066", "This is an epithelial cell."),
        ("CL:0000255", "This is a eukaryotic cell."),
        ("CL:0000731", "This is a urothelial cell."),
        ("CL:0000987", "This is an IgA plasma cell."),
        ("CL:0002496", "This is an intraepithelial lymphocyte."),
        ("CL:0000748", "This is a retinal bipolar neuron."),
        ("CL:0000749", "This is an ON-bipolar cell."),
        ("CL:0000551", "This is a unimodal nocireceptor."),
        ("CL:0002030", "This is an Fc-epsilon RIalpha-high basophil progenitor cell."),
    ],
)
def test_article(term, start):
    assert find_opening(render(Slots(term), TERMS)) == start


# Tissue, disease, sex and stage, each known or not; cell type and pathways have their own sentences.
SAMPLES = {
    (): "",
    ("tissue",): "The sample is lung.",
    ("disease",): "The sample is from a donor, with melanoma.",
    ("sex",): "The sample is from a male donor.",
    ("stage",): "The sample is from a donor at the 80-year-old stage.",
    ("tissue", "disease"): "The sample is lung, with melanoma.",
    ("tissue", "sex"): "The sample is lung from a male donor.",
    ("tissue", "stage"): "The sample is lung at the 80-year-old stage.",
    ("disease", "sex"): "The sample is from a male donor, with melanoma.",
    ("disease", "stage"): "The sample is from a donor at the 80-year-old stage, with melanoma.",
    ("sex", "stage"): "The sample is from a male donor at the 80-year-old stage.",
    ("tissue", "disease", "sex"): "The sample is lung from a male donor, with melanoma.",
    ("tissue", "disease", "stage"): "The sample is lung at the 80-year-old stage, with melanoma.",
    ("tissue", "sex", "stage"): "The sample is lung from a male donor at the 80-year-old stage.",
    ("disease", "sex", "stage"): "The sample is from a male donor at the 80-year-old stage, with melanoma.",
    ("tissue", "disease", "sex", "stage"): (
        "The sample is lung from a male donor at the 80-year-old stage, with melanoma."
    ),
}
SAMPLE_IDS = {
    "tissue": "UBERON:0002048",
    "disease": "MONDO:0005105",
    "sex": "PATO:0000384",
    "stage": "HsapDv:0000206",
}


@pytest.mark.parametrize("known", SAMPLES, ids="-".join)
def test_the_text_of_every_combination_of_missing_slots(known):
    slots = Slots(**{slot: SAMPLE_IDS[slot] for slot in known})
    sample = SAMPLES[known]
    assert render(slots, TERMS) == sample
    assert parse(render(slots, TERMS), TERMS).slots == slots
    healthy = Slots(**{**vars(slots), "disease": NORMAL}) if "disease" in known else slots
    healthy_sample = sample.replace("with melanoma", "without known disease")
    for cell_type, pathways in itertools.product([None, "CL:0000622"], [(), ("B",), ("C", "A")]):
        full = Slots(**{**vars(healthy), "cell_type": cell_type, "pathways": pathways})
        programmes = {
            (): "",
            ("B",): "Most active gene programmes: Regulation of TP53.",
            ("C", "A"): "Most active gene programmes: Regulation of TP53 Activity; then interferon response.",
        }[pathways]
        sentences = ["This is an acinar cell." if cell_type else "", healthy_sample, programmes]
        assert find_opening(render(full, TERMS)) == " ".join(filter(None, sentences))
        assert_inverse(full)


any_slots = st.builds(
    Slots,
    **{slot: st.none() | st.sampled_from(IDS[slot]) for slot in TERM_SLOTS},
    pathways=st.lists(st.sampled_from("ABCDEF"), unique=True, max_size=4).map(tuple),
)


@settings(max_examples=500, deadline=None)
@given(any_slots)
def test_any_slots_survive(slots):
    named = [text for _, text in pieces(slots, TERMS)]
    assert all(text[0] == " " and text[1] != " " for text in named[1:])
    assert all(text[-1] in ".,;" or text.split()[-1] in ("from", "at") for text in named)
    assert not named or (named[-1][-1] == "." and named[0][0] != " ")
    assert_inverse(slots)


def test_a_name_with_commas_is_parsed_whole():
    text = "This is a CD4-positive, CD25-positive, alpha-beta regulatory T cell. The sample is blood."
    assert parse(text, TERMS).slots.cell_type == "CL:0000792"


def test_names_that_are_not_terms_have_no_piece():
    text = " This is a B cell. The sample is nonsense, with melanoma. Most active gene programmes: dancing; then E."
    parsed = parse(text, TERMS)
    assert (parsed.slots, parsed.status) == (Slots("CL:0000236", disease="MONDO:0005105", pathways=("E",)), "partial")
    assert cut(text, parsed.names) == [("cell_type", "B cell"), ("disease", "melanoma"), ("pathway", "E")]
    assert cut(text, parsed.pieces) == [
        ("cell_type", "This is a B cell."),
        ("disease", " with melanoma."),
        ("pathway", " then E."),
    ]


def test_names_are_read_from_text_that_violates_the_grammar():
    text = "This is a B cell. So it is. Most active gene programmes: Regulation of TP53 Activity. Definit"
    parsed = parse(text, TERMS)
    assert (parsed.slots, parsed.status) == (Slots("CL:0000236", pathways=("C",)), "partial")
    assert cut(text, parsed.pieces) == [
        ("cell_type", "This is a B cell."),
        ("pathway", " Most active gene programmes: Regulation of TP53 Activity."),
    ]


@pytest.mark.parametrize(
    ("text", "status", "cell_type"),
    [
        ("", "failed", None),
        ("I do not know.", "failed", None),
        ("This is a purple cell. The sample is blood.", "failed", None),
        ("This is a B cell. The sample is nonsense.", "partial", "CL:0000236"),
        ("This is a B cell. Definitions. Cell type: it never en", "partial", "CL:0000236"),
        (
            "This is a B cell. The sample is blood. Most active gene programmes: dancing.",
            "partial",
            "CL:0000236",
        ),
        ("This is a B cell. and more", "partial", "CL:0000236"),
        ("This is a B cell. The sample is bloodfrom a male donor.", "parsed", "CL:0000236"),
        ("This is a B cell. Most active gene programmes: ; then E.", "partial", "CL:0000236"),
    ],
)
def test_texts_that_violate_the_grammar(text, status, cell_type):
    parsed = parse(text, TERMS)
    assert (parsed.status, parsed.slots.cell_type) == (status, cell_type)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_can_be_parsed(text):
    assert parse(text, TERMS).status in {"parsed", "partial", "failed"}


def test_first_sentence_keeps_abbreviations():
    assert first_sentence("A cell, e.g. of T. brucei. It swims.") == "A cell, e.g. of T. brucei."
    assert first_sentence(None) == ""
    assert first_sentence("No stop") == "No stop."
