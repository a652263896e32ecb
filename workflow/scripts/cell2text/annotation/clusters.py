"""One paragraph per cluster: what most of its cells are reported to be, and how well they agree."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cell2text.annotation.order import natural
from cell2text.confidence.back_off import TermsAbove
from cell2text.errors import InputError
from cell2text.grammar import PATHWAY, Terms
from cell2text.ontology import UNKNOWN

PROGRAMMES = 3
_MOST_CLUSTERS = 0.5  # per cell; a column with more distinct values names cells or measures them
_ANOTHER_COLUMN = "Name a column of obs with one value per cluster"


@dataclass(frozen=True)
class TermShare:
    """A term, and how many of a cluster's cells have it.

    Parameters
    ----------
    id, name
        Id and name of the term.
    share
        Share of all cells of the cluster, from 0 to 1.
    """

    id: str
    name: str
    share: float


@dataclass(frozen=True)
class OwnLabel:
    """The most frequent of the file's own labels in a cluster.

    Parameters
    ----------
    label
        The label as the file has it, free text or a Cell Ontology id.
    name
        Name of the term; None for free text, and for an id that is not among the terms.
    share
        Share of all cells of the cluster, from 0 to 1.
    conflict
        Whether the reported term is neither this term nor above or below it. None if that cannot be judged: the label
        is free text, or nothing is reported.
    """

    label: str
    name: str | None
    share: float
    conflict: bool | None


@dataclass(frozen=True)
class Cluster:
    """What is known of a cluster.

    Parameters
    ----------
    name
        Its name in the file, or its number.
    cells
        Number of cells, at least 1.
    reported
        The most specific cell type that is at or above the reported terms of enough cells, with the share of cells
        that agree; None if there is none ("not determined").
    guess, runner_up
        The most frequent and second most frequent guesses of the cell type; None if there are not so many.
    markers
        Symbols of marker genes, best first, see ``find_markers``.
    programmes
        The most frequent gene programmes, at most ``PROGRAMMES``. A cell names several, so shares may add up to more
        than 1.
    novel
        Share of the judged cells that are novel; None if no cell was judged.
    flagged
        Share of cells that QC flags.
    own_label
        The file's own label; None if no cell of the cluster has one.
    """

    name: str
    cells: int
    reported: TermShare | None
    guess: TermShare | None
    runner_up: TermShare | None
    markers: tuple[str, ...]
    programmes: tuple[TermShare, ...]
    novel: float | None
    flagged: float
    own_label: OwnLabel | None

    @property
    def agreement(self) -> float | None:
        """Share of cells whose reported term is the cluster's or below it; None if the cluster has none."""
        return self.reported.share if self.reported else None


def check_clusters(column: pd.Series, where: str) -> None:
    """Check that a column of the user's ``obs`` can hold clusters.

    Parameters
    ----------
    column
        One value per cell, of any type.
    where
        The file and the column, for messages.

    Raises
    ------
    InputError
        If cells lack a cluster, all are in the same one, or the column has more than half as many values as cells.
        Blank text and ``nan`` are missing values.
    """
    names = _names(column)
    cells, missing, distinct = len(names), int(names.isna().sum()), names.nunique()
    if not cells:
        raise InputError(where, "no cells", "Give a file with cells")
    if missing == cells:
        raise InputError(where, "no cell has a cluster", _ANOTHER_COLUMN)
    if missing:
        problem = f"{missing:,} of {cells:,} cells have no cluster"
        raise InputError(where, problem, "Give each of them a cluster, or remove them from the file")
    if distinct == 1:
        raise InputError(where, f"all {cells:,} cells are in cluster {names.iloc[0]}", _ANOTHER_COLUMN)
    if distinct == cells:
        raise InputError(where, f"each of the {cells:,} cells has a value of its own", _ANOTHER_COLUMN)
    if distinct > _MOST_CLUSTERS * cells:
        raise InputError(where, f"{distinct:,} different values for {cells:,} cells are no clusters", _ANOTHER_COLUMN)


