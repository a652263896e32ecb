"""The cells of the corpus, and their split into training, validation and test."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from cellxgene_ontology_guide.curated_ontology_term_lists import get_curated_ontology_term_list
from cellxgene_ontology_guide.entities import CuratedOntologyTermList
from pandas.api.types import union_categoricals

from cell2text.audit import audit_split
from cell2text.cell_files import id_parts, read_obs
from cell2text.cell_labels import CELLXGENE
from cell2text.contracts import CELLS, SAMPLED_CELLS, SPLITS, TERM_SLOTS, hash_ids, whole_file, write_json
from cell2text.duplicates import find_pairs, hash_counts, join_cells
from cell2text.errors import InputError
from cell2text.ontology import live_terms
from cell2text.progress import Progress
from cell2text.sampling import draw_sample, measure_diversity
from cell2text.splits import GROUPS, TEST, assign_cells, assign_groups, read_split

log = logging.getLogger("cell2text.corpus")

# Columns of few values: held as categories, for a corpus may have millions of cells.
CATEGORIES = ["dataset_id", "donor", "assay_id", *(f"{slot}{suffix}" for slot in TERM_SLOTS for suffix in ("_id", ""))]
DRAWN_BY = ["dataset_id", "donor", "cell_type_id", "tissue_id", "disease_id"]


def sample_cells(
    cell_files: Iterable[str | Path],
    cells: int,
    shares: Mapping[str, float],
    caps: Mapping[str, Mapping[str, float]],
    seed: int,
    path: str | Path,
    diversity_file: str | Path,
) -> None:
    """Draw the cells of the corpus, all datasets together, and write what is known of them.

    The draw depends on the ids of the cells and the seed, not on the order of cells or files.

    Parameters
    ----------
    cell_files
        Filtered counts of each dataset; a block of rows is held, and of each cell what the draw looks at.
    cells
        How many to draw; all of them where there are fewer.
    shares, caps
        As in ``sampling.draw_sample``, where tissues are told apart by organ.
    seed
        Seed of the draw.
    path
        Where to write the table (``contracts.SAMPLED_CELLS``), in the order of the files.
    diversity_file
        Where to write how diverse the cells are before and after, TSV (``sampling.measure_diversity``).
    """
    cell_files = list(cell_files)
    known = _stack([read_labels(file)[DRAWN_BY] for file in cell_files])
    by_id = np.argsort(np.concatenate([hash_ids(ids) for file in cell_files for ids in id_parts(file)]))
    known = known.iloc[by_id].reset_index(drop=True)
    rng = np.random.default_rng(seed)
    drawn = draw_sample(known.assign(tissue_id=_organs(known["tissue_id"])), cells, shares, caps, rng)
    diversity = measure_diversity(known, drawn)
    for slot in diversity.itertuples():
        log.info(
            "%s: %d of %d values, diversity %.3f (before: %.3f)",
            slot.slot, slot.values_after, slot.values_before, slot.diversity_after, slot.diversity_before,
        )  # fmt: skip
    log.info("%d cells of %d datasets", len(drawn), known["dataset_id"].iloc[drawn].nunique())
    chosen = np.zeros(len(known), dtype=bool)
    chosen[by_id[drawn]] = True
    del known, by_id, drawn
    SAMPLED_CELLS.write_parts(_describe_cells(cell_files, chosen), path)
    with whole_file(diversity_file) as unfinished:
        diversity.to_csv(unfinished, sep="\t", index=False, float_format="%.4f")


def _describe_cells(cell_files: Sequence[str | Path], chosen: np.ndarray) -> Iterator[pd.DataFrame]:
    """Yield ``contracts.SAMPLED_CELLS`` of the chosen among all cells of the files."""
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
    """Return what an h5ad says of its cells: columns of ``contracts.SAMPLED_CELLS``, each a category.

    Donors are ``{dataset}|{donor}``, for a donor's name is unique only in its study. What is unknown is
    missing.
    """
    sources = {"dataset_id": "dataset_id", "donor": "donor_id", "assay_id": "assay_ontology_term_id"}
    sources |= {f"{slot}_id": f"{column}_ontology_term_id" for slot, column in CELLXGENE.items()} | CELLXGENE
    obs = read_obs(path, sources.values())
    table = {}
    for column, source in sources.items():
        values = pd.Categorical(obs[source])
        names = values.categories.astype(str)
        table[column] = values.rename_categories(names).set_categories(names.drop("unknown", errors="ignore"))
    study, donor = table["dataset_id"], table["donor"]
    codes, pairs = pd.factorize(pd.MultiIndex.from_arrays([study.codes, donor.codes]))
    names = [f"{study.categories[i]}|{donor.categories[j]}" for i, j in pairs]
    return pd.DataFrame(table | {"donor": pd.Categorical.from_codes(codes, names)})


def _stack(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return tables one below the other; pandas alone would turn categories that differ into text."""
    stacked = {}
    for column in tables[0]:
        parts = [table[column] for table in tables]
        known = isinstance(parts[0].dtype, pd.CategoricalDtype)
        stacked[column] = union_categoricals(parts, sort_categories=True) if known else pd.concat(parts).array
    return pd.DataFrame(stacked)


