"""Descriptions fit into the positions of the language model and into the limit of generation."""

import math
import shutil

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from cell2text.contracts import DESCRIPTIONS
from cell2text.embedding.vectors import InMemoryVectors
from cell2text.errors import InputError
from cell2text.files import read_json
from cell2text.finetuning import finetune as finetune_module
from cell2text.generation import describe
from cell2text.generation.decode import Written, write_texts
from cell2text.model import language_model as lm
from cell2text.model.bundle import load
from cell2text.model.prompt import Prompt
from finetune_run import finetune, write_files
from tests_terms import small_terms


@pytest.fixture
def files(tmp_path, tiny_model):
    return write_files(tmp_path, tiny_model)


def test_the_limit_of_a_text_follows_from_the_training_texts(files, tiny_model, monkeypatch):
    model = load(finetune(files, tiny_model, "model", epochs=1), tiny_model)
    longest, limits = model.about["longest_text"], []
    vectors = InMemoryVectors(torch.zeros(1, 1, 6), torch.tensor([[2]]))
    monkeypatch.setattr(describe, "write_texts", lambda *given: limits.append(given[3]) or [Written([], [], True)])
    for limit in (None, longest, longest + 9):
        list(describe.describe_cells(model, vectors, small_terms(), 8, limit))
    assert limits == [math.ceil(1.25 * longest), longest, longest + 9]
    with pytest.raises(InputError, match=f"Set at least {longest}"):
        list(describe.describe_cells(model, vectors, small_terms(), 8, longest - 1))


def test_a_limit_that_would_truncate_texts_is_refused_before_training(files, tiny_model, monkeypatch):
    texts = DESCRIPTIONS.read(files / "descriptions.parquet")["text"].to_list()
    tokens = AutoTokenizer.from_pretrained(tiny_model)(texts, add_special_tokens=False)["input_ids"]
    longest = max(map(len, tokens)) + 1  # and the end token
    with monkeypatch.context() as patch:
        patch.setattr(finetune_module, "align", lambda *_: pytest.fail("training began"))
        with pytest.raises(InputError, match=rf"max_new_tokens: .* has {longest} tokens. Set at least {longest}"):
            finetune(files, tiny_model, "model", max_new_tokens=longest - 1)
    directory = finetune(files, tiny_model, "model", max_new_tokens=longest, epochs=1)
    assert read_json(directory / "cell2text.json")["longest_text"] == longest


@pytest.mark.parametrize(("positions", "enough"), [(0, True), (-1, False)])
def test_texts_longer_than_the_positions_are_refused_before_training(files, tiny_model, monkeypatch, positions, enough):
    monkeypatch.setattr(lm, "pick_precision", lambda device: torch.float32)
    folder = shutil.copytree(tiny_model, files / "learned_positions")
    (folder / "model.safetensors").unlink()
    longest = max(
        len(text)
        for text in AutoTokenizer.from_pretrained(tiny_model)(
            DESCRIPTIONS.read(files / "descriptions.parquet")["text"].to_list(), add_special_tokens=False
        )["input_ids"]
    )
    prompt = Prompt.of(AutoTokenizer.from_pretrained(tiny_model))
    needed = len(prompt.before) + 2 + len(prompt.after) + longest + 1  # two soft tokens, and the end token
    config = GPT2Config(vocab_size=600, n_embd=32, n_layer=1, n_head=2, n_positions=needed + positions)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    if not enough:
        with pytest.raises(
            InputError, match=f"it has {needed - 1} positions, and the longest text needs {longest + 1}"
        ):
            finetune(files, folder, "model")
        return
    trained = load(finetune(files, folder, "model", epochs=1), folder).ready_to_write()
    trained.tokenizer.eos_token = "Z"  # so that texts do not end
    written = write_texts(trained, torch.zeros(1, 6), torch.tensor([2]), 10 * needed)
    assert len(written[0].ids) == longest + 1 and not written[0].ended
