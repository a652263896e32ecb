"""How well texts find the test cells that they fit, and cells their texts, compared with simpler methods and chance."""

import logging
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from scipy.stats import hypergeom, rankdata
from sklearn.feature_extraction.text import TfidfVectorizer

from cell2text.contracts import CELLS, DESCRIPTIONS, HELD_OUT, RETRIEVAL, SEEN, TERMS
from cell2text.embedding.vectors import Embeddings
from cell2text.evaluation.bootstrap import Bootstrap, interval
from cell2text.files import read_jsonl
from cell2text.grammar import PATHWAY, find_opening
from cell2text.model.alignment import LabelTargets, order_slots
from cell2text.model.bundle import load_projector
from cell2text.retrieval.fit_retriever import SLOTS
from cell2text.retrieval.retriever import Retriever, TextReader
from cell2text.spreadsheet import write_tsv

log = logging.getLogger("cell2text.retrieval")

LARGEST = 5000  # test cells; more are drawn at random, because scores are computed for all pairs of cell and text
CUTS = (1, 5, 10)
TEXT = "text"
CELLS_OF_TEXT, TEXT_OF_CELL = "cells_of_text", "text_of_cell"


@torch.no_grad()
def score_retrieval(
    retriever: str,
    model: str,
    language_model: str,
    corpus: str,
    descriptions: str,
    terms: str,
    embeddings: Embeddings,
    generations: list[str],
    table: str,
    bootstrap: int,
    seed: int,
) -> None:
    """Score the retriever and three other methods on the test cells.

    ``aligned`` compares the soft tokens of the projector with the words of a label, ``tfidf`` the predicted text of a
    cell with the query, and ``shuffled`` is the control: the retriever with the vectors of other cells.

    Parameters
    ----------
    retriever
        File written by ``fit_retriever``.
    model, language_model
        Folders of the fine-tuned and of the original language model.
    corpus, descriptions, terms
        Files of ``contracts.CELLS``, ``contracts.DESCRIPTIONS`` and ``contracts.TERMS``.
    embeddings
        Embeddings of the cells.
    generations
        JSONL files of ``contracts.PREDICTIONS`` of the test cells.
    table
        The TSV file to write, with the columns ``contracts.RETRIEVAL``.
    bootstrap
        Number of resamples of cells, or of texts, for each 95% interval.
    seed
        Seed of the resamples, the shuffled cells and the drawn ones.
    """
    described, known = DESCRIPTIONS.read(descriptions), TERMS.read(terms)
    test = draw_cells(described, seed)
    queries = list_queries(test, known)
    matches = find_matches(test, queries)
    donors = CELLS.read(corpus, ["cell_id", "donor"]).set_index("cell_id")["donor"]
    donors = test["cell_id"].map(donors)
    predicted = {row["cell_id"]: row["text"] for path in generations for row in read_jsonl(path)}
    training = described.loc[described["split"] == "train"]
    cells = test["cell_id"].tolist()
    loaded = Retriever.load(retriever)
    pooled, _ = embeddings.vectors(cells, "pooled")[np.arange(len(cells))]
    scores = {
        "retriever": score_pairs(loaded, TextReader(language_model), pooled, queries),
        "aligned": score_aligned(model, language_model, known, embeddings, cells, queries, matches),
        "tfidf": score_tfidf(training["text"], test["cell_id"].map(predicted), queries),
    }
    rng = np.random.default_rng(seed)
    scores["shuffled"] = scores["retriever"][rng.permutation(len(cells))]
    rows = [
        {"method": method} | row
        for method, found in scores.items()
        for row in summarise(found, matches, queries, donors, set(training["cell_type_id"]), bootstrap, seed)
    ]
    write_tsv(pd.DataFrame(rows, columns=list(RETRIEVAL)), table)


