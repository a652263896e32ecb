"""Geneformer: official checkpoints are fetched, and gene vectors equal those of transformers for single cells."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel

from cell2text import contracts
from cell2text.contracts import EMBEDDINGS, TOKENS
from cell2text.embedding.embed_genes import embed_genes, read_rows
from cell2text.embedding.encoders import load_encoder
from cell2text.embedding.encoders.geneformer import Geneformer
from cell2text.embedding.encoders.ranked_bert import RankedBert, Special
from cell2text.errors import InputError
from cell2text.files import read_json
from cell2text.models.fetch_encoder import fetch_encoder
from default_settings import encoder_settings
from ranked_files import ranked_cells, write_genes
from tiny_geneformer import GENES, V1, V2, tiny_bert, write_checkpoint

TOP = 6


def some_cells(lengths, special, seed=1):
    """Return cells with the given numbers of distinct genes."""
    random = np.random.default_rng(seed)
    first = sum(token is not None for token in special.values())
    tokens = [random.permutation(GENES)[:length] + first for length in lengths]
    return ranked_cells(tokens, [np.ones(length) for length in lengths], GENES + first)


@torch.no_grad()
def plain_vectors(model, cells, special, positions, layer):
    """Return each cell's hidden states from plain transformers: single cells, no padding, no mask."""
    bert = BertModel(model.config, add_pooling_layer=False)
    bert.load_state_dict(model.bert.state_dict())
    bert.eval()
    around = [special["cls"]], [special["eos"]]
    found = []
    for start, end in zip(cells.offsets[:-1], cells.offsets[1:], strict=True):
        genes = cells.tokens[start:end].tolist()
        ids = around[0] + genes[: positions - 2] + around[1] if special is V2 else genes[:positions]
        states = bert(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
        found.append((states[1:-1], states[0]) if special is V2 else (states, None))
    return found


@pytest.mark.parametrize("special", [V1, V2], ids=["V1", "V2"])
@pytest.mark.parametrize(("precision", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_gene_vectors_equal_those_of_transformers_for_single_cells(tmp_path, special, precision, atol, layer):
    folder, model = write_checkpoint(tmp_path / "repository/tiny", special)
    fetch_encoder(str(folder), tmp_path / "model")
    encoder = Geneformer.load(tmp_path / "model", precision, layer)
    encoder.budget = 50
    cells = some_cells([9, 18, 19, 20, 30, 1, 9, 9, 5, 14], special)
    tensors = encoder.embed(cells, TOP)
    if precision is torch.bfloat16:
        model = model.to(torch.bfloat16)
    plain = plain_vectors(model.float() if precision is torch.float32 else model, cells, special, 20, layer)
    for cell, (genes, whole) in enumerate(plain):
        kept = min(TOP, len(genes))
        assert tensors["lengths"][cell] == kept
        # fp16 keeps 11 bits
        limit = {"rtol": 1e-3, "atol": max(atol, 1e-3)}
        np.testing.assert_allclose(tensors["gene_vectors"][cell, :kept], genes[:kept].float().numpy(), **limit)
        assert not tensors["gene_vectors"][cell, kept:].any()
        np.testing.assert_allclose(tensors["pooled"][cell], genes.float().mean(0).numpy(), atol=atol)
        if whole is not None:
            np.testing.assert_allclose(tensors["cls"][cell], whole.float().numpy(), atol=atol)
    assert ("cls" in tensors) == (special is V2)


def test_float32_vectors_are_equal_before_rounding(tmp_path):
    model = tiny_bert(V1)
    encoder = RankedBert(model.bert, Special(**V1), -2)
    cells = some_cells([3, 20, 7, 20], V1)
    known = cells.lengths
    plain = plain_vectors(tiny_bert(V1), cells, V1, 20, -2)
    for rows, vectors in encoder._read(cells, np.argsort(-known), known, 20):
        for place, row in enumerate(rows):
            found = vectors["gene_vectors"][place, : known[row]]
            torch.testing.assert_close(found, plain[row][0], rtol=1e-5, atol=1e-5)


def test_vectors_do_not_depend_on_order_batches_or_other_cells():
    encoder = RankedBert(tiny_bert(V2).bert, Special(**V2), -2)
    lengths = [4, 18, 11, 18, 2, 9]
    cells = some_cells(lengths, V2)
    whole = encoder.embed(cells, TOP)
    for budget in (1, 25, 60):
        encoder.budget = budget
        for name, tensor in encoder.embed(cells, TOP).items():
            np.testing.assert_allclose(tensor, whole[name], rtol=2e-3, atol=1e-5)
    alone = encoder.embed(cells.take(np.array([2])), TOP)
    assert all(np.allclose(alone[name][0], whole[name][2], rtol=2e-3, atol=1e-5) for name in whole)


def test_batches_are_halved_if_memory_runs_out(monkeypatch):
    encoder = RankedBert(tiny_bert(V1).bert, Special(**V1), -1)
    cells = some_cells([20, 20, 19, 5, 5], V1)
    whole = encoder.embed(cells, TOP)
    vectors = encoder._vectors

    def tight(ids, known, top_k):
        if ids.numel() > 40:
            raise torch.OutOfMemoryError
        return vectors(ids, known, top_k)

    monkeypatch.setattr(encoder, "_vectors", tight)
    encoder.budget = 200
    np.testing.assert_allclose(encoder.embed(cells, TOP)["pooled"], whole["pooled"], atol=1e-5)
    assert encoder.budget <= 50
    monkeypatch.setattr(encoder, "_vectors", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        encoder.embed(cells, TOP)


def test_a_cell_without_known_genes_has_zero_vectors():
    encoder = RankedBert(tiny_bert(V1).bert, Special(**V1), -1)
    cells = some_cells([3, 0], V1)
    tensors = encoder.embed(cells, TOP)
    assert not tensors["pooled"][1].any() and tensors["lengths"].tolist() == [3, 0]
    assert np.isfinite(tensors["pooled"]).all() and encoder.embed(cells, 0)["lengths"].tolist() == [3, 0]
    assert not encoder.embed(some_cells([0, 0], V1), TOP)["pooled"].any()


@pytest.mark.parametrize("as_bin", [False, True], ids=["safetensors", "bin"])
def test_an_official_folder_is_fetched_without_its_pickles(tmp_path, as_bin):
    folder, model = write_checkpoint(tmp_path / "repository/Geneformer-V2-tiny", V2, as_bin)
    fetch_encoder(str(folder), tmp_path / "models/tiny")
    fetched = tmp_path / "models/tiny"
    assert sorted(path.name for path in fetched.iterdir()) == [
        "config.json", "encoder.json", "genes.parquet", "model.safetensors", "source.json",
    ]  # fmt: skip
    source = read_json(fetched / "source.json")
    assert source["licence"] == "apache-2.0" and source["source"] == str(folder)
    assert set(source["sha256"]) == {"config.json", "encoder.json", "genes.parquet", "model.safetensors"}
    weights = load_file(fetched / "model.safetensors")
    assert all(torch.equal(weights[f"bert.{name}"], value) for name, value in model.bert.state_dict().items())
    assert read_json(fetched / "encoder.json")["special"] == V2
    table = contracts.GENES.read(fetched / "genes.parquet")
    assert table.iloc[0, :4].tolist() == [7, "CD3E", "CD3E", 4.0] and len(table) == GENES + 1
    assert all(len(datasets) == 0 for datasets in table["datasets"])


def test_the_encoder_of_a_run_links_the_checkpoint_and_embeds_shards(tmp_path):
    folder, _ = write_checkpoint(tmp_path / "repository/tiny", V2)
    fetch_encoder(str(folder), tmp_path / "models/tiny")
    settings = encoder_settings(kind="geneformer", layer=-3)
    (tmp_path / "results/encoder").mkdir(parents=True)
    Geneformer.fit(None, None, settings, 0, tmp_path, tmp_path / "models/tiny").save(tmp_path / "results/encoder")
    assert (tmp_path / "results/encoder/model.safetensors").is_symlink()
    encoder = load_encoder(tmp_path / "results/encoder")
    assert len(encoder.bert.encoder.layer) == 1 and encoder.layer == -3
    cells = some_cells([5, 18, 9, 2, 17], V2)
    parts = np.split(cells.tokens, cells.offsets[1:-1])
    table = pd.DataFrame({"cell_id": cells.cell_ids, "tokens": parts, "expression": [part * 1.0 for part in parts]})
    table["n_counts"] = cells.n_counts
    TOKENS.write_parts([table[:2], table[2:]], tmp_path / "tokens.parquet")
    genes = write_genes(tmp_path / "genes.parquet", {"tokens": [True] * (GENES + 4)})
    files, found = (tmp_path / "tokens.parquet", genes), []
    for shard in range(2):
        embed_genes(tmp_path / "results/encoder", *files, tmp_path / f"{shard}", shard, 2, TOP, views=0, seed=0)
        found.append(EMBEDDINGS.read(tmp_path / f"{shard}", [*EMBEDDINGS.tensors, "cls"]))
    assert [ids for _, ids in found] == [["c0", "c1"], ["c2", "c3", "c4"]]
    whole = encoder.embed(cells, TOP)
    for name, tensor in whole.items():
        np.testing.assert_allclose(np.concatenate([tensors[name] for tensors, _ in found]), tensor, atol=0.05)
    measured = np.ones(GENES + 4, dtype=bool)
    again = [part.cell_ids.tolist() for part in read_rows(tmp_path / "tokens.parquet", measured, 1, 4)]
    assert again == [["c1"], ["c2", "c3"]]


def break_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def break_weights(folder):
    (folder / "model.safetensors").write_bytes(b"nothing")


def drop_layer(folder):
    weights = {name: value for name, value in load_file(folder / "model.safetensors").items() if "layer.1" not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda folder: break_config(folder, vocab_size=99), "the checkpoint has 99 tokens, .* has 44"),
        (lambda folder: break_config(folder, pad_token_id=1), "pad_token_id is 1, not 0"),
        (lambda folder: break_config(folder, model_type="gpt2"), "is no BERT"),
        (lambda folder: (folder / "config.json").write_text("{"), "no config.json to read"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json to read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors or pytorch_model.bin"),
        (break_weights, "no plain weights"),
        (lambda folder: (folder.parent / "geneformer/token_dictionary_gc104M.pkl").unlink(), "no token_dictionary"),
    ],
)
def test_an_invalid_checkpoint_is_reported_and_nothing_is_written(tmp_path, corrupt, message):
    folder, _ = write_checkpoint(tmp_path / "repository/tiny", V2)
    corrupt(folder)
    with pytest.raises(InputError, match=message):
        fetch_encoder(str(folder), tmp_path / "models/tiny")
    assert not list((tmp_path / "models").iterdir())


def test_missing_weights_and_layers_are_errors(tmp_path):
    folder, _ = write_checkpoint(tmp_path / "repository/tiny", V2)
    fetch_encoder(str(folder), tmp_path / "tiny")
    with pytest.raises(InputError, match="-4 of 3 layers"):
        Geneformer.load(tmp_path / "tiny", layer=-4)
    drop_layer(tmp_path / "tiny")
    with pytest.raises(InputError, match="weights are missing, such as .*layer.1"):
        Geneformer.load(tmp_path / "tiny")


def test_a_bin_file_that_runs_code_is_refused(tmp_path):
    folder, _ = write_checkpoint(tmp_path / "repository/tiny", V2)
    (folder / "model.safetensors").unlink()

    class Hostile:
        def __reduce__(self):
            return (tmp_path / "mark").mkdir, ()

    torch.save({"bert.embeddings.word_embeddings.weight": Hostile()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="no plain weights"):
        fetch_encoder(str(folder), tmp_path / "models/tiny")
    assert not (tmp_path / "mark").exists()
