"""What a split guarantees and what it does not: each claim is counted from the table that is written."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cell2text.contracts import SPLITS, TERM_SLOTS
from cell2text.corpus.duplicates import find_pairs, join_groups

FEW_CELLS = 5
MOST_NAMES = 10
FAR = 0.05  # a split whose share of the cells is so far from the share asked for is told of


def audit_split(
    cells: pd.DataFrame, split: str, shares: Mapping[str, float], held_out: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what a split guarantees and what it does not.

    Parameters
    ----------
    cells
        The corpus with its splits (``contracts.CELLS``).
    split
        How it was split.
    shares
        Share of the cells that each split should have, those of held-out types aside; empty where a table
        of the user's says it all.
    held_out
        Cell types that were held out of training by name.

    Returns
    -------
    dict
        ``split`` and ``shares`` as asked for; ``cells``, ``donors``, ``studies`` and ``classes`` of each
        split; ``held_out`` (id, name and cells of each type); ``joined`` (sets of donors with cells in
        common); ``guarantees`` (each a claim, whether it holds, and the count behind it); and ``limits``,
        in plain words.
    """
    pairs = find_pairs(cells)
    held = cells["cell_type_id"].isin(held_out)
    donors, studies, types = (_presence(cells, column) for column in ("donor", "dataset_id", "cell_type"))
    whole_donors, whole_studies = (_presence(cells[~held], column) for column in ("donor", "dataset_id"))
    withheld = cells[held].groupby(["cell_type_id", "cell_type"], observed=True).size().reset_index(name="cells")
    untrained = sorted(set(types.index[~types["train"]]) - set(withheld["cell_type"]))
    aside = ", cells of held-out types aside" if held_out else ""
    facts = {
        "split": split,
        "shares": dict(shares),
        "cells": {name: int((cells["split"] == name).sum()) for name in SPLITS},
        "donors": _count(donors),
        "studies": _count(studies),
        "classes": _count(types),
        "held_out": [{"id": term, "name": name, "cells": int(n)} for term, name, n in withheld.itertuples(index=False)],
        "joined": _join_donors(cells["donor"], pairs),
        "guarantees": [
            _claim_whole(whole_donors, f"No donor is in two splits{aside}"),
            _claim_whole(whole_studies, f"No study is in two splits{aside}"),
            _claim_together(cells, pairs[pairs["identical"]], "No two cells with identical counts are in two splits"),
            _claim_together(
                cells,
                pairs[~pairs["identical"]],
                "No cell that two studies have, by barcode and total counts, is in two splits",
            ),
            {
                "claim": f"Every cell type of validation and test is in training{aside}",
                "holds": not untrained,
                "detail": f"never seen in training: {_some(untrained)}"
                if untrained
                else f"{len(types) - len(withheld)} cell types",
            },
        ],
    }
    if held_out:
        elsewhere = int((cells["split"][held] != "test").sum())
        facts["guarantees"].append(
            {
                "claim": "Cells of held-out types are in the test alone",
                "holds": not elsewhere,
                "detail": f"{elsewhere} of {held.sum()} are elsewhere",
            }
        )
    limits = [
        *_limits_of_sizes(cells["split"][~held], shares),
        *_limits_of_donors(cells, whole_donors, whole_studies, facts["joined"]),
        *_limits_of_types(cells, types, facts["held_out"], untrained),
        *_limits_of_slots(cells),
    ]
    return facts | {"limits": limits}


