"""Input of the report: the files of a run, read and checked."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cell2text.confidence.decisions import Confidence
from cell2text.contracts import (
    CELLS,
    DESCRIPTIONS,
    EMBEDDINGS,
    HELD_OUT,
    HISTORY,
    METRICS,
    SEEN,
    TERM_SLOTS,
    TERMS,
)
from cell2text.errors import InputError
from cell2text.evaluation.methods import FINE_TUNED
from cell2text.files import check_hashes, read_json, read_jsonl
from cell2text.grammar import PATHWAY, Terms
from cell2text.spreadsheet import restore_text

METHOD = FINE_TUNED
SLOTS = (*TERM_SLOTS, "pathways")
RUN_AGAIN = "Run the workflow again"
PER_CLASS = ("split", "method", "slot", "id", "name", "n", "precision", "recall", "f1")
CONFUSION = ("split", "method", "slot", "true_id", "true_name", "predicted_id", "predicted_name", "n")
CALIBRATION = ("split", "method", "slot", "bin_low", "bin_high", "confidence", "accuracy", "n")
SLOT_NAMES = {
    "pathways": "gene programmes",
    SEEN: "cell type (seen in training)",
    HELD_OUT: "cell type (held out)",
}
_TEXT_COLUMNS = {"split", "method", "slot", "metric", "resampled", "id", "name", *CONFUSION[3:7]}
_NUMBERS = ("value", "low", "high", "n", "difference", "difference_low", "difference_high")


@dataclass(frozen=True)
class RunFiles:
    """Paths of the files that the report is made from, named as in the rule.

    Parameters
    ----------
    metrics, per_class, confusion, calibration
        Tables of the evaluation, TSV.
    provenance, audit
        JSON.
    comparison
        Plot that compares the methods, SVG.
    confidence
        How scores became confidences, written by ``calibrate``, JSON.
    generations
        Generated descriptions of the test cells, one JSONL file per shard.
    corpus, descriptions, terms
        Parquet.
    qc, qc_plots
        JSON and SVG of each dataset, in the same order.
    embeddings
        One safetensors file per dataset and shard.
    encoder
        Directory of the encoder. It holds ``history.parquet`` if the encoder was pre-trained in this run.
    model
        Directory of the fine-tuned model.
    """

    metrics: str
    per_class: str
    confusion: str
    calibration: str
    provenance: str
    comparison: str
    confidence: str
    generations: Iterable[str]
    corpus: str
    descriptions: str
    terms: str
    audit: str
    qc: Iterable[str]
    qc_plots: Iterable[str]
    embeddings: Iterable[str]
    encoder: str
    model: str


@dataclass(frozen=True)
class Results:
    """Results of a run; tables with several splits are cut to the test split.

    Parameters
    ----------
    metrics, per_class, confusion, calibration
        Tables of the evaluation.
    cells
        Predictions for each test cell (``contracts.PREDICTIONS``), sorted by cell id, with the reference in
        ``true_{slot}_id``, ``true_pathway_ids`` and ``true_text``, and with ``dataset_id`` and ``donor``. Unknown
        terms are None.
    pooled
        Pooled embedding of each of these cells, float32 (cells, dimensions).
    terms
        Names of the terms.
    depths
        Depth of the terms in their ontology, indexed by slot and id; NA where a slot has none.
    confidence
        How scores became confidences, and the thresholds of reported terms.
    datasets
        Datasets of the corpus.
    history
        Losses of the training stages (``contracts.HISTORY``): of the encoder, if it was pre-trained, and of
        fine-tuning.
    model, provenance, audit
        Content of the JSON files.
    qc
        Summary of each dataset, with the path of its plot under ``plot``.
    """

    metrics: pd.DataFrame
    per_class: pd.DataFrame
    confusion: pd.DataFrame
    calibration: pd.DataFrame
    cells: pd.DataFrame
    pooled: np.ndarray
    terms: Terms
    depths: pd.Series
    confidence: Confidence
    datasets: list[str]
    history: pd.DataFrame
    model: dict[str, Any]
    provenance: dict[str, Any]
    audit: dict[str, Any]
    qc: list[dict[str, Any]]

    def metric(self, method: str, slot: str, metric: str) -> dict[str, float] | None:
        """Return the numbers of a metric's row in ``contracts.METRICS``; None if it was not computed."""
        table = self.metrics
        rows = table[(table["method"] == method) & (table["slot"] == slot) & (table["metric"] == metric)]
        rows = rows[rows["value"].notna()]
        return rows.iloc[0][list(_NUMBERS)].astype(float).to_dict() if len(rows) else None

    def name(self, slot: str, term: str | None) -> str:
        """Return the name of a slot's term, or its id if it has no name."""
        if term is None:
            return "not determined"
        slot = {"pathways": PATHWAY, SEEN: "cell_type", HELD_OUT: "cell_type"}.get(slot, slot)
        return self.terms.name.get(slot, {}).get(term, term)

    @property
    def requested(self) -> float | None:
        """The share of the reported terms that should be right; None if no slot has a threshold."""
        return next((one.confidence for one in self.confidence.thresholds.values()), None)

    def resampled(self) -> tuple[str | None, int]:
        """Return what was resampled for metrics of all test cells (donor, cell or None), and their number of donors."""
        about = self.provenance["bootstrap"]["splits"]["test"]
        return about["unit"], about["donors"]


