"""Genes of mice as human genes, through a table of orthologues."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cell2text.cells.gene_kinds import MOST, OTHER_SPECIES, wrong_genes
from cell2text.cells.gene_names import ENSEMBL, HUMAN_GENOME, MITOCHONDRIAL_SYMBOLS, clean_names
from cell2text.cells.genes import GeneMap, GeneTable, find_genes, find_ids, number_genes, text_columns
from cell2text.errors import InputError
from cell2text.provenance import hash_file
from cell2text.tables import read_table

MIN_SOURCES = 3
MOUSE_ENSEMBL = ENSEMBL.replace("ENSG", "ENSMUSG")
MOUSE_GENOME = r"^(?:GRCm\d+(?:\.p\d+)?|mm\d+|(?i:mouse))[-_.]+"
COLUMNS = {
    "Gene stable ID": "mouse",
    "Gene name": "mouse_symbol",
    "Human gene stable ID": "human",
    "Human gene name": "human_symbol",
}
SOURCES = "supporting_source"
HUMAN_INSTEAD = "Set `species` to human, or give the symbols of MGI or mouse Ensembl ids"


@dataclass(frozen=True)
class Orthologues:
    """The human orthologue of each mouse gene.

    Parameters
    ----------
    genes
        ``human`` (Ensembl id), ``human_symbol``, ``sources`` (number of sources that support the pair) and ``others``
        (symbols of human genes with as many sources, which were not chosen; list), indexed by the mouse's Ensembl id.
    ids
        Ensembl id of each mouse symbol.
    human_symbols
        Symbols of all human genes of the table.
    min_sources
        Pairs with fewer sources are not used.
    origin
        Name and SHA-256 of the table.
    """

    genes: pd.DataFrame
    ids: pd.Series
    human_symbols: frozenset[str]
    min_sources: int
    origin: dict[str, str]


def read_orthologues(path: str | Path, min_sources: int = MIN_SOURCES) -> Orthologues:
    """Read pairs of genes and choose for each mouse gene the human gene with the most sources.

    Among human genes with as many sources, the one with the same symbol apart from case is chosen, or else the one
    with the lowest id. No mouse gene has two human genes, but several mouse genes may have the same.

    Parameters
    ----------
    path
        Table with ``COLUMNS``, one row per pair, as in HCOP's and BioMart's. The column ``supporting_source`` lists
        the sources of a pair, separated by commas; without it, all pairs count the same.
    min_sources
        Minimum number of sources of a pair.

    Raises
    ------
    InputError
        If the file cannot be read, lacks a column or has no pair.
    """
    table = read_table(path, set(COLUMNS), row_names="never")
    absent = [name for name in COLUMNS if name not in table]
    if absent:
        raise InputError(path, f"no column {', '.join(absent)}", f"Give the columns {', '.join(COLUMNS)}")
    pairs = table.rename(columns=COLUMNS)
    pairs = pairs[pairs["mouse"].str.fullmatch(MOUSE_ENSEMBL) & pairs["human"].str.fullmatch(ENSEMBL)]
    if pairs.empty:
        raise InputError(path, "no pair of a mouse and a human Ensembl id", "Give a table of mouse and human genes")
    pairs = pairs.assign(human_symbol=pairs["human_symbol"].mask(pairs["human_symbol"].isin(["", "-"]), pairs["human"]))
    named = pairs.drop_duplicates(["mouse", "human"]).set_index(["mouse", "human"])
    if SOURCES in pairs:  # a pair may have several rows, and a source may be listed twice
        sources = pairs.assign(source=pairs[SOURCES].str.split(",")).explode("source")
        named["sources"] = sources.groupby(["mouse", "human"])["source"].nunique()
    else:
        named["sources"] = min_sources
    named["other_symbol"] = named["mouse_symbol"].str.upper() != named["human_symbol"].str.upper()
    named = named.reset_index().sort_values(["sources", "other_symbol", "human"], ascending=[False, True, True])
    genes = named.drop_duplicates("mouse").set_index("mouse")
    rest = named[named.duplicated("mouse")]
    rest = rest[rest["sources"].to_numpy() == genes["sources"].loc[rest["mouse"]].to_numpy()]
    others = rest.groupby("mouse")["human_symbol"].agg(list).reindex(genes.index)
    genes["others"] = [other if isinstance(other, list) else [] for other in others]
    symbols = genes[~genes["mouse_symbol"].isin(["", "-"])].reset_index().drop_duplicates("mouse_symbol")
    return Orthologues(
        genes[["human", "human_symbol", "sources", "others"]],
        symbols.set_index("mouse_symbol")["mouse"],
        frozenset(named["human_symbol"]),
        min_sources,
        {"table": Path(path).name, "sha256": hash_file(path)},
    )


def map_mouse_genes(var: pd.DataFrame, where: str, orthologues: Orthologues, table: GeneTable | None = None) -> GeneMap:
    """Find the human orthologue of each gene of a mouse study, its id and its symbol.

    Mouse genes are found by Ensembl id, wherever a column has it, or else by symbol: as written, with R's dots as
    hyphens, or in any case. Rows with the same human gene become one and their counts are summed. Human genes without
    an orthologue in the file do not occur, that is, they are not measured.

    Parameters
    ----------
    var
        A file's gene table, one row per gene.
    where
        The file, for messages.
    orthologues
        From ``read_orthologues``.
    table
        Of human genes, for their symbols; None to use those of the orthologues.

    Raises
    ------
    InputError
        If the rows are not genes, or look like human genes.
    """
    names, columns, symbol_columns = text_columns(var)
    ids = find_ids([*columns, *symbol_columns], MOUSE_ENSEMBL)
    measured = find_genes(var, names, ids, where)
    foreign, native = rf"{OTHER_SPECIES}|{HUMAN_GENOME}|^ENSG\d{{11}}", rf"{MOUSE_GENOME}|^MGI:\d"
    other = pd.concat([column.str.contains(foreign) & ~column.str.contains(native) for column in columns], axis=1)
    other = other.any(axis=1) & ids.isna()

    symbols = pd.Series("", index=names.index)
    for column in (*symbol_columns, *columns):
        bare = column.str.replace(MOUSE_GENOME, "", regex=True)
        bare = bare.str.replace(rf"[-_|:; ]?{MOUSE_ENSEMBL}(?:\.\d+)?[-_|:; ]?", "", regex=True)
        symbols = symbols.mask(symbols == "", clean_names(bare))
    _check_mouse(names[measured], symbols[measured], other[measured], ids[measured], orthologues, where)
    mouse = ids.where(ids.isin(orthologues.genes.index), _look_up(symbols, orthologues.ids)).mask(other)
    chosen = orthologues.genes.reindex(mouse).reset_index(drop=True)
    few = chosen["sources"] < orthologues.min_sources

    reasons = np.select(
        [~measured, other, mouse.isna(), few],
        ["not genes", "from other species", "without a human orthologue", "with too few sources for their orthologue"],
        default="",
    ).astype(object)
    kept = reasons == ""
    known = (table.symbols.to_dict() if table else {}) | MITOCHONDRIAL_SYMBOLS
    genes, column = number_genes(chosen["human"], chosen["human"].map(known).fillna(chosen["human_symbol"]), kept)
    ties = chosen.assign(symbol=symbols)[kept & (chosen["others"].str.len() > 0)].drop_duplicates("human_symbol")
    return GeneMap(
        genes,
        column,
        measured.to_numpy(),
        {reason: int((reasons == reason).sum()) for reason in dict.fromkeys(reasons) if reason},
        reasons,
        [f"{one.symbol}: {one.human_symbol}, not {', '.join(one.others)}" for one in ties.itertuples()],
    )


def _check_mouse(
    names: pd.Series, symbols: pd.Series, other: pd.Series, ids: pd.Series, orthologues: Orthologues, where: str
) -> None:
    """Raise an ``InputError`` if genes have ids of other species, or more of them human symbols than mouse symbols."""
    if other.mean() > MOST:
        raise wrong_genes(where, "species is mouse, but genes are from other species", names[other], HUMAN_INSTEAD)
    mouse = symbols.isin(orthologues.ids.index) | ids.notna()
    human = symbols.isin(orthologues.human_symbols) & ~mouse
    if human.sum() > mouse.sum():
        raise wrong_genes(where, "species is mouse, but symbols look like human genes", symbols[human], HUMAN_INSTEAD)


def _look_up(symbols: pd.Series, known: pd.Series) -> pd.Series:
    any_case = known.set_axis(known.index.str.upper())
    any_case = any_case[~any_case.index.duplicated(keep=False)]
    dotted = symbols.str.replace(".", "-", regex=False)
    found = symbols.map(known)
    for spelling, ids in ((dotted, known), (symbols.str.upper(), any_case), (dotted.str.upper(), any_case)):
        found = found.where(found.notna(), spelling.map(ids))
    return found


def describe_mapping(genes: GeneMap, totals: np.ndarray, orthologues: Orthologues) -> str:
    """Return as JSON what became of the genes of a mouse study and of their counts.

    Parameters
    ----------
    genes
        From ``map_mouse_genes``.
    totals
        Counts of each row of the file's gene table over all cells; float64.
    orthologues
        The table that was used.
    """
    counted = totals[genes.measured].sum()
    reasons = [reason for reason in genes.excluded if reason != "not genes"]
    return json.dumps(
        {
            **orthologues.origin,
            "min_sources": orthologues.min_sources,
            "mouse_genes": int(genes.measured.sum()),
            "mouse_genes_kept": int((genes.column >= 0).sum()),
            "human_genes": len(genes.genes),
            "counts_kept": totals[genes.column >= 0].sum() / counted,
            "counts_lost": {reason: totals[genes.reasons == reason].sum() / counted for reason in reasons},
            "ties": genes.ties,
        }
    )
