"""The path from vectors to text, on a tiny real language model."""

import copy
import re

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cell2text.contracts import TERM_SLOTS
from cell2text.errors import InputError
from cell2text.generation.decode import Written, write_texts
from cell2text.generation.describe import decode, read_text
from cell2text.grammar import Terms
from cell2text.model import bundle, fast, language_model
from cell2text.model.alignment import LabelTargets
from cell2text.model.fast.layers import FusedGate, FusedLora, FusedNorm
from cell2text.model.projectors import PROJECTORS
from cell2text.model.prompt import INSTRUCTION
from default_settings import finetune_settings, projector_settings
from tests_terms import ROWS, small_table, small_terms

CPU = torch.device("cpu")
LORA = finetune_settings(lora_rank=4, lora_alpha=8)


@pytest.fixture
def build(tiny_model, monkeypatch):
    monkeypatch.setattr(language_model, "pick_precision", lambda device: torch.float32)

    def make(kind="pooled", seed=0, speed_up=True):
        torch.manual_seed(seed)
        model = bundle.build(tiny_model, projector_settings(kind=kind, soft_tokens=3, hidden=16), 5, LORA, CPU)
        if speed_up:
            fast.speed_up(model)
        with torch.no_grad():  # an adapter that has no effect would hide mistakes
            for name, value in model.trainable().items():
                if "lora_B" in name:
                    value.normal_(0, 0.05)
        return model.eval()

    return make


def cells(kind, count=4, seed=1):
    torch.manual_seed(seed)
    if kind == "pooled":
        return torch.randn(count, 5), torch.full((count,), 7)
    vectors, lengths = torch.randn(count, 6, 5), torch.tensor([6, 2, 4, 1, 5, 3][:count])
    return vectors * (torch.arange(6) < lengths[:, None])[..., None], lengths


@pytest.mark.parametrize("kind", sorted(PROJECTORS))
def test_soft_tokens_start_at_the_mean_norm_of_token_embeddings(build, kind):
    model = build(kind)
    soft, present = model.projector(*cells(kind))
    norm = model.language_model.get_input_embeddings().weight.norm(dim=-1).mean()
    assert torch.allclose(soft[present].norm(dim=-1), norm.expand(int(present.sum())), rtol=1e-5)


@pytest.mark.parametrize("kind", sorted(PROJECTORS))
def test_the_loss_of_a_cell_does_not_depend_on_its_batch(build, kind):
    model, (vectors, lengths) = build(kind), cells(kind)
    text = torch.randint(5, 300, (4, 9))
    mask = torch.arange(9) < torch.tensor([9, 4, 7, 2])[:, None]
    together = [
        model.text_loss(*model.projector(vectors, lengths), text, mask & (torch.arange(4) == i)[:, None])[0]
        for i in range(4)
    ]
    for i in range(4):
        row = slice(i, i + 1)
        width = int(mask[i].sum())
        # alone and without padding
        short = vectors[row] if kind == "pooled" else vectors[row, : lengths[i]]
        alone, tokens = model.text_loss(*model.projector(short, lengths[row]), text[row, :width], mask[row, :width])
        assert int(tokens) == width
        assert torch.allclose(alone, together[i], rtol=1e-4), kind


