"""Which gene programmes a cell runs: AUCell scores, and the descriptions written with them."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import anndata as ad
import decoupler as dc
import numba
import numpy as np
import pandas as pd
import pyarrow as pa

from cell2text.cell_files import find_cells, read_blocks, read_genes
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
DESCRIBED_AT_ONCE = 1 << 16
ROUNDING = 1e-9  # a standard deviation of scores up to this comes of rounding
COLLECTIONS = ("HALLMARK", "REACTOME", "KEGG_MEDICUS", "KEGG", "BIOCARTA", "PID", "WP", "GOBP", "GOCC", "GOMF")
ABBREVIATIONS = frozenset(
    re.findall(
        r"\w+",
        "AKT AMPK ATM ATP ATR BCR BMP DNA EGF EGFR ERBB ERK FGF GPCR GTP IFN IGF JAK KRAS MAPK MHC MRNA MTOR MYC "
        "NADH NFKB NK NKT PDGF PPAR PTEN RAS RHO RNA RRNA SRC STAT TCA TCR TGF TLR TNF TNFA TRNA UV VEGF WNT",
    )
)


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
    genes of the file are ranked by their counts (to normalise a cell would not change the order), so the score
    of a cell does not depend on the cells beside it. Genes with equal counts, at the last of the top genes
    too, stand in an order that decoupler draws once, with a fixed seed, for all cells.

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
        Where to write the scores (``contracts.PATHWAY_SCORES``), in the order of the dataset, a block at a time.

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
    rows, training = find_cells(cells_file, corpus_file), find_cells(cells_file, corpus_file, "train")
    top_genes = count_top_genes(cells_file, training if training.any() else rows)
    progress = Progress(int(rows.sum()), "cells")
    # A symbol that two genes share goes with the first of them.
    own = ~symbols.duplicated().to_numpy()
    var = pd.DataFrame(index=symbols[own].to_numpy())

    def score() -> Iterator[pd.DataFrame]:
        for ids, counts in read_blocks(cells_file, rows, CELLS_AT_ONCE):
            block = ad.AnnData(counts[:, own], obs=pd.DataFrame(index=ids), var=var)
            dc.mt.aucell(block, net, tmin=min_genes, empty=False, n_up=top_genes)
            scores = block.obsm["score_aucell"].reindex(columns=list(sets)).astype("float32")
            yield scores.reset_index(names="cell_id")
            progress.advance(len(ids))

    PATHWAY_SCORES.write_parts(score(), path, rest=sets)


def count_top_genes(path: str | Path, rows: np.ndarray) -> int:
    """Return over how many top genes of a cell AUCell integrates: 5% of the genes, or fewer.

    A cell with fewer genes than that would fill the rest of its ranks with genes it does not express, so
    the number is at most what 95% of the cells express.

    Parameters
    ----------
    path
        Filtered counts of the dataset.
    rows
        Which of its cells to ask: those in training, or all where none is.
    """
    expressed = [np.diff(counts.indptr) for _, counts in read_blocks(path, rows)]
    limit = np.quantile(np.concatenate(expressed), 0.05) if expressed else 0
    return max(2, int(min(np.ceil(TOP_SHARE * len(read_genes(path))), limit)))


def write_descriptions(
    corpus_file: str | Path,
    score_files: Iterable[str | Path],
    pathways_file: str | Path | None,
    min_active_share: float,
    per_cell: int,
    descriptions_file: str | Path,
    terms_file: str | Path,
    kept_file: str | Path,
) -> None:
    """Write each cell's slots and its description, the terms they draw on, and the gene sets kept.

    The scores are read a part at a time. Of a cell only the numbers of its terms and gene sets are held, and
    cells with the same slots share one text.

    Parameters
    ----------
    corpus_file
        The corpus (``contracts.CELLS``).
    score_files
        AUCell scores of each dataset.
    pathways_file
        TSV that gives each gene set ``id``, ``name`` and ``description``; None where there is none.
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
    columns = [f"{slot}_id" for slot in TERM_SLOTS]
    corpus = CELLS.read(corpus_file, ["cell_id", "split", *columns], categories=["split", *columns])
    cells, training = pd.Index(corpus["cell_id"]), (corpus["split"] == "train").to_numpy()
    score_files = list(score_files)

    def read_scores() -> Iterator[tuple[np.ndarray, pd.DataFrame]]:
        for file in score_files:
            for part in PATHWAY_SCORES.read_parts(file):
                yield cells.get_indexer(part.pop("cell_id")), part

    def read_training() -> Iterator[pd.DataFrame]:
        return (scores[training[rows]] for rows, scores in read_scores())

    kept = fit_sets(read_training, per_cell, min_active_share)
    if kept.empty:
        raise InputError(
            "config: pathways: min_active_share",
            f"no gene set is active in more than {min_active_share:.3%} of the training cells",
            "Lower it, or give other gene sets",
        )
    log.info("%d gene sets kept", len(kept))
    told = np.full((len(cells), per_cell), -2, dtype=np.int32)
    for rows, scores in read_scores():
        told[rows] = choose_pathways(scores, kept, per_cell)
    if (told == -2).any():
        raise ValueError(f"{cells[(told == -2).any(axis=1)][0]} has no scores")
    table = pd.concat(
        [*(slot_terms(slot) for slot in TERM_SLOTS), name_pathways(list(kept.index), pathways_file)], ignore_index=True
    )
    DESCRIPTIONS.write_parts(_describe(corpus, told, list(kept.index), Terms(table)), descriptions_file)
    TERMS.write(table, terms_file)
    write_json(kept.rename_axis("id").reset_index().to_dict("records"), kept_file)


