"""The cells of the corpus, sampled from all datasets together."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from cellxgene_ontology_guide.curated_ontology_term_lists import get_curated_ontology_term_list
from cellxgene_ontology_guide.entities import CuratedOntologyTermList
from pandas.api.types import union_categoricals

from cell2text.cells.h5ad import has_column, id_parts, read_obs
from cell2text.cells.labels import CELLXGENE
from cell2text.cells.sampling import draw_sample, measure_diversity
from cell2text.contracts import SAMPLED_CELLS
from cell2text.contracts.table import hash_ids
from cell2text.corpus.duplicates import hash_counts
from cell2text.files import write_json
from cell2text.ontology import live_terms
from cell2text.progress import Progress
from cell2text.settings import SampleSettings

log = logging.getLogger("cell2text.corpus")

DRAWN_BY = ["dataset_id", "donor", "cell_type_id", "tissue_id", "disease_id"]


def sample_cells(
    cell_files: Iterable[str | Path],
    settings: SampleSettings,
    seed: int,
    path: str | Path,
    diversity_file: str | Path,
) -> None:
    """Draw the cells of the corpus from all datasets together and write their labels.

    The draw depends on the cell ids and the seed, not on the order of cells or files.

    Parameters
    ----------
    cell_files
        Filtered counts of each dataset. One block of counts and a few labels of every cell are in memory.
    settings
        Number of cells (all cells if there are fewer), and shares and caps as in ``sampling.draw_sample``. Tissues
        are grouped by organ.
    seed
        Seed of the draw.
    path
        Where to write the table (``contracts.SAMPLED_CELLS``), in the order of the files.
    diversity_file
        Where to write the diversity before and after sampling, as JSON (``sampling.measure_diversity``).
    """
    cell_files = list(cell_files)
    known = _stack([read_labels(file)[DRAWN_BY] for file in cell_files])
    by_id = np.argsort(np.concatenate([hash_ids(ids) for file in cell_files for ids in id_parts(file)]))
    known = known.iloc[by_id].reset_index(drop=True)
    rng = np.random.default_rng(seed)
    drawn = draw_sample(
        known.assign(tissue_id=_organs(known["tissue_id"])), settings.cells, settings.shares, settings.caps, rng
    )
    diversity = measure_diversity(known, drawn)
    for slot in diversity.itertuples():
        log.info(
            "%s: %d of %d values sampled, diversity %.3f (before: %.3f)",
            slot.slot, slot.values_after, slot.values_before, slot.diversity_after, slot.diversity_before,
        )  # fmt: skip
    log.info("%d cells from %d datasets", len(drawn), known["dataset_id"].iloc[drawn].nunique())
    chosen = np.zeros(len(known), dtype=bool)
    chosen[by_id[drawn]] = True
    del known, by_id, drawn
    SAMPLED_CELLS.write_parts(_hash_cells(cell_files, chosen), path)
    write_json(diversity.round(4).to_dict("records"), diversity_file)


def _hash_cells(cell_files: Sequence[str | Path], chosen: np.ndarray) -> Iterator[pd.DataFrame]:
    """Yield the rows of ``contracts.SAMPLED_CELLS`` for the chosen cells of the files."""
    progress = Progress(int(chosen.sum()), "cells")
    first = 0
    for file in cell_files:
        labels = read_labels(file)
        rows = chosen[first : first + len(labels)]
        first += len(labels)
        labels, done = labels[rows], 0
        for counts in hash_counts(file, rows):
            known = labels.iloc[done : done + len(counts)].reset_index(drop=True)
            done += len(counts)
            progress.advance(len(counts))
            yield known.join(counts)


def read_labels(path: str | Path) -> pd.DataFrame:
    """Return the labels of an h5ad's cells: columns of ``contracts.SAMPLED_CELLS``, each categorical.

    Donors are ``{dataset}|{donor}``, because a donor's name is unique only within its study; for cells of CELLxGENE
    Census ``{collection}|{donor}``, because one person may be in several datasets of a collection. Unknown labels are
    missing.
    """
    scope = "collection_id" if has_column(path, "collection_id") else "dataset_id"
    sources = {"dataset_id": "dataset_id", "donor": "donor_id", "assay_id": "assay_ontology_term_id"}
    sources |= {f"{slot}_id": f"{column}_ontology_term_id" for slot, column in CELLXGENE.items()} | CELLXGENE
    obs = read_obs(path, {*sources.values(), scope})
    table = {}
    for column, source in sources.items():
        values = pd.Categorical(obs[source])
        names = values.categories.astype(str)
        named = source in ("dataset_id", "donor_id")  # even if the name is "unknown"
        known = names if named else names.drop("unknown", errors="ignore")
        table[column] = values.rename_categories(names).set_categories(known)
    within, donor = pd.Categorical(obs[scope]), table["donor"]
    codes, pairs = pd.factorize(pd.MultiIndex.from_arrays([within.codes, donor.codes]))
    names = [f"{within.categories[i]}|{donor.categories[j]}" for i, j in pairs]
    return pd.DataFrame(table | {"donor": pd.Categorical.from_codes(codes, names)})


def _stack(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Concatenate tables; pandas alone would turn categories that differ between them into text."""
    stacked = {}
    for column in tables[0]:
        parts = [table[column] for table in tables]
        known = isinstance(parts[0].dtype, pd.CategoricalDtype)
        stacked[column] = union_categoricals(parts, sort_categories=True) if known else pd.concat(parts).array
    return pd.DataFrame(stacked)


def _organs(tissues: pd.Series) -> pd.Series:
    """Return the organ of each tissue, as CELLxGENE groups them; a tissue without such an organ is unchanged."""
    organs = set(get_curated_ontology_term_list(CuratedOntologyTermList.TISSUE_GENERAL))
    above = {}
    for tissue in tissues.cat.categories:
        ancestors = live_terms("UBERON").get(tissue, {}).get("ancestors", {})
        nearest = sorted((steps, term) for term, steps in {**ancestors, tissue: 0}.items() if term in organs)
        above[tissue] = nearest[0][1] if nearest else tissue
    return tissues.map(above).astype("category")
