"""Gene vectors of the cells to annotate, by the encoder in a packed model."""

from pathlib import Path

from cell2text.annotation.pack_model import read_facts
from cell2text.embedding.embed_genes import embed_genes


def embed_query(model: str, tokens: str, genes: str, embeddings: str, shard: int = 0, shards: int = 1) -> None:
    """Embed one shard of the cells of a file of ranked genes as they are, without views.

    Parameters
    ----------
    model
        Folder of a packed model.
    tokens, genes
        Files written by ``rank_query``.
    embeddings
        Where to write ``contracts.EMBEDDINGS``.
    shard, shards
        Index of the shard, from 0, and number of shards.
    """
    top_k = read_facts(model)["settings"]["top_k"]
    embed_genes(str(Path(model) / "encoder"), tokens, genes, embeddings, shard, shards, top_k, views=0, seed=0)
