"""Which gene programmes a cell runs: AUCell scores, and the descriptions written with them."""

import logging
from collections.abc import Iterable
from pathlib import Path

import anndata as ad
import decoupler as dc
import numba
import numpy as np
import pandas as pd
import scanpy as sc

from cell2text.cell_files import read_blocks, read_genes
from cell2text.contracts import (
    CELLS,
    DESCRIPTIONS,
    PATHWAY_SCORES,
    TERM_SLOTS,
    TERMS,
    write_json,
)
from cell2text.descriptions import PATHWAY, Slots, Terms, describe, render
from cell2text.errors import InputError
from cell2text.ontology import slot_terms
from cell2text.progress import Progress

log = logging.getLogger("cell2text.pathways")

CELLS_AT_ONCE = 1000
TOP_SHARE = 0.05  # of a cell's ranked genes, AUCell's own default


def read_gene_sets(path: str | Path) -> dict[str, list[str]]:
    """Return id -> gene symbols of a GMT file: a set a line, id, a name or link, then genes.

    Raises
    ------
    InputError
        If a line has no gene, an id repeats, or there is no line.
    """
    sets: dict[str, list[str]] = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        if not line.strip():
            continue
        name, *rest = [field.strip() for field in line.split("\t")]
        genes = sorted({gene for gene in rest[1:] if gene})
        if not genes:
            raise InputError(
                f"{path} line {number}", "no gene in the set", "Write id, name and genes with tabs between"
            )
        if name in sets:
            raise InputError(f"{path} line {number}", f"the set {name} is there twice", "Keep one of the two")
        sets[name] = genes
    if not sets:
        raise InputError(path, "no gene set in it", "Name a GMT file under `pathways: gene_sets`")
    return sets


def score_pathways(
    cells_file: str | Path,
    corpus_file: str | Path,
    gene_sets_file: str | Path,
    min_genes: int,
    path: str | Path,
) -> None:
    """Score each gene set in each of a dataset's cells with AUCell (Aibar et al., Nature Methods 2017).

    The score is the area under the recovery curve over a cell's top genes, as decoupler computes it. All
    genes of the file are ranked by log-normalised counts, so the score of a cell does not depend on the
    cells beside it. Genes with equal counts stand in an order that decoupler draws once, with a fixed seed,
    for all cells.

    Parameters
    ----------
    cells_file
        Filtered counts of the dataset.
    corpus_file
        The corpus; only its cells are scored.
    gene_sets_file
        GMT with gene symbols.
    min_genes
        A set with fewer genes measured is not scored: its column holds NaN.
    path
        Where to write the scores (``contracts.PATHWAY_SCORES``), in the order of the corpus.

    Raises
    ------
    InputError
        If no set has enough genes.
    """
    sets = read_gene_sets(gene_sets_file)
    symbols = read_genes(cells_file)["symbol"]
    measured = set(symbols)
    usable = {name: genes for name, genes in sets.items() if len(measured & set(genes)) >= min_genes}
    if not usable:
        raise InputError(
            gene_sets_file,
            f"no set has {min_genes} genes that {Path(cells_file).stem} measures ({symbols.iloc[0]}, ...)",
            "Give gene sets with the symbols of human genes",
        )
    left_out = [name for name in sets if name not in usable]
    if left_out:
        log.info("Fewer than %d genes measured, not scored: %s", min_genes, ", ".join(left_out))
    # decoupler shares out the few sets of one cell at a time; waking a second thread costs more than it does.
    numba.set_num_threads(1)
    net = pd.DataFrame([(name, gene) for name, genes in usable.items() for gene in genes], columns=["source", "target"])
    corpus = CELLS.read(corpus_file, ["cell_id", "split"])
    corpus = corpus[corpus["cell_id"].isin(read_cell_ids(cells_file))]
    cells = corpus["cell_id"]
    top_genes = count_top_genes(cells_file, corpus)
    progress = Progress(len(cells), "cells")
    scored = [pd.DataFrame(columns=list(usable), dtype=float)]
    # A symbol that two genes share goes with the first of them.
    own = ~symbols.duplicated().to_numpy()
    var = pd.DataFrame(index=symbols[own].to_numpy())
    for ids, counts in read_blocks(cells_file, cells, CELLS_AT_ONCE):
        block = ad.AnnData(counts[:, own], obs=pd.DataFrame(index=ids), var=var)
        sc.pp.normalize_total(block, target_sum=1e4)
        sc.pp.log1p(block)
        dc.mt.aucell(block, net, tmin=min_genes, empty=False, n_up=top_genes)
        scored.append(block.obsm["score_aucell"])
        progress.advance(len(ids))
    scores = pd.concat(scored).loc[cells].reindex(columns=list(sets)).astype("float32")
    PATHWAY_SCORES.write(scores.reset_index(names="cell_id"), path)