def _organs(tissues: pd.Series) -> pd.Series:
    """Return the organ of each tissue, as CELLxGENE groups them; a tissue of no such organ stays itself."""
    organs = set(get_curated_ontology_term_list(CuratedOntologyTermList.TISSUE_GENERAL))
    above = {}
    for tissue in tissues.cat.categories:
        ancestors = live_terms("UBERON").get(tissue, {}).get("ancestors", {})
        nearest = sorted((steps, term) for term, steps in {**ancestors, tissue: 0}.items() if term in organs)
        above[tissue] = nearest[0][1] if nearest else tissue
    return tissues.map(above).astype("category")


def split_donors(
    cells_file: str | Path,
    split: str,
    shares: Mapping[str, float],
    seed: int,
    path: str | Path,
    audit_file: str | Path,
    held_out: Sequence[str] = (),
    diversity_file: str | Path | None = None,
) -> None:
    """Put each cell in training, validation or test, and write down what the split guarantees.

    Parameters
    ----------
    cells_file
        The sampled cells.
    split
        What stays together: ``"donors"``, ``"studies"``, or, by name only, single ``"cells"``; or a table of
        the user's that says it all (``splits.read_split``).
    shares
        Share of the cells that each split should have, those of held-out types aside.
    seed
        Seed of the draw.
    path, audit_file
        Where to write the corpus (``contracts.CELLS``), in the order of the ids, and the audit (JSON).
    held_out
        Cell types, by id, whose cells all go to the test.
    diversity_file
        How diverse the cells were before and after sampling; the audit repeats it.

    Raises
    ------
    InputError
        If a split would be empty, a cell type has too few cells, or one to hold out has none.
    """
    cells = SAMPLED_CELLS.read(cells_file, categories=CATEGORIES)
    # so that the split depends on the cells alone, and not on the order in which they came
    cells = cells.iloc[pc.sort_indices(pa.array(cells["cell_id"])).to_numpy()].reset_index(drop=True)
    pairs = find_pairs(cells)
    held = _find_held_out(cells, held_out, pairs)
    codes = np.full(len(cells), TEST)
    if not held.all():
        codes[~held] = _assign(cells[~held], _among(pairs, ~held), split, shares, np.random.default_rng(seed))
    empty = [name for code, name in enumerate(SPLITS) if code not in codes]
    if empty:
        raise InputError(
            "config: split_shares",
            f"no cell is left for {' and '.join(empty)}",
            "Raise the share or add cells",
        )
    cells["split"] = pd.Categorical.from_codes(codes, SPLITS)
    audit = audit_split(cells, split, shares if split in (*GROUPS, "cells") else {}, held_out)
    if diversity_file is not None:
        audit["diversity"] = pd.read_csv(diversity_file, sep="\t").to_dict("records")
    log.info("%s", ", ".join(f"{name} {audit['cells'][name]}" for name in SPLITS))
    for guarantee in audit["guarantees"]:
        log.info("%s: %s (%s)", guarantee["claim"], "holds" if guarantee["holds"] else "fails", guarantee["detail"])
    for limit in audit["limits"]:
        log.info("%s", limit)
    CELLS.write(cells[list(CELLS.columns)], path)
    write_json(audit, audit_file)


def _assign(
    cells: pd.DataFrame, pairs: pd.DataFrame, split: str, shares: Mapping[str, float], rng: np.random.Generator
) -> np.ndarray:
    if split in GROUPS:
        return assign_groups(cells, GROUPS[split], pairs, shares, rng)
    return assign_cells(cells, pairs, shares, rng) if split == "cells" else read_split(split, cells)


def _find_held_out(cells: pd.DataFrame, held_out: Sequence[str], pairs: pd.DataFrame) -> np.ndarray:
    """Return which cells are of a type to hold out, or are likely the same cell as one that is."""
    absent = sorted(set(held_out) - set(cells["cell_type_id"].unique()))
    if absent:
        raise InputError(
            "config: held_out_cell_types",
            f"no cell of {', '.join(absent)} in the corpus",
            "Name Cell Ontology ids that the corpus has",
        )
    one = join_cells(len(cells), pairs)
    return np.isin(one, one[cells["cell_type_id"].isin(held_out)])


def _among(pairs: pd.DataFrame, kept: np.ndarray) -> pd.DataFrame:
    """Return the pairs of kept cells, by their position among these."""
    position = np.cumsum(kept) - 1
    pairs = pairs[kept[pairs["first"]] & kept[pairs["second"]]]
    return pairs.assign(first=position[pairs["first"]], second=position[pairs["second"]])