def describe_clusters(
    cells: pd.DataFrame,
    markers: Callable[[np.ndarray], Mapping[int, tuple[str, ...]]],
    clusters: pd.Series,
    terms: pd.DataFrame,
    own_labels: pd.Series | None,
    confidence: float,
    labels: Collection[str] | None = None,
) -> list[Cluster]:
    """Summarise the cells of each cluster.

    The rows of ``cells``, ``clusters`` and ``own_labels`` are the same cells in the same order; their
    indices are ignored. Whatever is equally frequent is ordered by id.

    Parameters
    ----------
    cells
        One row per cell. Of ``contracts.PREDICTIONS``: ``cell_type_id``, ``cell_type_reported_id``, ``pathway_ids`` and
        ``novel``; and ``flag``, text that is empty if QC finds nothing.
    markers
        Returns the marker genes of clusters from the number of each cell's cluster, as ``find_markers`` does.
    clusters
        Name of each cell's cluster: text, whole numbers or categories. See :func:`check_clusters`.
    terms
        Rows of ``contracts.TERMS``, with the ancestors of cell types.
    own_labels
        The file's own label of each cell, Cell Ontology ids or free text; ``unknown`` and missing labels do not count.
        None if the file has none.
    confidence
        Share of a cluster's cells that must agree on the reported term, from above 0 to 1. Cells without a reported
        term agree on none.
    labels
        Cell types that the model can name. A term above all of them is true of every cell and is not reported. By
        default, all cell types of ``terms``.

    Returns
    -------
    list of Cluster
        In the order of the categories; other clusters are in natural order (2 before 10). Empty categories are left
        out.

    Raises
    ------
    ValueError
        If the numbers of cells differ, or a cell has no cluster.
    KeyError
        If an id is not among the terms.
    """
    lengths = {len(cells), len(clusters), len(cells if own_labels is None else own_labels)}
    if len(lengths) > 1:
        raise ValueError(f"cells, clusters and own labels differ in length: {sorted(lengths)}")
    names = _names(clusters)
    if names.isna().any():
        raise ValueError(f"{names.isna().sum()} cells have no cluster")
    order = _order(clusters, names)
    codes = pd.Index(order, dtype=object).get_indexer(names)
    known = Terms(terms)
    by_cell_type = terms[terms["slot"] == "cell_type"]
    ancestors = {
        key: frozenset(() if above is None else above)
        for key, above in by_cell_type[["id", "ancestors"]].itertuples(index=False)
    }

    members = _Members(codes, np.bincount(codes, minlength=len(order)))
    reported = members.agreed(
        cells["cell_type_reported_id"],
        ancestors,
        confidence,
        known.name["cell_type"] if labels is None else labels,
        known.name["cell_type"],
    )
    guesses = members.most_frequent(cells["cell_type_id"], 2, known.name["cell_type"])
    programmes = members.most_frequent(cells["pathway_ids"], PROGRAMMES, known.name.get(PATHWAY, {}))
    own = members.most_frequent(_known_labels(own_labels), 1, None) if own_labels is not None else []
    novelty = cells["novel"].astype("boolean")
    novel = members.share(novelty.fillna(False), novelty.notna())
    flagged = members.share(cells["flag"].astype(object).fillna("").ne(""))
    found = markers(codes)
    return [
        Cluster(
            name=name,
            cells=int(members.sizes[number]),
            reported=reported[number],
            guess=next(iter(guesses[number]), None),
            runner_up=next(iter(guesses[number][1:]), None),
            markers=found.get(number, ()),
            programmes=tuple(programmes[number]),
            novel=novel[number],
            flagged=flagged[number],
            own_label=_compare(own[number] if own else [], reported[number], known.name["cell_type"], ancestors),
        )
        for number, name in enumerate(order)
    ]


