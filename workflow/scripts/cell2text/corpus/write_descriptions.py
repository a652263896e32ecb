"""The reference description of each cell, from its labels and its most active gene sets."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from cell2text.contracts import CELLS, DESCRIPTIONS, PATHWAY_SCORES, TERM_SLOTS, TERMS
from cell2text.corpus.gene_sets import name_pathways
from cell2text.corpus.pathways import choose_pathways, fit_sets
from cell2text.corpus.score_pathways import kept_share
from cell2text.errors import InputError
from cell2text.files import write_json
from cell2text.grammar import Slots, Terms, render
from cell2text.ontology import MOUSE, slot_terms
from cell2text.progress import Progress

log = logging.getLogger("cell2text.pathways")

DESCRIBED_AT_ONCE = 1 << 16  # cells


def write_descriptions(
    corpus_file: str | Path,
    score_files: Iterable[str | Path],
    pathways_file: str | Path | None,
    min_active_share: float,
    per_cell: int,
    descriptions_file: str | Path,
    terms_file: str | Path,
    kept_file: str | Path,
) -> None:
    """Write the slots and the description of each cell, the terms they use, and the kept gene sets.

    The scores are read in parts. Only the codes of each cell's terms and gene sets are in memory, and cells with the
    same slots share one text.

    Parameters
    ----------
    corpus_file
        The corpus (``contracts.CELLS``).
    score_files
        Scores of the gene sets in each dataset.
    pathways_file
        TSV with ``id``, ``name`` and ``description`` of each gene set, or None.
    min_active_share
        Sets must be active in more than this share of the training cells to be used.
    per_cell
        Maximum number of gene sets per cell.
    descriptions_file, terms_file, kept_file
        Output files (``contracts.DESCRIPTIONS``, ``contracts.TERMS``, JSON).

    Raises
    ------
    InputError
        If names of gene sets are ambiguous in a text, or no set is kept.
    """
    columns = [f"{slot}_id" for slot in TERM_SLOTS]
    corpus = CELLS.read(corpus_file, ["cell_id", "split", "n_counts", *columns], categories=["split", *columns])
    cells, training = pd.Index(corpus["cell_id"]), (corpus["split"] == "train").to_numpy()
    kept_counts = kept_share(corpus["n_counts"].to_numpy(dtype=float))
    score_files = list(score_files)

    def read_scores() -> Iterator[tuple[np.ndarray, pd.DataFrame]]:
        for file in score_files:
            for part in PATHWAY_SCORES.read_parts(file):
                yield cells.get_indexer(part.pop("cell_id")), part

    def read_training() -> Iterator[tuple[pd.DataFrame, np.ndarray]]:
        for rows, scores in read_scores():
            trained = training[rows]
            yield scores[trained], kept_counts[rows[trained]]

    kept = fit_sets(read_training, per_cell, min_active_share)
    if kept.empty:
        raise InputError(
            "config: pathways: min_genes, min_active_share",
            f"no gene set with enough genes is active in more than {min_active_share:.3%} of the training cells",
            "Lower one of them, or use other gene sets",
        )
    log.info("%d gene sets kept", len(kept))
    chosen = np.full((len(cells), per_cell), -2, dtype=np.int32)
    for rows, scores in read_scores():
        chosen[rows] = choose_pathways(scores, kept, per_cell)
    if (chosen == -2).any():
        raise ValueError(f"{cells[(chosen == -2).any(axis=1)][0]} has no scores")
    table = pd.concat(
        [
            *(slot_terms(slot) for slot in TERM_SLOTS),
            *(slot_terms(slot, "mouse") for slot, root in MOUSE.items() if _has_terms(corpus[f"{slot}_id"], root)),
            name_pathways(list(kept.index), pathways_file).assign(ancestors=[[]] * len(kept)),
        ],
        ignore_index=True,
    )
    DESCRIPTIONS.write_parts(_describe(corpus, chosen, list(kept.index), Terms(table)), descriptions_file)
    TERMS.write(table, terms_file)
    write_json(kept.rename_axis("id").reset_index().to_dict("records"), kept_file)


def _has_terms(ids: pd.Series, ontology: str) -> bool:
    return any(str(term).startswith(f"{ontology}:") for term in ids.cat.categories)


def _describe(corpus: pd.DataFrame, chosen: np.ndarray, sets: list[str], terms: Terms) -> Iterator[pa.Table]:
    """Yield the rows of the descriptions in parts, rendering each distinct combination of slots once per part."""
    slots = [corpus[f"{slot}_id"] for slot in TERM_SLOTS]
    codes = np.column_stack([*(column.cat.codes for column in slots), chosen])
    # unknown slots have code -1, which indexes the None at the end
    ids = [[*column.cat.categories, None] for column in slots] + [[*sets, None]] * chosen.shape[1]
    progress = Progress(len(corpus), "cells")
    for start in range(0, len(corpus), DESCRIBED_AT_ONCE):
        part = slice(start, start + DESCRIBED_AT_ONCE)
        distinct, which = np.unique(codes[part], axis=0, return_inverse=True)
        described = []
        for row in distinct:
            known = [names[code] for names, code in zip(ids, row, strict=True)]
            pathways = tuple(name for name in known[len(slots) :] if name)
            described.append(Slots(**dict(zip(TERM_SLOTS, known, strict=False)), pathways=pathways))
        columns = {f"{slot}_id": [getattr(slots, slot) for slots in described] for slot in TERM_SLOTS}
        columns["pathway_ids"] = [list(slots.pathways) for slots in described]
        columns["text"] = [render(slots, terms) for slots in described]
        cells = {name: pa.array(corpus[name][part].astype(object), pa.string()) for name in ("cell_id", "split")}
        types = DESCRIPTIONS.columns
        yield pa.table(
            cells | {name: pa.array(values, types[name]).take(pa.array(which)) for name, values in columns.items()}
        )
        progress.advance(len(which))