def _describe(corpus: pd.DataFrame, told: np.ndarray, sets: list[str], terms: Terms) -> Iterator[pa.Table]:
    """Yield the rows of the descriptions, each distinct set of slots rendered once a part."""
    slots = [corpus[f"{slot}_id"] for slot in TERM_SLOTS]
    numbers = np.column_stack([*(column.cat.codes for column in slots), told])
    # what is not known has the number -1, the last
    ids = [[*column.cat.categories, None] for column in slots] + [[*sets, None]] * told.shape[1]
    progress = Progress(len(corpus), "cells")
    for start in range(0, len(corpus), DESCRIBED_AT_ONCE):
        part = slice(start, start + DESCRIBED_AT_ONCE)
        distinct, which = np.unique(numbers[part], axis=0, return_inverse=True)
        described = []
        for row in distinct:
            known = [names[number] for names, number in zip(ids, row, strict=True)]
            pathways = tuple(name for name in known[len(slots) :] if name)
            described.append(describe(Slots(**dict(zip(TERM_SLOTS, known, strict=False)), pathways=pathways), terms))
        columns = {f"{slot}_id": [getattr(slots, slot) for slots in described] for slot in TERM_SLOTS}
        columns["pathway_ids"] = [list(slots.pathways) for slots in described]
        columns["definition"] = [slots.definition for slots in described]
        columns["text"] = [render(slots, terms) for slots in described]
        cells = {name: pa.array(corpus[name][part].astype(object), pa.string()) for name in ("cell_id", "split")}
        types = DESCRIPTIONS.columns
        yield pa.table(
            cells | {name: pa.array(values, types[name]).take(pa.array(which)) for name, values in columns.items()}
        )
        progress.advance(len(which))