@dataclass(frozen=True)
class _Members:
    """Which cells are in which cluster.

    Parameters
    ----------
    codes
        Number of the cluster of each cell, int64 (cells,).
    sizes
        Number of cells of each cluster, int64 (clusters,).
    """

    codes: np.ndarray
    sizes: np.ndarray

    def count(self, ids: pd.Series) -> pd.DataFrame:
        """Return ``cluster``, ``id`` and ``cells`` of pairs that occur; ``ids`` has an id, a list or None per cell."""
        pairs = pd.DataFrame({"cluster": self.codes, "id": ids.to_numpy(dtype=object)}).explode("id").dropna()
        return pairs.groupby(["cluster", "id"], sort=True).size().reset_index(name="cells")

    def most_frequent(self, ids: pd.Series, most: int, names: Mapping[str, str] | None) -> list[list[TermShare]]:
        """Return the most frequent ids of each cluster, first by frequency, then by id; without names, ids are names.

        Returns
        -------
        list of lists
            At most ``most`` ids per cluster.
        """
        counted = self.count(ids)
        counted = counted.sort_values(["cluster", "cells", "id"], ascending=[True, False, True])
        found: list[list[TermShare]] = [[] for _ in self.sizes]
        for cluster, key, cells in counted.groupby("cluster").head(most).itertuples(index=False):
            found[cluster].append(
                TermShare(key, key if names is None else names[key], cells / int(self.sizes[cluster]))
            )
        return found

    def agreed(
        self,
        ids: pd.Series,
        ancestors: Mapping[str, Collection[str]],
        confidence: float,
        labels: Collection[str],
        names: Mapping[str, str],
    ) -> list[TermShare | None]:
        """Return the most specific term at or above the ids of a share of ``confidence`` of each cluster's cells."""
        counted = self.count(ids)
        candidates = sorted({*labels, *counted["id"]})
        shares = np.zeros((len(self.sizes), len(candidates)))
        columns = pd.Index(candidates, dtype=object).get_indexer(counted["id"])
        shares[counted["cluster"], columns] = counted["cells"] / self.sizes[counted["cluster"]]
        # a share of cells takes the place of a probability: both are summed over the terms at or below another
        terms, found = TermsAbove(candidates, ancestors, complete=False).report(shares, confidence)
        exact = (found * self.sizes).round() / self.sizes  # they were float32
        return [
            None if term is None else TermShare(term, names[term], float(share))
            for term, share in zip(terms, exact, strict=True)
        ]

    def share(self, hits: pd.Series, judged: pd.Series | None = None) -> list[float | None]:
        """Return the share of hits among each cluster's cells, or its judged cells; None without judged cells."""
        total = self.sizes if judged is None else self._sizes_of(judged)
        counted = zip(self._sizes_of(hits).tolist(), total.tolist(), strict=True)
        return [some / every if every else None for some, every in counted]

    def _sizes_of(self, selected: pd.Series) -> np.ndarray:
        return np.bincount(self.codes[selected.to_numpy(dtype=bool)], minlength=len(self.sizes))


def _names(column: pd.Series) -> pd.Series:
    """Return text for values of any type; None for missing values, and for text that pandas writes for them."""
    codes, values = pd.factorize(column)
    texts = [_as_text(value) for value in values]
    texts = [None if text.strip() in ("", "nan", "<NA>") else text for text in texts]
    return pd.Series(np.array([*texts, None], dtype=object)[codes])  # a missing value has code -1, the last entry


def _as_text(value: object) -> str:
    # whole numbers become floats in a column that had missing values
    return str(int(value) if isinstance(value, float | np.floating) and value.is_integer() else value)


def _order(clusters: pd.Series, names: pd.Series) -> list[str]:
    """Return the names of the clusters with cells, in the order of the categories or in natural order."""
    present = set(names)
    if isinstance(clusters.dtype, pd.CategoricalDtype):
        return [name for name in dict.fromkeys(map(_as_text, clusters.cat.categories)) if name in present]
    return sorted(present, key=natural)


def _known_labels(labels: pd.Series) -> pd.Series:
    names = _names(labels)
    return names.where(~names.str.strip().str.lower().isin(UNKNOWN), None)


def _compare(
    label: Sequence[TermShare],
    reported: TermShare | None,
    names: Mapping[str, str],
    ancestors: Mapping[str, Collection[str]],
) -> OwnLabel | None:
    """Return the own label of a cluster, and whether the reported term contradicts it."""
    if not label:
        return None
    own = label[0]
    conflict = None
    if reported and own.id in names:
        related = own.id == reported.id or own.id in ancestors[reported.id] or reported.id in ancestors[own.id]
        conflict = not related
    return OwnLabel(own.id, names.get(own.id), own.share, conflict)
