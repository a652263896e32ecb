"""What a split guarantees and what it does not, counted from the table that is written."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cell2text.contracts import SPLITS, TERM_SLOTS
from cell2text.corpus.duplicates import find_pairs, join_groups
from cell2text.ontology import UNKNOWN

FEW_CELLS = 5
MAX_NAMES = 10
MAX_DEVIATION = 0.05  # from the configured share of a split, before the audit reports it


def audit_split(
    cells: pd.DataFrame, split: str, shares: Mapping[str, float], held_out: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what a split guarantees and what it does not.

    Parameters
    ----------
    cells
        The corpus with its splits (``contracts.CELLS``).
    split
        The config's ``split``.
    shares
        Configured share of the cells in each split, not counting held-out cell types; empty if the user's table
        assigns the splits.
    held_out
        Ids of the cell types held out of training.

    Returns
    -------
    dict
        ``split`` and ``shares`` as configured; numbers of ``cells``, ``donors``, ``studies`` and ``classes`` in
        each split; ``held_out`` (id, name and number of cells of each type); ``joined`` (sets of donors that share
        cells); ``guarantees`` (claims, whether each holds, and the count behind it); and ``limits``, sentences
        about what the scores cannot show.
    """
    pairs = find_pairs(cells)
    held = cells["cell_type_id"].isin(held_out)
    donors, studies, types = (_presence(cells, column) for column in ("donor", "dataset_id", "cell_type"))
    whole_donors, whole_studies = (_presence(cells[~held], column) for column in ("donor", "dataset_id"))
    withheld = cells[held].groupby(["cell_type_id", "cell_type"], observed=True).size().reset_index(name="cells")
    untrained = sorted(set(types.index[~types["train"]]) - set(withheld["cell_type"]))
    aside = ", except for cells of held-out types" if held_out else ""
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
                "No cell published by two studies (same barcode and total counts) is in two splits",
            ),
            {
                "claim": f"Every cell type in validation and test is also in training{aside}",
                "holds": not untrained,
                "detail": f"not in training: {_some(untrained)}"
                if untrained
                else f"{len(types) - len(withheld)} cell types",
            },
        ],
    }
    if held_out:
        elsewhere = int((cells["split"][held] != "test").sum())
        facts["guarantees"].append(
            {
                "claim": "Cells of held-out types are only in the test split",
                "holds": not elsewhere,
                "detail": f"{elsewhere} of {held.sum()} are in other splits",
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
    """Return whether each value of a column has cells in each split: bool, values by splits."""
    codes, values = pd.factorize(cells[column], sort=True)
    splits = pd.Categorical(cells["split"], categories=SPLITS).codes
    table = np.zeros((len(values), len(SPLITS)), dtype=bool)
    table[codes[codes >= 0], splits[codes >= 0]] = True
    return pd.DataFrame(table, index=[str(value) for value in values], columns=SPLITS)


def _count(presence: pd.DataFrame) -> dict[str, int]:
    return {name: int(presence[name].sum()) for name in SPLITS}


def _some(names: Iterable[str]) -> str:
    """Join names in one line, only the first few if there are many."""
    names = list(names)
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def _claim_whole(presence: pd.DataFrame, claim: str) -> dict[str, Any]:
    shared = presence.index[presence.sum(axis=1) > 1]
    detail = f"{len(shared)} of {len(presence)} are in more than one split{f': {_some(shared)}' if len(shared) else ''}"
    return {"claim": claim, "holds": not len(shared), "detail": detail}


def _claim_together(cells: pd.DataFrame, pairs: pd.DataFrame, claim: str) -> dict[str, Any]:
    splits = cells["split"].to_numpy()
    separated = int((splits[pairs["first"]] != splits[pairs["second"]]).sum())
    return {"claim": claim, "holds": not separated, "detail": f"{separated} of {len(pairs)} pairs span two splits"}


def _join_donors(donors: pd.Series, pairs: pd.DataFrame) -> list[list[str]]:
    """Return the sets of donors that share cells."""
    codes, names = pd.factorize(donors, sort=True)
    sets = pd.Series([str(name) for name in names]).groupby(join_groups(codes, pairs)).agg(list)
    return [donors for donors in sets if len(donors) > 1]


def _limits_of_sizes(splits: pd.Series, shares: Mapping[str, float]) -> Iterator[str]:
    reached = {name: (splits == name).mean() for name in shares}
    if any(abs(reached[name] - share) > MAX_DEVIATION for name, share in shares.items()):
        sizes = ", ".join(f"{name} {reached[name]:.1%} (configured: {share:.1%})" for name, share in shares.items())
        yield f"Split sizes differ from the configured shares because the groups kept together are too large: {sizes}."


def _limits_of_donors(
    cells: pd.DataFrame, donors: pd.DataFrame, studies: pd.DataFrame, joined: Sequence[Sequence[str]]
) -> Iterator[str]:
    split_donors, split_studies = donors.sum(axis=1) > 1, studies.sum(axis=1) > 1
    if len(donors) == 1:
        yield "One donor: the scores show how well cells of this donor are described, not cells of a new donor."
    elif split_donors.any():
        yield (
            f"{split_donors.sum()} of {len(donors)} donors have cells in more than one split, so the scores say "
            "little about new donors."
        )
    else:
        per_study = cells[["dataset_id", "donor"]].drop_duplicates()["dataset_id"].value_counts()
        single = [study for study in studies.index if per_study[study] == 1]
        if single and len(single) < len(studies):
            names = _some(f"{study} ({studies.columns[studies.loc[study]][0]})" for study in single)
            yield f"These studies have one donor each, so all their cells are in one split: {names}."
    yield from _limits_of_names(cells)
    if joined:
        names = _some(" and ".join(donors) for donors in joined)
        yield f"Donors that share cells are treated as one: {names}."
    if len(studies) == 1:
        yield "One study: the scores say nothing about other laboratories, assays or tissues."
    elif split_studies.any():
        yield (
            f"{split_studies.sum()} of {len(studies)} studies have cells in more than one split, so batch effects "
            "may inflate the scores."
        )
    untested = studies.index[~studies["test"]]
    if len(untested):
        yield f"No test cell comes from {_some(untested)}."


def _limits_of_names(cells: pd.DataFrame) -> Iterator[str]:
    """Yield what the names of donors, ``{collection or dataset}|{donor}``, do not show about who is the same person."""
    donors = cells[["dataset_id", "donor"]].drop_duplicates().astype(str)
    donors[["scope", "name"]] = donors["donor"].str.partition("|")[[0, 2]]
    what = "collection" if (donors["scope"] != donors["dataset_id"]).any() else "dataset"
    donors = donors.drop_duplicates("donor")
    lower = donors["name"].str.lower()
    unnamed, pooled = (lower == donors["scope"].str.lower()) | lower.isin(UNKNOWN), lower.str.startswith("pool")
    if len(donors["scope"].unique()) > 1:
        times = donors["name"][~unnamed & ~pooled].value_counts()
        again = _some(sorted(times.index[times > 1]))
        yield f"A person in two {what}s counts as two donors: equal names mean one donor only within a {what}." + (
            f" These names occur in several {what}s: {again}." if again else ""
        )
    if unnamed.any():
        yield (
            f"No donor is given for some or all cells of {_some(donors['scope'][unnamed])}. In each, these cells count "
            "as one donor, though its people may also be donors with a name."
        )
    if pooled.any():
        pools = _some(donors["donor"][pooled])
        yield f"Donors that are pools of people, who may also be donors by themselves: {pools}."


def _limits_of_types(
    cells: pd.DataFrame, types: pd.DataFrame, held_out: Sequence[Mapping[str, Any]], untrained: Sequence[str]
) -> Iterator[str]:
    if held_out:
        names = _some(f"{term['name']} ({term['id']}, {term['cells']} test cells)" for term in held_out)
        yield f"Cell types held out of training, for all donors: {names}."
    if untrained:
        yield f"Cell types without training cells cannot be predicted correctly: {_some(untrained)}."
    untested = types.index[~types["test"]]
    if len(untested):
        yield f"Cell types without test cells are not evaluated: {_some(untested)}."
    totals = cells["cell_type"].value_counts()
    alone = sorted(totals.index[totals == 1])
    if alone:
        yield f"Cell types with a single cell, which cannot serve both training and evaluation: {_some(alone)}."
    sizes = cells["cell_type"][cells["split"] == "test"].value_counts()
    few = sorted(sizes.index[(sizes > 0) & (sizes < FEW_CELLS)])
    if few:
        yield f"Cell types with fewer than five test cells: {_some(few)}."


def _limits_of_slots(cells: pd.DataFrame) -> Iterator[str]:
    for slot in TERM_SLOTS:
        name, column = slot.replace("_", " "), f"{slot}_id"
        terms = cells[column].nunique()
        if not terms:
            yield f"The {name} is unknown for every cell, so it is not evaluated."
        elif terms == 1:
            yield f"All cells of known {name} have the same one, so its score is uninformative."
        elif (
            len(cells[["dataset_id", column]].dropna().drop_duplicates())
            == cells["dataset_id"][cells[column].notna()].nunique()
        ):
            yield f"Each study has a single {name}, so {name} and study are confounded."
