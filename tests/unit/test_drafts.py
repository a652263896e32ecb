"""Drafts of texts: their number is that of the wrong names and two more, whatever the model writes."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from cell2text.generation.drafts import Drafts
from cell2text.grammar import Slots, Terms, render
from tests_terms import two_names_per_slot

TABLE = two_names_per_slot()
TERMS = Terms(TABLE)
LABELS = {slot: sorted(rows["id"]) for slot, rows in TABLE.groupby("slot")}
LIKELY = {slot: ids[0] for slot, ids in LABELS.items() if slot != "pathway"}  # what the projector scores highest
PROGRAMMES = LABELS["pathway"]


@pytest.fixture(scope="module")
def drafts(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    falling = {f"projector_{slot}": -np.arange(len(ids), dtype=float)[None] for slot, ids in LABELS.items()}
    return Drafts(LABELS, 2, TERMS, tokenizer, falling)


def write(drafts, text):
    """Return the tokens that a model writes whose most likely text is the given one, and the number of passes."""
    tokens, written, passes = drafts.tokenizer(text, add_special_tokens=False)["input_ids"], [], 0
    tokens.append(drafts.tokenizer.eos_token_id)
    while written != tokens:
        draft = drafts.draft(0, written)
        wrong = [
            place for place, pair in enumerate(zip(draft, tokens[len(written) :], strict=False)) if len(set(pair)) > 1
        ]
        right = min([*wrong, len(draft)])
        written, passes = tokens[: len(written) + right + 1], passes + 1
    return passes


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, 2),
        ({"cell_type": LABELS["cell_type"][2]}, 3),
        ({"disease": LABELS["disease"][1]}, 3),
        ({"pathways": (PROGRAMMES[0], PROGRAMMES[2])}, 3),
        # the second programme of the draft is then the most likely one that is not named yet
        ({"pathways": (PROGRAMMES[1], PROGRAMMES[0])}, 3),
        ({"cell_type": LABELS["cell_type"][3], "sex": LABELS["sex"][1], "pathways": tuple(PROGRAMMES[1:])}, 6),
    ],
)
def test_each_wrong_name_costs_a_draft(drafts, changes, most, monkeypatch):
    monkeypatch.setattr("cell2text.generation.drafts.AT_ONCE", 1000)
    slots = Slots(**LIKELY | {"pathways": tuple(PROGRAMMES[:2])} | changes)
    assert write(drafts, render(slots, TERMS)) <= most


@pytest.mark.parametrize("left_out", [["tissue"], ["sex"], ["stage"], ["disease"], ["sex", "stage"]])
def test_slots_that_the_model_leaves_out_cost_drafts_too(drafts, left_out, monkeypatch):
    monkeypatch.setattr("cell2text.generation.drafts.AT_ONCE", 1000)
    slots = Slots(**LIKELY | {"pathways": tuple(PROGRAMMES[:2])} | dict.fromkeys(left_out))
    assert write(drafts, render(slots, TERMS)) <= 3 + len(left_out)


def test_a_text_with_a_wrong_explanation_is_drafted_on_from_the_next_words(drafts):
    text = render(Slots(**LIKELY | {"pathways": tuple(PROGRAMMES[:2])}), TERMS)
    assert "lymphocyte of B lineage" in text
    wrong = text.replace("lymphocyte of B", "kill of B")
    assert write(drafts, wrong) <= 3 + 1 + 3 + 2  # the wrong word, the three after it, and what is cut at 16 tokens


def test_words_of_no_description_are_written_one_by_one(drafts):
    written = drafts.tokenizer("blood blood blood", add_special_tokens=False)["input_ids"]
    assert drafts.draft(0, written) == []
    assert write(drafts, "This is blood blood blood") >= 3
