"""The split of the corpus into training, validation and test cells, and its audit."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from cell2text.contracts import CELLS, SAMPLED_CELLS, SPLITS, TERM_SLOTS
from cell2text.corpus.audit import audit_split
from cell2text.corpus.duplicates import find_pairs, join_cells
from cell2text.corpus.splits import GROUPS, TEST, assign_cells, assign_groups, read_split
from cell2text.errors import InputError
from cell2text.files import read_json, write_json

log = logging.getLogger("cell2text.corpus")

# Columns with few distinct values, kept as categories because a corpus may have millions of cells.
CATEGORIES = ["dataset_id", "donor", "assay_id", *(f"{slot}{suffix}" for slot in TERM_SLOTS for suffix in ("_id", ""))]


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
    """Assign each cell to training, validation or test, and write an audit of what the split guarantees.

    Parameters
    ----------
    cells_file
        The sampled cells.
    split
        What stays together: ``"donors"``, ``"studies"`` or ``"cells"`` (each cell by itself); or the path of a
        table with the split of each cell or group (``splits.read_split``).
    shares
        Share of the cells in each split, not counting held-out cell types.
    seed
        Seed of the draw.
    path, audit_file
        Where to write the corpus (``contracts.CELLS``), sorted by cell id, and the audit (JSON).
    held_out
        Ids of cell types whose cells all go to the test split.
    diversity_file
        Diversity before and after sampling, copied into the audit.

    Raises
    ------
    InputError
        If a split would be empty, or a held-out cell type has no cells.
    """
    cells = SAMPLED_CELLS.read(cells_file, categories=CATEGORIES)
    # so that the split does not depend on the order of the cells in the file
    cells = cells.iloc[pc.sort_indices(pa.array(cells["cell_id"])).to_numpy()].reset_index(drop=True)
    pairs = find_pairs(cells)
    held = _find_held_out(cells, held_out, pairs)
    codes = np.full(len(cells), TEST)
    if not held.all():
        codes[~held] = _assign(cells[~held], _pairs_among(pairs, ~held), split, shares, np.random.default_rng(seed))
    empty = [name for code, name in enumerate(SPLITS) if code not in codes]
    if empty:
        own = split not in (*GROUPS, "cells")
        raise InputError(
            split if own else "config: split_shares",
            f"no cell is left for {' and '.join(empty)}",
            "Assign some cells to it" if own else "Raise the share or add cells",
        )
    cells["split"] = pd.Categorical.from_codes(codes, SPLITS)
    audit = audit_split(cells, split, shares if split in (*GROUPS, "cells") else {}, held_out)
    if diversity_file is not None:
        audit["diversity"] = read_json(diversity_file)
        for row in audit["diversity"]:
            absent = row["values_before"] - row["values_after"]
            if row["slot"] == "study" and absent:
                audit["limits"].append(f"No cell was sampled from {absent} of {row['values_before']} studies.")
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
    """Return which cells are of a held-out type, or are likely duplicates of such a cell."""
    absent = sorted(set(held_out) - set(cells["cell_type_id"].unique()))
    if absent:
        raise InputError(
            "config: held_out_cell_types",
            f"no cell of {', '.join(absent)} in the corpus",
            "Use ids of cell types in the corpus",
        )
    joined = join_cells(len(cells), pairs)
    return np.isin(joined, joined[cells["cell_type_id"].isin(held_out)])


def _pairs_among(pairs: pd.DataFrame, kept: np.ndarray) -> pd.DataFrame:
    """Return the pairs of kept cells, with positions among the kept cells."""
    position = np.cumsum(kept) - 1
    pairs = pairs[kept[pairs["first"]] & kept[pairs["second"]]]
    return pairs.assign(first=position[pairs["first"]], second=position[pairs["second"]])
