"""One paragraph per cluster of the cells to annotate: clusters of the file, or found where it has none."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cell2text.annotation.cluster_text import clusters_table
from cell2text.annotation.clusters import describe_clusters
from cell2text.annotation.communities import find_clusters
from cell2text.annotation.fetch_query import CLUSTER, OWN_LABEL
from cell2text.annotation.markers import find_markers
from cell2text.annotation.pack_model import read_facts
from cell2text.annotation.predictions import read_predictions
from cell2text.cells.h5ad import all_cells, read_blocks, read_genes, read_obs
from cell2text.confidence.decisions import Confidence
from cell2text.contracts import CLUSTERS, EMBEDDINGS, TERMS
from cell2text.spreadsheet import write_tsv

log = logging.getLogger("cell2text.annotation")


def cluster_query(
    counts: str,
    descriptions: Sequence[str],
    tokens: str,
    qc: str,
    embeddings: Sequence[str],
    model: str,
    clusters: str,
    table: str,
    seed: int,
) -> None:
    """Describe each cluster.

    Parameters
    ----------
    counts, tokens, qc
        Files written by ``fetch_query``, ``rank_query`` and ``flag_query``.
    descriptions, embeddings
        Files written by ``describe_query`` and ``embed_query``.
    model
        Folder of a packed model.
    clusters
        Where to write the cluster of each cell (``contracts.CLUSTERS``).
    table
        Where to write the clusters as TSV, with a paragraph for each.
    seed
        Seed of the clusters, if the file has none.
    """
    folder, obs = Path(model), read_obs(counts)
    terms = TERMS.read(folder / "terms.parquet")
    cells = read_predictions(descriptions, tokens, qc, terms)
    if CLUSTER in obs:
        of_cells = obs[CLUSTER]
    else:
        of_cells = find_clusters(EMBEDDINGS.read_cells(embeddings, cells["cell_id"], ["pooled"])["pooled"], seed)
        log.info("%d clusters found", of_cells.nunique())
    CLUSTERS.write(cells[["cell_id"]].assign(cluster=of_cells.astype(str).to_numpy(dtype=object)), clusters)
    threshold = Confidence.load(folder / "confidence.json").of_new_study.thresholds["cell_type"]
    labels = read_facts(model)["labels"]["cell_type"]
    own, genes = obs.get(OWN_LABEL), read_genes(counts)

    def markers(codes: np.ndarray) -> dict[int, tuple[str, ...]]:
        return find_markers(lambda: (block for _, block in read_blocks(counts, all_cells(counts))), genes, codes)

    found = describe_clusters(cells, markers, of_cells, terms, own, threshold.confidence, labels)
    write_tsv(clusters_table(found), table)
