"""Which cells are learned from and which are judged by: whole donors, whole studies, or single cells."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from cell2text.contracts import SPLITS
from cell2text.corpus.duplicates import join_cells, join_groups
from cell2text.errors import InputError

TRAIN, VALIDATION, TEST = range(len(SPLITS))
GROUPS = {"donors": "donor", "studies": "dataset_id"}
DRAWS = 64
# Draws that miss the shares by so little more than the best one count as alike.
ALIKE = 0.01


def assign_cells(
    cells: pd.DataFrame, pairs: pd.DataFrame, shares: Mapping[str, float], rng: np.random.Generator
) -> np.ndarray:
    """Return the split of each cell: at random within each cell type, at least one cell of it in training.

    Cells that are likely one cell stay together, under the cell type of the first of them.

    Parameters
    ----------
    cells
        ``cell_type_id`` and ``cell_type`` of each cell.
    pairs
        Pairs that are likely one cell, as ``duplicates.find_pairs`` gives them.
    shares
        Share of the cells that each split should have.
    rng
        Source of chance.

    Returns
    -------
    array of int
        Index into ``contracts.SPLITS`` of each cell.

    Raises
    ------
    InputError
        If a cell type has a single cell.
    """
    types = code_types(cells)
    single = np.flatnonzero(np.bincount(types) == 1)
    if len(single):
        alone = cells[np.isin(types, single)].sort_values("cell_type_id")
        told = ", ".join(f"{cell.cell_type} ({cell.cell_type_id}): 1 cell" for cell in alone.itertuples())
        raise InputError(
            "corpus: cell_type_id",
            f"too few cells to have some to learn from and some to judge by: {told}",
            "Drop the label, or merge it with another in the label table",
        )
    # A unit is what stays together: a cell, or cells that are likely one.
    unit = join_cells(len(cells), pairs)
    size, first = np.bincount(unit), np.unique(unit, return_index=True)[1]
    unit_type = types[first]
    order = np.lexsort((rng.permutation(len(size)), unit_type))
    total = np.bincount(unit_type, weights=size)
    before = np.empty(len(size))
    before[order] = np.cumsum(size[order]) - size[order]
    before -= (np.cumsum(total) - total)[unit_type]
    # One random offset a cell type: each split gets its share on average however few the cells are.
    offset = rng.random(len(total))
    bounds = np.cumsum([shares[name] for name in SPLITS[:-1]])
    split = np.searchsorted(bounds, ((before + offset[unit_type]) / total[unit_type]), side="right")
    trained = np.bincount(types[split[unit] == TRAIN], minlength=types.max() + 1)
    uncovered, its_first = np.unique(types, return_index=True)
    split[unit[its_first[trained[uncovered] == 0]]] = TRAIN
    return split[unit]


def assign_groups(
    cells: pd.DataFrame, column: str, pairs: pd.DataFrame, shares: Mapping[str, float], rng: np.random.Generator
) -> np.ndarray:
    """Return the split of each cell, whole donors (or studies) at a time.

    Donors that have cells in common count as one. Many times over, donors are taken in random order, each
    to validation or test, whichever is then filled less, as long as that brings the split nearer to its share
    and every cell type keeps a donor in training. Of these draws the one that comes nearest to the shares
    is kept; among those that come as near, the one that leaves most cell types to judge by. Training has
    the rest, which is more than its share where few donors can leave it.

    Where no draw leaves something to validate and something to test, donors raise an error; studies, whose
    cell types often are their own, are drawn again without a hold on cell types, and the draw that leaves
    the fewest untrained is kept.

    Parameters
    ----------
    cells
        ``cell_type_id`` and the group of each cell.
    column
        The column that holds the group: ``donor`` or ``dataset_id``.
    pairs
        Pairs that are likely one cell, as ``duplicates.find_pairs`` gives them.
    shares
        Share of the cells that each split should have.
    rng
        Source of chance.

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
        told = ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")
        what = {"donors": "donor", "studies": "study"}[what] if len(names) == 1 else what
        joined = "" if units == len(names) else f", {units} where those with cells in common count as one"
        raise InputError(
            "config: split",
            f"{len(names)} {what} in the corpus ({told}){joined}, three needed",
            "Set `split: cells`, or add studies",
        )
    sizes = np.bincount(unit, minlength=units)
    types = code_types(cells)
    holds = sparse.coo_matrix((np.ones(len(cells), bool), (unit, types)), shape=(units, types.max() + 1)).tocsr()
    goals = np.array([shares[name] * len(cells) for name in SPLITS])
    draws = [_draw_groups(sizes, holds, goals, rng, cover=True) for _ in range(DRAWS)]
    if not any(_full(draw) for draw in draws):
        if what == "donors":
            kept = min(int((draw == TRAIN).sum()) for draw in draws)
            raise InputError(
                "config: split",
                f"{kept} of {units} donors must be in training so that it has every cell type, "
                "so too few are left for validation and test",
                "Set `split: cells`, add donors, or merge rare labels",
            )
        draws = [_draw_groups(sizes, holds, goals, rng, cover=False) for _ in range(DRAWS)]
    return _choose_draw(draws, sizes, holds, goals)[unit]


