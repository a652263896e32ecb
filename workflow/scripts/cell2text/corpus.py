"""The cells of the corpus, and their split into training, validation and test."""

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from cell2text.cell_files import read_blocks
from cell2text.contracts import CELLS, SAMPLED_CELLS, SPLITS, TERM_SLOTS, write_json
from cell2text.counts import CELLXGENE
from cell2text.errors import InputError
from cell2text.progress import Progress

log = logging.getLogger("cell2text.corpus")


def sample_cells(cell_files: Iterable[str | Path], cells: int, seed: int, path: str | Path) -> None:
    """Draw cells at random, all datasets together, and write what is known of them.

    The draw depends on the ids of the cells and the seed, not on the order of cells or files.

    Parameters
    ----------
    cell_files
        Filtered counts of each dataset; only ``obs`` and a block of rows are held.
    cells
        How many to draw; all of them where there are fewer.
    seed
        Seed of the draw.
    path
        Where to write the table (``contracts.SAMPLED_CELLS``), in the order of dataset and cell id.
    """
    cell_files = list(cell_files)
    known = pd.concat([read_cells(file).assign(file=str(file)) for file in cell_files])
    known = known.sort_values(["dataset_id", "cell_id"], ignore_index=True)
    if len(known) > cells:
        rows = np.random.default_rng(seed).choice(len(known), size=cells, replace=False)
        known = known.iloc[np.sort(rows)].reset_index(drop=True)
    hashes = {}
    progress = Progress(len(known), "cells")
    for file, wanted in known.groupby("file", sort=True):
        hashes.update(hash_counts(file, wanted["cell_id"], progress))
    known["counts_hash"] = known["cell_id"].map(hashes)
    log.info("%d cells of %d datasets", len(known), known["dataset_id"].nunique())
    SAMPLED_CELLS.write(known[list(SAMPLED_CELLS.columns)], path)


def read_cells(path: str | Path) -> pd.DataFrame:
    """Return what an h5ad says of its cells, in the columns of ``contracts.SAMPLED_CELLS`` but the hash.

    Donors are ``{dataset}|{donor}``, for a donor's name is unique only in its study. What is unknown is
    None.
    """
    cells = ad.read_h5ad(path, backed="r")
    obs = cells.obs.astype(object)
    cells.file.close()
    table = pd.DataFrame(
        {
            "cell_id": obs.index.astype(str),
            "dataset_id": obs["dataset_id"].to_numpy(),
            "donor": (obs["dataset_id"] + "|" + obs["donor_id"]).to_numpy(),
            "assay_id": obs["assay_ontology_term_id"].to_numpy(),
        }
    )
    for slot, column in CELLXGENE.items():
        table[f"{slot}_id"] = obs[f"{column}_ontology_term_id"].to_numpy()
        table[slot] = obs[column].to_numpy()
    return table.mask(table == "unknown", None)


def hash_counts(path: str | Path, cell_ids: pd.Series, progress: Progress) -> dict[str, str]:
    """Return a hash of the genes and counts of each cell: equal where two cells have the same counts.

    Genes count by id, so the order of genes in a file, and genes without a count, make no difference.

    Parameters
    ----------
    path
        Filtered counts.
    cell_ids
        Cells to hash.
    progress
        Told of each block.
    """
    cells = ad.read_h5ad(path, backed="r")
    genes = cells.var_names.to_numpy(dtype=str)
    cells.file.close()
    by_id = np.argsort(genes)
    codes = np.array(
        [int.from_bytes(hashlib.blake2b(gene.encode(), digest_size=8).digest(), "little") for gene in genes[by_id]],
        dtype="<u8",
    )
    hashes = {}
    for ids, counts in read_blocks(path, cell_ids):
        counts = counts[:, by_id]
        counts.eliminate_zeros()
        counts.sort_indices()
        names, values, ends = codes[counts.indices], counts.data.astype("<f4"), counts.indptr
        for cell, first, last in zip(ids, ends[:-1], ends[1:], strict=True):
            seen = hashlib.blake2b(names[first:last].tobytes(), digest_size=16)
            seen.update(values[first:last].tobytes())
            hashes[cell] = seen.hexdigest()
        progress.advance(len(ids))
    return hashes


