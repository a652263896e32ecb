"""Annotation: packed models, genes of a new file among those of the model, and what is added to the user's object."""

import gzip
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cell2text.annotation.annotate_query import add_columns, annotate_query, annotation_columns
from cell2text.annotation.fetch_model import fetch_model
from cell2text.annotation.fetch_query import fetch_query
from cell2text.annotation.find_queries import find_queries, name_query
from cell2text.annotation.hide_labels import hide_labels
from cell2text.annotation.language_models import locate_language_model
from cell2text.annotation.pack_model import FORMAT, pack_model, read_model
from cell2text.annotation.predictions import NO_GENES, read_predictions
from cell2text.annotation.rank_query import match_genes, rank_query
from cell2text.cells.filter_cells import flag_cells
from cell2text.cells.h5ad import write_cells
from cell2text.contracts import CELLS, CLUSTERS, EVIDENCE, GENES, PREDICTIONS, QC, TERMS
from cell2text.errors import InputError
from cell2text.files import read_jsonl, seal, write_json, write_jsonl
from default_settings import qc_settings
from ranked_files import write_corpus
from tests_terms import small_table

KNOWN = pd.DataFrame(
    {
        "token": np.array([0, 1, 2, 2], dtype=np.int32),
        "gene_id": ["ENSG00000000001", "ENSG00000000002", "ENSG00000000003", "ENSG00000000004"],
        "symbol": ["AAA", "BBB", "CCC", "CCC"],
        "median": [1.0, 2.0, 3.0, 3.0],
        "datasets": [["old"], [], ["old"], ["old"]],
    }
)


def make_folder(path, marker, content, **facts):
    path.mkdir(parents=True)
    (path / "weights.safetensors").write_bytes(content)
    write_json(facts, path / marker)
    seal(path, marker)
    return path


@pytest.fixture
def packed(tmp_path):
    """A packed model without real weights."""
    facts = {"projector": {}, "finetune": {}, "language_model": {"name": "lm", "source": "s", "sha256": {}}}
    finetuned = make_folder(tmp_path / "finetuned", "cell2text.json", b"projector", **facts)
    (finetuned / ".snakemake_timestamp").touch()
    encoder = make_folder(tmp_path / "encoder", "encoder.json", b"encoder", kind="coexpression", dimensions=2)
    GENES.write(KNOWN, tmp_path / "genes.parquet")
    TERMS.write(small_table(), tmp_path / "terms.parquet")
    for name in ("confidence.json", "reference.safetensors", "card.md"):
        (tmp_path / name).write_text("{}")
    corpus = pd.DataFrame({"cell_id": [f"s|{i}" for i in range(21)], "n_counts": np.arange(21.0) * 100})
    corpus = corpus.reindex(columns=list(CELLS.columns)).astype({"n_counts": float})
    corpus = corpus.astype({name: object for name in corpus if name != "n_counts"}).assign(split="train")
    corpus = corpus.where(corpus.notna(), None).astype({"n_counts": float})
    CELLS.write(corpus, tmp_path / "corpus.parquet")
    inputs = (
        "genes.parquet",
        "terms.parquet",
        "confidence.json",
        "reference.safetensors",
        "corpus.parquet",
        "card.md",
    )
    files = [str(tmp_path / name) for name in inputs]
    settings = {"top_k": 0, "batch_cells": 8, "qc": {}}
    pack_model(str(finetuned), str(encoder), *files, str(tmp_path / "model"), settings)
    return tmp_path / "model"


def test_a_packed_model_is_complete_and_can_be_moved(packed, tmp_path):
    facts = read_model(packed)
    assert facts["format"] == FORMAT and facts["settings"]["batch_cells"] == 8
    assert facts["training_counts"] == [100, 1000, 1900]
    assert set(facts["sha256"]) == {
        *("weights.safetensors", "encoder/weights.safetensors", "encoder/encoder.json", "genes.parquet"),
        *("terms.parquet", "confidence.json", "reference.safetensors", "README.md"),
    }
    shutil.copytree(packed, tmp_path / "elsewhere/copy")
    assert read_model(tmp_path / "elsewhere/copy") == facts


