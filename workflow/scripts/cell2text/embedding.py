"""Encoders fitted on the training cells, and their vectors written shard by shard."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse

from cell2text.contracts import CELLS, EMBEDDINGS, TOKENS
from cell2text.encoders import ENCODERS, load_encoder
from cell2text.rank_lists import flatten

log = logging.getLogger("cell2text.embedding")


def fit_encoder(corpus: str, genes: str, tokens: list[str], directory: str, settings: dict, seed: int) -> None:
    """Fit the encoder that the config names on the training cells and save it.

    Parameters
    ----------
    corpus, genes, tokens
        Files of ``contracts.CELLS``, ``contracts.GENES`` and ``contracts.TOKENS``.
    directory
        Where the encoder goes.
    settings
        The config's ``encoder`` section.
    seed
        Of anything random in the fit.
    """
    cells = CELLS.read(corpus, ["cell_id", "split"])
    training = set(cells.loc[cells["split"] == "train", "cell_id"])
    ranked = pd.concat([TOKENS.read(path) for path in tokens], ignore_index=True)
    ranked = ranked[ranked["cell_id"].isin(training)]
    indices, offsets = flatten(ranked["tokens"])
    values, _ = flatten(ranked["expression"])
    vocabulary = len(pd.read_csv(genes, sep="\t", usecols=["token"]))
    expression = scipy.sparse.csr_matrix((values, indices, offsets), shape=(len(ranked), vocabulary))
    encoder = ENCODERS[settings["kind"]].fit(expression, settings, seed)
    Path(directory).mkdir(parents=True, exist_ok=True)
    encoder.save(Path(directory))
    log.info("%s encoder of %d dimensions, from %d cells", settings["kind"], encoder.dimensions, len(ranked))


def embed_shard(encoder: str, tokens: str, embeddings: str, shard: int, shards: int, top_k: int) -> None:
    """Embed one shard of a dataset's cells: the ``shard``-th of ``shards`` runs of cells, in file order."""
    ranked = TOKENS.read(tokens)
    rows = np.array_split(np.arange(len(ranked)), shards)[shard]
    ranked = ranked.iloc[rows]
    tensors = load_encoder(encoder).embed(ranked, top_k)
    log.info("%d cells, %.1f MB", len(ranked), sum(tensor.nbytes for tensor in tensors.values()) / 1e6)
    EMBEDDINGS.write(tensors, ranked["cell_id"].to_list(), embeddings)


def read_embeddings(files: list[str], cell_ids: list[str], names: list[str]) -> dict[str, np.ndarray]:
    """Return the named tensors for the given cells, in their order, from any number of shards.

    Raises
    ------
    KeyError
        If a cell is in none of the files.
    """
    parts = [EMBEDDINGS.read(path, names) for path in files]
    row = {cell: i for i, cell in enumerate(cell for _, cells in parts for cell in cells)}
    wanted = [row[cell] for cell in cell_ids]
    return {name: np.concatenate([tensors[name] for tensors, _ in parts])[wanted] for name in names}


def shard_cells(path: str) -> list[str]:
    """Return the cell ids of a shard, in order, without reading its tensors."""
    return EMBEDDINGS.read(path, [])[1]
