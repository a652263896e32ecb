"""Shards, datasets and splits with no cell or a single one run through, and are reported where they limit a result."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cell2text.confidence.decisions import Confidence, read_ancestors
from cell2text.contracts import (
    CELLS,
    DESCRIPTIONS,
    EMBEDDINGS,
    PATHWAY_SCORES,
    PREDICTIONS,
    SAMPLED_CELLS,
    SPLITS,
    TERMS,
    TOKENS,
)
from cell2text.corpus.score_pathways import score_pathways
from cell2text.corpus.split_donors import split_donors
from cell2text.corpus.write_descriptions import write_descriptions
from cell2text.embedding.axes import find_profile
from cell2text.embedding.embed_genes import embed_genes
from cell2text.embedding.measure_genes import measure_genes
from cell2text.embedding.rank_genes import rank_genes
from cell2text.embedding.ranked_cells import RankedSplit, read_measured
from cell2text.embedding.vectors import Embeddings
from cell2text.errors import InputError
from cell2text.evaluation.baselines.aligned import predict_aligned
from cell2text.evaluation.baselines.knn import predict_knn
from cell2text.evaluation.baselines.nearest_text import predict_nearest_text
from cell2text.evaluation.baselines.shuffled import predict_shuffled
from cell2text.evaluation.evaluate import _read_methods
from cell2text.files import read_json, read_jsonl, write_json, write_jsonl
from cell2text.generation.generate_descriptions import generate_descriptions
from cell2text.generation.score_candidates import Scorer, score_candidates
from finetune_run import PROJECTOR, finetune, write_files
from ranked_files import random_encoder, write_genes
from scored_cells import run_calibrate

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


def write_encoder(folder):
    folder.mkdir()
    random_encoder(9, 6).save(folder)
    return folder


def write_tokens(path, cells):
    table = pd.DataFrame({"cell_id": [f"study|{i}" for i in range(cells)]})
    table["tokens"] = [np.arange(3, dtype=np.int32)] * cells
    table["expression"] = [np.ones(3, dtype=np.float32)] * cells
    table["n_counts"] = 1000.0
    TOKENS.write(table, path)  # without cells, a file without parts, as rank_genes writes it
    return path


@pytest.mark.parametrize("cells", [0, 1, 3, 4, 9])
@pytest.mark.parametrize(("top_k", "views"), [(0, 0), (4, 0), (4, 2)])
def test_a_dataset_has_fewer_cells_than_shards_or_none(tmp_path, cells, top_k, views):
    encoder, tokens = write_encoder(tmp_path / "encoder"), write_tokens(tmp_path / "tokens.parquet", cells)
    genes = write_genes(tmp_path / "genes.parquet", {"tokens": [True] * 9})
    files = [tmp_path / f"{shard}.safetensors" for shard in range(4)]
    for shard, path in enumerate(files):
        embed_genes(encoder, tokens, genes, path, shard, 4, top_k, views, seed=0)
    names = [*EMBEDDINGS.tensors, *(f"view_{name}" for name in EMBEDDINGS.tensors if views)]
    read = [EMBEDDINGS.read(path, names) for path in files]
    assert [cell for _, ids in read for cell in ids] == [f"study|{i}" for i in range(cells)]
    assert all(tensors["gene_vectors"].shape[1:] == (top_k, 6) for tensors, _ in read)
    assert all(tensors["pooled"].shape[1:] == (12,) for tensors, _ in read)
    assert all(tensors["view_gene_vectors"].shape[1:] == (2, top_k, 6) for tensors, _ in read if views)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    """A fine-tuned tiny model, with one validation cell, two test cells, and a shard without any of them."""
    folder = write_files(tmp_path_factory.mktemp("run"), tiny_model)
    model = finetune(folder, tiny_model, "model", epochs=1)
    described = DESCRIPTIONS.read(folder / "descriptions.parquet")
    described["split"] = ["train"] * 27 + ["validation"] + ["test"] * 2
    DESCRIPTIONS.write(described, folder / "descriptions.parquet")
    corpus = described[["cell_id", "split"]].reindex(columns=list(CELLS.columns))
    CELLS.write(corpus.astype(object).where(corpus.notna(), None).assign(n_counts=1.0), folder / "cells.parquet")
    tensors, ids = EMBEDDINGS.read(folder / "embeddings.safetensors")
    for name, rows in {"none": slice(0), "train": slice(20), "rest": slice(20, None)}.items():
        part = {key: tensor[rows] for key, tensor in tensors.items()}
        EMBEDDINGS.write(part, ids[rows], folder / f"{name}.safetensors")
    inputs = [str(path) for path in (model, tiny_model, folder / "cells.parquet", folder / "terms.parquet")]
    for name in ("train", "rest"):
        embeddings = Embeddings([str(folder / f"{name}.safetensors")])
        score_candidates(*inputs, embeddings, str(folder / f"scores-{name}.safetensors"), "validation", 8)
    run_calibrate(folder, scores=["scores-train", "scores-rest"])
    return folder, inputs


@pytest.mark.parametrize("shard", ["none", "train"])
def test_a_shard_without_cells_of_a_split_gives_an_empty_file(run, shard):
    folder, inputs = run
    out = folder / "generations/test"
    for name in (shard, "rest"):
        files, scores = [str(folder / f"{name}.safetensors")], str(folder / f"test-{name}.safetensors")
        score_candidates(*inputs, Embeddings(files), scores, "test", 8)
        fitted = str(folder / "confidence.json"), str(folder / "reference.safetensors")
        generate_descriptions(inputs[0], scores, *fitted, inputs[3], files, str(out / f"{name}.jsonl"), "test")
    assert (out / f"{shard}.jsonl").read_text() == ""
    assert [row["cell_id"] for row in read_jsonl(out / "rest.jsonl")] == ["study|28", "study|29"]
    [(_, generated, _)] = _read_methods([out / f"{shard}.jsonl", out / "rest.jsonl"], [])
    assert list(generated["cell_id"]) == ["study|28", "study|29"]


def test_generations_of_which_all_are_empty_have_the_columns_of_predictions(tmp_path):
    for name in "ab":
        write_jsonl([], tmp_path / f"{name}.jsonl")
    [(_, generated, _)] = _read_methods([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], [])
    assert len(generated) == 0 and list(generated) == list(PREDICTIONS.columns)


def test_the_aligned_projector_predicts_nothing_for_an_empty_split(run):
    folder, inputs = run
    embeddings = Embeddings([str(folder / f"{name}.safetensors") for name in ("none", "train", "rest")])
    for splits, cells in ((["none", "test"], ["study|28", "study|29"]), (["none"], [])):
        predict_aligned(*inputs, embeddings, str(folder / "aligned.parquet"), splits)
        assert list(PREDICTIONS.read(folder / "aligned.parquet")["cell_id"]) == cells


def test_a_cell_alone_in_its_split_is_not_described_from_its_own_embedding(run, monkeypatch):
    folder, inputs = run
    embeddings = Embeddings([str(folder / f"{name}.safetensors") for name in ("none", "train", "rest")])
    vectors, asked, scored = Embeddings.vectors, [], []
    score = Scorer.score
    monkeypatch.setattr(Scorer, "score", lambda self, *given: scored.append(score(self, *given)) or scored[-1])
    monkeypatch.setattr(Embeddings, "vectors", lambda self, ids, *rest: asked.append(ids) or vectors(self, ids, *rest))
    confidence, out = str(folder / "confidence.json"), str(folder / "shuffled.parquet")
    predict_shuffled(*inputs, confidence, embeddings, out, SPLITS[1:], batch_cells=8, seed=0)
    predicted = PREDICTIONS.read(out)
    assert list(predicted["cell_id"]) == ["study|27", "study|28", "study|29"]
    assert (predicted["status"] == "parsed").all() and predicted["cell_type_confidence"].between(0, 1).all()
    (other,), swapped = asked
    assert int(other.split("|")[1]) < 27  # a training cell
    assert swapped == ["study|29", "study|28"]
    labels, ancestors = read_json(folder / "model/cell2text.json")["labels"], read_ancestors(inputs[3])
    described = [Confidence.load(confidence).describe(scores, labels, ancestors) for scores in scored]
    assert list(predicted["cell_type_id"]) == list(pd.concat(described)["cell_type_id"])
    predict_shuffled(*inputs, confidence, embeddings, out, ["none"], batch_cells=8, seed=0)
    assert len(PREDICTIONS.read(out)) == 0


def test_gene_vectors_are_read_from_among_empty_shards(run):
    folder, _ = run
    tensors, ids = EMBEDDINGS.read(folder / "embeddings.safetensors")
    tensors["gene_vectors"][:] = np.arange(30)[:, None, None]
    files = []
    for i, rows in enumerate([slice(0), slice(10), slice(10, 10), slice(10, 30), slice(30, 30)]):
        files.append(str(folder / f"part{i}.safetensors"))
        EMBEDDINGS.write({key: tensor[rows] for key, tensor in tensors.items()}, ids[rows], files[-1])
    vectors = Embeddings(files).vectors([ids[i] for i in (10, 0, 29, 9)], "gene_vectors")
    assert vectors[np.arange(4)][0][:, 0, 0].tolist() == [10, 0, 29, 9]
    assert len(Embeddings(files).vectors([], "gene_vectors")) == 0


@pytest.mark.parametrize("kind", ["pooled", "mlp", "perceiver"])
def test_a_model_is_trained_with_one_validation_cell(run, tiny_model, kind):
    folder, _ = run
    finetune(folder, tiny_model, f"one-{kind}", projector=PROJECTOR | {"kind": kind}, epochs=1)


def test_baselines_read_empty_shards(run):
    folder, _ = run
    files = [str(folder / f"{name}.safetensors") for name in ("none", "train", "rest")]
    predict_knn(folder / "descriptions.parquet", folder / "terms.parquet", files, folder / "knn.parquet")
    predict_nearest_text(folder / "descriptions.parquet", files, folder / "text.parquet")
    for name in ("knn", "text"):
        assert list(PREDICTIONS.read(folder / f"{name}.parquet")["cell_id"]) == ["study|27", "study|28", "study|29"]


def write_counts(path, dataset, cells):
    ad.AnnData(
        sparse.csr_matrix(np.ones((cells, 5), dtype=np.float32)),
        obs=pd.DataFrame(index=[f"{dataset}|{i}" for i in range(cells)]),
        var=pd.DataFrame({"symbol": list("ABCDE")}, index=list("ABCDE")),
    ).write_h5ad(path)
    return path


def test_a_dataset_without_cells_in_the_corpus(tmp_path):
    one, other = (write_counts(tmp_path / f"{name}.h5ad", name, 4) for name in "ab")
    ids = [f"a|{i}" for i in range(4)]
    corpus = pd.DataFrame({"cell_id": ids, "split": "train"}).reindex(columns=list(CELLS.columns))
    CELLS.write(corpus.astype(object).where(corpus.notna(), None).assign(n_counts=5.0), tmp_path / "cells.parquet")
    measure_genes(tmp_path / "cells.parquet", [one, other], tmp_path / "genes.parquet")
    tokens = [tmp_path / f"{name}_tokens/{name}.parquet" for name in "ab"]
    for cells, path in zip((one, other), tokens, strict=True):
        rank_genes(tmp_path / "cells.parquet", cells, tmp_path / "genes.parquet", path)
    split = RankedSplit(tokens, tmp_path / "cells.parquet", "train", read_measured(tmp_path / "genes.parquet", tokens))
    assert [list(part.cell_ids) for part in split] == [ids] and split.measured.all()
    np.testing.assert_allclose(find_profile(split), 1 / 5)
    (tmp_path / "sets.gmt").write_text("ONE\t\tA\tB\nTWO\t\tC\tD\n")
    scores = [tmp_path / f"{name}.parquet" for name in "ab"]
    for cells, path in zip((one, other), scores, strict=True):
        score_pathways(cells, tmp_path / "cells.parquet", tmp_path / "sets.gmt", 1, path)
    assert len(PATHWAY_SCORES.read(scores[1])) == 0
    varied = PATHWAY_SCORES.read(scores[0]).assign(ONE=np.arange(4, dtype=np.float32))
    PATHWAY_SCORES.write(varied, scores[0])
    outputs = [tmp_path / name for name in ("descriptions.parquet", "terms.parquet", "kept.json")]
    write_descriptions(tmp_path / "cells.parquet", scores, None, 0, 2, *outputs)
    assert list(DESCRIPTIONS.read(outputs[0])["cell_id"]) == ids
    assert len(TERMS.read(outputs[1])) > 0


def sampled(folder, cell_types, donors):
    """Write sampled cells with the given types and donors, a letter each."""
    table = pd.DataFrame({"cell_type_id": list(cell_types), "donor": [f"s|{donor}" for donor in donors]})
    table["cell_id"] = table["counts_hash"] = [f"s|{i}" for i in range(len(table))]
    table = table.assign(dataset_id="s", cell_type=table["cell_type_id"], n_counts=1.0)
    SAMPLED_CELLS.write(table.reindex(columns=list(SAMPLED_CELLS.columns)).astype(object), folder / "sampled.parquet")
    return folder / "sampled.parquet"


def test_a_type_with_one_cell_is_in_training_and_reported(tmp_path):
    for seed in range(10):
        cells = sampled(tmp_path, "AAAAAAAAAAAAAAAAAAABCDD", "1" * 23)
        split_donors(cells, "cells", SHARES, seed, tmp_path / "cells.parquet", tmp_path / "audit.json")
        corpus, audit = CELLS.read(tmp_path / "cells.parquet"), read_json(tmp_path / "audit.json")
        assert set(corpus["split"][corpus["cell_type_id"].isin(["B", "C"])]) == {"train"}
        assert "train" in set(corpus["split"][corpus["cell_type_id"] == "D"])  # two cells: at least one in training
        limits = "\n".join(audit["limits"])
        assert "Cell types with a single cell, which cannot serve both training and evaluation: B, C." in limits
        assert "Cell types without test cells are not evaluated: B, C" in limits


def test_types_that_all_have_one_cell_leave_nothing_to_evaluate(tmp_path):
    with pytest.raises(InputError, match="config: split_shares: no cell is left for validation and test"):
        split_donors(sampled(tmp_path, "ABCDE", "11111"), "cells", SHARES, 0, tmp_path / "out", tmp_path / "audit")


def test_a_split_of_the_users_own_that_is_empty_names_the_table(tmp_path):
    own = tmp_path / "mine.tsv"
    own.write_text("donor\tsplit\ns|1\ttrain\ns|2\ttest\n")
    with pytest.raises(InputError, match=r"mine\.tsv: no cell is left for validation\. .*Assign some cells"):
        split_donors(sampled(tmp_path, "AAAA", "1122"), str(own), SHARES, 0, tmp_path / "out", tmp_path / "audit")


def test_studies_without_sampled_cells_are_reported(tmp_path):
    rows = [("donor", 5), ("study", 3)]
    write_json([{"slot": slot, "values_before": n, "values_after": 1} for slot, n in rows], tmp_path / "diversity.json")
    outputs = tmp_path / "cells.parquet", tmp_path / "audit.json"
    cells = sampled(tmp_path, "A" * 20, "1" * 20)
    split_donors(cells, "cells", SHARES, 0, *outputs, diversity_file=tmp_path / "diversity.json")
    limits = read_json(outputs[1])["limits"]
    assert [limit for limit in limits if "sampled" in limit] == ["No cell was sampled from 2 of 3 studies."]