def _presence(cells: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return in which splits each value of a column has cells: values by splits, true or false."""
    of_cell, values = pd.factorize(cells[column], sort=True)
    splits = pd.Categorical(cells["split"], categories=SPLITS).codes
    table = np.zeros((len(values), len(SPLITS)), dtype=bool)
    table[of_cell[of_cell >= 0], splits[of_cell >= 0]] = True
    return pd.DataFrame(table, index=[str(value) for value in values], columns=SPLITS)


def _count(presence: pd.DataFrame) -> dict[str, int]:
    return {name: int(presence[name].sum()) for name in SPLITS}


def _some(names: Iterable[str]) -> str:
    """Return names in one line, the first few where there are many."""
    names = list(names)
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _claim_whole(presence: pd.DataFrame, claim: str) -> dict[str, Any]:
    shared = presence.index[presence.sum(axis=1) > 1]
    detail = f"{len(shared)} of {len(presence)} are in more than one{f': {_some(shared)}' if len(shared) else ''}"
    return {"claim": claim, "holds": not len(shared), "detail": detail}


def _claim_together(cells: pd.DataFrame, pairs: pd.DataFrame, claim: str) -> dict[str, Any]:
    splits = cells["split"].to_numpy()
    apart = int((splits[pairs["first"]] != splits[pairs["second"]]).sum())
    return {"claim": claim, "holds": not apart, "detail": f"{apart} of {len(pairs)} pairs are in two splits"}


def _join_donors(donors: pd.Series, pairs: pd.DataFrame) -> list[list[str]]:
    """Return the sets of donors that have cells in common."""
    codes, names = pd.factorize(donors, sort=True)
    sets = pd.Series([str(name) for name in names]).groupby(join_groups(codes, pairs)).agg(list)
    return [donors for donors in sets if len(donors) > 1]


def _limits_of_sizes(splits: pd.Series, shares: Mapping[str, float]) -> Iterator[str]:
    reached = {name: (splits == name).mean() for name in shares}
    if any(abs(reached[name] - share) > FAR for name, share in shares.items()):
        told = ", ".join(f"{name} {reached[name]:.1%} (asked: {share:.1%})" for name, share in shares.items())
        yield f"The splits are not of the sizes asked for, for what stays together is too large: {told}."


def _limits_of_donors(
    cells: pd.DataFrame, donors: pd.DataFrame, studies: pd.DataFrame, joined: Sequence[Sequence[str]]
) -> Iterator[str]:
    parted, crossing = donors.sum(axis=1) > 1, studies.sum(axis=1) > 1
    if len(donors) == 1:
        yield (
            "One donor: the scores say how well cells of this donor are told apart, not how well a new "
            "donor's would be."
        )
    elif parted.any():
        yield (
            f"{parted.sum()} of {len(donors)} donors have cells in more than one split: the scores say "
            "little of a new donor."
        )
    else:
        per_study = cells[["dataset_id", "donor"]].drop_duplicates()["dataset_id"].value_counts()
        single = [study for study in studies.index if per_study[study] == 1]
        if single and len(single) < len(studies):
            told = _some(f"{study} ({studies.columns[studies.loc[study]][0]})" for study in single)
            yield f"These studies have one donor each, so all their cells are in one split: {told}."
    if joined:
        told = _some(" and ".join(donors) for donors in joined)
        yield f"Donors that have cells in common count as one: {told}."
    if len(studies) == 1:
        yield "One study: nothing is said of another laboratory, assay or tissue."
    elif crossing.any():
        yield (
            f"{crossing.sum()} of {len(studies)} studies have cells in more than one split: "
            "a study's own traits may help the scores."
        )
    untested = studies.index[~studies["test"]]
    if len(untested):
        yield f"No test cell comes from {_some(untested)}."


def _limits_of_types(
    cells: pd.DataFrame, types: pd.DataFrame, held_out: Sequence[Mapping[str, Any]], untrained: Sequence[str]
) -> Iterator[str]:
    if held_out:
        told = _some(f"{term['name']} ({term['id']}, {term['cells']} test cells)" for term in held_out)
        yield f"Held out of training by name, whatever their donors: {told}."
    if untrained:
        yield f"Cell types without a training cell cannot be named rightly: {_some(untrained)}."
    unjudged = types.index[~types["test"]]
    if len(unjudged):
        yield f"Cell types without a test cell are not judged: {_some(unjudged)}."
    sizes = cells["cell_type"][cells["split"] == "test"].value_counts()
    few = sorted(sizes.index[(sizes > 0) & (sizes < FEW_CELLS)])
    if few:
        yield f"Fewer than five test cells: {_some(few)}."


def _limits_of_slots(cells: pd.DataFrame) -> Iterator[str]:
    for slot in TERM_SLOTS:
        told, column = slot.replace("_", " "), f"{slot}_id"
        known = cells[column].nunique()
        if not known:
            yield f"The {told} is not known for any cell, so it is not judged."
        elif known == 1:
            yield f"No cell is known to have another {told} than the rest, so its score says nothing."
        elif (
            len(cells[["dataset_id", column]].dropna().drop_duplicates())
            == cells["dataset_id"][cells[column].notna()].nunique()
        ):
            yield f"Each study has one {told}, so naming it may be no more than knowing the study."