@pytest.mark.parametrize("kind", sorted(PROJECTORS))
def test_the_fast_path_equals_the_plain_path_in_loss_and_gradients(build, kind):
    (vectors, lengths), model, plain = cells(kind), build(kind), build(kind, speed_up=False)
    text = torch.randint(5, 300, (4, 9))
    mask = torch.arange(9) < torch.tensor([9, 4, 7, 2])[:, None]
    assert sum(type(part) is FusedLora for part in model.modules()) == 14
    assert sum(type(part) is FusedNorm for part in model.modules()) == 5
    assert sum(type(part) is FusedGate for part in model.modules()) == 2
    losses = []
    for one in (model, plain):
        loss, tokens = one.text_loss(*one.projector(vectors, lengths), text, mask)
        loss.backward()
        losses.append(loss)
        assert int(tokens) == 22
    assert torch.allclose(*losses, rtol=1e-5)
    gradients = {name: value.grad for name, value in model.trainable().items()}
    for name, value in plain.trainable().items():
        assert torch.allclose(gradients[name], value.grad, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("kind", sorted(PROJECTORS))
def test_the_plain_path_equals_transformers_one_cell_at_a_time(build, kind):
    (vectors, lengths), model = cells(kind), build(kind, speed_up=False)
    text = torch.randint(5, 300, (4, 9))
    mask = torch.arange(9) < torch.tensor([9, 4, 7, 2])[:, None]
    ours, _ = model.text_loss(*model.projector(vectors, lengths), text, mask)
    theirs = 0
    for i in range(4):
        prompt, prompt_mask = model.read_cells(vectors[i : i + 1], lengths[i : i + 1])
        prompt, words = prompt[:, prompt_mask[0]], text[i : i + 1][:, mask[i]]
        labels = torch.cat([torch.full((1, prompt.shape[1]), -100), words], 1)
        embeddings = torch.cat([prompt, model.embed_tokens(words)], 1)
        theirs = theirs + model.language_model(inputs_embeds=embeddings, labels=labels).loss * words.shape[1]
    assert torch.allclose(ours, theirs, rtol=1e-5)


def test_both_paths_judge_the_same_tokens(build):
    (vectors, lengths), judged = cells("pooled"), torch.arange(9) < torch.tensor([3, 0, 5, 2])[:, None]
    text, mask = torch.randint(5, 300, (4, 9)), torch.arange(9) < torch.tensor([9, 4, 7, 2])[:, None]
    plain, found = build(speed_up=False), []
    text[0, :3] = torch.tensor(write_texts(plain, vectors[:1], lengths[:1], 3)[0].ids)
    for model in (build(), plain):
        soft = model.projector(vectors, lengths)
        loss, chosen = model.judge_text(*soft, text, mask, judged)
        assert torch.allclose(loss, model.text_loss(*soft, text, mask)[0], rtol=1e-5)
        assert chosen[0, :3].all() and chosen[~judged].all() and not chosen.all()
        found.append(chosen)
    assert torch.equal(*found)


def test_the_check_leaves_weights_and_buffers_as_they_were(tiny_model, monkeypatch):
    monkeypatch.setattr(language_model, "pick_precision", lambda device: torch.bfloat16)
    model = bundle.build(tiny_model, projector_settings(soft_tokens=3, hidden=16), 5, LORA, CPU)
    base = {name: value.clone() for name, value in model.named_parameters() if "lora_" not in name}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    assert any(value.dtype == torch.float32 and "inv_freq" in name for name, value in buffers.items())
    text, there = torch.randint(5, 300, (4, 9)), torch.ones(4, 9, dtype=torch.bool)
    soft, present = (part.detach() for part in model.projector(*cells("pooled")))
    assert fast.check(model, soft, present, text, there)
    kept = dict(model.named_parameters())
    assert all(torch.equal(kept[name], value) and kept[name].dtype == value.dtype for name, value in base.items())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    layers = [part for part in model.modules() if type(part) is FusedLora]
    assert len(layers) == 14 and all(layer.is_plain(torch.bfloat16) for layer in layers)


def test_a_model_with_another_loss_on_the_fast_path_is_reported(build, monkeypatch, caplog):
    model, (vectors, lengths) = build(speed_up=False), cells("pooled")
    text, mask = torch.randint(5, 300, (4, 9)), torch.ones(4, 9, dtype=torch.bool)
    soft, present = (part.detach() for part in model.projector(vectors, lengths))
    monkeypatch.setattr(fast, "fuse_norms", lambda model: model.get_decoder().norm.weight.data.mul_(1.01))
    with caplog.at_level("INFO", logger="cell2text.model"):
        assert not fast.check(model, soft, present, text, mask)
    assert len(caplog.messages) == 1 and "nats per token, not" in caplog.text


def test_prompt_is_the_chat_template_with_the_cell_in_it(build):
    model = build()
    before, after = (model.tokenizer.decode(half) for half in (model.prompt.before, model.prompt.after))
    assert before + after == f"<|start|>user\n{INSTRUCTION} <|end|>\n<|start|>assistant\n"


def test_only_adapter_and_projector_are_trained(build):
    model = build()
    assert model.trainable()
    assert all("lora_" in name or name.startswith("projector.") for name in model.trainable())


@pytest.mark.parametrize("kind", sorted(PROJECTORS))
def test_greedy_decoding_equals_transformers_generate(build, kind):
    model, (vectors, lengths) = build(kind), cells(kind)
    model.ready_to_write()
    written = write_texts(model, vectors, lengths, 12)
    for i in range(4):
        embeddings, mask = model.read_cells(vectors[i : i + 1], lengths[i : i + 1])
        expected = model.language_model.generate(
            inputs_embeds=embeddings, attention_mask=mask.long(), do_sample=False, max_new_tokens=12
        )[0].tolist()
        end = model.tokenizer.eos_token_id
        expected = expected[: expected.index(end)] if end in expected else expected
        assert written[i].ids == expected


def test_log_probabilities_are_those_of_a_forward_pass(build):
    model, (vectors, lengths) = build(), cells("pooled", 1)
    merged = copy.deepcopy(model).ready_to_write()
    written = write_texts(merged, vectors, lengths, 6)[0]
    soft = model.projector(vectors, lengths)
    mask = torch.ones(1, len(written.ids), dtype=torch.bool)
    with torch.no_grad():
        sums = [
            float(model.text_loss(*soft, torch.tensor([written.ids[:n]]), mask[:, :n])[0])
            for n in range(1, len(written.ids) + 1)
        ]
    assert -np.cumsum(written.log_probabilities) == pytest.approx(np.array(sums), abs=1e-4)


def test_saved_and_loaded_model_writes_the_same(build, tiny_model, tmp_path):
    model, (vectors, lengths) = build(), cells("pooled")
    bundle.save(model, tmp_path, {"seed": 1})
    again = bundle.load(tmp_path, tiny_model, CPU)
    model.language_model.set_attn_implementation("sdpa")
    ours, theirs = (write_texts(one, vectors, lengths, 8) for one in (again, model))
    assert [one.ids for one in ours] == [one.ids for one in theirs]
    weights = again.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.trainable().items())
    assert not [path for path in tmp_path.rglob("*") if path.suffix in {".bin", ".pt", ".pkl"}]


