"""One study brought into one form: raw counts, CELLxGENE's columns, one id per cell."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scipy import sparse

from cell2text.cells.counts import TOTALS, NotCountsError, check_counts, recover_counts
from cell2text.cells.genes import GeneMap, map_genes, read_gene_table
from cell2text.cells.h5ad import write_cells
from cell2text.cells.labels import OBS_COLUMNS, label_cells
from cell2text.cells.studies import HUMAN, Study, open_study
from cell2text.errors import InputError
from cell2text.progress import Progress

log = logging.getLogger("cell2text.counts")

# Where counts are looked for, in this order, if the sheet does not say where they are.
PLACES = ("raw.X", 'layers["counts"]', 'layers["raw_counts"]', "X")
FIX = 'Put raw counts, whole numbers, in X, raw.X or layers["counts"], or name their place in the column `matrix`'


def fetch_dataset(
    row: dict[str, str], path: str | Path, gene_table: str | Path | None = None, min_counts_kept: float = 0.5
) -> None:
    """Bring a study into one form and write it as h5ad.

    The first of ``PLACES`` whose stored values are all counts is taken; where there is none, the first whose
    values prove to be logs of counts. If the row names a ``matrix``, no other is looked at.

    Parameters
    ----------
    row
        The study's row of the sheet of datasets, empty cells left out.
    path
        Where to write. ``X`` holds counts (CSR, float32), ``obs`` is indexed by ``{dataset}|{barcode}``
        and holds the columns of CELLxGENE's schema, ``var`` is indexed by gene id and holds ``symbol``,
        ``uns`` tells where the counts come from and which share of them lies in the genes kept.
    gene_table
        Ensembl ids and symbols, see ``genes.read_gene_table``; None to leave symbols as they are.
    min_counts_kept
        Least share of the counts that must lie in genes that are kept.

    Raises
    ------
    InputError
        If the file, its counts, its genes, its labels or its ontology ids are not what they should be.
    """
    path, where = Path(path), row["source"]
    table = read_gene_table(gene_table) if gene_table else None
    wanted = [*OBS_COLUMNS, *TOTALS, *([row["label_column"]] if "label_column" in row else [])]
    with open_study(where, wanted) as study:
        _check_species(study)
        obs = label_cells(study.obs, row, study.obs_columns)
        faults: dict[str, NotCountsError] = {}
        for read in (check_counts, recover_counts):
            for place in choose_places(study, row.get("matrix")):
                if read is recover_counts and not faults[place].logs:
                    continue
                genes = map_genes(study.matrices[place][1], where, table)
                uns = {"source": f"{where} ({place})"}
                blocks = read(study, place, path.with_name(f".{path.name}.entries"))
                try:
                    counts = keep_genes(blocks, genes, len(obs), where, min_counts_kept, uns)
                    write_cells(path, counts, [obs.index], obs, genes.genes, uns)
                except NotCountsError as fault:
                    first = f"{faults[place]}; " if place in faults else ""
                    faults[place] = NotCountsError(f"{first}{fault}", fault.logs)
                    continue
                log.info("%s: %d cells, %d genes, counts from %s", row["dataset"], len(obs), len(genes.genes), place)
                return
    told = "; ".join(f"{place}: {fault}" for place, fault in faults.items()) or "no matrix in the usual places"
    others = ", ".join(sorted(set(study.matrices) - set(faults)))
    told += f"; not looked at: {others}" if others else ""
    raise InputError(
        where,
        f"no raw counts found ({told})",
        FIX,
    )


def _check_species(study: Study) -> None:
    foreign = [species for species in study.species if species != HUMAN]
    if foreign:
        raise InputError(
            f"{study.where}: organism_ontology_term_id", f"{foreign[0]} is not human ({HUMAN})", "Give human cells"
        )


def choose_places(study: Study, named: str | None) -> list[str]:
    """Return the places of a study's matrices to look at.

    Parameters
    ----------
    study
        An open study.
    named
        What the sheet's column ``matrix`` says: ``X``, ``raw.X`` or the name of a layer; None if nothing.

    Raises
    ------
    InputError
        If there is no such matrix.
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
) -> Iterator[sparse.csr_matrix]:
    """Yield counts over the genes that are kept; at the end tell which share of all counts that is.

    Parameters
    ----------
    blocks
        Counts over all rows of the file's table of genes.
    genes
        What becomes of those rows.
    cells
        Number of cells in all.
    where
        The file, for messages.
    min_counts_kept
        Least share of the counts that must be kept.
    uns
        Takes the share as ``counts_kept``.

    Raises
    ------
    NotCountsError
        If there is no count above nought.
    InputError
        If fewer are kept.
    """
    progress, measured, kept = Progress(cells, "cells"), 0.0, 0.0
    for block in blocks:
        measured += float((block @ genes.measured.astype(float)).sum())
        gathered = genes.gather(block)
        kept += float(gathered.data.sum(dtype=float))
        progress.advance(block.shape[0])
        yield gathered
    if not measured:
        raise NotCountsError("no value above nought")
    share = kept / measured
    reasons = ", ".join(f"{rows} {why}" for why, rows in genes.left_out.items() if rows)
    log.info("%s: %d genes kept, with %.2f%% of the counts%s", where, len(genes.genes), 100 * share,
             f"; rows left out: {reasons}" if reasons else "")  # fmt: skip
    if share < min_counts_kept:
        raise InputError(
            f"{where}: var",
            f"only {share:.1%} of the counts lie in genes that are kept (rows left out: {reasons})",
            "Check the species and the gene table, or lower genes: min_counts_kept",
        )
    uns["counts_kept"] = share
