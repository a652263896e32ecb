"""Damage of models and encoders, and values that are not finite, are reported in one line when they are loaded."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from cell2text.embedding import fit_encoder as fitting
from cell2text.embedding.axes import Axes
from cell2text.embedding.encoders import load_encoder
from cell2text.embedding.encoders.geneformer import Geneformer
from cell2text.embedding.encoders.pretrain import Pretrained
from cell2text.embedding.encoders.ranked_bert import Special
from cell2text.errors import InputError
from cell2text.files import read_json, seal, whole_folder, write_json
from cell2text.model import bundle
from cell2text.models.fetch_encoder import fetch_encoder
from cell2text.models.fetch_language_model import fetch_language_model
from default_settings import encoder_settings, finetune_settings, projector_settings
from ranked_files import random_encoder, random_gene_text, write_genes
from small_disk import small_files
from tiny_geneformer import V2, tiny_bert, write_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def fetched(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("fetched") / "tiny"
    fetch_language_model(str(tiny_model), folder)
    return folder


def build(language_model, mode):
    settings = finetune_settings(mode=mode) if mode == "full" else finetune_settings(lora_rank=4, lora_alpha=8)
    torch.manual_seed(0)
    return bundle.build(language_model, projector_settings(kind="pooled", soft_tokens=2, hidden=16), 5, settings, CPU)


def write_model(folder, language_model, mode):
    with whole_folder(folder, "cell2text.json") as unfinished:
        (unfinished / "history.parquet").write_bytes(b"rows")
        bundle.save(build(language_model, mode), unfinished, {"seed": 1})
    return folder


@pytest.fixture(scope="module", params=["lora", "full"])
def model(request, tmp_path_factory, fetched):
    return write_model(tmp_path_factory.mktemp("model") / request.param, fetched, request.param)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """One saved encoder of each kind."""
    root = tmp_path_factory.mktemp("encoders")
    source, _ = write_checkpoint(root / "repository/tiny", V2)
    fetch_encoder(str(source), root / "models/geneformer")
    made = {
        "coexpression": random_encoder(7, 3),
        "geneformer": Geneformer.fit(
            None, None, encoder_settings(kind="geneformer"), 0, root, root / "models/geneformer"
        ),
        "pretrain": Pretrained(tiny_bert(V2).bert, Special(**V2), -1, []),
        "gene_text": random_gene_text(7, 3),
    }
    for kind, encoder in made.items():
        with whole_folder(root / "results" / kind, "encoder.json") as folder:
            encoder.save(folder)
    return root


def flip(content):
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    return bytes(flipped)


DAMAGES = {"cut": lambda content: content[: len(content) // 2], "flipped": flip, "empty": lambda content: b""}


@pytest.mark.parametrize("damage", [*DAMAGES, "gone"])
def test_every_file_of_a_model_is_checked(model, fetched, tmp_path, damage):
    files = sorted(path.relative_to(model) for path in model.rglob("*") if path.is_file())
    assert {path.as_posix() for path in files} == {*read_json(model / "cell2text.json")["sha256"], "cell2text.json"}
    folder = shutil.copytree(model, tmp_path / "model")
    bundle.load(folder, fetched, CPU)
    for name in files:
        content = (folder / name).read_bytes()
        if damage == "gone":
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(DAMAGES[damage](content))
        with pytest.raises(InputError, match=rf"^{folder / name}: .*\. Delete {folder} and run the workflow again$"):
            bundle.load(folder, fetched, CPU)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("damage", [*DAMAGES, "gone"])
def test_every_file_of_the_language_model_is_checked(model, fetched, tmp_path, damage):
    folder = shutil.copytree(fetched, tmp_path / "tiny")
    for name in sorted(path.name for path in folder.iterdir() if path.name != "source.json" or damage != "gone"):
        content = (folder / name).read_bytes()
        if damage == "gone":
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(DAMAGES[damage](content))
        for load in (lambda: bundle.load(model, folder, CPU), lambda: build(folder, "lora")):
            with pytest.raises(
                InputError, match=rf"^{folder / name}: .*\. Delete {folder} and run the workflow again$"
            ):
                load()
        (folder / name).write_bytes(content)


def weights_of(folder):
    return sorted(path for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(model, fetched, tmp_path, value):
    for file in weights_of(model):
        folder = shutil.copytree(model, tmp_path / file.stem)
        path = folder / file.relative_to(model)
        weights = load_file(path)
        name = sorted(weights)[-1]
        weights[name].view(-1)[0] = value
        save_file(weights, path, metadata={"format": "pt"})
        seal(folder, "cell2text.json")  # as if training had written it
        with pytest.raises(InputError, match=rf"^{folder}/.*: .* has values that are not finite\. Delete the model's"):
            bundle.load(folder, fetched, CPU)


@pytest.mark.parametrize(
    "change",
    [
        lambda about: {},
        lambda about: about | {"finetune": {}},
        lambda about: about | {"finetune": None},
        lambda about: about | {"projector": {"kind": "pooled"}},
        lambda about: about | {"projector": about["projector"] | {"surplus": 1}},
        lambda about: {name: value for name, value in about.items() if name != "dimensions"},
    ],
)
def test_incomplete_facts_of_a_model_are_reported(model, fetched, tmp_path, change):
    folder = shutil.copytree(model, tmp_path / "model")
    about = read_json(folder / "cell2text.json")
    write_json(change({key: about[key] for key in about if key != "seal"}), folder / "cell2text.json")
    with pytest.raises(InputError, match=rf"^{folder}/cell2text.json: cannot be read: .*fine-tune again"):
        bundle.load(folder, fetched, CPU)


def test_without_hashes_damage_is_reported_in_one_line_all_the_same(fetched, tmp_path):
    bundle.save(build(fetched, "lora"), tmp_path, {})
    for name in ("projector.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        content = (tmp_path / name).read_bytes()
        for damaged in (content[: len(content) // 2], b""):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(InputError, match=rf"^{tmp_path}/.*: cannot be read: .*fine-tune again"):
                bundle.load(tmp_path, fetched, CPU)
        (tmp_path / name).write_bytes(content)
    bundle.load(tmp_path, fetched, CPU)


@pytest.mark.parametrize("damage", [*DAMAGES, "gone"])
@pytest.mark.parametrize("kind", ["coexpression", "pretrain", "gene_text"])
def test_every_file_of_an_encoder_is_checked(encoders, tmp_path, kind, damage):
    folder = shutil.copytree(encoders / "results" / kind, tmp_path / kind)
    load_encoder(folder)
    for name in sorted(path.name for path in folder.iterdir()):
        content = (folder / name).read_bytes()
        if damage == "gone":
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(DAMAGES[damage](content))
        with pytest.raises(InputError, match=rf"^{folder / name}: .*\. Delete {folder} and run the workflow again$"):
            load_encoder(folder)
        (folder / name).write_bytes(content)


def test_damage_of_a_fetched_encoder_names_its_own_folder(encoders, tmp_path, monkeypatch):
    root = shutil.copytree(encoders, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(root)
    load_encoder("results/geneformer")
    weights = Path("models/geneformer/model.safetensors")
    weights.write_bytes(flip(weights.read_bytes()))
    expected = rf"^{weights}: has changed: .*\. Delete models/geneformer and run the workflow again$"
    with pytest.raises(InputError, match=expected):
        load_encoder("results/geneformer")
    with pytest.raises(InputError, match=expected):
        Geneformer.fit(None, None, encoder_settings(kind="geneformer"), 0, root, Path("models/geneformer"))
    weights.unlink()
    with pytest.raises(InputError, match=rf"^{weights}: no such file\. Delete models/geneformer"):
        load_encoder("results/geneformer")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["coexpression", "pretrain", "gene_text"])
def test_an_encoder_that_is_not_finite_is_refused(encoders, tmp_path, kind, value):
    for name in sorted(load_file(weights_of(encoders / "results" / kind)[0])):
        folder = shutil.copytree(encoders / "results" / kind, tmp_path / name)
        (file,) = weights_of(folder)
        weights = load_file(file)
        weights[name].view(-1)[-1] = value
        save_file(weights, file, metadata={"format": "pt"})
        seal(folder, "encoder.json")
        with pytest.raises(InputError, match=rf"^{file}: {name} has values that are not finite\. Delete {folder}"):
            load_encoder(folder)


AXES = {"vectors": torch.ones(7, 3)} | {name: torch.ones(7) for name in ("mean", "profile", "noise")}
AXES |= {name: torch.ones(3) for name in ("variance", "scale")}


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"vectors": torch.ones(7, 3)},
        AXES | {"scale": torch.ones(2)},
        AXES | {"profile": torch.ones(6)},
        AXES | {"vectors": torch.ones(21)},
        AXES | {"centre": torch.ones(3)},
        AXES | {"members": torch.ones(7, 2, dtype=torch.uint8)},
        AXES | {"members": torch.ones(6, 2, dtype=torch.uint8), "programme_scale": torch.ones(2)},
        AXES | {"members": torch.ones(7, 2, dtype=torch.uint8), "programme_scale": torch.ones(3)},
    ],
)
def test_axes_that_do_not_fit_together_are_refused(encoders, tmp_path, tensors):
    folder = shutil.copytree(encoders / "results/coexpression", tmp_path / "encoder")
    save_file(tensors, folder / "coexpression.safetensors")
    seal(folder, "encoder.json")
    expected = r"coexpression.safetensors: not axes with mean, profile, noise, variance and scale: found "
    with pytest.raises(InputError, match=expected):
        load_encoder(folder)


TEXTS = {"vectors": torch.ones(7, 3)} | {name: torch.ones(7) for name in ("mean", "profile")}
TEXTS |= {name: torch.ones(3) for name in ("shift", "scale")}


@pytest.mark.parametrize(
    "tensors",
    [{}, TEXTS | {"mean": torch.ones(6)}, TEXTS | {"scale": torch.ones(2)}, TEXTS | {"vectors": torch.ones(21)}, AXES],
)
def test_vectors_of_texts_that_do_not_fit_together_are_refused(encoders, tmp_path, tensors):
    folder = shutil.copytree(encoders / "results/gene_text", tmp_path / "encoder")
    save_file(tensors, folder / "gene_text.safetensors")
    seal(folder, "encoder.json")
    expected = r"gene_text.safetensors: not vectors with mean, profile, shift and scale: found "
    with pytest.raises(InputError, match=expected):
        load_encoder(folder)


@pytest.mark.parametrize("about", [{}, [], {"kind": "nobody"}, {"kind": "pretrain"}, {"kind": ["pretrain"]}])
def test_incomplete_facts_of_an_encoder_are_reported(encoders, tmp_path, about):
    folder = shutil.copytree(encoders / "results/pretrain", tmp_path / "encoder")
    write_json(about, folder / "encoder.json")
    with pytest.raises(InputError, match=rf"^{folder}/encoder.json: .*\. Delete {folder} and run the workflow again$"):
        load_encoder(folder)


def test_weights_of_a_checkpoint_that_are_not_finite_are_refused(tmp_path):
    folder, model = write_checkpoint(tmp_path / "repository/tiny", V2)
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.weight[0, 0] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(InputError, match=r"model.safetensors: bert\..*query.weight has values that are not finite"):
        fetch_encoder(str(folder), tmp_path / "models/tiny")


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "max_position_embeddings"])
def test_a_checkpoint_without_a_size_is_reported(tmp_path, key):
    folder, _ = write_checkpoint(tmp_path / "repository/tiny", V2)
    config = read_json(folder / "config.json")
    for value in (None, 0, "12"):
        write_json({name: config[name] for name in config if name != key} | ({key: value} if value else {}),
                   folder / "config.json")  # fmt: skip
        with pytest.raises(InputError, match=rf"config.json: {key} is {value if value else None}, no positive number"):
            fetch_encoder(str(folder), tmp_path / "models/tiny")


def test_a_checkpoint_without_pad_token_id_has_the_default_of_bert(tmp_path):
    folder, _ = write_checkpoint(tmp_path / "repository/tiny", V2)
    config = {name: value for name, value in read_json(folder / "config.json").items() if name != "pad_token_id"}
    write_json(config, folder / "config.json")
    fetch_encoder(str(folder), tmp_path / "models/tiny")
    for path in (tmp_path / "repository/geneformer").glob("token_dictionary*.pkl"):
        tokens = pd.read_pickle(path)
        first = next(name for name, token in tokens.items() if token == 1)
        pd.to_pickle(tokens | {"<pad>": tokens[first], first: tokens["<pad>"]}, path, protocol=4)
    with pytest.raises(InputError, match=r"config.json: pad_token_id is 0, not 1\. Use the dictionaries"):
        fetch_encoder(str(folder), tmp_path / "models/other")


def test_weights_without_a_message_in_their_error(tmp_path, monkeypatch):
    folder, _ = write_checkpoint(tmp_path / "repository/tiny", V2)

    def fail(*_, **__):
        raise RuntimeError("")

    monkeypatch.setattr("safetensors.torch.load_file", fail)
    with pytest.raises(InputError, match=r"no plain weights \(RuntimeError\)"):
        fetch_encoder(str(folder), tmp_path / "models/tiny")


def test_a_full_disk_is_reported_by_all_writers(encoders, fetched, tmp_path, monkeypatch):
    source, _ = write_checkpoint(tmp_path / "repository/tiny", V2)
    expected = r"^{}: cannot be written: File too large \(disk: .*\)\. Raise the limit"
    with pytest.raises(InputError, match=expected.format(tmp_path / "models/tiny")), small_files(2000):
        fetch_encoder(str(source), tmp_path / "models/tiny")
    for mode in ("lora", "full"):
        model = build(fetched, mode)
        (tmp_path / mode).mkdir()
        with pytest.raises(InputError, match=expected.format(tmp_path / mode)), small_files(2000):
            bundle.save(model, tmp_path / mode, {})
    genes = write_genes(tmp_path / "genes.parquet", {"a": [True] * 7})
    for kind in ("coexpression", "pretrain"):
        encoder = load_encoder(encoders / "results" / kind)
        if kind == "coexpression":
            encoder.axes = Axes(np.ones((1000, 3)), *np.ones((2, 1000)), np.ones(3), np.ones(1000))
        monkeypatch.setattr(fitting, "encoder_class", lambda _, made=encoder: type("", (), {"fit": lambda *_: made}))
        checkpoints = tmp_path / f"{kind}.checkpoints"
        checkpoints.mkdir()
        with pytest.raises(InputError, match=expected.format(tmp_path / kind)), small_files(2000):
            fitting.fit_encoder(fitting.EncoderInputs("", genes, [], encoder_settings(), 0), tmp_path / kind)
        assert checkpoints.is_dir()  # the next attempt need not train again
    assert not list(tmp_path.glob("**/.*"))
