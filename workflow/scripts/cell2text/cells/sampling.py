"""Sampling of the cells of a corpus, at random or balanced by labels, and the diversity of the sample."""

from bisect import bisect_right
from collections.abc import Mapping

import numpy as np
import pandas as pd

# The column that each pool balances or caps, in the order in which pools are filled.
POOLS = {
    "natural": "tissue_id",
    "cell_type": "cell_type_id",
    "disease": "disease_id",
    "donor": "donor",
    "rare_tissue": "tissue_id",
}
ANY = "any"
RARE = 0.1  # a tissue is rare if its number of cells is in the lowest tenth of all tissues
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
    """Draw exactly n distinct cells from pools with different sampling schemes.

    The pools are those of Cell2Text (arXiv 2509.24840): ``natural`` draws uniformly; ``cell_type``, ``disease`` and
    ``donor`` draw the same number of cells of each value, as far as there are enough; ``rare_tissue`` does the same
    among the rarest tenth of the tissues. A cell drawn by one pool is not available to later pools. If caps leave a
    pool short, the missing cells are drawn from all remaining cells. A cell type with more than one cell keeps at
    least two if it keeps any.

    Parameters
    ----------
    cells
        ``cell_type_id``, ``tissue_id``, ``disease_id`` and ``donor`` of each cell, preferably as categories; missing if
        unknown. Only the columns of pools with a share, and ``cell_type_id``, are read. The draw depends on positions:
        sort the cells by id to make it independent of their original order.
    n
        Number of cells to draw; all cells if there are fewer.
    shares
        Relative share of the n cells that each pool draws; a pool that is not named draws none.
    caps
        For each pool, the maximum share of it per value, with ``"any"`` for values that are not named. Caps of
        ``natural`` and ``rare_tissue`` name tissues.
    rng
        Random generator.

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
    """Add a second cell to each cell type with one drawn cell, if there is one, in exchange for the commonest type.

    A type with a single cell can be used for training or for evaluation, but not for both.
    """
    names, codes = _code_values(cell_types)
    drawn = np.bincount(codes[~left], minlength=len(names) + 1)
    available = np.bincount(codes, minlength=len(names) + 1)
    for value in np.flatnonzero((drawn == 1) & (available > 1)):
        if value == 0 or drawn.max() < 3:
            continue
        commonest = int(drawn.argmax())
        left[rng.choice(np.flatnonzero(left & (codes == value)))] = False
        left[rng.choice(np.flatnonzero(~left & (codes == commonest)))] = True
        drawn[commonest] -= 1


def apportion(n: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Split n into whole numbers in proportion to shares, by the largest remainder method.

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
    # 1e-9: 5% of 100 must be 5 despite rounding in binary
    most = np.minimum(available, np.floor(np.multiply(share, size) + 1e-9)).astype(np.int64)
    if pool == "natural":
        quotas = _natural_quotas(available, most, size, rng)
    else:
        most[0] = 0  # unknown is not a value to balance by
        if pool == "rare_tissue":
            cells_of = np.bincount(of_all, minlength=len(names) + 1)[1:]
            most[1:][cells_of > np.quantile(cells_of, RARE)] = 0
        quotas = _balanced_quotas(most, size, rng)
    # In this order the cells of a value are contiguous, so each quota is drawn from one range.
    by_value = np.argsort(codes, kind="stable")
    starts = np.cumsum(available) - available
    drawn = [
        by_value[starts[value] + rng.choice(available[value], size=quotas[value], replace=False, shuffle=False)]
        for value in np.flatnonzero(quotas)
    ]
    return rows[np.concatenate(drawn)] if drawn else rows[:0]


def _code_values(values: pd.Series) -> tuple[list[str], np.ndarray]:
    """Return the values in alphabetical order, and the code of each cell: 0 if unknown, i + 1 for the i-th value."""
    values = values.astype("category").cat.remove_unused_categories()
    values = values.cat.reorder_categories(sorted(values.cat.categories))
    names = list(values.cat.categories)
    # the smallest type: numpy uses a radix sort for up to 16 bits
    return names, (values.cat.codes.to_numpy().astype(np.int32) + 1).astype(np.min_scalar_type(len(names) + 1))


def _natural_quotas(available: np.ndarray, most: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return the number of cells of each value in a random draw that skips values at their maximum."""
    quotas = np.zeros_like(available)
    while True:
        open_cells = np.where(quotas < most, available - quotas, 0)
        wanted = min(size - quotas.sum(), open_cells.sum())
        if not wanted:
            return quotas
        quotas += rng.multivariate_hypergeometric(open_cells, wanted, method="marginals")
        quotas = np.minimum(quotas, most)


def _balanced_quotas(most: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return equal numbers of cells per value, or the value's maximum if that is smaller; ``size`` in total.

    If the cells cannot be divided equally, random values get one more.
    """
    if most.sum() <= size:
        return most
    level = bisect_right(range(int(most.max()) + 1), size, key=lambda each: np.minimum(most, each).sum()) - 1
    quotas = np.minimum(most, level)
    more = rng.choice(np.flatnonzero(most > level), size=size - quotas.sum(), replace=False)
    quotas[more] += 1
    return quotas


def measure_diversity(cells: pd.DataFrame, rows: np.ndarray) -> pd.DataFrame:
    """Return the diversity of all cells and of the drawn cells.

    Diversity is the Shannon entropy of the shares of the values, divided by the logarithm of the number of values
    among all cells: 1 if all values have the same number of cells, 0 if there is only one value. Both scores have the
    same divisor, so a value that was not drawn lowers the second.

    Parameters
    ----------
    cells
        The columns of ``DIVERSITY``, missing if unknown; such cells are not counted.
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
        before, after = (np.bincount(part, minlength=len(names) + 1)[1:] for part in (codes, codes[rows]))
        values = {"values_before": len(names), "values_after": int((after > 0).sum())}
        table.append({"slot": slot, **values, "diversity_before": entropy(before), "diversity_after": entropy(after)})
    return pd.DataFrame(table)


def entropy(cells: np.ndarray) -> float:
    """Return the Shannon entropy of cell numbers, divided by the logarithm of the number of groups.

    Examples
    --------
    >>> entropy(np.array([5, 5])), entropy(np.array([7])), entropy(np.array([8, 0]))
    (1.0, 0.0, 0.0)
    """
    shares = cells[cells > 0] / max(cells.sum(), 1)
    return float(-(shares * np.log(shares)).sum() / np.log(len(cells))) + 0.0 if len(cells) > 1 else 0.0
