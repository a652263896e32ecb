"""Search in words: the two towers, the scores of retrieval, and the ranked cells."""

import logging

import numpy as np
import pandas as pd
import pytest
import torch

from cell2text.annotation.find_queries import read_searched
from cell2text.contracts import DESCRIPTIONS, EMBEDDINGS, HELD_OUT, NAMES, SEEN, TERMS
from cell2text.embedding.vectors import Embeddings
from cell2text.errors import InputError
from cell2text.files import write_json
from cell2text.retrieval import fit_retriever as fitting
from cell2text.retrieval.collect_names import collect_names
from cell2text.retrieval.fit_retriever import SLOTS, Texts, contrast, fit_retriever
from cell2text.retrieval.retriever import Retriever, TextReader
from cell2text.retrieval.score_retrieval import (
    CELLS_OF_TEXT,
    TEXT,
    TEXT_OF_CELL,
    find_matches,
    first_ranks,
    list_queries,
    measure,
    score_tfidf,
    summarise,
)
from cell2text.retrieval.search_cells import search_cells
from cell2text.spreadsheet import read_tsv
from described_cells import B_CELL, BLOOD, LUNG, NK_CELL, NORMAL, write_corpus, write_embeddings

CELLS = 90


@pytest.fixture(scope="module")
def planted(tmp_path_factory, tiny_model):
    """Cells whose vectors show type, tissue and programme; every third has no known tissue."""
    folder = tmp_path_factory.mktemp("planted")
    number = np.arange(CELLS)
    types, tissues = np.where(number % 2, B_CELL, NK_CELL), np.where(number % 4 < 2, BLOOD, LUNG)
    splits = np.where(number % 5 == 3, "validation", np.where(number % 5 == 4, "test", "train"))
    known = [tissue if i % 3 else None for i, tissue in enumerate(tissues)]
    programmes = [("P1",) if i % 2 else ("P2",) for i in number]
    write_corpus(folder, types, splits, programmes, tissue=known, disease=[NORMAL] * CELLS)
    noise = np.random.default_rng(0).normal(scale=0.1, size=(CELLS, 4))
    pooled = np.stack([number % 2, number % 4 < 2, number * 0, number * 0], axis=1) + noise
    ids = [f"study|{i}" for i in number]
    write_embeddings(folder / "embeddings.safetensors", ids, pooled)
    collect_names(str(folder / "descriptions.parquet"), str(folder / "terms.parquet"), str(folder / "names.parquet"))
    fit(folder, tiny_model, folder / "retriever.safetensors")
    return folder


def fit(folder, language_model, path, descriptions="descriptions.parquet", seed=1):
    files = [str(folder / name) for name in (descriptions, "terms.parquet", "names.parquet")]
    embeddings = Embeddings([str(folder / "embeddings.safetensors")])
    fit_retriever(str(language_model), *files, embeddings, str(path), dimensions=8, seed=seed)


def rank_cells(folder, language_model, query):
    """Return the numbers of all cells, best first."""
    retriever = Retriever.load(folder / "retriever.safetensors")
    pooled = torch.from_numpy(EMBEDDINGS.read(folder / "embeddings.safetensors")[0]["pooled"])
    text = retriever.embed_texts(TextReader(language_model).sums([query]))
    return (retriever.embed_cells(pooled) @ text[0]).argsort(descending=True).numpy()


