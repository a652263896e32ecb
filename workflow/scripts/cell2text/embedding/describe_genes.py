"""Texts about genes: approved names, designations and gene sets, fetched or from files of the user's own."""

import ast
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cell2text.contracts import GENE_TEXTS, GENES
from cell2text.corpus.gene_sets import read_gene_sets
from cell2text.errors import InputError
from cell2text.tables import read_lines, read_table

log = logging.getLogger("cell2text.embedding")

HGNC = {
    "Approved symbol": "symbol",
    "Approved name": "name",
    "Status": "status",
    "Alias symbols": "aliases",
    "Previous symbols": "previous",
    "NCBI Gene ID(supplied by NCBI)": "ncbi",
    "Ensembl gene ID": "gene_id",
}
# A gene in NCBI's file, which is Python code: it is read as text, never run
NCBI_GENE = re.compile(r"\s*\d+ : (NtData\(.*\)),")


def describe_genes(genes: str | Path, files: Mapping[str, str | Path], texts: Sequence[str], path: str | Path) -> None:
    """Write the texts of the genes of a run, and of all other genes that have one.

    Genes are found by Ensembl id, or else by approved, previous or alias symbol. Genes that no study of the run
    measures have the tokens after those of the run, so that a model can read them in other studies.

    Parameters
    ----------
    genes
        Genes of the run (``contracts.GENES``).
    files
        File of each of ``sources_to_read(texts)``.
    texts
        What the text of a gene is made of: keys of ``fetch_resource.TEXT_SOURCES``, tables with the columns ``gene_id``
        and ``text`` (``.tsv``), or gene sets whose names are added to the texts of their genes (``.gmt``).
    path
        Where to write the table (``contracts.GENE_TEXTS``).

    Raises
    ------
    InputError
        If a file cannot be read, a table lacks a column, or a gene repeats in it.
    """
    own, hgnc = GENES.read(genes), read_hgnc(files["names"]) if "names" in files else _no_hgnc()
    tables = {source: _read_texts(source, file, hgnc) for source, file in files.items() if source in texts}
    own["entry"] = find_entries(own, hgnc)
    listed = hgnc.assign(entry=np.arange(len(hgnc)))[["gene_id", "symbol", "entry"]]
    others = listed[(listed["gene_id"] != "") & ~listed["entry"].isin(own["entry"])]
    given = [table.index.to_series() for source, table in tables.items() if source.endswith(".tsv")]
    ids = pd.concat([pd.Series(dtype=object), *given]).drop_duplicates()
    named = {*own["gene_id"], *own["symbol"], *listed["gene_id"], *listed["symbol"]}
    others = pd.concat([others, pd.DataFrame({"gene_id": ids[~ids.isin(named)], "symbol": "", "entry": -1})])
    others = others[~others["gene_id"].isin(own["gene_id"])].drop_duplicates("gene_id").sort_values("gene_id")
    every = pd.concat([own, others.assign(median=own["median"].median())], ignore_index=True)
    symbols = every["symbol"].where(every["symbol"] != "", every["gene_id"])
    approved = every["entry"].map(hgnc["symbol"]).fillna(symbols)
    parts = pd.DataFrame(
        {
            source: every["gene_id"].map(table).fillna(approved.map(table)).fillna(symbols.map(table))
            for source, table in tables.items()
        }
    ).fillna("")
    every["text"] = [" ".join(" ".join(row).split()) for row in parts.itertuples(index=False)]
    every["sources"] = [list(parts.columns[row]) for row in (parts != "").to_numpy()]
    every = every[(every["text"] != "") | (every.index < len(own))].reset_index(drop=True)
    every.loc[len(own) :, "token"] = own["token"].max() + 1 + np.arange(len(every) - len(own))
    every["datasets"] = [names if isinstance(names, np.ndarray | list) else [] for names in every["datasets"]]
    every["token"] = every["token"].astype(np.int32)
    GENE_TEXTS.write(every[list(GENE_TEXTS.columns)], path)
    described = (every["text"][: len(own)] != "").sum()
    log.info("%d of %d genes have a text, and %d that no study measures", described, len(own), len(every) - len(own))


