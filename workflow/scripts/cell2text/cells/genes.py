"""Gene names: which rows of a study are human genes, their Ensembl ids and their symbols."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from cell2text.cells.gene_kinds import OTHER_SPECIES, check_kinds, check_names, check_species, find_kinds
from cell2text.cells.gene_names import ENSEMBL, MITOCHONDRIAL_IDS, MITOCHONDRIAL_SYMBOLS, clean_names, respell
from cell2text.errors import InputError
from cell2text.tables import read_table

ID_COLUMNS = (
    *("gene_ids", "gene_id", "ensembl_gene_id", "ensembl_id", "ensembl_ids", "ensembl", "feature_id"),
    *("ENSEMBL", "Accession"),  # of Bioconductor and loom
)
SYMBOL_COLUMNS = (
    *("feature_name", "gene_symbols", "gene_symbol", "gene_names", "gene_name", "symbol"),
    *("Symbol", "SYMBOL", "hgnc_symbol", "gene_short_name", "external_gene_name"),
)
ALIAS_COLUMNS = ("aliases", "prev_symbol", "alias_symbol")
VAR_COLUMNS = (*ID_COLUMNS, *SYMBOL_COLUMNS, "feature_types")
MITOCHONDRIAL = "MT-"  # prefix of the symbols of mitochondrially encoded genes


@dataclass(frozen=True)
class GeneTable:
    """Ensembl ids and symbols of human genes.

    Parameters
    ----------
    ids
        Ensembl id of each symbol.
    symbols
        Symbol of each Ensembl id.
    """

    ids: pd.Series
    symbols: pd.Series


@dataclass(frozen=True)
class GeneMap:
    """Mapping of the rows of a file's gene table to the genes that are kept.

    Parameters
    ----------
    genes
        The genes that are kept: ``symbol``, indexed by gene id.
    column
        Position in ``genes`` of each row of the file, or -1; rows of the same gene share a position.
    measured
        Which rows are genes, not antibodies, peaks or spike-ins; bool.
    excluded
        Number of excluded rows by reason.
    reasons
        Only for a study of mice: why each row is excluded, empty if it is not; str.
    ties
        Only for a study of mice: choices between human genes that are equally well supported.
    """

    genes: pd.DataFrame
    column: np.ndarray
    measured: np.ndarray
    excluded: dict[str, int]
    reasons: np.ndarray | None = None
    ties: list[str] = field(default_factory=list)

    def gather(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        """Convert counts over the rows of the file to counts over ``genes``; rows of the same gene are summed."""
        if np.array_equal(self.column, np.arange(len(self.genes))):
            return counts
        rows = np.flatnonzero(self.column >= 0)
        indicator = (np.ones(len(rows), dtype=counts.dtype), (rows, self.column[rows]))
        gathered = counts @ sparse.csr_matrix(indicator, shape=(len(self.column), len(self.genes)))
        gathered.sort_indices()
        return gathered


def map_genes(var: pd.DataFrame, where: str, table: GeneTable | None = None) -> GeneMap:
    """Find the id and the symbol of each gene.

    Ids are Ensembl ids without version, from the index or from the column of ``ID_COLUMNS`` that holds the most. A
    gene without an id is looked up by its symbol in ``table`` and excluded if it is not there; without a table its
    symbol becomes its id.

    The symbol of a gene is that of the table. Otherwise it comes from ``SYMBOL_COLUMNS``, the index or ``ID_COLUMNS``,
    the first of them that has a name and not just an id or a number, in the spelling of ``gene_names.respell``.

    Rows with the same id become one gene and their counts are summed: versions of an id, the X and Y copies of a
    gene, a repeated symbol, several symbols of one gene in the table. Names made unique by a suffix (``MATR3-1`` next
    to ``MATR3``) are the same gene if the table has only the name without suffix; without a table they stay separate,
    because ``-1`` may be part of a symbol.

    Genes of other species in a mixture (``mm10_``, ``ENSMUSG``) are excluded: descriptions are of human cells.
    Features that are not genes (antibodies, peaks, guides, spike-ins, by feature type or by name) are dropped and do
    not count towards the share of counts that is kept.

    Parameters
    ----------
    var
        A file's gene table, one row per gene.
    where
        The file, for messages.
    table
        From ``read_gene_table``; None to use the file's symbols.

    Raises
    ------
    InputError
        If the rows are not genes, the genes are not human, or they have no symbols and there is no table.
    """
    names, columns, symbol_columns = text_columns(var)
    ids = find_ids([*columns, *symbol_columns], ENSEMBL)
    measured = find_genes(var, names, ids, where)
    other = pd.concat([column.str.contains(OTHER_SPECIES) for column in columns], axis=1).any(axis=1) & ids.isna()

    symbols = pd.Series("", index=names.index)
    for column in (*symbol_columns, *columns):
        symbols = symbols.mask(symbols == "", clean_names(column))
    symbols = symbols.mask(symbols == "", ids.fillna(names))
    check_species(names[measured], symbols[measured], other[measured], ids.notna().any(), where)
    usual, known = respell(symbols), MITOCHONDRIAL_SYMBOLS
    if table is not None:
        ids = ids.where(ids.notna() | other, _look_up(symbols, usual, table))
        known = table.symbols.to_dict() | known
        unknown = ids.isna() & measured & ~other
    else:
        ids = ids.where(ids.notna(), usual)
        unknown = pd.Series(False, index=names.index)
    found = ids.map(known)
    check_names(found.fillna(symbols)[measured & ~other], table is not None, where)
    symbols = found.fillna(usual)

    genes, column = number_genes(ids, symbols, measured & ~other & ~unknown)
    excluded = {"not genes": ~measured, "from other species": measured & other, "not in the gene table": unknown}
    return GeneMap(genes, column, measured.to_numpy(), {reason: int(rows.sum()) for reason, rows in excluded.items()})


def text_columns(var: pd.DataFrame) -> tuple[pd.Series, list[pd.Series], list[pd.Series]]:
    """Return as text the index of a gene table, the columns that may have ids (it is one), and those with symbols."""
    names = _as_text(pd.Series(var.index))
    columns = [names, *(_as_text(var[column]) for column in ID_COLUMNS if column in var)]
    return names, columns, [_as_text(var[column]) for column in SYMBOL_COLUMNS if column in var]


def find_ids(columns: list[pd.Series], pattern: str) -> pd.Series:
    """Return the Ensembl ids in the column that has the most, NaN for rows without."""
    ids = [column.str.upper().str.extract(f"({pattern})")[0] for column in columns]
    return max(ids, key=lambda found: found.notna().sum())


def find_genes(var: pd.DataFrame, names: pd.Series, ids: pd.Series, where: str) -> pd.Series:
    """Return which rows of a gene table are genes (bool); an ``InputError`` if there are hardly any."""
    kinds = find_kinds(names.mask(ids.notna(), ""), _as_text(var["feature_types"]) if "feature_types" in var else None)
    if len(names):
        check_kinds(names, kinds, where)
    return kinds == ""


def number_genes(ids: pd.Series, symbols: pd.Series, kept: pd.Series) -> tuple[pd.DataFrame, np.ndarray]:
    """Return ``genes`` and ``column`` of a :class:`GeneMap`; rows with the same id become one gene, named as the first.

    Parameters
    ----------
    ids, symbols
        Id and symbol of each row of a gene table.
    kept
        Which rows are kept; bool.
    """
    codes, unique = pd.factorize(ids[kept])
    column = np.full(len(ids), -1)
    column[kept] = codes
    first = np.unique(codes, return_index=True)[1]
    index = pd.Index(unique, name="gene_id", dtype=object)
    return pd.DataFrame({"symbol": symbols[kept].to_numpy(dtype=object)[first]}, index=index), column


def _as_text(column: pd.Series) -> pd.Series:
    return column.astype(object).where(column.notna(), "").astype(str).reset_index(drop=True)


def _look_up(symbols: pd.Series, usual: pd.Series, table: GeneTable) -> pd.Series:
    """Look up Ensembl ids by symbol: as written, as usual, with R's dots as hyphens, without a suffix, in any case."""
    stems = symbols.str.replace(r"[-.]\d+$", "", regex=True)
    stems = stems.where(stems.isin(set(symbols)), "")
    dotted = (names.str.replace(".", "-", regex=False) for names in (symbols, stems))
    spellings = [symbols, usual, *dotted, symbols.str.upper(), stems]
    any_case = pd.DataFrame({"symbol": table.ids.index.str.upper(), "id": table.ids.to_numpy()}).drop_duplicates()
    any_case = any_case.drop_duplicates("symbol", keep=False).set_index("symbol")["id"]
    ids = pd.Series(np.nan, index=symbols.index, dtype=object)
    for known, written in (
        (table.ids, spellings),
        (any_case, [spelling.str.upper() for spelling in spellings]),
        (pd.Series(MITOCHONDRIAL_IDS), [usual]),
    ):
        for spelling in written:
            ids = ids.where(ids.notna(), spelling.map(known))
    return ids