def count_top_genes(path: str | Path, corpus: pd.DataFrame) -> int:
    """Return over how many top genes of a cell AUCell integrates: 5% of the genes, or fewer.

    A cell with fewer genes than that would fill the rest of its ranks with genes it does not express, so
    the number is at most what 95% of the training cells express (of all cells where none is in training).

    Parameters
    ----------
    path
        Filtered counts of the dataset.
    corpus
        ``cell_id`` and ``split`` of the dataset's cells.
    """
    training = corpus["cell_id"][corpus["split"] == "train"]
    cells = training if len(training) else corpus["cell_id"]
    expressed = [np.diff(counts.indptr) for _, counts in read_blocks(path, cells)]
    limit = np.quantile(np.concatenate(expressed), 0.05) if expressed else 0
    return max(2, int(min(np.ceil(TOP_SHARE * len(read_genes(path))), limit)))


def read_cell_ids(path: str | Path) -> pd.Index:
    """Return the ids of the cells of an h5ad."""
    cells = ad.read_h5ad(path, backed="r")
    cells.file.close()
    return cells.obs_names


def write_descriptions(
    corpus_file: str | Path,
    score_files: Iterable[str | Path],
    pathways_file: str | Path,
    min_active_share: float,
    per_cell: int,
    descriptions_file: str | Path,
    terms_file: str | Path,
    kept_file: str | Path,
) -> None:
    """Write each cell's slots and its description, the terms they draw on, and the gene sets kept.

    Parameters
    ----------
    corpus_file
        The corpus (``contracts.CELLS``).
    score_files
        AUCell scores of each dataset.
    pathways_file
        TSV that gives each gene set ``id``, ``name`` and ``description``.
    min_active_share
        Sets active in no more than this share of the training cells are not told.
    per_cell
        Gene sets told of a cell, at most.
    descriptions_file, terms_file, kept_file
        The three files to write (``contracts.DESCRIPTIONS``, ``contracts.TERMS``, JSON).

    Raises
    ------
    InputError
        If names of gene sets cannot be told apart in a text, or no set is kept.
    """
    corpus = CELLS.read(corpus_file)
    scores = pd.concat([PATHWAY_SCORES.read(file) for file in score_files]).set_index("cell_id")
    scores = scores.loc[corpus["cell_id"]]
    kept = fit_sets(scores[(corpus["split"] == "train").to_numpy()], per_cell, min_active_share)
    if kept.empty:
        raise InputError(
            "config: pathways: min_active_share",
            f"no gene set is active in more than {min_active_share:.3%} of the training cells",
            "Lower it, or give other gene sets",
        )
    log.info("%d of %d gene sets kept", len(kept), scores.shape[1])
    told = choose_pathways(scores, kept, per_cell)
    rows = name_pathways(list(kept.index), pathways_file)
    table = pd.concat([*(slot_terms(slot) for slot in TERM_SLOTS), rows], ignore_index=True)
    terms = Terms(table)
    ids = corpus[[f"{slot}_id" for slot in TERM_SLOTS]].astype(object)
    ids = ids.where(ids.notna(), None)
    described = [
        describe(Slots(**dict(zip(TERM_SLOTS, known, strict=True)), pathways=pathways), terms)
        for known, pathways in zip(ids.itertuples(index=False, name=None), told, strict=True)
    ]
    descriptions = pd.DataFrame(
        {
            "cell_id": corpus["cell_id"],
            "split": corpus["split"],
            **ids,
            "pathway_ids": [list(pathways) for pathways in told],
            "definition": [slots.definition for slots in described],
            "text": [render(slots, terms) for slots in described],
        }
    )
    DESCRIPTIONS.write(descriptions, descriptions_file)
    TERMS.write(table, terms_file)
    write_json(kept.rename_axis("id").reset_index().to_dict("records"), kept_file)