def test_load_refuses_missing_weights(build, tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    bundle.save(build(), tmp_path, {})
    file = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(sorted(weights)[0])
    save_file(weights, file)
    with pytest.raises(InputError, match="weights missing"):
        bundle.load(tmp_path, tiny_model, CPU)


def test_label_targets_of_sentences_are_the_centred_directions_of_sentences(build):
    model, labels = build(), {"cell_type": ["CL:0000236", "CL:0000623"], "tissue": ["UBERON:0000178"]}
    cell_types, tissues = LabelTargets.of_sentences(labels, small_table(), model).directions
    texts = [
        "This is a B cell. Definitions. Cell type: A lymphocyte of B lineage.",
        "This is a natural killer cell. Definitions. Cell type: A lymphocyte that can kill.",
    ]
    embeddings = model.language_model.get_input_embeddings().weight.detach().float()
    ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    first, second = (embeddings[text].mean(0) / embeddings[text].mean(0).norm() for text in ids)
    assert torch.allclose(cell_types[0], (first - second) / (first - second).norm(), atol=1e-5)
    assert torch.allclose(cell_types[1], -cell_types[0], atol=1e-5)
    assert not tissues.any()  # a single label is its own mean


def word_tokenizer(text):
    """A toy tokenizer whose tokens are words, with the space before them, and punctuation."""
    split = pre_tokenizers.Split(Regex(r" ?[\w-]+|[.,:;()]"), "isolated")
    words = {word for word, _ in split.pre_tokenize_str(text)}
    toy = Tokenizer(models.WordLevel({word: number for number, word in enumerate(sorted(words))}))
    toy.pre_tokenizer, toy.decoder = split, decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=toy)


