"""What the rows of a file are: genes that can be named, or peaks, antibodies, transcripts, genes of a mouse."""

import logging
from typing import NamedTuple

import pandas as pd

from cell2text.cells.gene_names import ENSEMBL
from cell2text.errors import InputError

log = logging.getLogger("cell2text.genes")

GENE_TYPES = ("gene expression", "gex", "rna", "gene")
OTHER_TYPES = {
    "peaks": "regions",
    "antibody capture": "antibodies",
    "multiplexing capture": "antibodies",
    "antigen capture": "antibodies",
    "crispr guide capture": "guides",
    "custom": "other features",
}
# Names of other species' genes: how Cell Ranger and Seurat prefix them in a mixture, and the ids of databases
OTHER_SPECIES = (
    r"^(?:(?:GRCm|mm|mRatBN|Rnor_|rn)[\d.]*\d|(?i:mouse))[-_.]+|^ENS[A-Z]{3,}G\d{11}|^FBgn\d{7}|^WBGene\d{8}|^MGI:\d"
    r"|^RGD:?\d|^ZDB-GENE-|^AT[1-5CM]G\d{5}|^Y[A-P][LR]\d{3}[WC](?:-[A-Z])?$"
)
# Rows that are no genes, by name
NOT_GENES = {
    "regions": (
        r"(?i:chr)\w*(?:\.\d)?[:_.-]\d+[:_.-]\d+|chr\w+:\d+"
        r"|(?:\d{1,2}|[XYM]|MT|[A-Z]{1,2}\d{5,8}(?:[.-]\d+)?)[:_.-]\d+[:_.-]\d{3,}"
    ),
    "antibodies": (
        r"(?i:(?:adt|anti|ab|hto|prot)[-_. ].+|(?:hashtag|totalseq).*"
        r"|.+[-_. |:](?:total[-_ ]?(?:seq)?[-_ ]?[abcd]\d*|adt|hto|pabo|prot|protein|abseq))"
    ),
    "guides": r"(?:sg|g)RNA.*|.+[-_.](?:sg|g)RNA.*|(?i:non[-_. ]?target.*)|sg[A-Z].*[-_.]\d+",
    "spike-ins": r"(?i:.*ERCC[-_.]\d{5})",
    "counters": r"__\w+|N_(?:unmapped|multimapping|noFeature|ambiguous)",
}
RNA = "Give the counts of genes (RNA) of the same cells"
NAME_THEM = "Give Ensembl ids or symbols as index, or symbols in the column gene_symbol of var"
ORTHOLOGUES = "If they are of mice, set `species` to mouse (docs/mouse.md); otherwise give human orthologues"


class _Wrong(NamedTuple):
    names: str
    problem: str
    fix: str


_UNIPROT = r"(?:[OPQ]\d[A-Z\d]{3}\d|[A-NR-Z]\d(?:[A-Z][A-Z\d]{2}\d){1,2})(?:-\d+)?"
# What stands in the place of symbols
_WRONG = (
    _Wrong(r"\d+(?:\.0)?", "gene names are numbers, such as row numbers or NCBI (Entrez) ids", NAME_THEM),
    _Wrong(r"(?:HGNC|GeneID|NCBI)[:_]?\d+|LOC\d+", "genes have ids of HGNC or NCBI, but no symbols", NAME_THEM),
    _Wrong(
        r"ENS[A-Z]*T\d{11}.*|[NX][MR]_\d{5,}.*",
        "rows are transcripts, not genes",
        "Sum the counts of each gene's transcripts (tximport does), and give genes",
    ),
    _Wrong(rf"ENS[A-Z]*P\d{{11}}.*|[NX]P_\d{{5,}}.*|{_UNIPROT}", "rows are proteins, not genes", RNA),
    _Wrong(
        r"ILMN_\d+|(?:\d|AFFX).*_at|A_\d+_P\d+",
        "rows are probes of a microarray, not genes",
        "Give the counts of a sequencing experiment",
    ),
)
_NO_SYMBOLS = _Wrong(
    rf"{ENSEMBL}.*",
    "genes have Ensembl ids but no symbols, which gene sets need",
    "Set `genes: table` in the config to a table of gene_id and symbol, such as HGNC's complete set, or add the column "
    "feature_name to var",
)
_LABELS = {
    "regions": "genomic regions, such as ATAC peaks",
    "antibodies": "antibodies or hashtags",
    "guides": "CRISPR guides",
}
# What antibodies are called, but no gene
_ANTIGENS = (
    r"(?:CD3|CD8|CD16|CD20|CD25|CD45|CD45R[AO]|CD56|CD57|CD62L|CD66b|CD103|CD11[abc]|CD123|CD127|CD161|HLA-DR"
    r"|Ig[GMD]\d?|PD-1)(?:[-_.]\d)?"
)
# Families of which any set of a hundred human genes has a member
_FAMILIES = (
    r"(?i:ABC[A-G]|ACT|ADAM|AKT|ALDH|ANX|APO|ATP\d|BCL|CACN|CASP|CC[LRN]|CD\d|CDH|CDK|CEBP|CHRN|CLDN|CLEC|COL\d|CTS"
    r"|CX[CR]|CYP|DUSP|EGF|EPH|FAM\d|FCG?E?R|FGF|FOX|GABR|GATA|GRI|GZM|H[1-4][-ABC]|HLA-|HOX|HSP|IF[IN]|IGF?[HKL]?"
    r"|IL\d|ITG|JAK|JUN|KCN|KIR|KLF|KLR|KRT|LAM[ABC]|LGALS|LINC|MAP\d?K|MMP|MT-|MUC|MYH|NDUF|NFK|NKX|NOTCH|NR\d|OR\d"
    r"|PAX|PCDH|PDGF|PRDM|PSM|RAB\d|RP[LS]\d|S100|SERPIN|SLC\d|SMAD|SOX|STAT|TBX|TGF|TLR|TMEM|TNF|TR[ABDGI]|TUB|UBE"
    r"|VEGF|WNT|ZNF)"
)
# species, symbols, and the share of them from which on the species is not human
_SYMBOLS_OF_OTHERS = (
    ("mouse or rat", r"[A-Z][a-z]+[a-z0-9.-]*", 0.5),
    ("zebrafish", r"(?:si|zgc|wu|im):.*", 0.01),
    ("fruit fly", r"CG\d{4,5}|Rp[LS]\d.*", 0.01),
)
MOST = 0.9  # of the rows
MIN_GENES = 2000  # a file with as many other rows has genes, however many peaks come with them
MIN_NAMES = 100  # fewer names may be a panel of any kind


