"""Filter cells by QC metrics, and record why cells are excluded.

Counts are read block by block and never held in memory as a whole: one pass computes the metrics, one sorts the good
cells into files for doublet scoring, one writes the cells that are kept.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from cell2text.cells.doublets import score_doublets
from cell2text.cells.h5ad import id_parts, kept_ids, open_cells, read_blocks, read_obs, write_cells
from cell2text.cells.qc import (
    UNLABELLED,
    is_mitochondrial,
    is_ribosomal,
    judge_cells,
    limit_samples,
    measure_cells,
    scale_limits,
)
from cell2text.cells.qc_plot import draw_qc
from cell2text.contracts import QC
from cell2text.errors import InputError
from cell2text.files import write_json
from cell2text.settings import QcSettings

log = logging.getLogger("cell2text.qc")

COLUMNS = ("dataset_id", "donor_id")


def filter_cells(
    cells_file: str | Path,
    kept_file: str | Path,
    table_file: str | Path,
    summary_file: str | Path,
    plot_file: str | Path,
    limits: QcSettings,
    own_limits: Mapping[str, float] | None = None,
    seed: int = 0,
) -> None:
    """Exclude low-quality and unlabelled cells; write the others, the metrics of every cell, a summary and a plot.

    Parameters
    ----------
    cells_file
        Raw counts, as ``fetch_dataset`` writes them. If its studies measure different genes, ``uns["measured"]`` has
        for each which genes these are (bool), and the limits are scaled for each.
    kept_file, table_file, summary_file, plot_file
        The four files to write: h5ad, Parquet (``contracts.QC``), JSON and SVG.
    limits
        QC limits of a whole transcriptome, and how doublets are scored.
    own_limits
        Limits from this dataset's row of the sheet, used without scaling by ``scale_limits``.
    seed
        Seed of the doublet scores.

    Raises
    ------
    InputError
        If no cell is kept.
    """
    kept = _judge_file(Path(cells_file), table_file, summary_file, plot_file, limits, own_limits or {}, seed)
    with open_cells(cells_file) as file:
        var, uns = (ad.io.read_elem(file[part]) for part in ("var", "uns"))
    obs = _drop_unused_categories(read_obs(cells_file)[kept])
    write_cells(
        kept_file, (block for _, block in read_blocks(cells_file, kept)), kept_ids(cells_file, kept), obs, var, uns
    )


def _judge_file(
    cells_file: Path,
    table_file: str | Path,
    summary_file: str | Path,
    plot_file: str | Path,
    limits: QcSettings,
    own_limits: Mapping[str, float],
    seed: int,
) -> np.ndarray:
    """Write the table of metrics, the summary and the plot; return which cells are kept."""
    found = measure_file(cells_file, limits, own_limits, seed, Path(f"{table_file}.scratch"))
    studies = found.study.remove_unused_categories().categories
    name = str(studies[0]) if len(studies) == 1 else Path(table_file).stem
    label = read_obs(cells_file, ["cell_type_ontology_term_id"])["cell_type_ontology_term_id"]
    failed, reasons = judge_cells(found.metrics, found.samples, found.bounds, np.asarray(label != "unknown"))
    kept = failed == ""
    summary = {
        "dataset_id": name,
        "cells": len(kept),
        "kept": int(kept.sum()),
        "dropped": _count_dropped(failed, name),
        "limits": found.limits,
        "mads": limits.mads,
        "samples": list(_summarise_samples(found.samples, kept, found.bounds)),
        "genes": len(found.symbols),
        "genes_detected": found.detected,
        "genes_mitochondrial": int(is_mitochondrial(found.symbols).sum()),
        "genes_ribosomal": int(is_ribosomal(found.symbols).sum()),
        "source": found.source,
    } | ({"orthologues": json.loads(found.orthologues)} if found.orthologues else {})
    QC.write_parts(_add_ids(cells_file, found.table(kept, reasons)), table_file)
    draw_qc(found.metrics, kept, found.bounds, name, plot_file)
    write_json(summary, summary_file)
    return kept


def flag_cells(cells_file: str | Path, table_file: str | Path, limits: QcSettings, seed: int = 0) -> None:
    """Write the metrics of every cell (``contracts.QC``) and why QC would exclude it; labels are not needed.

    Parameters
    ----------
    cells_file, table_file
        Raw counts, as ``fetch_dataset`` writes them, and the Parquet file to write.
    limits, seed
        See :func:`filter_cells`.
    """
    found = measure_file(Path(cells_file), limits, {}, seed, Path(f"{table_file}.scratch"))
    failed, reasons = judge_cells(found.metrics, found.samples, found.bounds)
    log.info("%d of %d cells are flagged", (failed != "").sum(), len(failed))
    QC.write_parts(_add_ids(cells_file, found.table(failed == "", reasons)), table_file)


@dataclass(frozen=True)
class Measured:
    """The cells of a file with their QC metrics and limits.

    Parameters
    ----------
    study, samples
        Study and sample of each cell.
    metrics
        From ``measure_cells``.
    bounds
        From ``limit_samples``.
    limits
        The fixed limits of the file.
    symbols
        Symbols of its genes.
    detected
        Number of genes with counts.
    source
        Where the counts came from.
    orthologues
        What became of the genes of a study of mice, as JSON; else empty.
    """

    study: pd.Categorical
    samples: pd.Categorical
    metrics: pd.DataFrame
    bounds: pd.DataFrame
    limits: dict[str, float]
    symbols: pd.Series
    detected: int
    source: str
    orthologues: str

    def table(self, kept: np.ndarray, reasons: pd.Categorical) -> dict[str, Any]:
        """Return the columns of ``contracts.QC`` besides the ids."""
        return {"dataset_id": self.study, "donor": self.samples, **self.metrics, "kept": kept, "reason": reasons}


def measure_file(
    cells_file: Path, limits: QcSettings, own_limits: Mapping[str, float], seed: int, scratch: Path
) -> Measured:
    """Compute metrics and limits of the cells of a file; see :func:`filter_cells`."""
    with open_cells(cells_file) as file:
        symbols = ad.io.read_elem(file["var"])["symbol"]
        uns = ad.io.read_elem(file["uns"])
    obs = read_obs(cells_file, COLUMNS)
    study, donor = (pd.Categorical(obs[column]) for column in COLUMNS)
    samples = name_samples(study, donor)
    blocks = (counts for _, counts in read_blocks(cells_file, np.ones(len(samples), dtype=bool)))
    metrics, detected = measure_cells(blocks, len(samples), symbols)
    scaled = {name: scale_limits(limits, symbols[genes]) for name, genes in uns.get("measured", {}).items()}
    fixed = scale_limits(limits, symbols) | dict(own_limits)
    each = [scaled.get(name, fixed) | dict(own_limits) for name in _studies_of(samples, study)]
    bounds = limit_samples(metrics, samples, pd.DataFrame(each, index=samples.categories), limits.mads)
    if limits.score_doublets:
        good = judge_cells(metrics, samples, bounds)[0] == ""
        metrics["doublet_score"] = score_doublets(cells_file, good, samples, len(symbols), seed, scratch)
    source, orthologues = (str(uns.get(key, "")) for key in ("source", "orthologues"))
    return Measured(study, samples, metrics, bounds, fixed, symbols, detected, source, orthologues)


def _count_dropped(failed: pd.Categorical, name: str) -> dict[str, int]:
    dropped = {reason: int(number) for reason, number in failed.value_counts().items() if reason and number}
    listed = ", ".join(f"{reason}: {number}" for reason, number in dropped.items()) or "none"
    kept = len(failed) - sum(dropped.values())
    if not kept:
        fix = "Relax the limits under `qc` in the config or in the dataset's row of the sheet"
        if max(dropped, key=dropped.get, default="") == UNLABELLED:
            fix = "Provide labels through label_column and label_table in the datasets sheet"
        raise InputError(f"{name}: qc", f"all {len(failed)} cells are excluded ({listed})", fix)
    log.info("%s: %d of %d cells kept; excluded: %s", name, kept, len(failed), listed)
    return dropped


def _add_ids(cells_file: str | Path, table: dict[str, Any]) -> Iterator[pd.DataFrame]:
    start = 0
    for ids in id_parts(cells_file):
        rows = slice(start, start + len(ids))
        yield pd.DataFrame({"cell_id": ids} | {name: column[rows] for name, column in table.items()})
        start += len(ids)


def _drop_unused_categories(obs: pd.DataFrame) -> pd.DataFrame:
    return obs.assign(**{name: obs[name].cat.remove_unused_categories() for name in obs.select_dtypes("category")})


def _summarise_samples(samples: pd.Categorical, kept: np.ndarray, bounds: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield the name, the numbers of cells and the limits of each sample."""
    cells = np.bincount(samples.codes, minlength=len(bounds))
    cells_kept = np.bincount(samples.codes[kept], minlength=len(bounds))
    for name, row, n, n_kept in zip(bounds.index, bounds.to_dict("records"), cells, cells_kept, strict=True):
        limits = {limit: value for limit, value in row.items() if not math.isnan(value)}
        yield {"donor": name, "cells": int(n), "kept": int(n_kept), **limits}


def _studies_of(samples: pd.Categorical, study: pd.Categorical) -> np.ndarray:
    """Return the study of each sample."""
    return np.asarray(study)[np.unique(samples.codes, return_index=True)[1]]


def name_samples(study: pd.Categorical, donor: pd.Categorical) -> pd.Categorical:
    """Return the sample of each cell: the cells of one donor in one study, ``{dataset}|{donor}``."""
    codes = study.codes.astype(np.int64) * len(donor.categories) + donor.codes
    pairs, codes = np.unique(codes, return_inverse=True)
    pairs = [divmod(pair, len(donor.categories)) for pair in pairs]
    return pd.Categorical.from_codes(codes, [f"{study.categories[i]}|{donor.categories[j]}" for i, j in pairs])
