"""The cells of an annotated file, ranked by how well they fit each query."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cell2text.annotation.pack_model import RETRIEVER
from cell2text.contracts import EMBEDDINGS
from cell2text.retrieval.retriever import Retriever, TextReader, content_words
from cell2text.spreadsheet import restore_text, write_tsv

log = logging.getLogger("cell2text.retrieval")


@torch.no_grad()
def search_cells(
    queries: list[str], model: str, language_model: str, embeddings: list[str], cells: str, results: str
) -> None:
    """Rank all cells for each query, best first, and warn of a query without a word of the training texts.

    Parameters
    ----------
    queries
        What to search for.
    model, language_model
        Folders of the packed and of the original language model.
    embeddings
        Files of ``contracts.EMBEDDINGS`` of the file's cells, written by ``embed_query``.
    cells
        The table of cells that ``annotate_query`` wrote, in the order of the file.
    results
        The TSV file to write: ``query``, ``rank``, ``cell_id`` (the cell's name in the file), ``score`` (cosine), and
        ``cell_type`` as reported. Cells without a gene of the model are not in it.
    """
    retriever, parts = Retriever.load(Path(model, RETRIEVER)), []
    for path in embeddings:
        tensors, ids = EMBEDDINGS.read(path, ["pooled", "lengths"])
        rows = pd.Series(ids, dtype=object).str.rpartition("|")[2].astype(int)  # ids end with the number of the row
        scored = retriever.embed_cells(torch.from_numpy(tensors["pooled"])).numpy()
        parts.append((rows.to_numpy()[tensors["lengths"] > 0], scored[tensors["lengths"] > 0]))
    rows, vectors = (np.concatenate(part) for part in zip(*parts, strict=True))
    texts = retriever.embed_texts(TextReader(language_model).sums(queries)).numpy()
    named = restore_text(pd.read_csv(cells, sep="\t", dtype=str, keep_default_na=False))
    tables = []
    for query, scores in zip(queries, texts @ vectors.T, strict=True):
        explain_query(query, scores.max(initial=-1), retriever)
        order = np.lexsort((rows, -scores))
        found = named.iloc[rows[order]]
        tables.append(
            pd.DataFrame(
                {
                    "query": query,
                    "rank": np.arange(1, len(order) + 1),
                    "cell_id": found["cell"].to_numpy(),
                    "score": scores[order],
                    "cell_type": found["cell2text_cell_type"].to_numpy(),
                }
            )
        )
    write_tsv(pd.concat(tables), results, float_format="%.4f")


def explain_query(query: str, best: float, retriever: Retriever) -> None:
    """Log which words of a query no training text has, and how its best score compares with those of known names."""
    words = content_words(query)
    unknown = [word for word in words if word not in retriever.words]
    known = retriever.best_scores.numpy()
    share = f"{np.searchsorted(known, best) / len(known):.0%} of" if len(known) else "an unknown share of"
    line = f"{query!r}: the best score, {best:.3f}, is above that of {share} the names in training"
    if len(unknown) == len(words):
        log.warning("%s. No training text has any of its words: do not trust the order", line)
    else:
        log.info("%s%s", line, f". No training text has: {', '.join(unknown)}" if unknown else "")