def split_donors(
    cells_file: str | Path,
    split: str,
    shares: dict[str, float],
    seed: int,
    path: str | Path,
    audit_file: str | Path,
) -> None:
    """Put each cell in training, validation or test, and write down what the split guarantees.

    Parameters
    ----------
    cells_file
        The sampled cells.
    split
        What stays together: ``"donors"``, ``"studies"``, or, by name only, single ``"cells"``.
    shares
        Share of the cells that each split should have.
    seed
        Seed of the draw.
    path, audit_file
        Where to write the corpus (``contracts.CELLS``) and the audit (JSON).

    Raises
    ------
    InputError
        If a split would be empty, or a cell type has too few cells.
    """
    cells = SAMPLED_CELLS.read(cells_file)
    rng = np.random.default_rng(seed)
    if split == "cells":
        cells["split"] = assign_cells(cells, shares, rng)
    else:
        column = {"donors": "donor", "studies": "dataset_id"}[split]
        cells["split"] = assign_groups(cells, column, shares, rng, cover=split == "donors")
    empty = [name for name in SPLITS if name not in set(cells["split"])]
    if empty:
        raise InputError(
            "config: split_shares",
            f"no cell is left for {' and '.join(empty)}",
            "Raise the share or add cells",
        )
    audit = audit_split(cells, split)
    log.info("%s", ", ".join(f"{name} {audit['cells'][name]}" for name in SPLITS))
    for limit in audit["limits"]:
        log.info("%s", limit)
    CELLS.write(cells[list(CELLS.columns)], path)
    write_json(audit, audit_file)


def assign_cells(cells: pd.DataFrame, shares: dict[str, float], rng: np.random.Generator) -> np.ndarray:
    """Return the split of each cell: at random within each cell type, at least one cell of it in training.

    Cells with identical counts stay together, under the cell type of the first of them.

    Parameters
    ----------
    cells
        ``cell_type_id`` and ``counts_hash`` of each cell.
    shares
        Share of the cells that each split should have.
    rng
        Source of chance.

    Raises
    ------
    InputError
        If a cell type has a single cell.
    """
    sizes = cells["cell_type_id"].value_counts()
    single = sorted(sizes.index[sizes == 1])
    if single:
        names = cells.set_index("cell_type_id")["cell_type"]
        told = ", ".join(f"{names[term]} ({term}): 1 cell" for term in single)
        raise InputError(
            "corpus: cell_type_id",
            f"too few cells to have some to learn from and some to judge by: {told}",
            "Drop the label, or merge it with another in the label table",
        )
    bounds = np.cumsum([shares[name] for name in SPLITS[:-1]])
    units = cells.groupby("counts_hash", sort=True)["cell_type_id"].agg(["first", "size"])
    units["order"] = rng.permutation(len(units))
    units = units.sort_values(["first", "order"])
    total = units.groupby("first")["size"].transform("sum")
    before = units.groupby("first")["size"].cumsum() - units["size"]
    # One random offset a cell type: each split gets its share on average however few the cells are.
    offset = units["first"].map({term: rng.random() for term in sorted(set(units["first"]))})
    units["split"] = np.searchsorted(bounds, (before + offset) / total, side="right")
    trained = set(cells["cell_type_id"][cells["counts_hash"].map(units["split"]) == 0])
    uncovered = cells[~cells["cell_type_id"].isin(trained)].drop_duplicates("cell_type_id")
    units.loc[uncovered["counts_hash"], "split"] = 0
    return np.array(SPLITS, dtype=object)[cells["counts_hash"].map(units["split"])]


def assign_groups(
    cells: pd.DataFrame, column: str, shares: dict[str, float], rng: np.random.Generator, cover: bool
) -> np.ndarray:
    """Return the split of each cell, whole donors (or studies) at a time.

    Groups are taken in random order, each to the split that lacks most cells. Before, where ``cover`` is
    set, each cell type, the rarest among donors first, pulls its smallest donor into training unless it
    is there.

    Parameters
    ----------
    cells
        ``cell_type_id`` and the group of each cell.
    column
        The column that holds the group.
    shares
        Share of the cells that each split should have.
    rng
        Source of chance.
    cover
        Whether each cell type must be in training.

    Raises
    ------
    InputError
        If there are too few groups for three splits.
    """
    what = {"donor": "donor", "dataset_id": "study"}[column]
    sizes = cells[column].value_counts().sort_index()
    sizes = sizes.iloc[rng.permutation(len(sizes))]
    if len(sizes) < len(SPLITS):
        raise InputError(
            "config: split",
            f"{len(sizes)} {what} in the corpus ({', '.join(sorted(sizes.index))}), three needed",
            "Set `split: cells`, or add studies",
        )
    chosen = dict.fromkeys(_cover_cell_types(cells, column, sizes), "train") if cover else {}
    filled = dict.fromkeys(SPLITS, 0) | {"train": int(sum(sizes[group] for group in chosen))}
    waiting = [group for group in sizes.index if group not in chosen]
    # Where training already has more than its share, the others share what is left.
    lacking = {name: max(shares[name] * len(cells) - filled[name], 0) for name in SPLITS}
    scale = sizes[waiting].sum() / sum(lacking.values())
    lacking = {name: scale * cells_lacking for name, cells_lacking in lacking.items()}
    for left, group in zip(range(len(waiting), 0, -1), waiting, strict=True):
        empty = [name for name in SPLITS if not filled[name]]
        chosen[group] = max(empty if len(empty) >= left else SPLITS, key=lacking.get)
        filled[chosen[group]] += int(sizes[group])
        lacking[chosen[group]] -= sizes[group]
    if cover and not all(filled.values()):
        raise InputError(
            "config: split",
            f"{len(sizes) - len(waiting)} of {len(sizes)} donors must be in training, each for a cell type "
            "that no other has, so too few are left for validation and test",
            "Set `split: cells`, add donors, or merge rare labels",
        )
    return cells[column].map(chosen).to_numpy(dtype=object)