@pytest.mark.parametrize(
    ("marked", "confidences"),  # a number is the probability of the token before it; all others are certain
    [
        (
            "This is a{0.9} natural{0.8} killer cell{0.5}.{0.25} The{0.5} sample is blood{0.7} from{0.5} a "
            "female{0.75} donor at{0.5} the 29-year-old stage,{0.9} with{0.4} flu{0.5}.{0.25}",
            {
                "cell_type": 0.9 * 0.8 * 0.5 * 0.25,  # not "an", and the full stop: not "natural killer cell, human"
                "tissue": 0.5 * 0.7 * 0.5,  # The: there is a sample; from: not "blood vessel"
                "sex": 0.75 * 0.5,  # at: there is a stage
                "stage": 0.9,  # the comma
                "disease": 0.4 * 0.5 * 0.25,  # not "without", and the full stop: not "flu, chronic"
            },
        ),
        (
            "This is a{0.5} B cell.{0.8} The sample is blood{0.7},{0.5} without{0.4} known disease{0.5}.{0.9}",
            {"cell_type": 0.5 * 0.8, "tissue": 0.7 * 0.5, "disease": 0.4 * 0.5 * 0.9},
        ),
        ("This is a{0.5} B{0.8} cell.{0.5} and{0.1} more", {"cell_type": 0.5 * 0.8 * 0.5}),  # violates the grammar
    ],
)  # fmt: skip
def test_confidence_is_the_probability_of_the_piece_of_a_slot(marked, confidences):
    pieces = re.split(r"\{(.*?)\}", marked)
    text, marks = "".join(pieces[::2]), np.cumsum([len(piece) for piece in pieces[:-1:2]]).tolist()
    unsure = dict(zip(marks, map(float, pieces[1::2]), strict=True))
    tokenizer = word_tokenizer(text)
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert set(marks) <= {end for _, end in encoded["offset_mapping"]}
    written = Written(encoded["input_ids"], [np.log(unsure.get(end, 1)) for _, end in encoded["offset_mapping"]], True)
    flu = ("disease", "MONDO:0005812", "flu", "")
    terms = Terms(pd.DataFrame([*ROWS, flu], columns=["slot", "id", "name", "definition"]))
    row = read_text(written, terms, tokenizer)
    assert row["text"] == text
    found = {slot: row[f"{slot}_confidence"] for slot in TERM_SLOTS if row[f"{slot}_id"]}
    assert found == pytest.approx(confidences)


def test_confidence_does_not_depend_on_how_words_are_cut_into_tokens(build):
    tokenizer, terms = build().tokenizer, small_terms()
    for lead in ("", " "):
        text = lead + "This is a B cell. The sample is blood."
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        decoded, ends = decode(ids, tokenizer)
        assert decoded == text
        starts = np.concatenate([[0], ends[:-1]])
        piece = (ends > len(lead)) & (starts < len(lead + "This is a B cell."))
        row = read_text(Written(ids, [-0.25] * len(ids), True), terms, tokenizer)
        assert (row["cell_type_id"], row["tissue_id"], row["disease_id"]) == ("CL:0000236", "UBERON:0000178", None)
        assert row["cell_type_confidence"] == pytest.approx(np.exp(-0.25 * piece.sum()))
        assert row["disease_confidence"] is None
        assert read_text(Written(ids, [-0.25] * len(ids), False), terms, tokenizer)["status"] == "partial"