def test_missing_changed_and_surplus_files_of_a_model_are_refused(packed):
    def refused(problem):
        with pytest.raises(InputError, match=problem) as error:
            read_model(packed)
        assert "\n" not in str(error.value)

    weights, kept = packed / "encoder/weights.safetensors", (packed / "encoder/weights.safetensors").read_bytes()
    weights.unlink()
    refused("weights.safetensors: no such file")
    weights.write_bytes(b"others")
    refused("has changed")
    weights.write_bytes(kept)
    (packed / "adapter.pkl").touch()
    refused("adapter.pkl: is not a file of this model")
    (packed / "adapter.pkl").unlink()
    facts = json.loads((packed / "cell2text.json").read_text())
    write_json(facts | {"format": 99}, packed / "cell2text.json")
    refused("written in format 99, and this version reads format 5")
    write_json(facts | {"settings": {}}, packed / "cell2text.json")
    refused("has changed since it was written")
    (packed / "cell2text.json").unlink()
    refused("no cell2text.json in it")


def test_a_linked_encoder_is_packed_with_its_weights(packed, tmp_path):
    encoder = tmp_path / "encoder/weights.safetensors"
    encoder.rename(tmp_path / "fetched.safetensors")
    encoder.symlink_to(tmp_path / "fetched.safetensors")
    inputs = [str(tmp_path / name) for name in ("finetuned", "encoder", "genes.parquet", "terms.parquet")]
    inputs += [
        str(tmp_path / name) for name in ("confidence.json", "reference.safetensors", "corpus.parquet", "card.md")
    ]
    pack_model(*inputs, str(packed), {})
    assert not (packed / "encoder/weights.safetensors").is_symlink()
    (tmp_path / "fetched.safetensors").unlink()
    assert read_model(packed)


def test_test_cells_without_labels_are_a_file_to_annotate(tmp_path):
    counts = sparse.random(5, 4, 0.6, format="csr", dtype=np.float32, random_state=0)
    ids = [f"study|{cell}" for cell in range(5)]
    obs, var = (
        pd.DataFrame({"cell_type": ["T cell"] * 5, "donor_id": ["a"] * 5}),
        KNOWN.set_index("gene_id")[["symbol"]],
    )
    write_cells(tmp_path / "cells.h5ad", [counts], [np.array(ids)], obs, var, {"source": "here"})
    corpus = write_corpus(tmp_path / "corpus.parquet", [ids[4], ids[0], ids[1]], ["test", "train", "test"])
    hide_labels(str(tmp_path / "cells.h5ad"), str(corpus), str(tmp_path / "unlabelled.h5ad"))
    found = ad.read_h5ad(tmp_path / "unlabelled.h5ad")
    assert list(found.obs_names) == ["study|1", "study|4"] and found.obs.shape == (2, 0) and not found.uns
    assert (counts[[1, 4]] != found.X).nnz == 0 and list(found.var_names) == list(var.index)


def test_the_language_model_is_found_by_its_hashes(tmp_path):
    wanted = {"language_model": {"name": "lm", "source": "hf://a/b@c", "sha256": {"config.json": "0" * 64}}}
    assert locate_language_model(wanted, tmp_path) == {"name": "lm", "source": "hf://a/b@c"}
    for name, digit in (("lm", "1"), ("renamed", "0")):
        (tmp_path / name).mkdir()
        write_json({"source": f"path/{name}", "sha256": {"config.json": digit * 64}}, tmp_path / name / "source.json")
    assert locate_language_model(wanted, tmp_path) == {"name": "renamed", "source": "path/renamed"}
    shutil.rmtree(tmp_path / "renamed")
    assert locate_language_model(wanted, tmp_path)["name"] == "lm-00000000"  # another model is named lm
    wanted["language_model"]["source"] = "gone/model"
    with pytest.raises(InputError, match="was read from gone/model"):
        locate_language_model(wanted, tmp_path)


