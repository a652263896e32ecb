"""Tiny random models of many families: trained on the fast path, on the plain one, or rejected."""

import pytest
import torch
from transformers import AutoConfig

from cell2text.errors import InputError
from cell2text.generation.decode import write_texts
from cell2text.model import fast
from cell2text.models.check_language_model import check_language_model
from tiny_architectures import FAMILIES, FEW_HEADS, build, write_model

pytestmark = pytest.mark.usefixtures("in_float32")

TEXT = torch.randint(5, 300, (4, 9), generator=torch.Generator().manual_seed(2))
MASK = torch.arange(9) < torch.tensor([9, 4, 7, 2])[:, None]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_family_trains_and_generates_as_in_transformers(tmp_path, tiny_model, family, caplog):
    settings, path = FAMILIES[family]
    folder = write_model(tmp_path, tiny_model, family, **settings)
    if path == "rejected":
        for use in (build, check_language_model):
            with pytest.raises(InputError, match="Choose "):
                use(folder)
        return
    check_language_model(folder)
    model = build(folder)
    vectors, lengths = torch.randn(4, 5, generator=torch.Generator().manual_seed(3)), torch.full((4,), 7)
    soft, present = model.projector(vectors, lengths)
    with torch.no_grad():
        loss = float(model.text_loss(soft, present, TEXT, MASK)[0])
        prompt, _ = model.read_cells(vectors, lengths)
        one_by_one = 0.0
        for cell in range(4):
            words = TEXT[cell : cell + 1, MASK[cell]]
            labels = torch.cat([torch.full((1, prompt.shape[1]), -100), words], 1)
            embeddings = torch.cat([prompt[cell : cell + 1], model.embed_tokens(words)], 1)
            output = model.language_model(inputs_embeds=embeddings, labels=labels, use_cache=False)
            one_by_one += float(output.loss) * words.shape[1]
    assert loss == pytest.approx(one_by_one, rel=1e-4)
    written = [one.ids for one in write_texts(model, vectors, lengths, 8)]
    end = model.tokenizer.eos_token_id
    for cell, ids in enumerate(written):
        expected = model.language_model.generate(
            inputs_embeds=prompt[cell : cell + 1].detach(),
            attention_mask=torch.ones(1, prompt.shape[1], dtype=torch.long),
            do_sample=False,
            max_new_tokens=8,
        )[0].tolist()
        assert ids == (expected[: expected.index(end)] if end in expected else expected)

    def draft(cell, so_far):
        """Cell 0: its text; 1: with every third token wrong; 2: another text; 3: none."""
        text = [*written[cell], end]
        if cell == 1:
            text = [(token + 1) % 20 if place % 3 == 2 else token for place, token in enumerate(text)]
        return [text[len(so_far) :], text[len(so_far) :], written[3], []][cell]

    assert [one.ids for one in write_texts(model, vectors, lengths, 8, draft)] == written
    with caplog.at_level("INFO", logger="cell2text.model"):
        assert fast.check(model, soft.detach(), present, TEXT, MASK) == (path == "fast")
    assert ("training with plain transformers and PEFT" in caplog.text) == (path == "plain")
    if path == "fast":
        found = float(model.text_loss(soft, present, TEXT, MASK)[0].detach())
        assert found == pytest.approx(loss, rel=1e-4)


def test_an_encoder_decoder_is_rejected_in_one_line(tmp_path, tiny_model):
    settings = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 64, "d_kv": 8}
    AutoConfig.for_model("t5", **settings).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="t5 is not a causal language model. Choose another model$"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma", {}),  # multiplies by the root of the width inside its embeddings
        ("gemma3_text", {}),
        ("biogpt", {}),
        ("granite", FEW_HEADS | {"embedding_multiplier": 12.0}),  # multiplies after them
        ("bloom", {}),  # normalises after them
        ("opt", {"word_embed_proj_dim": 16}),  # projects them to another width
        ("gpt2", {}),  # adds positions
        ("llama", FEW_HEADS),
    ],
)
def test_soft_tokens_start_with_the_norm_of_tokens_where_the_first_layer_receives_them(
    tmp_path, tiny_model, family, changes
):
    known = FAMILIES[family][0] if family in FAMILIES else {}
    model = build(write_model(tmp_path, tiny_model, family, **known | changes))
    received = []
    layers = next(part for part in model.base_model.modules() if isinstance(part, torch.nn.ModuleList))
    layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: received.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    soft, _ = model.projector(torch.randn(100, 5, generator=torch.Generator().manual_seed(3)), torch.full((100,), 7))
    with torch.no_grad():
        ids = torch.randperm(model.base_model.get_input_embeddings().weight.shape[0])[:300].view(100, 3)
        model.base_model(input_ids=ids, use_cache=False)
        model.base_model(inputs_embeds=soft, use_cache=False)
    of_tokens, of_soft = (float(states.norm(dim=-1).mean()) for states in received)
    assert of_soft == pytest.approx(of_tokens, rel=0.1)


def test_a_prompt_that_begins_with_the_cell_is_trained_on_the_plain_path(tmp_path, tiny_model, caplog):
    folder = write_model(tmp_path, tiny_model, "qwen2", **FEW_HEADS)
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }} {{ messages[0].content }}{# system #}")
    model = build(folder)
    assert len(model.prompt.before) == 0
    vectors, lengths = torch.randn(4, 5, generator=torch.Generator().manual_seed(3)), torch.full((4,), 7)
    soft, present = (part.detach() for part in model.projector(vectors, lengths))
    assert len(write_texts(model, vectors, lengths, 3)) == 4
    assert not fast.check(model, soft, present, TEXT, MASK)