def fit_sets(scores: pd.DataFrame, per_cell: int, min_active_share: float) -> pd.DataFrame:
    """Return mean, standard deviation and active share of the gene sets worth telling.

    A set is active in a cell if it is among the ``per_cell`` sets that ``choose_pathways`` would choose
    from all of them. A threshold on the standardised score would not do: a programme that half of the
    cells run never lies far above its mean.

    Parameters
    ----------
    scores
        Training cells by gene sets; NaN where a cell's dataset does not measure a set.
    per_cell
        How many sets are told of a cell.
    min_active_share
        A set is kept if it is active in more than this share of the cells in which it is measured.

    Returns
    -------
    DataFrame
        ``mean``, ``sd`` and ``active_share`` of each kept set, in the order of ``scores``.
    """
    fitted = pd.DataFrame({"mean": scores.mean(), "sd": scores.std(ddof=0)}).astype(float)
    fitted = fitted[fitted["sd"] > 0]
    chosen = pd.Series([name for names in choose_pathways(scores, fitted, per_cell) for name in names])
    active = chosen.value_counts().reindex(fitted.index, fill_value=0)
    fitted["active_share"] = active / scores[fitted.index].notna().sum()
    return fitted[fitted["active_share"] > min_active_share]


def choose_pathways(scores: pd.DataFrame, fitted: pd.DataFrame, per_cell: int) -> list[tuple[str, ...]]:
    """Return each cell's gene sets with the highest standardised scores, highest first.

    Only sets with a score above nought are chosen; of equals, the first in ``fitted``.

    Parameters
    ----------
    scores
        Cells by gene sets.
    fitted
        ``mean`` and ``sd`` of the sets to choose from, as ``fit_sets`` gives them.
    per_cell
        How many to choose, at most.
    """
    scores = scores[fitted.index]
    standard = ((scores - fitted["mean"]) / fitted["sd"]).where(scores > 0, -np.inf).to_numpy(dtype=float)
    best = np.argsort(-standard, axis=1, kind="stable")[:, :per_cell]
    chosen = np.isfinite(np.take_along_axis(standard, best, axis=1))
    names = fitted.index.to_numpy(dtype=object)[best]
    return [tuple(row[mask]) for row, mask in zip(names, chosen, strict=True)]


def name_pathways(ids: list[str], path: str | Path) -> pd.DataFrame:
    """Return the rows that gene sets have among the terms (``contracts.TERMS``).

    A set without a line in the table is named by its id, underscores as spaces, and has no description.

    Parameters
    ----------
    ids
        Gene sets to name.
    path
        TSV with ``id``, ``name`` and ``description``.

    Raises
    ------
    InputError
        If a column is missing, two sets share a name, or a name would break the grammar of the text.
    """
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    columns = ["id", "name", "description"]
    if not set(columns) <= set(table):
        raise InputError(path, f"columns {', '.join(table)}", f"Give the columns {', '.join(columns)}")
    told = table.drop_duplicates("id").set_index("id").reindex(ids)
    names = told["name"].fillna(pd.Series({name: name.replace("_", " ").strip() for name in ids}))
    descriptions = told["description"].fillna("")
    if names.duplicated().any():
        raise InputError(path, f"two gene sets are named {names[names.duplicated()].iloc[0]}", "Give each its own name")
    for column, values in (("name", names), ("description", descriptions)):
        broken = values[values.str.contains("; then ", regex=False)]
        if len(broken):
            raise InputError(
                f"{path}: {column}", f"{broken.iloc[0]!r} holds '; then ', which parts gene sets", "Reword it"
            )
    return pd.DataFrame({"slot": PATHWAY, "id": ids, "name": names.to_numpy(), "definition": descriptions.to_numpy()})