def test_sources_of_models(packed, tmp_path, monkeypatch):
    assert fetch_model(str(packed), tmp_path) == packed
    with pytest.raises(InputError, match="hf://organisation/name@revision"):
        fetch_model("hf://name-alone", tmp_path)

    def download(repository, revision, files, folder, where):
        assert (repository, revision) == ("lab/blood", "v1") and "*.safetensors" in files
        assert not any(pattern.endswith((".bin", ".pt", ".pkl", "*")) for pattern in files)
        shutil.copytree(packed, folder)

    monkeypatch.setattr("cell2text.annotation.fetch_model.download", download)
    found = fetch_model("hf://lab/blood@v1", tmp_path / "models")
    assert found.name == "lab--blood@v1" and read_model(found) == read_model(packed)
    monkeypatch.setattr("cell2text.annotation.fetch_model.download", None)  # it is there already
    assert fetch_model("hf://lab/blood@v1", tmp_path / "models") == found


def test_two_commands_that_download_one_model_do_so_once(packed, tmp_path, monkeypatch):
    downloads = []

    def download(repository, revision, files, folder, where):
        downloads.append(folder)
        assert not folder.exists()
        for file in sorted(packed.rglob("*")):
            if file.is_file():
                (folder / file.relative_to(packed)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, folder / file.relative_to(packed))
                time.sleep(0.02)

    monkeypatch.setattr("cell2text.annotation.fetch_model.download", download)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: fetch_model("hf://lab/blood@v1", tmp_path / "models"), range(2)))
    assert len(downloads) == 1 and found[0] == found[1]
    assert read_model(found[0]) == read_model(packed)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["lab--blood@v1"]


def test_a_download_that_fails_leaves_no_model(packed, tmp_path, monkeypatch):
    def download(repository, revision, files, folder, where):
        shutil.copytree(packed, folder, dirs_exist_ok=True)
        (folder / "terms.parquet").write_bytes(b"half")

    monkeypatch.setattr("cell2text.annotation.fetch_model.download", download)
    with pytest.raises(InputError, match=r"terms.parquet: has changed"):
        fetch_model("hf://lab/blood@v1", tmp_path / "models")
    assert not (tmp_path / "models/lab--blood@v1").exists()


def test_genes_of_a_file_are_matched_by_id_or_symbol():
    index = ["ENSG00000000004", "BBB", "ENSG00000000009", "XYZ"]
    measured = pd.DataFrame({"symbol": ["CCC", "BBB", "AAA", "XYZ"]}, index=index)
    genes = match_genes(KNOWN, measured, "new")
    by_name = genes.set_index("gene_id")
    assert by_name["token"].to_dict() == {"ENSG00000000009": 0, "BBB": 1, "ENSG00000000004": 2}
    assert by_name["median"].to_dict() == {"ENSG00000000009": 1, "BBB": 2, "ENSG00000000004": 3}
    assert (genes["datasets"].map(tuple) == ("new",)).all()


def test_tokens_that_a_file_does_not_measure_stay_in_the_table():
    genes = match_genes(KNOWN, pd.DataFrame({"symbol": ["AAA"]}, index=["AAA"]), "new")
    assert genes["token"].to_list() == [0, 1, 2] and genes["datasets"].map(len).to_list() == [1, 0, 0]
    two = KNOWN.assign(symbol=["AAA", "AAA", "CCC", "CCC"])  # a symbol of two tokens tells nothing
    assert match_genes(two, pd.DataFrame({"symbol": ["AAA"]}, index=["AAA"]), "new")["datasets"].map(len).sum() == 0


def write_study(path, counts, names=None, genes=("AAA", "BBB", "CCC", "XYZ")):
    counts = sparse.csr_matrix(np.array(counts, dtype=np.float32))
    obs = pd.DataFrame(
        {"mine": pd.Categorical(["x"] * counts.shape[0])}, index=names or [f"c{i}" for i in range(counts.shape[0])]
    )
    study = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=list(genes)))
    study.layers["twice"] = counts * 2
    study.obsm["X_umap"] = np.arange(2.0 * len(obs)).reshape(-1, 2)
    study.uns["mine"] = {"a": 1}
    study.write_h5ad(path)
    return str(path)


