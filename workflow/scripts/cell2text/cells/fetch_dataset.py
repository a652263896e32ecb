"""Convert a study to the common format: raw counts, columns of the CELLxGENE schema, one id per cell."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from cell2text.cells.counts import TOTALS, NotCountsError, check_counts, recover_counts
from cell2text.cells.genes import GeneMap, map_genes, read_gene_table
from cell2text.cells.h5ad import write_cells
from cell2text.cells.labels import OBS_COLUMNS, label_cells
from cell2text.cells.orthologues import (
    MIN_SOURCES,
    Orthologues,
    describe_mapping,
    map_mouse_genes,
    read_orthologues,
)
from cell2text.cells.studies import SPECIES, Study, open_study
from cell2text.errors import InputError
from cell2text.progress import Progress

log = logging.getLogger("cell2text.counts")

# Where to look for counts, in this order, unless the sheet names a matrix.
PLACES = ("raw.X", 'layers["counts"]', 'layers["raw_counts"]', "X")
FIX = 'Put raw counts (whole numbers) in X, raw.X or layers["counts"], or name their matrix in the column `matrix`'


def fetch_dataset(
    row: dict[str, str],
    path: str | Path,
    gene_table: str | Path | None = None,
    min_counts_kept: float = 0.5,
    orthologues: str | Path | None = None,
    orthologue_sources: int = MIN_SOURCES,
) -> None:
    """Convert a study to the common format and write it as h5ad.

    Uses the first of ``PLACES`` whose stored values are all counts, or else the first whose values are provably
    log1p of counts. If the row names a ``matrix``, no other is checked.

    Parameters
    ----------
    row
        The study's row of the datasets sheet, without empty fields.
    path
        Where to write. ``X`` holds counts (CSR, float32); ``obs`` is indexed by ``{dataset}|{barcode}`` and holds the
        columns of the CELLxGENE schema; ``var`` is indexed by gene id and holds ``symbol``; ``uns`` holds the source
        of the counts and the share of them in the genes that are kept. Of a study of mice, ``uns["orthologues"]``
        says as JSON what became of its genes.
    gene_table
        Ensembl ids and symbols, see ``genes.read_gene_table``; None to keep symbols as they are.
    min_counts_kept
        Minimum share of the counts in the genes that are kept.
    orthologues, orthologue_sources
        Table of the human genes of mouse genes, and the minimum number of sources of a pair, see
        ``orthologues.read_orthologues``; only for mice.

    Raises
    ------
    InputError
        If the file, its species, counts, genes, labels or ontology ids are invalid.
    """
    wanted = [*OBS_COLUMNS, *TOTALS, *([row["label_column"]] if "label_column" in row else [])]
    with open_study(row["source"], wanted) as study:
        pairs = choose_orthologues(study, row, orthologues, orthologue_sources)
        obs = label_cells(study.obs, row, study.obs_columns, "mouse" if pairs else "human")
        write_counts(study, obs, row, path, gene_table, min_counts_kept, pairs)


def write_counts(
    study: Study,
    obs: pd.DataFrame,
    row: dict[str, str],
    path: str | Path,
    gene_table: str | Path | None,
    min_counts_kept: float,
    orthologues: Orthologues | None,
) -> None:
    """Find the counts of an open study and write them with the given metadata; see :func:`fetch_dataset`."""
    path, where = Path(path), row["source"]
    table = read_gene_table(gene_table) if gene_table else None
    errors: dict[str, NotCountsError] = {}
    for read in (check_counts, recover_counts):
        for place in choose_places(study, row.get("matrix")):
            if read is recover_counts and not errors[place].maybe_logs:
                continue
            var = study.matrices[place][1]
            genes = map_mouse_genes(var, where, orthologues, table) if orthologues else map_genes(var, where, table)
            uns = {"source": f"{where} ({place})"}
            blocks = read(study, place, path.with_name(f".{path.name}.entries"))
            try:
                counts = keep_genes(blocks, genes, len(obs), where, min_counts_kept, uns, orthologues)
                write_cells(path, counts, [obs.index], obs, genes.genes, uns)
            except NotCountsError as error:
                first = f"{errors[place]}; " if place in errors else ""
                errors[place] = NotCountsError(f"{first}{error}", error.maybe_logs)
                continue
            log.info("%s: %d cells, %d genes, counts from %s", row["dataset"], len(obs), len(genes.genes), place)
            return
    reasons = "; ".join(f"{place}: {error}" for place, error in errors.items()) or "no matrix in the usual places"
    others = ", ".join(sorted(set(study.matrices) - set(errors)))
    reasons += f"; not checked: {others}" if others else ""
    raise InputError(where, f"no raw counts found ({reasons})", FIX)


def find_species(study: Study, given: str | None) -> str:
    """Return the species of a study, ``"human"`` or ``"mouse"``.

    Parameters
    ----------
    study
        An open study, which may name its species.
    given
        The species according to its row of the sheet; None if empty.

    Raises
    ------
    InputError
        If the file names another species, several, or not the one of the row.
    """
    where = f"{study.where}: organism_ontology_term_id"
    known = ", ".join(f"{taxon} ({name})" for taxon, name in SPECIES.items())
    if len(study.species) > 1:
        raise InputError(where, f"several species: {', '.join(study.species)}", "Give a file for each species")
    for taxon in study.species:
        if taxon not in SPECIES:
            raise InputError(where, f"{taxon} is not one of {known}", "Give human cells, or those of mice")
        if given and SPECIES[taxon] != given:
            raise InputError(where, f"{taxon} is {SPECIES[taxon]}, but `species` is {given}", "Correct one of them")
    return given or next((SPECIES[taxon] for taxon in study.species), "human")


def choose_orthologues(
    study: Study, row: dict[str, str], orthologues: str | Path | Callable[[], str] | None, min_sources: int
) -> Orthologues | None:
    """Return the orthologues for a study of mice, None for one of humans.

    Parameters
    ----------
    study, row
        An open study, and its row of the datasets sheet.
    orthologues
        Path of the table, or a function that fetches it and returns its path, called only for mice; None without one.
    min_sources
        See ``orthologues.read_orthologues``.

    Raises
    ------
    InputError
        As in :func:`find_species`, or if a study of mice comes without a table of orthologues.
    """
    if find_species(study, row.get("species")) == "human":
        return None
    if orthologues is None:
        raise InputError(
            f"{study.where}: organism_ontology_term_id",
            "these are cells of mice, and no table of orthologues was fetched",
            "Set `species` to mouse, in the row of the datasets sheet or for `annotate` in the config",
        )
    return read_orthologues(orthologues() if callable(orthologues) else orthologues, min_sources)


def choose_places(study: Study, named: str | None) -> list[str]:
    """Return the matrices of a study that may hold its counts.

    Parameters
    ----------
    study
        An open study.
    named
        Value of the sheet's column ``matrix``: ``X``, ``raw.X`` or the name of a layer; None if empty.

    Raises
    ------
    InputError
        If the study has no such matrix.
    """
    if named is None:
        return [place for place in PLACES if place in study.matrices]
    found = [place for place in (named, f'layers["{named}"]') if place in study.matrices]
    if not found:
        raise InputError(
            f"{study.where}: {named}",
            "no such matrix in the file",
            f"Set the column `matrix` to one of {', '.join(study.matrices) or 'none: the file has no matrix'}",
        )
    return found[:1]


def keep_genes(
    blocks: Iterator[sparse.csr_matrix],
    genes: GeneMap,
    cells: int,
    where: str,
    min_counts_kept: float,
    uns: dict[str, Any],
    orthologues: Orthologues | None = None,
) -> Iterator[sparse.csr_matrix]:
    """Yield counts over the genes that are kept; at the end record the share of all counts in them.

    Parameters
    ----------
    blocks
        Counts over all rows of the file's gene table.
    genes
        Mapping of those rows to genes.
    cells
        Total number of cells.
    where
        The file, for messages.
    min_counts_kept
        Minimum share of the counts that must be kept.
    uns
        The share is added to it as ``counts_kept``.
    orthologues
        Those by which genes of mice were mapped; what became of the counts is added to ``uns`` as ``orthologues``.

    Raises
    ------
    NotCountsError
        If there is no value above zero.
    InputError
        If the share is below the minimum.
    """
    progress, measured, kept, totals = Progress(cells, "cells"), 0.0, 0.0, np.zeros(len(genes.column))
    for block in blocks:
        measured += float((block @ genes.measured.astype(float)).sum())
        gathered = genes.gather(block)
        kept += float(gathered.data.sum(dtype=float))
        if orthologues:
            totals += np.asarray(block.sum(axis=0, dtype=float)).ravel()
        progress.advance(block.shape[0])
        yield gathered
    if not measured:
        raise NotCountsError("no value above zero")
    share = kept / measured
    reasons = ", ".join(f"{rows} {reason}" for reason, rows in genes.excluded.items() if rows)
    log.info("%s: %d genes kept, with %.2f%% of the counts%s", where, len(genes.genes), 100 * share,
             f"; rows excluded: {reasons}" if reasons else "")  # fmt: skip
    if share < min_counts_kept:
        raise InputError(
            f"{where}: var",
            f"only {share:.1%} of the counts are in genes that are kept (rows excluded: {reasons})",
            "Check the species and the gene table, or lower genes: min_counts_kept",
        )
    uns["counts_kept"] = share
    if orthologues:
        uns["orthologues"] = describe_mapping(genes, totals, orthologues)
