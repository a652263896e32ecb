"""Gene sets: read from GMT files, with readable names."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from cell2text.errors import InputError
from cell2text.grammar import DEFINITIONS, PATHWAY, THEN
from cell2text.tables import read_rows, read_table

COLLECTIONS = ("HALLMARK", "REACTOME", "KEGG_MEDICUS", "KEGG", "BIOCARTA", "PID", "WP", "GOBP", "GOCC", "GOMF")
ABBREVIATIONS = frozenset(
    re.findall(
        r"\w+",
        "AKT AMPK ATM ATP ATR BCR BMP DNA EGF EGFR ERBB ERK FGF GPCR GTP IFN IGF JAK KRAS MAPK MHC MRNA MTOR MYC "
        "NADH NFKB NK NKT PDGF PPAR PTEN RAS RHO RNA RRNA SRC STAT TCA TCR TGF TLR TNF TNFA TRNA UV VEGF WNT",
    )
)


def read_gene_sets(path: str | Path) -> dict[str, list[str]]:
    """Return id -> gene symbols of a GMT file: one set per line, with id, description or link, then genes.

    Lines that begin with ``#`` are comments.

    Raises
    ------
    InputError
        If a line has no gene, an id repeats, or the file has no set.
    """
    sets: dict[str, list[str]] = {}
    for number, (name, *rest) in read_rows(path):
        if name.startswith("#"):
            continue
        genes = sorted({gene for gene in rest[1:] if gene})
        if not genes:
            raise InputError(
                f"{path} line {number}", "no gene in the set", "Write id, name and genes, with tabs between them"
            )
        if name in sets:
            raise InputError(f"{path} line {number}", f"the set {name} is there twice", "Keep one of the two")
        sets[name] = genes
    if not sets:
        raise InputError(path, "no gene set in it", "Name a GMT file under `pathways: gene_sets`")
    return sets


def find_members(sets: Iterable[Iterable[str]], symbols: Sequence[str]) -> sparse.csc_matrix:
    """Return 1 for the genes that belong to each set, float64 (genes, sets).

    Parameters
    ----------
    sets
        Symbols of the genes of each set.
    symbols
        Symbol of each gene. One that several genes share belongs to the first of them.
    """
    position = {symbol: row for row, symbol in reversed(list(enumerate(symbols)))}
    rows = [[position[gene] for gene in genes if gene in position] for genes in sets]
    ends = np.cumsum([0, *map(len, rows)])
    return sparse.csc_matrix((np.ones(ends[-1]), [row for one in rows for row in one], ends), (len(symbols), len(rows)))


def name_pathways(ids: list[str], path: str | Path | None) -> pd.DataFrame:
    """Return the terms of gene sets: rows of ``contracts.TERMS``, without ``depth`` and ``ancestors``.

    A set that is not in the table is named after its id (``readable_name``) and has no description.

    Parameters
    ----------
    ids
        Gene sets to name.
    path
        TSV with ``id``, ``name`` and ``description``, or None.

    Raises
    ------
    InputError
        If a column is missing, two sets share a name, or a name would break the grammar of the text.
    """
    columns = ["id", "name", "description"]
    table = pd.DataFrame(columns=columns)
    if path is not None:
        table = read_table(path, set(columns))
    if not set(columns) <= set(table):
        raise InputError(path, f"columns {', '.join(table)}", f"Give the columns {', '.join(columns)}")
    rows = table.drop_duplicates("id").set_index("id").reindex(ids)
    readable = pd.Series({name: readable_name(name) for name in ids})
    with_collection = pd.Series({name: " ".join(name.replace("_", " ").split()) for name in ids})
    # APOPTOSIS in two collections: keep the collection in the name to distinguish them
    names = rows["name"].fillna(readable.where(~readable.duplicated(keep=False), with_collection))
    descriptions = rows["description"].fillna("")
    where = path or "config: pathways: gene_sets"
    if names.duplicated().any():
        raise InputError(
            where, f"two gene sets are named {names[names.duplicated()].iloc[0]}", "Give each its own name"
        )
    for words, what in ((THEN, "separates gene sets"), (DEFINITIONS, "begins the explanations")):
        broken = names[names.str.contains(words, regex=False)]
        if len(broken):
            raise InputError(f"{where}: name", f"{broken.iloc[0]!r} contains {words!r}, which {what}", "Reword it")
    return pd.DataFrame({"slot": PATHWAY, "id": ids, "name": names.to_numpy(), "definition": descriptions.to_numpy()})


def readable_name(gene_set: str) -> str:
    """Return a readable name of a gene set from its id.

    Underscores become spaces. MSigDB ids, which are in capitals, also lose the name of their collection and become
    lower case, except for common abbreviations and words with a digit.

    Examples
    --------
    >>> readable_name("HALLMARK_TNFA_SIGNALING_VIA_NFKB"), readable_name("HALLMARK_UV_RESPONSE_DN")
    ('TNFA signaling via NFKB', 'UV response down')
    >>> readable_name("Regulation of TP53 Activity"), readable_name("my_CD8_signature")
    ('Regulation of TP53 Activity', 'my CD8 signature')
    """
    found = re.fullmatch(rf"({'|'.join(COLLECTIONS)})_+([A-Z0-9][A-Z0-9_]*)", gene_set)
    words = (found[2] if found else gene_set).replace("_", " ").split()
    return " ".join(
        word if not found or word in ABBREVIATIONS or re.search(r"\d", word) else {"DN": "down"}.get(word, word.lower())
        for word in words
    )