def run_steps(folder, source, packed):
    """Run the steps that need no language model; predictions are those of the first cell type for every cell."""
    counts, qc, genes, tokens, fit = (
        folder / name for name in ("counts.h5ad", "qc.parquet", "genes.parquet", "new.parquet", "fit.json")
    )
    fetch_query({"dataset": "new", "source": source}, counts, None, 0.1)
    flag_cells(counts, qc, qc_settings(min_counts=30_000, score_doublets=False))
    rank_query(str(counts), str(packed), source, str(genes), str(tokens), str(fit))
    ids = QC.read(qc)["cell_id"]
    rows = [dict.fromkeys(PREDICTIONS.columns) | {"cell_id": one, "split": "query"} for one in reversed(list(ids))]
    for row in rows:
        row |= {
            "cell_type_id": "CL:0000236",
            "cell_type_confidence": 0.9,
            "pathway_ids": [],
            "text": "This is a B cell.",
        }
        row |= {
            "cell_type_reported_id": "CL:0000236",
            "cell_type_reported_confidence": 0.9,
            "novel": False,
            "novelty": 1.0,
        }
    write_jsonl(rows, folder / "described.jsonl")
    CLUSTERS.write(pd.DataFrame({"cell_id": ids, "cluster": "NA"}, dtype=object), folder / "clusters.parquet")
    (folder / "clusters.tsv").write_text("cluster\ttext\nNA\tCluster NA.\n")
    explained = pd.DataFrame({"cell_id": ids, "for_genes": [["AAA", "BBB"], [], [], ["AAA"]][: len(ids)]})
    explained["against_genes"] = explained["for_genes"]
    EVIDENCE.write(explained, folder / "evidence.parquet")
    made = (tokens, qc, fit, *(folder / name for name in ("clusters.parquet", "clusters.tsv", "evidence.parquet")))
    return [str(folder / "described.jsonl")], *map(str, made)


COUNTS = [[5, 1, 1, 0], [0, 0, 0, 3], [0, 0, 0, 0], [9, 0, 0, 0]]


def test_every_cell_comes_back_in_place_and_nothing_else_changes(packed, tmp_path):
    source = write_study(tmp_path / "mine.h5ad", COUNTS, names=["a", "a", "b", "=c"])  # names may repeat
    before = (tmp_path / "mine.h5ad").read_bytes()
    steps = run_steps(tmp_path, source, packed)
    outputs = [str(tmp_path / name) for name in ("annotated.h5ad", "cells.tsv.gz", "descriptions.jsonl")]
    annotate_query(source, *steps, str(packed), *outputs)
    assert (tmp_path / "mine.h5ad").read_bytes() == before
    found, mine = ad.read_h5ad(outputs[0]), ad.read_h5ad(source)
    assert list(found.obs_names) == ["a", "a", "b", "=c"] and list(found.obs)[0] == "mine"
    assert found.obs["cell2text_cell_type"].to_list() == ["B cell", "not determined", "not determined", "B cell"]
    assert found.obs["cell2text_cell_type_guess_id"].to_list() == ["CL:0000236", "", "", "CL:0000236"]
    assert found.obs["cell2text_flag"].to_list() == ["too few counts (7 < 8)", NO_GENES, NO_GENES, ""]
    assert found.obs["cell2text_evidence_for"].to_list() == ["AAA, BBB", "", "", "AAA"]
    assert found.obs["cell2text_description"].to_list() == ["This is a B cell.", "", "", "This is a B cell."]
    with h5py.File(outputs[0]) as new, h5py.File(source) as old:
        for name in ("X/data", "X/indices", "X/indptr", "layers/twice/data", "obsm/X_umap", "obs/mine/codes"):
            assert new[name].dtype == old[name].dtype and (new[name][:] == old[name][:]).all()
    assert found.uns["cell2text"]["clusters"]["text"].tolist() == ["Cluster NA."]
    assert found.uns["mine"] == mine.uns["mine"] and found.uns["cell2text"]["fit"]["cells_without_genes"] == 2
    with gzip.open(outputs[1], "rt") as file:
        lines = file.read().splitlines()
    assert len(lines) == 5 and lines[4].startswith("'=c\t")  # no formula for a spreadsheet
    assert lines[1].startswith("a\tB cell\tCL:0000236\t0.9\t")
    rows = list(read_jsonl(outputs[2]))
    assert [row["cell"] for row in rows] == ["a", "a", "b", "=c"] and [row["text"] for row in rows][1] is None


