"""Candidate names of each slot as tokens, and their prefix tree."""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cell2text.generation.candidates import find_candidates
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


def test_a_tree_has_each_shared_prefix_once():
    tree = Tree.of([(1, 2, 9), (1, 2, 3, 9), (1, 4, 9), (1, 2, 3, 5, 6, 9)])
    nodes = [1, 2, 4, 3, 5, 6]
    assert tree.tokens[: len(nodes)].tolist() == nodes
    assert tree.depths.tolist() == [1, 2, 2, 3, 4, 5]
    above = [[nodes[i] for i in row.nonzero().squeeze(1)] for row in tree.ancestors]
    assert above == [[1], [1, 2], [1, 4], [1, 2, 3], [1, 2, 3, 5], [1, 2, 3, 5, 6]]
    edges = list(zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True))
    after_node = {(nodes[parent - 1] if parent else None, token) for parent, token in edges}
    assert after_node == {
        *((None, 1), (1, 2), (1, 4), (2, 3), (2, 9), (3, 9), (4, 9), (3, 5), (5, 6), (6, 9)),
    }
    assert [nodes[head] for head in tree.heads] == [1, 2, 4, 3, 5, 5]
    assert tree.sizes.tolist() == [1, 1, 1, 1, 2, 0]
    assert tree.stem.tolist() == [True, *[False] * 5]
    assert tree.counts.tolist() == [4, 3, 1, 2, 1, 1]


@pytest.mark.parametrize(
    ("sequences", "stem"), [([(1,), (2,)], []), ([(1, 2, 3)], [True, True]), ([(1, 2), (3, 2)], [False, False])]
)
def test_the_stem_is_what_all_sequences_begin_with(sequences, stem):
    assert Tree.of(sequences).stem.tolist() == stem


def test_the_probability_of_a_sequence_is_the_product_along_its_path():
    tree = Tree.of([(1, 2), (1, 3), (4,)])
    probability = {(0, 1): 0.6, (0, 4): 0.3, (1, 2): 0.5, (1, 3): 0.1}
    edges = [probability[edge] for edge in zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True)]
    found = tree.sum_paths(torch.tensor([edges]).log())[:, tree.ends].exp()
    assert torch.allclose(found, torch.tensor([[0.3, 0.06, 0.3]]))


def test_padding_of_candidates_is_on_the_left(tiny_model):
    step = find_candidates(LABELS, 0, TERMS, AutoTokenizer.from_pretrained(tiny_model))[0]
    tokens, mask = step.padded
    assert [tuple(row[keep].tolist()) for row, keep in zip(tokens, mask, strict=True)] == list(step.tokens)
    assert bool(mask[:, -1].all()) and not bool(mask.all())
    assert replace(step, ids=step.ids[1:2], tokens=step.tokens[1:2]) == step.take([1])