def _cover_cell_types(cells: pd.DataFrame, column: str, sizes: pd.Series) -> list[str]:
    """Return groups that hold every cell type between them: for the rarest first, the smallest holder."""
    pairs = cells[["cell_type_id", column]].drop_duplicates()
    holders = pairs["cell_type_id"].value_counts().sort_index().sort_values(kind="stable")
    smallest_first = sizes.sort_values(kind="stable").index
    chosen: list[str] = []
    for term in holders.index:
        holding = set(pairs[column][pairs["cell_type_id"] == term])
        if holding.isdisjoint(chosen):
            chosen.append(next(group for group in smallest_first if group in holding))
    return chosen


def audit_split(cells: pd.DataFrame, split: str) -> dict[str, Any]:
    """Return what a split guarantees and what it does not, each claim counted from the table.

    Parameters
    ----------
    cells
        The corpus with its splits.
    split
        How it was split.
    """
    groups = cells.groupby("split")
    trained = set(cells["cell_type_id"][cells["split"] == "train"])
    unseen = sorted(set(cells["cell_type"][(cells["split"] != "train") & ~cells["cell_type_id"].isin(trained)]))
    guarantees = [
        _claim_apart(cells, "donor", "No donor is in two splits"),
        _claim_apart(cells, "dataset_id", "No study is in two splits"),
        _claim_apart(cells, "counts_hash", "No two cells with identical counts are in two splits"),
        {
            "claim": "Every cell type of validation and test is in training",
            "holds": not unseen,
            "detail": f"never seen in training: {', '.join(unseen)}" if unseen else f"{len(trained)} cell types",
        },
    ]
    return {
        "split": split,
        "cells": _of_splits(groups.size()),
        "donors": _of_splits(groups["donor"].nunique()),
        "studies": _of_splits(groups["dataset_id"].nunique()),
        "classes": _of_splits(groups["cell_type_id"].nunique()),
        "guarantees": guarantees,
        "limits": list(_tell_limits(cells, unseen)),
    }


def _of_splits(numbers: pd.Series) -> dict[str, int]:
    return {name: int(numbers.get(name, 0)) for name in SPLITS}


def _claim_apart(cells: pd.DataFrame, column: str, claim: str) -> dict[str, Any]:
    splits = cells.groupby(column)["split"].nunique()
    shared = sorted(splits.index[splits > 1])
    some = "" if column == "counts_hash" else f": {', '.join(shared[:5])}{', ...' if len(shared) > 5 else ''}"
    return {
        "claim": claim,
        "holds": not shared,
        "detail": f"{len(shared)} of {len(splits)} are in more than one{some if shared else ''}",
    }


def _tell_limits(cells: pd.DataFrame, unseen: list[str]) -> Iterable[str]:
    """Yield, in plain words, what scores on this split cannot say."""
    donors, studies = cells["donor"].nunique(), cells["dataset_id"].nunique()
    per_donor = cells.groupby("donor")["split"].nunique()
    per_study = cells.groupby("dataset_id")["split"].nunique()
    if donors == 1:
        yield (
            "One donor: the scores say how well cells of this donor are told apart, not how well a new "
            "donor's would be."
        )
    elif (per_donor > 1).any():
        yield (
            f"{(per_donor > 1).sum()} of {donors} donors have cells in more than one split: the scores say "
            "little of a new donor."
        )
    if studies == 1:
        yield "One study: nothing is said of another laboratory, assay or tissue."
    elif (per_study > 1).any():
        yield (
            f"{(per_study > 1).sum()} of {studies} studies have cells in more than one split: a study's own "
            "traits may help the scores."
        )
    tested = set(cells["dataset_id"][cells["split"] == "test"])
    untested = sorted(set(cells["dataset_id"]) - tested)
    if untested:
        yield f"No test cell comes from {', '.join(untested)}."
    if unseen:
        yield f"Cell types without a training cell cannot be named rightly: {', '.join(unseen)}."
    for slot in TERM_SLOTS:
        told = slot.replace("_", " ")
        known = set(cells[f"{slot}_id"].dropna())
        if not known:
            yield f"The {told} is not known for any cell, so it is not judged."
        elif len(known) == 1:
            yield f"No cell is known to have another {told} than the rest, so its score says nothing."
        elif cells.groupby("dataset_id")[f"{slot}_id"].nunique().max() == 1:
            yield f"Each study has one {told}, so naming it may be no more than knowing the study."
    sizes = cells[cells["split"] == "test"]["cell_type"].value_counts()
    few = sorted(sizes.index[sizes < 5])
    if few:
        yield f"Fewer than five test cells: {', '.join(few)}."