def _draw_groups(
    sizes: np.ndarray, holds: sparse.csr_matrix, goals: np.ndarray, rng: np.random.Generator, cover: bool
) -> np.ndarray:
    """Return a split of groups: all in training but those that bring validation or test nearer to their goal.

    Parameters
    ----------
    sizes
        Cells of each group.
    holds
        Which group has which cell types, groups by cell types.
    goals
        Cells wanted in each split.
    rng
        Source of chance.
    cover
        Whether each cell type must keep a group in training.
    """
    split = np.full(len(sizes), TRAIN)
    filled = np.zeros(len(goals))
    holders = np.bincount(holds.indices, minlength=holds.shape[1])
    for group in rng.permutation(len(sizes)):
        its_types = holds.indices[holds.indptr[group] : holds.indptr[group + 1]]
        if cover and (holders[its_types] < 2).any():
            continue
        empty, nearer = filled == 0, sizes[group] < 2 * (goals - filled)
        open_to = empty if empty[TEST] or empty[VALIDATION] else nearer
        open_to[TRAIN] = False
        if open_to.any():
            # the split that is then filled least, so that they fill in proportion
            goes = int(np.argmin(np.where(open_to, (filled + sizes[group]) / goals, np.inf)))
            split[group] = goes
            filled[goes] += sizes[group]
            holders[its_types] -= 1
    return split


def _miss(reached: np.ndarray, goals: np.ndarray) -> float:
    """Return by what part of their goals splits miss them: the root of the mean square, weighted by the goals.

    Of splits that cannot reach their goals, those come nearest that are filled in proportion to them.
    """
    return float(np.sqrt(np.average(((reached - goals) / goals) ** 2, weights=goals)))


def _full(split: np.ndarray) -> bool:
    return len(np.unique(split)) == len(SPLITS)


def _choose_draw(
    draws: Sequence[np.ndarray], sizes: np.ndarray, holds: sparse.csr_matrix, goals: np.ndarray
) -> np.ndarray:
    """Return the draw that leaves the fewest cell types untrained, is nearest to the goals, and judges most types."""
    rows = []
    for draw in draws:
        types_of = [np.asarray(holds[draw == split].sum(axis=0)).ravel() > 0 for split in range(len(SPLITS))]
        rows.append(
            {
                "empty": not _full(draw),
                "untrained": int((~types_of[TRAIN]).sum()),
                "away": _miss(np.bincount(draw, weights=sizes, minlength=len(SPLITS)), goals),
                "judged": sum(int(held.sum()) for split, held in enumerate(types_of) if split != TRAIN),
            }
        )
    table = pd.DataFrame(rows)
    table = table[table["empty"] == table["empty"].min()]
    table = table[table["untrained"] == table["untrained"].min()]
    table = table[table["away"] <= table["away"].min() + ALIKE]
    return draws[table.sort_values(["judged", "away"], ascending=[False, True], kind="stable").index[0]]


def read_split(path: str | Path, cells: pd.DataFrame) -> np.ndarray:
    """Return the split of each cell as a table of the user's says.

    Parameters
    ----------
    path
        TSV with the column ``split`` and one of ``cell_id``, ``donor`` (``dataset|donor``), ``dataset_id``.
    cells
        These columns of the corpus. Lines of other cells or donors do no harm.

    Raises
    ------
    InputError
        If a column is missing, a line repeats, a split has another name, or a cell has none.
    """
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, comment="#")
    column = next((name for name in ("cell_id", "donor", "dataset_id") if name in table), None)
    if column is None or "split" not in table:
        raise InputError(
            path, f"columns {', '.join(table)}", "Give the columns `split` and `cell_id`, `donor` or `dataset_id`"
        )
    wrong = table[~table["split"].isin(SPLITS)]
    if len(wrong):
        raise InputError(
            f"{path} line {wrong.index[0] + 2}: split",
            f"no split is called {wrong['split'].iloc[0]!r}",
            f"Write {', '.join(SPLITS)}",
        )
    twice = table[column][table[column].duplicated()]
    if len(twice):
        raise InputError(f"{path}: {column}", f"{twice.iloc[0]} is there twice", "Keep one line of it")
    row = pd.Index(table[column]).get_indexer(pd.Index(cells[column].astype(object)))
    if (row < 0).any():
        absent = cells[column][row < 0].iloc[0]
        raise InputError(f"{path}: {column}", f"no line for {absent}, which is in the corpus", "Add its line")
    return table["split"].map({name: code for code, name in enumerate(SPLITS)}).to_numpy()[row]


def code_types(cells: pd.DataFrame) -> np.ndarray:
    """Return a code of each cell's type, from 0, in the order of the ids."""
    return pd.factorize(cells["cell_type_id"], sort=True)[0]
