"""Which cells make up a corpus: drawn as they come, or balanced by what they are, and how diverse they then are."""

from bisect import bisect_right
from collections.abc import Mapping

import numpy as np
import pandas as pd

# What each pool looks at, in the order in which pools are filled.
POOLS = {
    "natural": "tissue_id",
    "cell_type": "cell_type_id",
    "disease": "disease_id",
    "donor": "donor",
    "rare_tissue": "tissue_id",
}
ANY = "any"
RARE = 0.1  # a tissue is rare in the lowest tenth of the tissues by number of cells
DIVERSITY = {
    "cell_type": "cell_type_id",
    "tissue": "tissue_id",
    "disease": "disease_id",
    "donor": "donor",
    "study": "dataset_id",
}


def draw_sample(
    cells: pd.DataFrame,
    n: int,
    shares: Mapping[str, float],
    caps: Mapping[str, Mapping[str, float]],
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw exactly n different cells from pools that each favour something else.

    The pools are those of Cell2Text (arXiv 2509.24840): ``natural`` takes cells as they come; ``cell_type``,
    ``disease`` and ``donor`` take as many cells of each value as of any other, as far as there are; so does
    ``rare_tissue``, among the tissues of the lowest tenth by number of cells. A cell that one pool took is
    left out of the next ones. What caps leave a pool short of is drawn from all cells that are left. A cell
    type that has more than one cell keeps at least two if it keeps any.

    Parameters
    ----------
    cells
        ``cell_type_id``, ``tissue_id``, ``disease_id`` and ``donor`` of each cell, best as categories (only
        the columns of pools that have a share are read); missing where not known. The draw goes by
        position: sort the cells by their ids to make it independent of the order in which they came.
    n
        How many to draw; all of them where there are fewer.
    shares
        What each pool takes of the n cells, relative to the others; a pool not named takes none.
    caps
        For each pool, the largest share of it that a value may take, or ``"any"`` value not named. Caps of
        ``natural`` and ``rare_tissue`` name tissues.
    rng
        Source of chance.

    Returns
    -------
    array of int, shape (n,)
        Positions of the drawn cells, ascending.
    """
    if n >= len(cells):
        return np.arange(len(cells))
    left = np.ones(len(cells), dtype=bool)
    for pool, size in apportion(n, {pool: shares.get(pool, 0) for pool in POOLS}).items():
        if size:
            left[_fill_pool(pool, cells[POOLS[pool]], left, size, caps.get(pool, {}), rng)] = False
    short = n - int((~left).sum())
    left[rng.choice(np.flatnonzero(left), size=short, replace=False, shuffle=False)] = False
    _draw_second_cells(cells["cell_type_id"], left, rng)
    return np.flatnonzero(~left)


def _draw_second_cells(cell_types: pd.Series, left: np.ndarray, rng: np.random.Generator) -> None:
    """Give each cell type of which one cell was drawn a second if there is one, for one of the commonest type.

    A type with one cell can be learnt or judged, but not both.
    """
    names, codes = _code_values(cell_types)
    drawn = np.bincount(codes[~left], minlength=len(names) + 1)
    there = np.bincount(codes, minlength=len(names) + 1)
    for value in np.flatnonzero((drawn == 1) & (there > 1)):
        if value == 0 or drawn.max() < 3:
            continue
        commonest = int(drawn.argmax())
        left[rng.choice(np.flatnonzero(left & (codes == value)))] = False
        left[rng.choice(np.flatnonzero(~left & (codes == commonest)))] = True
        drawn[commonest] -= 1


def apportion(n: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Return whole numbers in proportion to shares that add up to n: rounded down, the largest remainders up.

    Examples
    --------
    >>> apportion(10, {"a": 0.5, "b": 0.25, "c": 0.25})
    {'a': 5, 'b': 3, 'c': 2}
    """
    total = sum(shares.values())
    if not total:
        return dict.fromkeys(shares, 0)
    exact = {name: n * share / total for name, share in shares.items()}
    whole = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(shares, key=lambda name: whole[name] - exact[name])
    for name in by_remainder[: n - sum(whole.values())]:
        whole[name] += 1
    return whole


def _fill_pool(
    pool: str, values: pd.Series, left: np.ndarray, size: int, caps: Mapping[str, float], rng: np.random.Generator
) -> np.ndarray:
    """Return positions of at most ``size`` cells among those left."""
    names, of_all = _code_values(values)
    rows = np.flatnonzero(left)
    codes = of_all[rows]
    available = np.bincount(codes, minlength=len(names) + 1)
    share = [np.inf, *(caps.get(name, caps.get(ANY, np.inf)) for name in names)]
    # 1e-9: a twentieth of a hundred is five, whatever the binary fraction
    most = np.minimum(available, np.floor(np.multiply(share, size) + 1e-9)).astype(np.int64)
    if pool == "natural":
        quotas = _natural_quotas(available, most, size, rng)
    else:
        most[0] = 0  # what is not known is nothing to balance by
        if pool == "rare_tissue":
            cells_of = np.bincount(of_all, minlength=len(names) + 1)[1:]
            most[1:][cells_of > np.quantile(cells_of, RARE)] = 0
        quotas = _balanced_quotas(most, size, rng)
    # Cells of a value lie together in this order, so a value's quota is drawn from one stretch of it.
    by_value = np.argsort(codes, kind="stable")
    starts = np.cumsum(available) - available
    drawn = [
        by_value[starts[value] + rng.choice(available[value], size=quotas[value], replace=False, shuffle=False)]
        for value in np.flatnonzero(quotas)
    ]
    return rows[np.concatenate(drawn)] if drawn else rows[:0]


def _code_values(values: pd.Series) -> tuple[list[str], np.ndarray]:
    """Return the values in alphabetical order and the code of each cell: 0 for unknown, i + 1 for the i-th."""
    values = values.astype("category").cat.remove_unused_categories()
    values = values.cat.reorder_categories(sorted(values.cat.categories))
    names = list(values.cat.categories)
    # the smallest type: sixteen bits and fewer are sorted by counting
    return names, (values.cat.codes.to_numpy().astype(np.int32) + 1).astype(np.min_scalar_type(len(names) + 1))


def _natural_quotas(available: np.ndarray, most: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return how many cells of each value a random draw takes that skips a value once it has reached its most."""
    quotas = np.zeros_like(available)
    while True:
        open_cells = np.where(quotas < most, available - quotas, 0)
        wanted = min(size - quotas.sum(), open_cells.sum())
        if not wanted:
            return quotas
        quotas += rng.multivariate_hypergeometric(open_cells, wanted, method="marginals")
        quotas = np.minimum(quotas, most)


def _balanced_quotas(most: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return equal numbers of cells of each value, or a value's most where that is less; ``size`` in all.

    Where the last cells do not go round, chance says which values have one more.
    """
    if most.sum() <= size:
        return most
    level = bisect_right(range(int(most.max()) + 1), size, key=lambda each: np.minimum(most, each).sum()) - 1
    quotas = np.minimum(most, level)
    more = rng.choice(np.flatnonzero(most > level), size=size - quotas.sum(), replace=False)
    quotas[more] += 1
    return quotas


def measure_diversity(cells: pd.DataFrame, rows: np.ndarray) -> pd.DataFrame:
    """Return how diverse all cells are, and the drawn ones.

    Diversity is Shannon's entropy of the shares of the values, divided by the logarithm of the number of
    values among all cells: 1 where each has as many cells as any other, 0 where there is one value only.
    Both figures have the same divisor, so a value that the draw lost lowers the second.

    Parameters
    ----------
    cells
        The columns of ``DIVERSITY``, missing where not known; such cells are not counted.
    rows
        Positions of the drawn cells.

    Returns
    -------
    DataFrame
        ``slot``, ``values_before``, ``values_after``, ``diversity_before``, ``diversity_after``.
    """
    table = []
    for slot, column in DIVERSITY.items():
        names, codes = _code_values(cells[column])
        before, after = (np.bincount(some, minlength=len(names) + 1)[1:] for some in (codes, codes[rows]))
        told = {"values_before": len(names), "values_after": int((after > 0).sum())}
        table.append({"slot": slot, **told, "diversity_before": entropy(before), "diversity_after": entropy(after)})
    return pd.DataFrame(table)


def entropy(cells: np.ndarray) -> float:
    """Return the Shannon entropy of numbers of cells, divided by the logarithm of how many numbers there are.

    Examples
    --------
    >>> entropy(np.array([5, 5])), entropy(np.array([7])), entropy(np.array([8, 0]))
    (1.0, 0.0, 0.0)
    """
    shares = cells[cells > 0] / max(cells.sum(), 1)
    return float(-(shares * np.log(shares)).sum() / np.log(len(cells))) + 0.0 if len(cells) > 1 else 0.0