def test_an_earlier_annotation_is_replaced(packed, tmp_path, caplog):
    source = write_study(tmp_path / "mine.h5ad", COUNTS)
    steps = run_steps(tmp_path, source, packed)
    cells, files = read_predictions(*steps[:3], small_table()), (steps[4], steps[6])
    first, second = str(tmp_path / "first.h5ad"), str(tmp_path / "second.h5ad")
    add_columns(source, annotation_columns(cells, *files).assign(cell2text_old=1), {"run": 1}, first)
    with caplog.at_level("INFO"):
        add_columns(first, annotation_columns(cells, *files), {"run": 2}, second)
    assert "39 columns of an earlier annotation are replaced" in caplog.text
    found = ad.read_h5ad(second)
    assert "cell2text_old" not in found.obs and found.uns["cell2text"] == {"run": 2}
    assert len(found.obs.columns) == len(set(found.obs.columns)) == 39


def test_a_file_with_other_genes_is_refused_before_anything_is_written(packed, tmp_path):
    source = write_study(tmp_path / "mine.h5ad", [[1, 0, 0, 99]] * 3)
    with pytest.raises(InputError, match=r"mine.h5ad: var: only 1.0% of the counts are in genes of the model"):
        run_steps(tmp_path, source, packed)
    assert not (tmp_path / "fit.json").exists() and not (tmp_path / "new.parquet").exists()


def test_shallow_files_and_few_known_genes_are_warned_about(packed, tmp_path):
    source = write_study(tmp_path / "mine.h5ad", [[1, 0, 0, 3]] * 3)
    run_steps(tmp_path, source, packed)
    warnings = json.loads((tmp_path / "fit.json").read_text())["warnings"]
    assert warnings[0].startswith("only 25% of the counts") and "fewer than 4 counts" in warnings[1]
    assert "fewer than three studies" in warnings[2]


def test_queries_are_files_or_sheets(packed, tmp_path):
    schema = Path(__file__).parents[2] / "workflow/schemas/datasets.schema.yaml"
    source = write_study(tmp_path / "my cells (1).h5ad", COUNTS)
    config = {"query": source, "model": str(packed)}
    assert find_queries(config, schema, tmp_path) == (
        {"my_cells_1": {"dataset": "my_cells_1", "source": source}},
        str(packed),
    )
    assert find_queries({"query": None, "model": None}, schema, tmp_path) == ({}, [])
    sheet = tmp_path / "sheet.tsv"
    sheet.write_text(f"dataset\tsource\none\t{source}\ntwo\t{source}\n")
    assert list(find_queries(config | {"query": str(sheet)}, schema, tmp_path)[0]) == ["one", "two"]
    for changed, problem in (
        ({"model": None}, "config: model"),
        ({"query": None}, "config: query"),
        ({"query": "x"}, "no such file: x"),
    ):
        with pytest.raises(InputError, match=problem):
            find_queries(config | changed, schema, tmp_path)


@pytest.mark.parametrize(
    ("path", "name"), [("a/b.h5ad", "b"), ("x/filtered matrix", "filtered_matrix"), ("é.h5", "query")]
)
def test_names_of_queries(path, name):
    assert name_query(path) == name
