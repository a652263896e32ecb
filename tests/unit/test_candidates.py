"""Candidate names of each slot as tokens, and their prefix tree."""

import math
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cell2text.generation.candidates import Candidates, find_candidates
from cell2text.generation.tree import Tree
from cell2text.grammar import Slots, Terms, pieces, render
from tests_terms import two_names_per_slot
from tiny_model import WORDS

TABLE = two_names_per_slot()
TERMS = Terms(TABLE)
LABELS = {slot: sorted(rows["id"]) for slot, rows in TABLE.groupby("slot")}


def sentencepiece_like():
    """A tokenizer that, like Llama 2's, marks words with an underline and puts one before the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # no merge across words, as in SentencePiece
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([*WORDS * 3, *TABLE["name"], "; at 0123456789"], trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def word_pieces():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator([*WORDS * 3, *TABLE["name"], "; at 0123456789"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", unk_token="[UNK]")


@pytest.fixture(params=["byte level", "sentencepiece", "word pieces"])
def tokenizer(request, tiny_model):
    if request.param == "byte level":
        return AutoTokenizer.from_pretrained(tiny_model)
    return sentencepiece_like() if request.param == "sentencepiece" else word_pieces()


def test_steps_are_the_labelled_slots_in_the_order_of_the_text_and_one_per_programme(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    steps = find_candidates(LABELS, 2, TERMS, tokenizer)
    assert [step.slot for step in steps] == ["cell_type", "tissue", "sex", "stage", "disease", "pathway", "pathway"]
    assert all(list(step.ids) == LABELS[step.slot] for step in steps)
    texts = [[tokenizer.decode(tokens) for tokens in step.tokens] for step in steps]
    assert texts[0] == [
        "This is a B cell.",
        "This is a natural killer cell.",
        "This is a CD14-positive monocyte.",
        "This is a B cell, mature.",
    ]
    assert texts[1] == [" The sample is blood from", " The sample is bone marrow from"]
    assert texts[4] == [" with lupus.", " without known disease."]
    assert [names[2] for names in texts[5:]] == [
        " Most active gene programmes: interferon response;",
        " then interferon response.",
    ]


def test_a_slot_without_labels_is_not_in_the_text(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    labels = {slot: LABELS[slot] for slot in ("cell_type", "tissue", "disease")}
    steps = find_candidates(labels, 0, TERMS, tokenizer)
    assert [step.slot for step in steps] == ["cell_type", "tissue", "disease"]
    assert tokenizer.decode(steps[1].tokens[0]) == " The sample is blood,"
    (only,) = find_candidates({"cell_type": LABELS["cell_type"]}, 0, TERMS, tokenizer)
    assert tokenizer.decode(only.tokens[0]) == "This is a B cell."


def test_tokens_of_pieces_are_those_of_the_whole_description(tokenizer):
    steps = find_candidates(LABELS, 2, TERMS, tokenizer)
    random = torch.Generator().manual_seed(0)
    for _ in range(50):
        chosen = [int(torch.randint(len(step.ids), (1,), generator=random)) for step in steps]
        named = {step.slot: step.ids[best] for step, best in zip(steps[:5], chosen, strict=False)}
        pathways = tuple(step.ids[best] for step, best in zip(steps[5:], chosen[5:], strict=True))
        slots = Slots(**named, pathways=pathways)
        found = [token for step, best in zip(steps, chosen, strict=True) for token in step.tokens[best]]
        whole = tokenizer(render(slots, TERMS), add_special_tokens=False)["input_ids"]
        assert found == whole[: len(found)]
        names = "".join(text for _, text in pieces(slots, TERMS))
        assert found == tokenizer(names, add_special_tokens=False)["input_ids"]


def steps_of(*tokens):
    return [Candidates(f"slot {i}", tuple(map(str, range(len(names)))), names) for i, names in enumerate(tokens)]


def test_a_tree_has_each_shared_prefix_once():
    steps = steps_of(((1, 2, 9), (1, 2, 3, 9), (1, 4, 9)), ((5,),), ((7, 1), (8, 1)))
    tree = Tree.of(steps)
    assert tree.tokens.tolist() == [0, 1, 2, 9, 3, 9, 4, 9, 5, 7, 1, 8, 1]
    assert tree.steps.tolist() == [-1, *[0] * 7, 1, *[2] * 4]
    assert tree.depths.tolist() == [0, 0, 1, 2, 2, 3, 1, 2, 0, 0, 1, 0, 1]
    inside = [row.nonzero().squeeze(1).tolist() for row in tree.within]
    assert inside[:8] == [[0], [1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 5], [1, 6], [1, 6, 7]]
    assert tree.names.equal(tree.within[tree.ends]) and tree.ends.tolist() == [3, 5, 7, 8, 10, 12]
    assert tree.sizes.tolist() == [3, 4, 3, 1, 2, 2]
    # names part after 1, after 1 2, and at the beginning of the last step
    assert tree.forks.tolist() == [1, 2, -1] and tree.steps_of_forks.tolist() == [0, 0, 2]
    options = zip(tree.options.tolist(), tree.forks_of_options.tolist(), strict=True)
    assert set(options) == {(2, 0), (6, 0), (3, 1), (4, 1), (9, 2), (11, 2)}
    assert tree.words[tree.words_of_options].tolist() == tree.tokens[tree.options].tolist()
    assert len(tree.words) == len(set(tree.tokens[tree.options].tolist()))
    assert tree.earlier_forks.nonzero().tolist() == [[1, 0]]
    assert [row.nonzero().squeeze(1).tolist() for row in tree.below_forks] == [[0, 1, 2], [0, 1], [4, 5]]


def test_shares_of_options_sum_to_one_at_every_fork():
    tree = Tree.of(steps_of(((1, 2), (1, 3), (4,))))
    logits = {1: 2.0, 4: 2.0, 2: 1000.0, 3: 1000.0 + math.log(3)}  # of tokens
    scores = torch.tensor([[logits[int(tree.tokens[node])] for node in tree.options]])
    shares = dict(zip(tree.tokens[tree.options].tolist(), tree.log_shares(scores)[0].exp().tolist(), strict=True))
    assert shares == pytest.approx({1: 0.5, 4: 0.5, 2: 0.25, 3: 0.75}, abs=1e-4)  # float32 near 1,000


def test_steps_without_a_choice_have_no_fork():
    tree = Tree.of(steps_of(((1, 2),), ((3,),)))
    assert len(tree.forks) == len(tree.options) == 0 and tree.log_shares(torch.empty(2, 0)).shape == (2, 0)


def test_some_candidates_of_a_step(tiny_model):
    step = find_candidates(LABELS, 0, TERMS, AutoTokenizer.from_pretrained(tiny_model))[0]
    assert replace(step, ids=step.ids[1:2], tokens=step.tokens[1:2]) == step.take([1])
