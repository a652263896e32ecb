"""Raw counts of a study in one form: whole numbers, CELLxGENE's columns, one id a cell.

A study comes as h5ad, or is the one that scanpy carries. Its counts are found in ``raw.X``,
``layers["counts"]`` or ``X`` by looking at every stored value, and never taken on trust.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse

from cell2text.cell_files import CELLS_AT_ONCE
from cell2text.contracts import TERM_SLOTS, whole_file
from cell2text.errors import InputError
from cell2text.genes import name_genes
from cell2text.ontology import UNKNOWN, name_of

log = logging.getLogger("cell2text.counts")

BUNDLED = "scanpy://pbmc68k_reduced"
# Column of a slot in CELLxGENE's schema, where it has another name than the slot.
CELLXGENE = {slot: slot for slot in TERM_SLOTS} | {"stage": "development_stage"}
TOTALS = ("n_counts", "total_counts")
# Logs rounded to three decimals give the counts of pbmc68k_reduced back within 0.09 of a whole number.
TOLERANCE = 0.1
VALUES_AT_ONCE = 10_000_000


def fetch_dataset(row: dict[str, str], path: str | Path) -> None:
    """Bring a study into one form and write it as h5ad.

    Parameters
    ----------
    row
        The study's row of the sheet of datasets, empty cells left out.
    path
        Where to write. ``X`` holds counts (CSR, float32), ``obs`` is indexed by ``{dataset}|{barcode}``
        and holds the columns of CELLxGENE's schema, ``var`` is indexed by gene id and holds ``symbol``.

    Raises
    ------
    InputError
        If the file, its counts, its labels or its ontology ids are not what they should be.
    """
    study = read_study(row["source"])
    where = row["source"]
    place, counts = find_counts(study, where)
    genes = name_genes(study.raw.var if place == "raw.X" else study.var, where)
    obs = describe_cells(study.obs, row)
    if study.isbacked:
        study.file.close()
    log.info("%s: %d cells, %d genes, counts from %s", row["dataset"], *counts.shape, place)
    with whole_file(path) as unfinished:
        cells = ad.AnnData(counts, obs=obs, var=genes, uns={"source": f"{where} ({place})"})
        cells.write_h5ad(unfinished, compression="gzip")


def read_study(source: str) -> ad.AnnData:
    """Open a study; ``X`` and ``raw.X`` of a file stay on disk.

    Raises
    ------
    InputError
        If there is no such study, or the file is no whole h5ad.
    """
    if source == BUNDLED:
        return sc.datasets.pbmc68k_reduced()
    if "://" in source:
        raise InputError(
            f"datasets sheet: source: {source}", "unknown kind of source", f"Give an h5ad file or {BUNDLED}"
        )
    if not Path(source).is_file():
        raise InputError(source, "no such file", "Correct the column `source` of the datasets sheet")
    try:
        return ad.read_h5ad(source, backed="r")
    except Exception as error:  # a damaged file may fail anywhere in h5py or anndata
        raise InputError(
            source, f"not a whole h5ad file ({type(error).__name__})", "Fetch or write the file again"
        ) from error


def find_counts(study: ad.AnnData, where: str) -> tuple[str, sparse.csr_matrix]:
    """Return where a study keeps its raw counts, and the counts.

    The first of ``raw.X``, ``layers["counts"]`` and ``X`` whose stored values are all whole numbers wins.
    Where there is none, counts are recovered from ``log1p`` of counts per 10,000, if ``obs`` holds the
    cells' totals.

    Parameters
    ----------
    study
        As ``read_study`` gives it.
    where
        The file, for messages.

    Returns
    -------
    tuple of str and csr_matrix
        The place, and float32 counts, cells by genes.

    Raises
    ------
    InputError
        If there are no raw counts; the message says what stands in each place.
    """
    faults = {}
    for place, load in _places(study).items():
        matrix = _as_csr(load())
        fault = _find_fault(matrix.data)
        if fault is None:
            matrix.eliminate_zeros()
            return place, matrix
        position, problem = fault
        faults[place] = f"{problem}{_name_value(study, matrix, place, position)}"
        del matrix  # before the next one is loaded
    logs = next((place for place, fault in faults.items() if fault.startswith("not a whole")), None)
    totals = next((column for column in TOTALS if column in study.obs), None)
    if logs and totals:
        return logs, _recover_counts(study, logs, totals, where)
    told = "; ".join(f"{place}: {fault}" for place, fault in faults.items())
    raise InputError(
        where,
        f"no raw counts found ({told}) and no totals of the cells in obs ({', '.join(TOTALS)})"
        if logs
        else f"no raw counts found ({told or 'no matrix in the file'})",
        'Put raw counts, whole numbers, in X, raw.X or layers["counts"]',
    )


def _places(study: ad.AnnData) -> dict[str, Callable[[], Any]]:
    """Return how to reach the matrix of each place that may hold counts."""
    places: dict[str, Callable[[], Any]] = {}
    if study.raw is not None and study.raw.n_vars:
        places["raw.X"] = lambda: study.raw.X
    if "counts" in study.layers:
        places['layers["counts"]'] = lambda: study.layers["counts"]
    if "X" in study.file if study.isbacked else study.X is not None:
        places["X"] = lambda: study.X
    return places


def _as_csr(stored: Any) -> sparse.csr_matrix:
    """Return a matrix in memory or on disk, sparse or dense, as float32 CSR."""
    if isinstance(stored, np.ndarray | h5py.Dataset):
        starts = range(0, stored.shape[0], CELLS_AT_ONCE)
        blocks = [sparse.csr_matrix(stored[start : start + CELLS_AT_ONCE], dtype=np.float32) for start in starts]
        return sparse.vstack(blocks, format="csr")
    loaded = stored.to_memory() if hasattr(stored, "to_memory") else stored
    return sparse.csr_matrix(loaded, dtype=np.float32)


def _find_fault(values: np.ndarray) -> tuple[int, str] | None:
    """Return position and kind of the first value that is no count, or None."""
    for start in range(0, len(values), VALUES_AT_ONCE):
        some = values[start : start + VALUES_AT_ONCE]
        wrong = ~((some >= 0) & (some == np.rint(some)) & np.isfinite(some))
        if wrong.any():
            break
    else:
        return None
    # Logs hold fractions nearly everywhere; a value that no log could be tells more.
    impossible = ~(np.isfinite(values) & (values >= 0))
    position = int(np.argmax(impossible)) if impossible.any() else start + int(np.argmax(wrong))
    value = values[position]
    if np.isfinite(value):
        return position, f"negative value {value:g}" if value < 0 else f"not a whole number: {value:g}"
    return position, "missing value (NaN)" if np.isnan(value) else "infinite value"


def _name_value(study: ad.AnnData, matrix: sparse.csr_matrix, place: str, position: int) -> str:
    genes = study.raw.var_names if place == "raw.X" else study.var_names
    cell = study.obs_names[np.searchsorted(matrix.indptr, position, side="right") - 1]
    return f" in cell {cell}, gene {genes[matrix.indices[position]]}"


def _recover_counts(study: ad.AnnData, place: str, totals: str, where: str) -> sparse.csr_matrix:
    """Return counts from ``log1p`` of counts per 10,000: round(expm1(x) * total / 10,000).

    Raises
    ------
    InputError
        If a value is farther than ``TOLERANCE`` from a whole number, or from any count above nought.
    """
    matrix = _as_csr(_places(study)[place]())
    matrix.eliminate_zeros()
    total = study.obs[totals].to_numpy(dtype=float)
    for start in range(0, matrix.shape[0], CELLS_AT_ONCE):
        first, last = matrix.indptr[start], matrix.indptr[min(start + CELLS_AT_ONCE, matrix.shape[0])]
        per_value = np.repeat(
            total[start : start + CELLS_AT_ONCE], np.diff(matrix.indptr[start : start + CELLS_AT_ONCE + 1])
        )
        counts = np.expm1(matrix.data[first:last].astype(float)) * per_value / 1e4
        whole = np.rint(counts)
        wrong = ~((np.abs(counts - whole) <= TOLERANCE) & (whole >= 1))
        if wrong.any():
            position = int(np.argmax(wrong))
            raise InputError(
                f"{where}: {place}",
                f"no raw counts: read as log1p of counts per 10,000 with the totals in obs[{totals!r}], "
                f"it holds {counts[position]:.3f}{_name_value(study, matrix, place, first + position)}",
                'Put raw counts, whole numbers, in X, raw.X or layers["counts"]',
            )
        matrix.data[first:last] = whole
    log.info("%s: counts recovered from %s (log1p of counts per 10,000) and obs[%r]", where, place, totals)
    return matrix


def describe_cells(obs: pd.DataFrame, row: dict[str, str]) -> pd.DataFrame:
    """Return what is known of each cell, in CELLxGENE's columns.

    What the file leaves unknown is filled from the row's constants; what stays unknown is ``"unknown"``.
    Ids are the truth: names are looked up from them.

    Parameters
    ----------
    obs
        The file's table of cells.
    row
        The study's row of the sheet of datasets.

    Raises
    ------
    InputError
        If cells, labels or ontology ids do not fit.
    """
    dataset, where = row["dataset"], row["source"]
    if "label_table" in row and "label_column" not in row:
        raise InputError(
            f"datasets sheet: label_table of {dataset}",
            "no label_column beside it",
            "Name the column of obs that holds the authors' labels",
        )
    cells = pd.Index([f"{dataset}|{barcode}" for barcode in obs.index], name="cell_id")
    if cells.has_duplicates:
        twice = obs.index[cells.duplicated()][0]
        raise InputError(f"{where}: obs", f"the cell {twice} is there twice", "Give each cell its own name")
    known = pd.DataFrame({"dataset_id": dataset}, index=cells)
    known["donor_id"] = _fill(obs, "donor_id", row.get("donor"))
    if (known["donor_id"] == "unknown").any():
        log.info("%s: no donor given for some cells; the dataset stands in as their donor", dataset)
        known["donor_id"] = known["donor_id"].replace("unknown", dataset)
    known["assay_ontology_term_id"] = _fill(obs, "assay_ontology_term_id", row.get("assay"))
    for slot in TERM_SLOTS:
        column = f"{CELLXGENE[slot]}_ontology_term_id"
        if slot == "cell_type" and "label_column" in row:
            ids, place = read_labels(obs, row), f"{where}: {row['label_column']}"
            place += "" if "label_table" in row else " (no label_table given)"
        else:
            ids, place = _fill(obs, column, row.get(slot)), f"{where}: {column}"
        names = {term: name_of(slot, term, place) or "unknown" for term in sorted(set(ids))}
        known[column] = ids
        known[CELLXGENE[slot]] = pd.Series(ids).map(names).to_numpy()
    return known.astype(dict.fromkeys(known.columns, "category"))


def _fill(obs: pd.DataFrame, column: str, constant: str | None) -> np.ndarray:
    """Return a column as text, unknown values replaced by a constant, or by ``"unknown"``."""
    values = obs[column].astype(object) if column in obs else pd.Series(None, index=obs.index, dtype=object)
    text = values.astype(str)
    unknown = values.isna() | text.str.lower().isin(UNKNOWN)
    return text.mask(unknown, constant or "unknown").to_numpy(dtype=object)


def read_labels(obs: pd.DataFrame, row: dict[str, str]) -> np.ndarray:
    """Return each cell's Cell Ontology id from the authors' labels; ``"unknown"`` for a cell without label.

    Raises
    ------
    InputError
        If the column is absent, the table is malformed, or labels are missing from it.
    """
    column = row["label_column"]
    if column not in obs:
        raise InputError(f"{row['source']}: obs", f"no column {column}", f"Set label_column to one of {', '.join(obs)}")
    labels = _fill(obs, column, None)
    if "label_table" not in row:
        return labels
    table = read_label_table(row["label_table"])
    absent = sorted(set(labels) - set(table) - {"unknown"})
    if absent:
        raise InputError(
            row["label_table"],
            f"no line for the labels {', '.join(absent)} of {row['dataset']}",
            "Add a line with the Cell Ontology id of each",
        )
    return pd.Series(labels).map({**table, "unknown": "unknown"}).to_numpy(dtype=object)


def read_label_table(path: str | Path) -> dict[str, str]:
    """Return author label -> Cell Ontology id.

    Raises
    ------
    InputError
        If a column is missing, a label repeats or an id is no live term.
    """
    columns = ["author_label", "cell_type_ontology_term_id"]
    if not Path(path).is_file():
        raise InputError(path, "no such file", "Correct the column `label_table` of the datasets sheet")
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    if not set(columns) <= set(table):
        raise InputError(path, f"columns {', '.join(table)}", f"Give the columns {' and '.join(columns)}")
    repeated = table["author_label"][table["author_label"].duplicated()]
    if len(repeated):
        raise InputError(path, f"the label {repeated.iloc[0]} is there twice", "Keep one line a label")
    for line, term in enumerate(table["cell_type_ontology_term_id"], start=2):
        name_of("cell_type", term, f"{path} line {line}: cell_type_ontology_term_id")
    return {label: term or "unknown" for label, term in table[columns].itertuples(index=False)}