def read_hgnc(path: str | Path) -> pd.DataFrame:
    """Return HGNC's approved genes, with the columns ``HGNC.values()``; missing values are empty.

    Raises
    ------
    InputError
        If the file cannot be read or lacks a column.
    """
    table = read_table(path, set(HGNC), only=HGNC, row_names="never")
    absent = [name for name in HGNC if name not in table]
    if absent:
        raise InputError(path, f"no column {', '.join(absent)}", "Delete it and run the workflow again")
    table = table.rename(columns=HGNC)
    return table[table["status"] == "Approved"].reset_index(drop=True)


def _no_hgnc() -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(dtype=object) for name in HGNC.values()})


def find_entries(genes: pd.DataFrame, hgnc: pd.DataFrame) -> pd.Series:
    """Return the row of HGNC's table of each gene, -1 if it has none.

    Parameters
    ----------
    genes
        Rows of ``contracts.GENES``.
    hgnc
        See :func:`read_hgnc`.
    """
    rows = pd.Series(np.arange(len(hgnc)))
    by_id = rows.set_axis(hgnc["gene_id"]).drop("", errors="ignore")
    by_symbol = rows.set_axis(hgnc["symbol"])
    older = (hgnc["previous"] + ", " + hgnc["aliases"]).str.split(", ").explode().drop_duplicates(keep=False)
    by_older = pd.Series(older.index, index=older.to_numpy()).drop("", errors="ignore")
    tables = [table[~table.index.duplicated()] for table in (by_id, by_symbol, by_older)]
    found = pd.Series(np.nan, index=genes.index)
    for table in tables:
        for names in (genes["gene_id"], genes["symbol"]):
            found = found.fillna(names.map(table))
    return found.fillna(-1).astype(int)


def _read_texts(source: str, path: str | Path, hgnc: pd.DataFrame) -> pd.Series:
    """Return the texts of one source, by Ensembl id or symbol."""
    if source == "names":
        return hgnc.drop_duplicates("symbol").set_index("symbol")["name"]
    if source == "designations":
        by_symbol = hgnc.drop_duplicates("symbol").set_index("symbol")["ncbi"]
        return by_symbol.map(read_designations(path)).dropna()
    if source.endswith(".gmt"):
        sets = read_gene_sets(path)
        pairs = pd.DataFrame([(gene, name.replace("_", " ")) for name, genes in sets.items() for gene in genes])
        return pairs.groupby(0)[1].agg(" ".join)
    table = read_table(path, {"gene_id", "text"}, row_names="never")
    absent = [name for name in ("gene_id", "text") if name not in table]
    if absent:
        raise InputError(path, f"no column {' or '.join(absent)}", "Give the columns gene_id and text")
    twice = table.index[table["gene_id"].duplicated()]
    if len(twice):
        name = table["gene_id"][twice[0]]
        raise InputError(f"{path} line {twice[0]}: gene_id", f"{name} repeats", "Give each gene one row")
    return table.set_index("gene_id")["text"]


def read_designations(path: str | Path) -> dict[str, str]:
    """Return the description and other designations of each gene by NCBI id, from a file of Python code.

    Raises
    ------
    InputError
        If the file cannot be read, or has no genes.
    """
    found = {}
    for number, line in read_lines(path):
        if match := NCBI_GENE.fullmatch(line):
            try:
                fields = {
                    one.arg: ast.literal_eval(one.value) for one in ast.parse(match[1], mode="eval").body.keywords
                }
                text = f"{fields['description']} {fields['other_designations']}".replace("|", " ")
                found[str(fields["GeneID"])] = text
            except (SyntaxError, ValueError, KeyError) as error:
                raise InputError(
                    f"{path} line {number}", "not a gene", "Delete it and run the workflow again"
                ) from error
    if not found:
        raise InputError(path, "no genes in it", "Delete it and run the workflow again")
    return found