def test_names_are_those_of_training_labels_and_of_terms_above_them(planted):
    names = NAMES.read(planted / "names.parquet")
    of = names.groupby("id")["name"].agg(list)
    assert {"B cell", "B lymphocyte", "B-cell"} <= set(of[B_CELL]) and "lymphocyte" in of["CL:0000542"]
    assert of[NORMAL][0] == "normal" and "healthy" in of[NORMAL] and of["P1"] == ["programme P1", "It does P1."]
    assert "P3" not in of and "CL:0000540" not in of  # a programme and a type (neuron) of no training cell
    assert names.duplicated().sum() == 0


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("b LYMPHOCYTES", lambda i: i % 2 == 1),
        ("natural killer cell", lambda i: i % 2 == 0),
        ("programme P2", lambda i: i % 2 == 0),
        ("This is a B cell. The sample is lung.", lambda i: i % 4 == 3),
    ],
)
def test_a_query_finds_planted_cells_of_all_splits(planted, tiny_model, query, expected):
    wanted = expected(np.arange(CELLS))
    first = rank_cells(planted, tiny_model, query)[: wanted.sum()]
    assert wanted[first].mean() > 0.95


def test_labels_of_test_cells_are_not_read_and_a_seed_gives_the_same_bytes(planted, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "EPOCHS", 2)
    table = pd.read_parquet(planted / "descriptions.parquet")
    test = table["split"] == "test"
    table.loc[test, "cell_type_id"] = table.loc[test, "cell_type_id"].to_numpy()[::-1]
    table.loc[test, "tissue_id"] = None
    DESCRIPTIONS.write(table, planted / "permuted.parquet")
    fit(planted, tiny_model, tmp_path / "first")
    fit(planted, tiny_model, tmp_path / "again", "permuted.parquet")
    fit(planted, tiny_model, tmp_path / "other", seed=2)
    first, again, other = ((tmp_path / name).read_bytes() for name in ("first", "again", "other"))
    assert first == again and first != other


def texts_by_hand():
    """Two cell types below one term, and a tissue that the second kind does not know."""
    fits = np.array([[1, 0, 1, 1], [0, 1, 1, 0]], dtype=bool)
    labels = np.array([[1, 0, 0, 1], [0, 1, 0, 0]], dtype=bool)
    return Texts(fits, labels, np.array([0, 0, 0, 1]), torch.eye(5), np.array([0, 2, 3, 4, 5]))


def test_drawn_texts_fit_their_cells_and_unknown_labels_do_not_count():
    texts, kinds = texts_by_hand(), np.array([0, 1] * 50)
    sums, fits, counted = texts.draw(kinds, np.random.default_rng(0))
    assert fits.diagonal().all() and counted.diagonal().all()
    said = sums.numpy() > 0
    assert said[:, 0].any() and said[:, 1].any() and (said.sum(axis=1) >= 1).all()
    assert not said[kinds == 1][:, [0, 1, 4]].any() and not said[kinds == 0][:, 2].any()
    tissue = said[:, 4]
    assert not counted[tissue][:, kinds == 1].any() and counted[~tissue].all()
    shared = said[:, 3] & (said.sum(axis=1) == 1)  # the term above both types
    assert shared.any() and fits[shared].all()
    own = said[:, [0, 1]].any(axis=1)
    assert not fits[own][:, kinds == 1].any()


def test_the_loss_of_perfect_towers_is_that_of_equal_matches():
    towers = Retriever(2, 2, 2)
    towers.embed_cells = towers.embed_texts = lambda vectors: vectors
    vectors, every = torch.eye(2)[[0, 1, 1]], torch.ones(3, 3, dtype=torch.bool)
    fits = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 1, 1]], dtype=torch.bool)
    assert float(contrast(towers, vectors, vectors, fits, every)) == pytest.approx(np.log(2) * 2 / 3, abs=1e-4)
    assert float(contrast(towers, vectors, vectors, fits[[1, 0, 2]], every)) > 5


