"""render and parse undo each other, for every term there is."""

import itertools
import random

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cell2text.contracts import TERM_SLOTS
from cell2text.descriptions import NORMAL, Slots, Terms, describe, parse, render
from cell2text.ontology import first_sentence, slot_terms

PATHWAYS = [
    ("pathway", "A", "interferon response", "genes that answer interferons"),
    ("pathway", "B", "Regulation of TP53", ""),
    ("pathway", "C", "Regulation of TP53 Activity", "what regulates it (in part)"),
]
TERMS = Terms(
    pd.concat(
        [slot_terms(slot) for slot in TERM_SLOTS]
        + [pd.DataFrame(PATHWAYS, columns=["slot", "id", "name", "definition"])]
    )
)
IDS = {slot: sorted(TERMS.name[slot]) for slot in TERM_SLOTS}


def assert_inverse(slots: Slots):
    slots = describe(slots, TERMS)
    parsed = parse(render(slots, TERMS), TERMS)
    assert parsed.slots == slots, render(slots, TERMS)
    assert parsed.status == ("parsed" if slots.cell_type else "failed")


@pytest.mark.parametrize("slot", TERM_SLOTS)
def test_every_term_survives_alone_and_among_others(slot):
    others = Slots("CL:0000236", None, "UBERON:0000178", "MONDO:0005105", "PATO:0000384", "HsapDv:0000003", ("B",))
    for term in IDS[slot]:
        assert_inverse(Slots(**{"cell_type": "CL:0000236", slot: term}))
        assert_inverse(Slots(**{**vars(others), slot: term}))


def test_every_combination_of_missing_slots_survives():
    chosen = random.Random(0)
    for known in itertools.product([False, True], repeat=len(TERM_SLOTS) + 1):
        for _ in range(50):
            terms = {slot: chosen.choice(IDS[slot]) for slot, there in zip(TERM_SLOTS, known, strict=False) if there}
            assert_inverse(Slots(**terms, pathways=("A", "C") if known[-1] else ()))


def test_text_reads_as_written_here():
    slots = Slots("CL:0000895", None, "UBERON:0000178", NORMAL, "PATO:0000383", "HsapDv:0000123", ("A",))
    assert render(slots, TERMS) == (
        "This is a naive thymus-derived CD4-positive, alpha-beta T cell. The sample is blood from a female donor "
        "at the 29-year-old stage, without known disease. Most active gene programmes: interferon response "
        "(genes that answer interferons)."
    )


@pytest.mark.parametrize(
    ("term", "start"),
    [
        ("CL:0000622", "This is an acinar cell."),
        ("CL:0000106", "This is a unipolar neuron."),
        ("CL:0000623", "This is a natural killer cell."),
        ("CL:0000682", "This is an M cell of gut."),
    ],
)
def test_article(term, start):
    assert render(Slots(term), TERMS) == start


def test_a_name_with_commas_is_read_whole_and_by_id():
    text = "This is a CD4-positive, CD25-positive, alpha-beta regulatory T cell. The sample is blood."
    assert parse(text, TERMS).slots.cell_type == "CL:0000792"


def test_spans_point_at_the_names():
    text = render(Slots("CL:0000236", None, "UBERON:0000178", "MONDO:0005105"), TERMS)
    spans = parse(text, TERMS).spans
    assert {slot: text[slice(*span)] for slot, span in spans.items()} == {
        "cell_type": "B cell",
        "tissue": "blood",
        "disease": "melanoma",
    }


@pytest.mark.parametrize(
    ("text", "status", "cell_type"),
    [
        ("", "failed", None),
        ("I do not know.", "failed", None),
        ("This is a purple cell. The sample is blood.", "failed", None),
        ("This is a B cell. The sample is nonsense.", "partial", "CL:0000236"),
        ("This is a B cell. By definition: it never en", "partial", "CL:0000236"),
        (
            "This is a B cell. The sample is blood. Most active gene programmes: dancing.",
            "partial",
            "CL:0000236",
        ),
        ("This is a B cell. and more", "partial", "CL:0000236"),
    ],
)
def test_texts_that_leave_the_grammar(text, status, cell_type):
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