def fit_sets(read: Callable[[], Iterable[pd.DataFrame]], per_cell: int, min_active_share: float) -> pd.DataFrame:
    """Return mean, standard deviation and active share of the gene sets worth telling.

    A set is active in a cell if it is among the ``per_cell`` sets that ``choose_pathways`` would choose
    from all of them. A threshold on the standardised score would not do: a programme that half of the
    cells run never lies far above its mean.

    Parameters
    ----------
    read
        Yields the scores of the training cells, cells by gene sets, some cells at a time; called three times.
        NaN where a cell's dataset does not measure a set.
    per_cell
        How many sets are told of a cell.
    min_active_share
        A set is kept if it is active in more than this share of the cells in which it is measured.

    Returns
    -------
    DataFrame
        ``mean``, ``sd`` (of the population) and ``active_share`` of each kept set, in the order of the scores.
    """
    number = total = 0
    for scores in read():
        number, total = number + scores.notna().sum(), total + scores.astype(float).sum()
    if not np.any(number):
        return pd.DataFrame(columns=["mean", "sd", "active_share"])
    mean = total / number
    squares = sum(((scores - mean) ** 2).sum() for scores in read())
    fitted = pd.DataFrame({"mean": mean, "sd": np.sqrt(squares / number)})
    fitted = fitted[fitted["sd"] > ROUNDING]
    active = np.zeros(len(fitted))
    for scores in read():
        chosen = choose_pathways(scores, fitted, per_cell)
        active += np.bincount(chosen[chosen >= 0], minlength=len(fitted))
    fitted["active_share"] = active / number[fitted.index]
    return fitted[fitted["active_share"] > min_active_share]


def choose_pathways(scores: pd.DataFrame, fitted: pd.DataFrame, per_cell: int) -> np.ndarray:
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

    Returns
    -------
    array
        Rows of ``fitted``, int32 (cells, per_cell); -1 where there is no further set.
    """
    scores = scores[fitted.index]
    standard = ((scores - fitted["mean"]) / fitted["sd"]).where(scores > 0, -np.inf).to_numpy(dtype=float)
    best = np.argsort(-standard, axis=1, kind="stable")[:, :per_cell]
    chosen = np.where(np.isfinite(np.take_along_axis(standard, best, axis=1)), best, -1)
    return np.pad(chosen, ((0, 0), (0, per_cell - best.shape[1])), constant_values=-1).astype(np.int32)


def name_pathways(ids: list[str], path: str | Path | None) -> pd.DataFrame:
    """Return the rows that gene sets have among the terms (``contracts.TERMS``), which lack ``depth``.

    A set without a line in the table is named after its id (``readable_name``) and has no description.

    Parameters
    ----------
    ids
        Gene sets to name.
    path
        TSV with ``id``, ``name`` and ``description``; None where there is none.

    Raises
    ------
    InputError
        If a column is missing, two sets share a name, or a name would break the grammar of the text.
    """
    columns = ["id", "name", "description"]
    table = pd.DataFrame(columns=columns)
    if path is not None:
        table = pd.read_csv(path, sep="	", dtype=str, keep_default_na=False)
    if not set(columns) <= set(table):
        raise InputError(path, f"columns {', '.join(table)}", f"Give the columns {', '.join(columns)}")
    told = table.drop_duplicates("id").set_index("id").reindex(ids)
    readable = pd.Series({name: readable_name(name) for name in ids})
    whole = pd.Series({name: " ".join(name.replace("_", " ").split()) for name in ids})
    # APOPTOSIS of two collections stay apart by the name of the collection
    names = told["name"].fillna(readable.where(~readable.duplicated(keep=False), whole))
    descriptions = told["description"].fillna("")
    where = path or "config: pathways: gene_sets"
    if names.duplicated().any():
        raise InputError(
            where, f"two gene sets are named {names[names.duplicated()].iloc[0]}", "Give each its own name"
        )
    for column, values in (("name", names), ("description", descriptions)):
        broken = values[values.str.contains("; then ", regex=False)]
        if len(broken):
            raise InputError(
                f"{where}: {column}", f"{broken.iloc[0]!r} holds '; then ', which parts gene sets", "Reword it"
            )
    return pd.DataFrame({"slot": PATHWAY, "id": ids, "name": names.to_numpy(), "definition": descriptions.to_numpy()})


def readable_name(gene_set: str) -> str:
    """Return the name of a gene set in words, where its id is one of MSigDB's, in capitals and underscores.

    The collection's name is left out. Words with a digit and common abbreviations keep their capitals.

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