def draw_cells(described: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return the rows of the test cells, at most ``LARGEST``, with the opening of the text instead of the text."""
    test = described[described["split"] == "test"]
    test = test.sample(min(len(test), LARGEST), random_state=seed).sort_index()
    return test.assign(text=test["text"].map(find_opening)).reset_index(drop=True)


def list_queries(test: pd.DataFrame, terms: pd.DataFrame) -> pd.DataFrame:
    """Return slot, id and words of all queries: the names of the labels of test cells, and their distinct openings."""
    names = terms.set_index(["slot", "id"])["name"]
    rows = []
    for slot in SLOTS:
        labels = test["pathway_ids"].explode() if slot == PATHWAY else test[f"{slot}_id"]
        rows += [(slot, label, names[slot, label]) for label in sorted(labels.dropna().unique())]
    rows += [(TEXT, text, text) for text in sorted(test["text"].unique())]
    return pd.DataFrame(rows, columns=["slot", "id", "words"])


def find_matches(test: pd.DataFrame, queries: pd.DataFrame) -> np.ndarray:
    """Return which cells each query fits, bool (cells, queries)."""
    found = np.zeros((len(test), len(queries)), dtype=bool)
    for slot, columns in queries.groupby("slot").groups.items():
        labels = test[{PATHWAY: "pathway_ids", TEXT: TEXT}.get(slot, f"{slot}_id")].explode()
        place = pd.Index(queries.loc[columns, "id"]).get_indexer(labels)
        found[labels.index[place >= 0], columns[0] + place[place >= 0]] = True
    return found


def score_pairs(retriever: Retriever, reader: TextReader, pooled: torch.Tensor, queries: pd.DataFrame) -> np.ndarray:
    """Return the cosine of each cell and each query by the retriever, float32 (cells, queries)."""
    texts = retriever.embed_texts(reader.sums(queries["words"].tolist()))
    return (retriever.embed_cells(pooled) @ texts.T).numpy()


def score_aligned(
    model: str,
    language_model: str,
    terms: pd.DataFrame,
    embeddings: Embeddings,
    cells: list[str],
    queries: pd.DataFrame,
    matches: np.ndarray,
) -> np.ndarray:
    """Return how near a cell's soft tokens are to the words of a label; of a whole text, the sum over its labels."""
    projector = load_projector(model, language_model, torch.device("cpu"))
    wanted = queries.groupby("slot")["id"].agg(list).to_dict()
    # slots have their own soft tokens, so the order and the number of slots is that of training
    labels = {slot: wanted.get(slot, ids) for slot, ids in order_slots(projector.about["labels"]).items()}
    targets = LabelTargets.of_model(labels, terms, projector)
    vectors, parts = embeddings.vectors(cells, projector.projector.reads), []
    for rows in np.array_split(np.arange(len(cells)), max(len(cells) // 1000, 1)):
        parts.append(targets.scores(*projector.projector(*vectors[rows])))
    by_slot = {slot: torch.cat(found).numpy() for slot, found in zip(labels, zip(*parts, strict=True), strict=True)}
    found = np.zeros(matches.shape, dtype=np.float32)
    for slot, columns in queries.groupby("slot").groups.items():
        if slot in by_slot:
            found[:, columns] = by_slot[slot]
    whole = (queries["slot"] == TEXT).to_numpy()
    one = matches[:, whole].argmax(axis=0)  # a cell that the text fits
    found[:, whole] = found[:, ~whole] @ matches[one][:, ~whole].T
    return found


def score_tfidf(training: pd.Series, predicted: pd.Series, queries: pd.DataFrame) -> np.ndarray:
    """Return the cosine of the predicted text of each cell and each query, by their words; float32 (cells, queries)."""
    words = TfidfVectorizer(token_pattern=r"\w+")  # noqa: S106 - no password
    words.fit(training.unique())
    return (words.transform(predicted) @ words.transform(queries["words"]).T).toarray().astype(np.float32)


def first_ranks(scores: np.ndarray, matches: np.ndarray) -> np.ndarray:
    """Return the rank of the best match in each row, from 1; equal scores share the middle of their ranks.

    Examples
    --------
    >>> first_ranks(np.array([[0.9, 0.5, 0.5, 0.1]]), np.array([[False, True, False, True]])).tolist()
    [2.5]
    """
    best = np.where(matches, scores, -np.inf).max(axis=1, keepdims=True)
    return (scores > best).sum(axis=1) + ((scores == best).sum(axis=1) + 1) / 2


def areas(scores: np.ndarray, matches: np.ndarray) -> np.ndarray:
    """Return for each row the probability that a match has a higher score than another (AUROC), 0.5 if all match."""
    right = matches.sum(axis=1)
    pairs = (right * (~matches).sum(axis=1)).astype(float)
    above = (rankdata(scores, axis=1) * matches).sum(axis=1) - right * (right + 1) / 2
    return np.divide(above, pairs, out=np.full(len(pairs), 0.5), where=pairs > 0)


def measure(scores: np.ndarray, matches: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return value and expected value in a random order of each metric, for each row of scores; both (rows,).

    In a random order of n candidates with m matches, the best k hold a match with hypergeometric probability.
    """
    ranks, right, total = first_ranks(scores, matches), matches.sum(axis=1), matches.shape[1]
    found = {f"recall@{k}": (ranks <= k, hypergeom.sf(0, total, right, min(k, total))) for k in CUTS}
    before = hypergeom.sf(0, total, right[:, None], np.arange(total + 1)).reshape(len(right), -1)
    found["mrr"] = 1 / ranks, np.diff(before, axis=1) @ (1 / np.arange(1, total + 1))
    return found | {"auroc": (areas(scores, matches), np.full(len(right), 0.5))}


def summarise(
    scores: np.ndarray,
    matches: np.ndarray,
    queries: pd.DataFrame,
    donors: pd.Series,
    types: set[str],
    bootstrap: int,
    seed: int,
) -> Iterator[dict]:
    """Yield rows of ``contracts.RETRIEVAL`` without the method.

    Parameters
    ----------
    scores, matches
        Score of each cell and query, and whether the query fits the cell; (cells, queries).
    queries
        As :func:`list_queries` returns them.
    donors
        Donor of each cell.
    types
        Cell types that have training cells.
    bootstrap, seed
        Number of resamples and their seed.
    """
    slot, seen = queries["slot"], queries["id"].isin(types)
    groups = {name: (slot == name).to_numpy() for name in (*SLOTS, TEXT)}
    if (groups["cell_type"] & ~seen).any():
        groups |= {SEEN: groups["cell_type"] & seen, HELD_OUT: groups["cell_type"] & ~seen}
    for name, columns in groups.items():
        # cells without a label in the slot may fit any of its texts
        labelled = matches[:, groups["cell_type" if name in (SEEN, HELD_OUT) else name]].any(axis=1)
        found, right = scores[labelled][:, columns], matches[labelled][:, columns]
        sides = [(CELLS_OF_TEXT, found.T, right.T, pd.Series(range(right.shape[1])))]
        if name not in (SEEN, HELD_OUT):
            sides.append((TEXT_OF_CELL, found, right, donors[labelled]))
        if right.all():  # there is nothing to distinguish
            continue
        for direction, given, fitting, units in sides:
            drawn = Bootstrap(units, bootstrap, seed)
            for metric, (values, chance) in measure(given, fitting).items():
                sums = drawn.sum_up(np.stack([values, np.ones(len(values))], axis=1), drawn.unit())
                value, low, high = interval(sums[:, 0] / sums[:, 1])
                row = {"direction": direction, "slot": name, "metric": metric, "value": value, "low": low, "high": high}
                yield row | {"chance": np.mean(chance), "n": len(values)}