def slot_name(slot: str) -> str:
    """Return a slot as readers know it.

    Examples
    --------
    >>> slot_name("cell_type"), slot_name("pathways")
    ('cell type', 'gene programmes')
    """
    return SLOT_NAMES.get(slot, slot.replace("_", " "))


def read_results(files: RunFiles) -> Results:
    """Read and check the files of a run.

    Raises
    ------
    InputError
        If a file is missing or invalid.
    """
    model = Path(files.model)
    single = [files.metrics, files.per_class, files.confusion, files.calibration, files.provenance]
    single += [files.comparison, files.confidence, files.corpus, files.descriptions, files.terms, files.audit]
    parts = [*files.generations, *files.qc, *files.qc_plots, *files.embeddings]
    for path in (*single, *parts, model / "history.parquet", model / "cell2text.json"):
        if not Path(path).is_file():
            raise InputError(path, "no such file", RUN_AGAIN)
    check_hashes([files.metrics, files.per_class, files.confusion, files.calibration], files.provenance)
    terms = TERMS.read(files.terms)
    corpus = CELLS.read(files.corpus, ["cell_id", "dataset_id", "donor"])
    cells = _read_cells(files, corpus)
    return Results(
        metrics=_read_test_rows(files.metrics, METRICS),
        per_class=_read_test_rows(files.per_class, PER_CLASS),
        confusion=_read_test_rows(files.confusion, CONFUSION),
        calibration=_read_test_rows(files.calibration, CALIBRATION),
        cells=cells,
        pooled=_read_pooled(files.embeddings, cells["cell_id"]),
        terms=Terms(terms),
        depths=terms.set_index(["slot", "id"])["depth"],
        confidence=Confidence.load(files.confidence),
        datasets=sorted(corpus["dataset_id"].unique()),
        history=_read_history(Path(files.encoder), model),
        model=read_json(model / "cell2text.json"),
        provenance=read_json(files.provenance),
        audit=read_json(files.audit),
        qc=[read_json(path) | {"plot": plot} for path, plot in zip(files.qc, files.qc_plots, strict=True)],
    )


def _read_test_rows(path: str | Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """Return the test split of a table; text such as "NA" is not read as missing, because it may be a name."""
    text = dict.fromkeys(_TEXT_COLUMNS, str)
    table = restore_text(pd.read_csv(path, sep="\t", dtype=text, keep_default_na=False, na_values={}))
    missing = [column for column in columns if column not in table]
    if missing:
        raise InputError(path, f"columns missing: {', '.join(missing)}", RUN_AGAIN)
    numbers = [column for column in columns if column not in _TEXT_COLUMNS]
    table[numbers] = table[numbers].apply(pd.to_numeric, errors="coerce")
    return table[table["split"] == "test"].reset_index(drop=True)


def _read_cells(files: RunFiles, corpus: pd.DataFrame) -> pd.DataFrame:
    generated = pd.DataFrame([row for path in files.generations for row in read_jsonl(path)])
    if generated.empty:
        raise InputError(files.model, "there are no descriptions of test cells", "Put some cells into the test split")
    reference = DESCRIPTIONS.read(files.descriptions).drop(columns="split")
    reference = reference.rename(columns=lambda name: name if name == "cell_id" else f"true_{name}")
    cells = generated.merge(reference, on="cell_id", how="left", validate="one_to_one", indicator=True)
    cells = cells.merge(corpus, on="cell_id", how="left")
    missing = cells["cell_id"][cells["_merge"] == "left_only"]
    if len(missing):
        raise InputError(files.descriptions, f"no reference for {len(missing)} described cells", RUN_AGAIN)
    cells = cells.drop(columns="_merge").sort_values("cell_id", ignore_index=True)
    for slot in TERM_SLOTS:
        for column in (f"{slot}_id", f"{slot}_reported_id", f"true_{slot}_id"):
            cells[column] = cells[column].astype(object).where(cells[column].notna(), None)
    return cells


def _read_history(encoder: Path, model: Path) -> pd.DataFrame:
    """Return the history of fine-tuning, followed by that of the encoder's pre-training if there was one."""
    history, pretraining = HISTORY.read(model / "history.parquet"), encoder / "history.parquet"
    return pd.concat([history, HISTORY.read(pretraining)], ignore_index=True) if pretraining.is_file() else history


def _read_pooled(paths: Iterable[str], cell_ids: pd.Series) -> np.ndarray:
    row_of = {cell: row for row, cell in enumerate(cell_ids)}
    pooled: np.ndarray | None = None
    found = np.zeros(len(row_of), dtype=bool)
    for path in paths:
        tensors, ids = EMBEDDINGS.read(path, ["pooled"])
        wanted = np.array([i for i, cell in enumerate(ids) if cell in row_of], dtype=int)
        if not len(wanted):
            continue
        if pooled is None:
            pooled = np.zeros((len(row_of), tensors["pooled"].shape[1]), dtype=np.float32)
        rows = [row_of[ids[i]] for i in wanted]
        pooled[rows] = tensors["pooled"][wanted]
        found[rows] = True
    if pooled is None or not found.all():
        raise InputError("embeddings", f"{(~found).sum()} described cells have no embedding", RUN_AGAIN)
    return pooled