def read_gene_table(path: str | Path) -> GeneTable:
    """Read Ensembl ids, symbols and, if present, aliases.

    Parameters
    ----------
    path
        Tab- or comma-separated, optionally gzipped, with the columns ``gene_id`` and ``symbol`` and optionally
        ``aliases`` (separated by ``|``). HGNC's complete set can be used unchanged, and so can a file without header
        whose first two columns are ids and symbols. A symbol with several ids maps to the first of them; an alias
        of several genes, or one that is itself a symbol, is ignored.

    Raises
    ------
    InputError
        If the file does not exist, lacks a column or holds no Ensembl id.
    """
    where, fix = f"{path}", "Give the columns gene_id (Ensembl) and symbol"
    if not Path(path).is_file():
        raise InputError("config: genes: table", f"no such file: {path}", "Correct the path")
    columns = {*ID_COLUMNS, *SYMBOL_COLUMNS}
    table = read_table(path, columns, without_hash={*columns, "hgnc_id"}, headerless=_name_columns)
    names = [name.lower() for name in table]
    if len(set(names)) < len(names):
        raise InputError(where, f"columns repeat: {', '.join(names)}", "Give each column its own name")
    table.columns = names
    found = [next((name for name in wanted if name in names), None) for wanted in (ID_COLUMNS, SYMBOL_COLUMNS)]
    if None in found:
        raise InputError(where, f"required columns missing (found: {', '.join(names)})", fix)
    ids = table[found[0]].str.extract(f"({ENSEMBL})")[0]
    table = table[ids.notna().to_numpy()].assign(id=ids[ids.notna()])
    if table.empty:
        raise InputError(f"{where}: {found[0]}", "no human Ensembl id", fix)
    pairs = table[["id", found[1]]].set_axis(["id", "symbol"], axis=1)
    pairs = pairs[pairs["symbol"] != ""]
    by_symbol = pairs.drop_duplicates("symbol").set_index("symbol")["id"]
    for column in (name for name in ALIAS_COLUMNS if name in names):
        aliases = table.assign(alias=table[column].str.split("|")).explode("alias")
        aliases = aliases.assign(alias=aliases["alias"].str.strip()).drop_duplicates(["alias", "id"])
        aliases = aliases.drop_duplicates("alias", keep=False).set_index("alias")["id"]
        by_symbol = pd.concat([by_symbol, aliases[~aliases.index.isin(by_symbol.index) & (aliases.index != "")]])
    return GeneTable(by_symbol, pairs.drop_duplicates("id").set_index("id")["symbol"])


def _name_columns(values: list[str]) -> list[str] | None:
    """Return names for the columns if the first line of a gene table holds a gene."""
    if not any(re.search(ENSEMBL, value) for value in values):
        return None
    return ["gene_id", "symbol", *map(str, range(2, len(values)))][: len(values)]
