"""Metadata of each cell (donor, assay and labels), in the columns of the CELLxGENE schema."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from cell2text.contracts import TERM_SLOTS
from cell2text.errors import InputError
from cell2text.ontology import UNKNOWN, live_id, name_of
from cell2text.tables import read_names, read_table

log = logging.getLogger("cell2text.counts")

# Column of each slot in the CELLxGENE schema; only one differs from the slot's name.
CELLXGENE = {slot: slot for slot in TERM_SLOTS} | {"stage": "development_stage"}
TERM_COLUMNS = [f"{column}_ontology_term_id" for column in CELLXGENE.values()]
OBS_COLUMNS = ["donor_id", "assay_ontology_term_id", "is_primary_data", *TERM_COLUMNS]


def label_cells(obs: pd.DataFrame, row: dict[str, str], columns: list[str], species: str = "human") -> pd.DataFrame:
    """Return the metadata of each cell in the columns of the CELLxGENE schema, each a categorical.

    Values that the file lacks are filled from the constants of the row; what remains unknown is ``"unknown"``.
    Names are always looked up from the ids.

    Parameters
    ----------
    obs
        The columns of the file's ``obs`` that are in ``OBS_COLUMNS``, and its label column.
    row
        The study's row of the datasets sheet.
    columns
        Names of all columns of the file's ``obs``, for messages.
    species
        ``"human"`` or ``"mouse"``, which decides the ontology of the stages.

    Raises
    ------
    InputError
        If cells, labels or ontology ids are invalid.
    """
    dataset, where = row["dataset"], row["source"]
    if "label_table" in row and "label_column" not in row:
        raise InputError(
            f"datasets sheet: label_table of {dataset}",
            "no label_column in the same row",
            "Name the column of obs that holds the authors' labels",
        )
    if not len(obs):
        raise InputError(f"{where}: obs", "no cells", "Give a study with cells")
    if obs.index.has_duplicates:
        duplicate = obs.index[obs.index.duplicated()][0]
        raise InputError(f"{where}: obs", f"cell {duplicate} occurs twice", "Give each cell a unique name")
    if "cell_table" in row:
        obs = join_cell_table(obs, row)
        columns = [*dict.fromkeys([*columns, *read_names(row["cell_table"], set(OBS_COLUMNS))])]
    known = pd.DataFrame({"dataset_id": pd.Categorical([dataset]).repeat(len(obs))})
    known.index = pd.Index(f"{dataset}|" + obs.index.astype(str), name="cell_id")
    known["donor_id"] = _fill(obs, "donor_id", row.get("donor"))
    if "unknown" in known["donor_id"].cat.categories:
        log.info("%s: no donor given for some cells; the dataset is used as their donor", dataset)
        known["donor_id"] = _fill(obs, "donor_id", row.get("donor", dataset))
    known["assay_ontology_term_id"] = _fill(obs, "assay_ontology_term_id", row.get("assay"))
    for slot, column in CELLXGENE.items():
        if slot == "cell_type" and "label_column" in row:
            ids, place = read_labels(obs, row, columns), f"{where}: {row['label_column']}"
            place += "" if "label_table" in row else " (no label_table given)"
        else:
            ids, place = _fill(obs, f"{column}_ontology_term_id", row.get(slot)), f"{where}: {column}_ontology_term_id"
        ids = _rename(ids, {term: live_id(slot, term, place, species) for term in ids.categories})
        known[f"{column}_ontology_term_id"] = ids
        known[column] = _rename(ids, {term: name_of(slot, term, species=species) for term in ids.categories})
    if "is_primary_data" in obs and (secondary := (obs["is_primary_data"].astype(str) == "False").sum()):
        log.info("%s: %d of %d cells are not primary data: another study has them too", dataset, secondary, len(obs))
    return known


def _fill(obs: pd.DataFrame, column: str, constant: str | None) -> pd.Categorical:
    """Return a column as text; unknown values become the constant, or ``"unknown"`` if there is none."""
    default = constant or "unknown"
    if column not in obs:
        return pd.Categorical([default]).repeat(len(obs))
    values = pd.Categorical(obs[column])
    names = [_text(name) for name in values.categories]
    names = [default if name.lower() in UNKNOWN else name for name in names]
    return _regroup(values.codes, [*names, default])  # a missing value has code -1, the last entry


def _text(value: object) -> str:
    # cluster numbers become floats if one is missing
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _rename(values: pd.Categorical, names: dict[str, str]) -> pd.Categorical:
    """Rename categories; several may get the same new name."""
    return _regroup(values.codes, [names[name] for name in values.categories])


def _regroup(codes: np.ndarray, names: list[str]) -> pd.Categorical:
    """Return ``names[code]`` as a categorical whose categories are the names that occur, in alphabetical order."""
    used = sorted({names[code] for code in np.unique(codes)})
    positions = np.array([used.index(name) if name in used else -1 for name in names])
    return pd.Categorical.from_codes(positions[codes], used)


def join_cell_table(obs: pd.DataFrame, row: dict[str, str]) -> pd.DataFrame:
    """Return ``obs`` with the columns of the row's cell table, which replace columns of the same name.

    Raises
    ------
    InputError
        If the table is malformed, shares no cell with the file or has no column that is used.
    """
    path = row["cell_table"]
    used = {*OBS_COLUMNS, *([row["label_column"]] if "label_column" in row else [])}
    table = read_table(path, used, only=used, row_names="always")
    cells = table.iloc[:, 0]
    table = table.set_index(table.columns[0])
    if not obs.index.isin(table.index).any():
        raise InputError(
            path,
            f"none of its cells ({', '.join(table.index[:2])}) is in the file ({', '.join(obs.index[:2])})",
            "Put the barcodes of the file in the first column",
        )
    _check_unique(path, cells, "cell")
    if not len(table.columns):
        raise InputError(
            path,
            f"none of its columns ({', '.join(read_names(path, used))}) is used",
            "Name a column like those of CELLxGENE (cell_type_ontology_term_id, donor_id), or as in label_column",
        )
    return obs.drop(columns=table.columns, errors="ignore").join(table)


def _check_unique(path: str | Path, values: pd.Series, what: str) -> None:
    twice = values.index[values.duplicated(keep=False)]
    if len(twice):
        value = values[twice[0]]
        lines = " and ".join(map(str, values.index[values == value][:2]))
        raise InputError(path, f"{what} {value} occurs twice (lines {lines})", f"Keep one line per {what}")


def read_labels(obs: pd.DataFrame, row: dict[str, str], columns: list[str]) -> pd.Categorical:
    """Map the authors' labels to Cell Ontology ids; ``"unknown"`` for a cell without a label.

    Parameters
    ----------
    obs, row, columns
        As in ``label_cells``.

    Raises
    ------
    InputError
        If the column is missing, the table is malformed, or labels are missing from it.
    """
    column = row["label_column"]
    if column not in obs:
        raise InputError(
            f"{row['source']}: obs", f"no column {column}", f"Set label_column to one of {', '.join(columns)}"
        )
    labels = _fill(obs, column, None)
    if "label_table" not in row:
        return labels
    table = read_label_table(row["label_table"])
    absent = sorted(set(labels.categories) - set(table) - {"unknown"})
    if absent:
        raise InputError(
            row["label_table"],
            f"no line for the labels {', '.join(absent)} of {row['dataset']}",
            "Add a line with a Cell Ontology id for each label",
        )
    return _rename(labels, {**table, "unknown": "unknown"})


def read_label_table(path: str | Path) -> dict[str, str]:
    """Return author label -> Cell Ontology id.

    Raises
    ------
    InputError
        If a column is missing, a label is repeated or an id is not a term.
    """
    columns = ["author_label", "cell_type_ontology_term_id"]
    table = read_table(path, set(columns))
    if not set(columns) <= set(table):
        raise InputError(
            path, f"required columns missing (found: {', '.join(table)})", f"Give the columns {' and '.join(columns)}"
        )
    _check_unique(path, table["author_label"], "label")
    for line, term in table["cell_type_ontology_term_id"].items():
        live_id("cell_type", term, f"{path} line {line}: cell_type_ontology_term_id")
    return {label: term or "unknown" for label, term in table[columns].itertuples(index=False)}
