"""Spellings of gene symbols: what R, Seurat, Cell Ranger and older annotations make of them, and the usual form."""

from itertools import product

import pandas as pd

ENSEMBL = r"(?<![A-Z0-9])ENSG\d{11}(?!\d)"
# Prefixes of human genes in a mixture of species: Cell Ranger's (also with Seurat's hyphens), and CITE-seq's
HUMAN_GENOME = r"^(?:GRCh\d+(?:\.p\d+)?|hg\d+|(?i:human))[-_.]+"
# an Ensembl id joined to a symbol, as in MATR3_ENSG00000015479 (CELLxGENE) or ENSG00000015479-MATR3
_JOINED_ID = rf"[-_|:; ]?{ENSEMBL}(?:\.\d+)?(?:[-_.]PAR[-_.]Y)?[-_|:; ]?"
# Clones, whose names have a dot of their own: AC000068.1, RP11-34P13.7
_CLONE = r"[A-Z]{1,2}\d{5,8}\.\d+|(?:(?:RP|KB|LL|GS)\d+|CT[ABCD]|XX)[.-].*"
# All 37 genes of the mitochondrial genome (GENCODE); their ids never changed, their names did
MITOCHONDRIAL_IDS = {f"MT-{name}": f"ENSG00000{number}" for name, number in {
    "ND1": 198888, "ND2": 198763, "CO1": 198804, "CO2": 198712, "ATP8": 228253, "ATP6": 198899, "CO3": 198938,
    "ND3": 198840, "ND4L": 212907, "ND4": 198886, "ND5": 198786, "ND6": 198695, "CYB": 198727, "RNR1": 211459,
    "RNR2": 210082, "TF": 210049, "TV": 210077, "TL1": 209082, "TI": 210100, "TQ": 210107, "TM": 210112, "TW": 210117,
    "TA": 210127, "TN": 210135, "TC": 210140, "TY": 210144, "TS1": 210151, "TD": 210154, "TK": 210156, "TG": 210164,
    "TR": 210174, "TH": 210176, "TS2": 210184, "TL2": 210191, "TE": 210194, "TT": 210195, "TP": 210196,
}.items()}  # fmt: skip
MITOCHONDRIAL_SYMBOLS = {gene: symbol for symbol, gene in MITOCHONDRIAL_IDS.items()}
_ROMAN = {"1": "I", "2": "II", "3": "III"}


def _old_names(name: str) -> list[str]:
    """Return a mitochondrial gene's names without prefix: ``CO1``, ``COX1``, ``COI`` and ``COXI``."""
    if name.startswith("CO"):
        return [f"{stem}{number}" for stem, number in product(("CO", "COX"), (name[2], _ROMAN[name[2]]))]
    return [name, *{"CYB": ["CYTB"], "ATP6": ["ATPASE6"], "ATP8": ["ATPASE8"]}.get(name, [])]


# Proteins are also written without a prefix (NCBI's annotation), but COX1 and COX2 are aliases of PTGS1 and PTGS2.
_BARE = {old: symbol for symbol in list(MITOCHONDRIAL_IDS)[:13] for old in _old_names(symbol[3:])}
_PREFIXED = {
    f"MT{joint}{old}": symbol
    for symbol in MITOCHONDRIAL_IDS
    for old in _old_names(symbol[3:])
    # MTTP is no transfer RNA, so those need a joint
    for joint in ("-", ".", "_", ":", *([] if symbol.startswith("MT-T") else [""]))
}
MIN_BARE = 10  # of 13 mitochondrial proteins


def clean_names(column: pd.Series) -> pd.Series:
    """Remove quotation marks, a genome's prefix and a joined Ensembl id; "" where no letter remains.

    Parameters
    ----------
    column
        Names as in the file, str.
    """
    names = column.str.strip(" \t\"'").str.replace(HUMAN_GENOME, "", regex=True)
    names = names.str.replace(_JOINED_ID, "", regex=True)
    return names.mask(names.isin(["nan", "None"]) | ~names.str.contains(r"[A-Za-z]"), "")


def respell(names: pd.Series) -> pd.Series:
    """Return the usual spelling of symbols, without a table of genes.

    Each rule changes names that have no other meaning:

    - The 37 mitochondrial genes: ``MT.ND1``, ``MT_ND1``, ``mt-Nd1``, ``MTND1`` and ``MT-COX1`` become ``MT-ND1`` and
      ``MT-CO1``. Names without prefix (``ND1``, ``COX1``) do if the file has at least ten of the 13 proteins.
    - ``HLA.A`` becomes ``HLA-A``.
    - If no name in the file has a hyphen, R has replaced them all: dots become hyphens, except in names of clones
      (``AC000068.1``) and in repeated names made unique (``MATR3.1`` next to ``MATR3``).
    - If most names are in lower case, they become upper case, except ``orf`` as in ``C1orf112``.

    No name is changed to one that the file has in another row, so no rows are merged.

    Parameters
    ----------
    names
        From ``clean_names``.
    """
    new = names
    if names.str.islower().mean() > 0.5:
        new = names.str.upper().str.replace(r"^(C(?:\d+|[XY]))ORF(\d+)", r"\1orf\2", regex=True)
    upper = new.str.upper()
    hyphenated = new.str.replace(".", "-", regex=False)
    if not names.str.contains("-", regex=False).any():
        copies = names.str.replace(r"\.\d+$", "", regex=True).isin(set(names)) & names.str.contains(r"\.\d+$")
        new = new.where(copies | upper.str.fullmatch(_CLONE), hyphenated)
    new = new.mask(upper.str.startswith("HLA."), upper.str.replace(".", "-", regex=False))
    spellings = _PREFIXED | (_BARE if upper.map(_BARE).nunique() >= MIN_BARE else {})
    new = upper.map(spellings).fillna(new)
    return new.where((new == names) | ~new.isin(set(names)), names)
