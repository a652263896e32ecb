"""Names of genes: Ensembl ids where a file gives them, and symbols."""

import pandas as pd

from cell2text.errors import InputError

ENSEMBL = r"ENSG\d{11}"
ID_COLUMNS = ("gene_ids", "gene_id", "ensembl_id", "ensembl_ids", "ensembl", "feature_id")
SYMBOL_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "gene_names", "gene_name", "symbol")
MITOCHONDRIAL = "MT-"  # how the symbols of the mitochondrial genome's genes begin


def name_genes(var: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return the ids of genes as index and their symbols as the column ``symbol``.

    Ids are Ensembl's, without version, where the index or one of ``ID_COLUMNS`` holds them for at least
    one gene; a gene without one keeps its name. Symbols are taken from ``SYMBOL_COLUMNS``, or else are
    the names themselves.

    Parameters
    ----------
    var
        A file's table of genes, one row a gene.
    where
        The file, for messages.

    Raises
    ------
    InputError
        If two genes have the same id.
    """
    names = pd.Series(var.index.astype(str), index=var.index)
    candidates = [names, *(var[column].astype(str) for column in ID_COLUMNS if column in var)]
    ids = next((ids for ids in candidates if ids.str.match(ENSEMBL).any()), names)
    ids = ids.where(ids.str.match(ENSEMBL), names).str.replace(rf"^({ENSEMBL})\.\d+$", r"\1", regex=True)
    if ids.duplicated().any():
        raise InputError(
            f"{where}: var", f"the gene {ids[ids.duplicated()].iloc[0]} is there twice", "Keep one row a gene"
        )
    column = next((column for column in SYMBOL_COLUMNS if column in var), None)
    symbols = names if column is None else var[column].astype(object)
    return pd.DataFrame(
        {"symbol": symbols.where(symbols.notna(), names).astype(str).to_numpy()},
        index=pd.Index(ids.to_numpy(), name="gene_id"),
    )
