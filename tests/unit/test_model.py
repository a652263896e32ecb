"""The path from vectors to text, on a tiny real language model."""

import numpy as np
import pytest
import torch

from cell2text.errors import InputError
from cell2text.generation.describe import decode, read_text
from cell2text.generation.greedy import Written, write_texts
from cell2text.model import cell2text as m
from cell2text.model.alignment import LabelTargets
from cell2text.model.projectors import PROJECTORS

CPU = torch.device("cpu")
LORA = {"r": 4, "lora_alpha": 8}


@pytest.fixture
def build(tiny_model, monkeypatch):
    monkeypatch.setattr(m, "compute_dtype", lambda device: torch.float32)

    def make(kind="pooled", seed=0):
        torch.manual_seed(seed)
        model = m.build(tiny_model, {"kind": kind, "soft_tokens": 3, "hidden": 16}, 5, LORA, CPU)
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
def test_soft_tokens_have_the_length_of_the_models_own(build, kind):
    model = build(kind)
    soft, there = model.projector(*cells(kind))
    typical = model.language_model.get_input_embeddings().weight.norm(dim=-1).mean()
    assert torch.allclose(soft[there].norm(dim=-1), typical.expand(int(there.sum())), rtol=1e-5)


@pytest.mark.parametrize("kind", sorted(PROJECTORS))
def test_batch_mates_change_nothing(build, kind):
    model, (vectors, lengths) = build(kind), cells(kind)
    text = torch.randint(5, 300, (4, 9))
    there = torch.arange(9) < torch.tensor([9, 4, 7, 2])[:, None]
    together = [
        model.text_loss(*model.read_cells(vectors, lengths), text, there & (torch.arange(4) == i)[:, None])[0]
        for i in range(4)
    ]
    for i in range(4):
        row = slice(i, i + 1)
        width = int(there[i].sum())
        # alone, and without any padding at all
        short = vectors[row] if kind == "pooled" else vectors[row, : lengths[i]]
        alone, tokens = model.text_loss(*model.read_cells(short, lengths[row]), text[row, :width], there[row, :width])
        assert int(tokens) == width
        assert torch.allclose(alone, together[i], rtol=1e-4), kind


def test_loss_equals_the_language_models_own(build):
    model, (vectors, lengths) = build(), cells("pooled", 1)
    text = torch.randint(5, 300, (1, 9))
    prompt, mask = model.read_cells(vectors, lengths)
    ours, tokens = model.text_loss(prompt, mask, text, torch.ones_like(text, dtype=torch.bool))
    labels = torch.cat([torch.full((1, prompt.shape[1]), -100), text], 1)
    embeddings = torch.cat([prompt, model.embed_tokens(text)], 1)
    theirs = model.language_model(inputs_embeds=embeddings, labels=labels).loss
    assert torch.allclose(ours / tokens, theirs, rtol=1e-5)


def test_prompt_is_the_chat_template_with_the_cell_in_it(build):
    model = build()
    before, after = (model.tokenizer.decode(half) for half in (model.prompt.before, model.prompt.after))
    assert before + after == f"<|start|>user\n{m.INSTRUCTION} <|end|>\n<|start|>assistant\n"


def test_only_adapter_and_projector_learn(build):
    model = build()
    assert model.trainable()
    assert all("lora_" in name or name.startswith("projector.") for name in model.trainable())


@pytest.mark.parametrize("kind", sorted(PROJECTORS))
def test_greedy_decoding_equals_transformers_generate(build, kind):
    model, (vectors, lengths) = build(kind), cells(kind)
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
    written = write_texts(model, vectors, lengths, 6)[0]
    prompt, mask = model.read_cells(vectors, lengths)
    there = torch.ones(1, len(written.ids), dtype=torch.bool)
    with torch.no_grad():
        sums = [
            float(model.text_loss(prompt, mask, torch.tensor([written.ids[:n]]), there[:, :n])[0])
            for n in range(1, len(written.ids) + 1)
        ]
    assert -np.cumsum(written.log_probabilities) == pytest.approx(np.array(sums), abs=1e-4)


def test_saved_and_loaded_model_writes_the_same(build, tiny_model, tmp_path):
    model, (vectors, lengths) = build(), cells("pooled")
    m.save(model, tmp_path, {"seed": 1})
    again = m.load(tmp_path, tiny_model, CPU)
    assert write_texts(again, vectors, lengths, 8) == write_texts(model, vectors, lengths, 8)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in {".bin", ".pt", ".pkl"}]


def test_load_refuses_missing_weights(build, tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    m.save(build(), tmp_path, {})
    file = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(sorted(weights)[0])
    save_file(weights, file)
    with pytest.raises(InputError, match="weights missing"):
        m.load(tmp_path, tiny_model, CPU)


def test_alignment_scores_are_cosines_over_the_temperature():
    targets = LabelTargets(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    soft = torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
    there = torch.tensor([[True, False], [True, True]])
    half = 2**-0.5
    assert torch.allclose(targets.scores(soft, there), torch.tensor([[1.0, 0.0], [half, half]]) / 0.05)
    assert float(targets.loss(soft, there, torch.tensor([-1, -1]))) == 0


def test_confidence_is_the_product_over_the_names_tokens(build):
    from tests_terms import small_terms

    tokenizer, terms = build().tokenizer, small_terms()
    text = "This is a B cell. The sample is blood."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded, ends = decode(ids, tokenizer)
    assert decoded == text
    starts = np.concatenate([[0], ends[:-1]])
    in_name = (ends > text.index("B cell")) & (starts < text.index("B cell") + len("B cell"))
    row = read_text(Written(ids, [-0.25] * len(ids), True), terms, tokenizer)
    assert (row["cell_type_id"], row["tissue_id"], row["disease_id"]) == (
        "CL:0000236",
        "UBERON:0000178",
        None,
    )
    assert row["cell_type_confidence"] == pytest.approx(np.exp(-0.25 * in_name.sum()))
    assert row["disease_confidence"] is None
    assert read_text(Written(ids, [-0.25] * len(ids), False), terms, tokenizer)["status"] == "partial"