def find_kinds(names: pd.Series, types: pd.Series | None) -> pd.Series:
    """Return for each row what it is if it is no gene (``regions``, ``antibodies``, ...), or "".

    Parameters
    ----------
    names
        Names of the rows, str.
    types
        10x feature types of the rows, str; None if the file has none.
    """
    kinds = pd.Series("", index=names.index)
    for kind, pattern in NOT_GENES.items():
        kinds = kinds.mask(names.str.fullmatch(pattern), kind)
    if types is not None:
        types = types.str.casefold()
        genes = types.isin(GENE_TYPES)
        other = ~genes & (genes.any() | types.isin(list(OTHER_TYPES)))
        kinds = kinds.mask(genes & (kinds != "spike-ins"), "").mask(
            other, types.map(OTHER_TYPES).fillna("other features")
        )
    return kinds


def check_kinds(names: pd.Series, kinds: pd.Series, where: str) -> None:
    """Check that a file has genes among its rows.

    Parameters
    ----------
    names
        Names of the rows.
    kinds
        From ``find_kinds``.
    where
        The file, for messages.

    Raises
    ------
    InputError
        If nearly all rows are peaks, antibodies, guides or other features.
    """
    genes = names[kinds == ""]
    if len(genes) < MIN_GENES and len(genes) < (1 - MOST) * len(names):
        kind = kinds[kinds != ""].mode()[0]
        raise wrong_genes(where, f"rows are {_LABELS.get(kind, kind)}, not genes", names[kinds == kind], RNA)
    # a panel of antibodies without feature types; none has as many as 500
    antigens = genes[genes.str.fullmatch(_ANTIGENS)]
    if len(genes) < 500 and len(antigens) >= 3:
        raise wrong_genes(where, f"rows are {_LABELS['antibodies']}, not genes", antigens, RNA)


def check_species(names: pd.Series, symbols: pd.Series, other: pd.Series, any_ids: bool, where: str) -> None:
    """Check that genes are human.

    Parameters
    ----------
    names, symbols
        Names of the genes in the index of the file, and their symbols.
    other
        Which of them have an id or a prefix of another species; bool.
    any_ids
        Whether the file has Ensembl ids of human genes, so that symbols need no check.
    where
        The file, for messages.

    Raises
    ------
    InputError
        If nearly all genes are of another species, or most symbols look like those of a mouse.
    """
    if other.mean() > MOST:
        raise wrong_genes(where, "genes are from other species", names[other], ORTHOLOGUES)
    if any_ids:
        return
    symbols = symbols[~other]
    for species, pattern, share in _SYMBOLS_OF_OTHERS:
        foreign = symbols.str.fullmatch(pattern)
        if foreign.mean() > share:
            raise wrong_genes(where, f"symbols look like {species} genes", symbols[foreign], ORTHOLOGUES)


def check_names(symbols: pd.Series, any_table: bool, where: str) -> None:
    """Check that what stands in the place of symbols are symbols.

    Parameters
    ----------
    symbols
        Symbols of the human genes: those of the table, or as in the file.
    any_table
        Whether there is a table of genes. If it lacks the ids, this is only logged.
    where
        The file, for messages.

    Raises
    ------
    InputError
        If they are transcripts, proteins, probes, numbers, Ensembl ids or made-up names.
    """
    for wrong in (*_WRONG, _NO_SYMBOLS):
        found = symbols.str.fullmatch(wrong.names)
        if found.mean() <= MOST or not len(found):
            continue
        if wrong is not _NO_SYMBOLS or not any_table:
            raise wrong_genes(where, wrong.problem, symbols[found], wrong.fix)
        log.warning(
            "%s: %d of %d genes have an Ensembl id without a symbol in the table, and gene sets need symbols",
            where,
            found.sum(),
            len(found),
        )
    named = symbols[~symbols.str.fullmatch(_NO_SYMBOLS.names)].drop_duplicates()
    if len(named) >= MIN_NAMES and not named.str.match(_FAMILIES).any():
        raise wrong_genes(where, f"none of the {len(named)} names is that of a usual human gene", named, NAME_THEM)


def wrong_genes(where: str, problem: str, examples: pd.Series, fix: str) -> InputError:
    """Return an error about the genes of a file, with three of them as examples."""
    return InputError(f"{where}: var", f"{problem} ({', '.join(examples[:3])})", fix)