def test_equal_scores_share_the_middle_of_their_ranks():
    scores = np.array([[3.0, 2, 2, 1], [5, 5, 5, 5], [1, 2, 3, 4]])
    matches = np.array([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=bool)
    assert first_ranks(scores, matches).tolist() == [2.5, 2.5, 1]


def test_chance_is_hypergeometric():
    expected = measure(np.zeros((1, 4)), np.array([[True, False, False, False]]))
    assert expected["recall@1"][1] == pytest.approx(0.25) and expected["recall@10"][1] == pytest.approx(1)
    assert expected["mrr"][1] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    two = measure(np.zeros((1, 12)), np.arange(12)[None] < 2)
    assert two["recall@5"][1] == pytest.approx(1 - (10 * 9 * 8 * 7 * 6) / (12 * 11 * 10 * 9 * 8))


@pytest.fixture
def judged(planted):
    table = pd.read_parquet(planted / "descriptions.parquet").assign(split="test")
    queries = list_queries(table, TERMS.read(planted / "terms.parquet"))
    return table, queries, find_matches(table, queries)


def rows_of(scores, judged, types=frozenset({B_CELL, NK_CELL})):
    table, queries, matches = judged
    donors = pd.Series("one donor", index=table.index)
    rows = pd.DataFrame(summarise(scores, matches, queries, donors, set(types), 0, 0))
    return rows.set_index(["direction", "slot", "metric"]).sort_index()


def test_matches_follow_the_labels(judged):
    table, queries, matches = judged
    assert dict(queries["slot"].value_counts()) == {
        TEXT: table["text"].nunique(),
        "cell_type": 2,
        "tissue": 2,
        "pathway": 2,
        "disease": 1,
    }
    for column, slot, term in queries[["slot", "id"]].itertuples():
        expected = [term in row["pathway_ids"] if slot == "pathway" else row.get(f"{slot}_id", row["text"]) == term
                    for _, row in table.iterrows()]  # fmt: skip
        assert matches[:, column].tolist() == expected, term


def test_perfect_scores_have_recall_1_and_shuffled_pairs_are_at_chance(judged):
    matches = judged[2]
    perfect = rows_of(matches.astype(float), judged)
    assert "disease" not in perfect.index.get_level_values("slot")  # one label: nothing to distinguish
    best = perfect.drop("text", level="slot")
    assert (perfect.xs("auroc", level="metric")["value"] == 1).all()
    # one text per cell; of a text, as many cells are equally good as it fits, and share their ranks
    for metric in ("recall@1", "mrr"):
        assert (best.loc[TEXT_OF_CELL].xs(metric, level="metric")["value"] == 1).all()
    distinct = matches - 1e-6 * np.arange(CELLS)[:, None]
    assert (rows_of(distinct, judged).loc[CELLS_OF_TEXT, "value"] == 1).all()
    rng, found = np.random.default_rng(0), []
    for _ in range(40):
        found.append(rows_of(distinct[rng.permutation(CELLS)], judged)["value"])
    chance, mean = perfect["chance"], np.mean(found, axis=0)
    searched = perfect.index.get_level_values("direction") == CELLS_OF_TEXT
    assert np.abs(mean - chance)[searched].max() < 0.12
    assert (np.abs(mean - chance)[perfect.index.get_level_values("metric") == "auroc"] < 0.05).all()


def test_cells_of_types_without_training_cells_are_scored_apart(judged):
    table, queries, matches = judged
    scores = matches.astype(float)
    held = (queries["id"] == NK_CELL).to_numpy()
    scores[:, held] = -scores[:, held]
    rows = rows_of(scores, judged, {B_CELL})
    assert rows.loc[(CELLS_OF_TEXT, SEEN, "auroc"), "value"] == 1
    assert rows.loc[(CELLS_OF_TEXT, HELD_OUT, "auroc"), "value"] == 0
    assert rows.loc[(CELLS_OF_TEXT, HELD_OUT, "auroc"), "n"] == 1


def test_texts_are_compared_by_their_words():
    predicted = pd.Series(["This is a B cell.", "This is a neuron."])
    queries = pd.DataFrame({"words": ["B cell", "neuron", "granulocyte"]})
    scores = score_tfidf(predicted, predicted, queries)
    assert scores[:, :2].argmax(axis=0).tolist() == [0, 1] and (scores[:, 2] == 0).all()


@pytest.fixture
def model(planted, tmp_path):
    """The parts of a packed model that a search reads."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "retriever.safetensors").write_bytes((planted / "retriever.safetensors").read_bytes())
    write_json({"sha256": {"retriever.safetensors": ""}}, folder / "cell2text.json")
    return folder


def search(planted, model, language_model, folder, *queries):
    cells = pd.DataFrame({"cell": [f"b{i % 50}" for i in range(CELLS)], "cell2text_cell_type": "not determined"})
    cells.to_csv(folder / "cells.tsv.gz", sep="\t", index=False)
    tensors, ids = EMBEDDINGS.read(planted / "embeddings.safetensors")
    tensors["lengths"][7] = 0
    for part, rows in enumerate(np.array_split(np.arange(CELLS)[::-1], 2)):
        chosen = {name: tensor[rows] for name, tensor in tensors.items()}
        EMBEDDINGS.write(chosen, [ids[row] for row in rows], folder / f"{part}.safetensors")
    files = [str(folder / f"{part}.safetensors") for part in (0, 1)]
    results = folder / "results.tsv"
    search_cells(list(queries), str(model), str(language_model), files, str(folder / "cells.tsv.gz"), str(results))
    return read_tsv(results)


def test_a_search_ranks_all_cells_with_genes_for_each_query(planted, model, tiny_model, tmp_path):
    queries = ("B cell", "=natural\tkiller {cell} $(touch x)")
    found = search(planted, model, tiny_model, tmp_path, *queries)
    assert list(found) == ["query", "rank", "cell_id", "score", "cell_type"]
    assert list(found["query"].unique()) == list(queries) and len(found) == 2 * (CELLS - 1)
    first = found[found["query"] == "B cell"]
    assert first["rank"].tolist() == [str(rank) for rank in range(1, CELLS)]
    assert first["score"].astype(float).is_monotonic_decreasing
    expected = [f"b{i % 50}" for i in rank_cells(planted, tiny_model, "B cell") if i != 7]
    assert first["cell_id"].tolist() == expected


def test_unknown_words_are_named_and_a_query_of_them_alone_is_answered_with_a_warning(
    planted, model, tiny_model, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    search(planted, model, tiny_model, tmp_path, "B cells in the lung", "exhausted B cell", "qwertz of the uiop")
    known, half, none = caplog.records[-3:]
    assert known.levelno == logging.INFO and known.message.endswith("of the names in training")
    assert half.levelno == logging.INFO and half.message.endswith("No training text has: exhausted")
    assert none.levelno == logging.WARNING and "do not trust the order" in none.message
    assert "% of the names in training" in none.message


@pytest.mark.parametrize("query", [None, "", " ", "B cell; "])
def test_an_empty_query_is_refused(model, query):
    with pytest.raises(
        InputError, match=r'^query: is empty. Write what to search for, such as query="T cells in lung"$'
    ):
        read_searched({"query": query, "input": "my.h5ad"}, model)


def test_a_model_without_a_retriever_is_refused_with_the_remedy(model):
    assert read_searched({"query": "B cell; NK cell", "input": "my.h5ad"}, model) == ["B cell", "NK cell"]
    assert read_searched({"query": "my.h5ad"}, model) == []
    write_json({"sha256": {"projector.safetensors": ""}}, model / "cell2text.json")
    with pytest.raises(
        InputError, match=r"model: this model cannot search\. Train it with `retrieval: \{train: true\}`"
    ):
        read_searched({"query": "B cell", "input": "my.h5ad"}, model)


def test_a_damaged_retriever_is_reported_in_one_line(model):
    (model / "retriever.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"retriever\.safetensors"):
        Retriever.load(model / "retriever.safetensors")


def test_slots_are_those_of_a_description():
    assert SLOTS == ("cell_type", "tissue", "disease", "sex", "stage", "pathway")
