"""Gene names: which rows of a study are human genes, their Ensembl ids and their symbols."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from cell2text.errors import InputError
from cell2text.tables import read_table

ENSEMBL = r"(?<![A-Z0-9])ENSG\d{11}(?!\d)"
# How Cell Ranger prefixes the genes of a species mixture, and how Ensembl names genes of other species.
HUMAN_GENOME = r"^(?:GRCh|hg)\d+_+"
OTHER_SPECIES = r"^(?:GRCm|mm|mRatBN|Rnor_|rn)[\d.]+_+|^ENS[A-Z]{3,}G\d{11}"
SPIKE_IN = r"^ERCC-\d{5}$"
ID_COLUMNS = ("gene_ids", "gene_id", "ensembl_gene_id", "ensembl_id", "ensembl_ids", "ensembl", "feature_id")
SYMBOL_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "gene_names", "gene_name", "symbol")
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
    """

    genes: pd.DataFrame
    column: np.ndarray
    measured: np.ndarray
    excluded: dict[str, int]

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
    symbol becomes its id. Symbols come from ``SYMBOL_COLUMNS``, else from the index; where these hold an Ensembl id,
    the symbol comes from the table.

    Rows with the same id become one gene and their counts are summed: versions of an id, the X and Y copies of a
    gene, a repeated symbol, several symbols of one gene in the table. Names made unique by a suffix (``MATR3-1`` next
    to ``MATR3``) are the same gene if the table has only the name without suffix; without a table they stay separate,
    because ``-1`` may be part of a symbol.

    Genes of other species in a mixture (``mm10_``, ``ENSMUSG``) are excluded: descriptions are of human cells.
    Features that are not genes (antibodies, peaks, spike-ins) are dropped and do not count towards the share of
    counts that is kept.

    Parameters
    ----------
    var
        A file's gene table, one row per gene.
    where
        The file, for messages.
    table
        From ``read_gene_table``; None to keep symbols as they are.

    Raises
    ------
    InputError
        If gene names are numbers, or symbols of another species.
    """
    names = pd.Series(var.index.astype(str))
    columns = [names, *(_as_text(var[column]) for column in ID_COLUMNS if column in var)]
    ids = max((column.str.extract(f"({ENSEMBL})")[0] for column in columns), key=lambda found: found.notna().sum())
    other = pd.concat([column.str.contains(OTHER_SPECIES) for column in columns], axis=1).any(axis=1) & ids.isna()
    measured = ~names.str.contains(SPIKE_IN)
    if "feature_types" in var and (kinds := _as_text(var["feature_types"])).eq("Gene Expression").any():
        measured &= kinds.eq("Gene Expression")

    symbols = next((_as_text(var[column]) for column in SYMBOL_COLUMNS if column in var), names)
    symbols = symbols.mask(symbols.isin(["", "nan", "None"]), names)
    symbols = symbols.str.replace(HUMAN_GENOME, "", regex=True)
    # CELLxGENE writes repeated symbols as MATR3_ENSG00000015479
    bare = symbols.str.replace(rf"[_|]?{ENSEMBL}(?:\.\d+)?(?:_PAR_Y)?[_|]?", "", regex=True)
    symbols = bare.where(bare != "", symbols)
    if table is not None:
        ids = ids.where(ids.notna() | other, _look_up(symbols, table))
        unnamed = symbols.str.contains(ENSEMBL)
        symbols = symbols.mask(unnamed, ids.map(table.symbols).fillna(ids))
        unknown = ids.isna() & measured & ~other
    else:
        _check_symbols(symbols[ids.isna() & measured & ~other], ids.notna().any(), where)
        ids = ids.where(ids.notna(), symbols)
        unknown = pd.Series(False, index=names.index)
    symbols = symbols.mask(symbols.str.contains(ENSEMBL), ids)

    kept = measured & ~other & ~unknown
    codes, unique = pd.factorize(ids[kept])
    column = np.full(len(names), -1)
    column[kept] = codes
    first = np.unique(codes, return_index=True)[1]
    genes = pd.DataFrame(
        {"symbol": symbols[kept].to_numpy(dtype=object)[first]}, index=pd.Index(unique, name="gene_id", dtype=object)
    )
    excluded = {"not genes": ~measured, "from other species": measured & other, "not in the gene table": unknown}
    return GeneMap(genes, column, measured.to_numpy(), {reason: int(rows.sum()) for reason, rows in excluded.items()})


def _as_text(column: pd.Series) -> pd.Series:
    return column.astype(object).where(column.notna(), "").astype(str).reset_index(drop=True)


def _look_up(symbols: pd.Series, table: GeneTable) -> pd.Series:
    """Look up Ensembl ids by symbol: as written, with R's dots as hyphens, in upper case, without a suffix."""
    ids = symbols.map(table.ids)
    stems = symbols.str.replace(r"[-.]\d+$", "", regex=True)
    for spelling in (
        symbols.str.replace(".", "-", regex=False),
        symbols.str.upper(),
        stems.where(stems.isin(set(symbols))),
    ):
        ids = ids.where(ids.notna(), spelling.map(table.ids))
    return ids


def _check_symbols(symbols: pd.Series, any_ids: bool, where: str) -> None:
    if any_ids or not len(symbols):
        return
    if symbols.str.fullmatch(r"\d+").all():
        raise InputError(
            f"{where}: var", f"gene names are numbers ({', '.join(symbols[:3])})",
            "Give Ensembl ids or symbols as index",
        )  # fmt: skip
    foreign = symbols.str.fullmatch(r"[A-Z][a-z]+[a-z0-9.-]*|mt-.*")
    if foreign.mean() > 0.5:
        raise InputError(
            f"{where}: var", f"symbols look like mouse or rat genes ({', '.join(symbols[foreign][:3])})",
            "Give human genes, or map them to human orthologues",
        )  # fmt: skip


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
