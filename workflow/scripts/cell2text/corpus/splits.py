"""Assignment of cells to training, validation and test, by whole donors, whole studies, or single cells."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from cell2text.contracts import SPLITS
from cell2text.corpus.duplicates import join_cells, join_groups
from cell2text.errors import InputError
from cell2text.tables import read_table

TRAIN, VALIDATION, TEST = range(len(SPLITS))
GROUPS = {"donors": "donor", "studies": "dataset_id"}
DRAWS = 64
# Draws whose distance to the shares exceeds the smallest by no more than this count as equally good.
TOLERANCE = 0.01


def assign_cells(
    cells: pd.DataFrame, pairs: pd.DataFrame, shares: Mapping[str, float], rng: np.random.Generator
) -> np.ndarray:
    """Return the split of each cell: random within each cell type, with at least one cell per type in training.

    The only cell of a type is therefore in training, and the type is not evaluated. Likely duplicates stay together
    and count under the cell type of the first of them.

    Parameters
    ----------
    cells
        ``cell_type_id`` of each cell.
    pairs
        Pairs of likely duplicates, from ``duplicates.find_pairs``.
    shares
        Share of the cells in each split.
    rng
        Random generator.

    Returns
    -------
    array of int
        Index into ``contracts.SPLITS`` of each cell.
    """
    types = code_types(cells)
    # A unit stays together: a single cell, or likely duplicates.
    unit = join_cells(len(cells), pairs)
    size, first = np.bincount(unit), np.unique(unit, return_index=True)[1]
    unit_type = types[first]
    order = np.lexsort((rng.permutation(len(size)), unit_type))
    total = np.bincount(unit_type, weights=size)
    before = np.empty(len(size))
    before[order] = np.cumsum(size[order]) - size[order]
    before -= (np.cumsum(total) - total)[unit_type]
    # One random offset per cell type: on average each split gets its share, however few the cells.
    offset = rng.random(len(total))
    bounds = np.cumsum([shares[name] for name in SPLITS[:-1]])
    split = np.searchsorted(bounds, ((before + offset[unit_type]) / total[unit_type]), side="right")
    trained = np.bincount(types[split[unit] == TRAIN], minlength=types.max() + 1)
    every_type, first_of_type = np.unique(types, return_index=True)
    split[unit[first_of_type[trained[every_type] == 0]]] = TRAIN
    return split[unit]


def assign_groups(
    cells: pd.DataFrame, column: str, pairs: pd.DataFrame, shares: Mapping[str, float], rng: np.random.Generator
) -> np.ndarray:
    """Return the split of each cell, keeping donors (or studies) whole.

    Donors that share cells count as one. Each of ``DRAWS`` random draws goes through the donors in random order and
    moves a donor to validation or test, whichever is then filled less, as long as this brings that split closer to
    its share and every cell type keeps a donor in training. The draw closest to the shares is kept; among equally
    close ones, the draw with the most cell types to evaluate. Training gets the rest, which is more than its share
    if few donors can leave it.

    If every draw leaves validation or test empty, a split by donors raises an error. Studies often have cell types of
    their own, so they are drawn again without the condition on cell types, and the draw with the fewest untrained
    types is kept.

    Parameters
    ----------
    cells
        ``cell_type_id`` and the group of each cell.
    column
        The column with the group: ``donor`` or ``dataset_id``.
    pairs
        Pairs of likely duplicates, from ``duplicates.find_pairs``.
    shares
        Share of the cells in each split.
    rng
        Random generator.

    Returns
    -------
    array of int
        Index into ``contracts.SPLITS`` of each cell.

    Raises
    ------
    InputError
        If there are too few groups for three splits.
    """
    what = {"donor": "donors", "dataset_id": "studies"}[column]
    codes, names = pd.factorize(cells[column], sort=True)
    unit = join_groups(codes, pairs)[codes]
    units = int(unit.max(initial=-1)) + 1
    if units < len(SPLITS):
        some = ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")
        what = {"donors": "donor", "studies": "study"}[what] if len(names) == 1 else what
        joined = "" if units == len(names) else f", {units} after joining those that share cells"
        raise InputError(
            "config: split",
            f"{len(names)} {what} in the corpus ({some}){joined}, but at least three are needed",
            "Set `split: cells`, or add studies",
        )
    sizes = np.bincount(unit, minlength=units)
    types = code_types(cells)
    group_types = sparse.coo_matrix((np.ones(len(cells), bool), (unit, types)), shape=(units, types.max() + 1)).tocsr()
    goals = np.array([shares[name] * len(cells) for name in SPLITS])
    draws = [_draw_groups(sizes, group_types, goals, rng, cover=True) for _ in range(DRAWS)]
    if not any(_is_full(draw) for draw in draws):
        if what == "donors":
            kept = min(int((draw == TRAIN).sum()) for draw in draws)
            raise InputError(
                "config: split",
                f"{kept} of {units} donors must be in training to cover every cell type, "
                "which leaves too few for validation and test",
                "Set `split: cells`, add donors, or merge rare labels",
            )
        draws = [_draw_groups(sizes, group_types, goals, rng, cover=False) for _ in range(DRAWS)]
    return _choose_draw(draws, sizes, group_types, goals)[unit]


def _draw_groups(
    sizes: np.ndarray, group_types: sparse.csr_matrix, goals: np.ndarray, rng: np.random.Generator, cover: bool
) -> np.ndarray:
    """Return a split of groups: all in training except those that bring validation or test closer to their goal.

    Parameters
    ----------
    sizes
        Cells of each group.
    group_types
        Whether each group has each cell type, groups by cell types.
    goals
        Target number of cells in each split.
    rng
        Random generator.
    cover
        Whether every cell type must keep a group in training.
    """
    split = np.full(len(sizes), TRAIN)
    filled = np.zeros(len(goals))
    groups_left = np.bincount(group_types.indices, minlength=group_types.shape[1])
    for group in rng.permutation(len(sizes)):
        own_types = group_types.indices[group_types.indptr[group] : group_types.indptr[group + 1]]
        if cover and (groups_left[own_types] < 2).any():
            continue
        empty, nearer = filled == 0, sizes[group] < 2 * (goals - filled)
        open_to = empty if empty[TEST] or empty[VALIDATION] else nearer
        open_to[TRAIN] = False
        if open_to.any():
            # the split that would be filled least, so that both fill in proportion
            goes = int(np.argmin(np.where(open_to, (filled + sizes[group]) / goals, np.inf)))
            split[group] = goes
            filled[goes] += sizes[group]
            groups_left[own_types] -= 1
    return split


def _distance(reached: np.ndarray, goals: np.ndarray) -> float:
    """Return the relative distance of split sizes from their goals: root mean square, weighted by the goals.

    Among draws that cannot reach the goals, it is smallest for those that fill the splits in proportion.
    """
    return float(np.sqrt(np.average(((reached - goals) / goals) ** 2, weights=goals)))


def _is_full(split: np.ndarray) -> bool:
    """Return whether no split is empty."""
    return len(np.unique(split)) == len(SPLITS)


def _choose_draw(
    draws: Sequence[np.ndarray], sizes: np.ndarray, group_types: sparse.csr_matrix, goals: np.ndarray
) -> np.ndarray:
    """Return the best draw.

    The fewest untrained cell types come first, then the distance to the goals up to ``TOLERANCE``, then the most cell
    types in validation and test.
    """
    rows = []
    for draw in draws:
        types_of = [np.asarray(group_types[draw == split].sum(axis=0)).ravel() > 0 for split in range(len(SPLITS))]
        rows.append(
            {
                "empty": not _is_full(draw),
                "untrained": int((~types_of[TRAIN]).sum()),
                "distance": _distance(np.bincount(draw, weights=sizes, minlength=len(SPLITS)), goals),
                "evaluated": sum(int(present.sum()) for split, present in enumerate(types_of) if split != TRAIN),
            }
        )
    table = pd.DataFrame(rows)
    table = table[table["empty"] == table["empty"].min()]
    table = table[table["untrained"] == table["untrained"].min()]
    table = table[table["distance"] <= table["distance"].min() + TOLERANCE]
    return draws[table.sort_values(["evaluated", "distance"], ascending=[False, True], kind="stable").index[0]]


def read_split(path: str | Path, cells: pd.DataFrame) -> np.ndarray:
    """Return the split of each cell according to a table from the user.

    Parameters
    ----------
    path
        Table with the column ``split`` and one of ``cell_id``, ``donor`` (``dataset|donor``), ``dataset_id``.
    cells
        The same columns of the corpus. Rows of the table for other cells or donors are ignored.

    Raises
    ------
    InputError
        If a column is missing, an id repeats, a split has an unknown name, or a cell has no split.
    """
    columns = ["cell_id", "donor", "dataset_id", "split"]
    table = read_table(path, set(columns))
    column = next((name for name in columns[:-1] if name in table), None)
    if column is None or "split" not in table:
        raise InputError(
            path, f"columns {', '.join(table)}", "Give the columns `split` and `cell_id`, `donor` or `dataset_id`"
        )
    wrong = table[~table["split"].isin(SPLITS)]
    if len(wrong):
        raise InputError(
            f"{path} line {wrong.index[0]}: split",
            f"unknown split {wrong['split'].iloc[0]!r}",
            f"Use one of {', '.join(SPLITS)}",
        )
    twice = table[column][table[column].duplicated()]
    if len(twice):
        raise InputError(f"{path} line {twice.index[0]}: {column}", f"{twice.iloc[0]} appears twice", "Keep one line")
    row = pd.Index(table[column]).get_indexer(pd.Index(cells[column].astype(object)))
    if (row < 0).any():
        absent = cells[column][row < 0].iloc[0]
        raise InputError(f"{path}: {column}", f"no line for {absent}, which is in the corpus", "Add a line for it")
    return table["split"].map({name: code for code, name in enumerate(SPLITS)}).to_numpy()[row]


def code_types(cells: pd.DataFrame) -> np.ndarray:
    """Return an integer code of each cell's type, from 0, in the order of the ids."""
    return pd.factorize(cells["cell_type_id"], sort=True)[0]
