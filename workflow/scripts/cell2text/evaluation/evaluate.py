"""Scores of all methods on the validation and test cells, with the provenance of the scores."""

import logging
import platform
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cell2text.contracts import CELLS, DESCRIPTIONS, METRICS, PREDICTIONS, TERM_SLOTS, TERMS
from cell2text.errors import InputError
from cell2text.evaluation.bootstrap import Bootstrap
from cell2text.evaluation.methods import FINE_TUNED
from cell2text.evaluation.metrics import Score, known, score_method, term_similarities
from cell2text.evaluation.sums import rate_programmes
from cell2text.evaluation.tables import calibration, confusion, per_class
from cell2text.files import read_json, read_jsonl, write_json
from cell2text.grammar import Terms
from cell2text.provenance import PACKAGE, hash_config, hash_file, library_version, versions
from cell2text.spreadsheet import write_tsv

log = logging.getLogger("cell2text.evaluation")

EVALUATED = ("validation", "test")
_TABLES = {
    "per_class": ("id", "name", "n", "precision", "recall", "f1"),
    "confusion": ("true_id", "true_name", "predicted_id", "predicted_name", "n"),
    "calibration": ("bin_low", "bin_high", "confidence", "accuracy", "n"),
}
_MAIN_METRICS = (
    ("cell_type", "accuracy"),
    ("cell_type", "macro_f1"),
    ("cell_type", "similarity"),
    ("pathways", "jaccard"),
    ("text", "parsed"),
)
_PACKAGES = (
    "anndata", "cellxgene-ontology-guide", "numpy", "pandas", "peft", "pyarrow", "rouge-score",
    "sacrebleu", "safetensors", "scanpy", "scikit-learn", "scipy", "snakemake", "torch", "transformers",
)  # fmt: skip


def evaluate(
    descriptions: str,
    terms: str,
    corpus: str,
    generations: list[str],
    baselines: list[str],
    model: str,
    language_model: str,
    outputs: dict[str, str],
    seed: int,
    replicates: int,
    config: dict[str, Any],
) -> None:
    """Score the fine-tuned model and the baselines and write the tables of the evaluation.

    Parameters
    ----------
    descriptions, terms, corpus
        Files of ``contracts.DESCRIPTIONS``, ``contracts.TERMS`` and ``contracts.CELLS``.
    generations
        JSONL files of the fine-tuned model; their keys are the columns of ``contracts.PREDICTIONS``.
    baselines
        Files of ``contracts.PREDICTIONS``; the file name is the method's name.
    model, language_model
        Directories of the fine-tuned and of the fetched model, for the provenance.
    outputs
        Paths of the files to write: ``metrics``, ``per_class``, ``confusion``, ``calibration``, ``provenance`` and
        ``config``, which has all settings and can be given to Snakemake to run again.
    seed, replicates
        Seed and number of replicates of the bootstrap.
    config
        The run's configuration, with defaults.

    Raises
    ------
    InputError
        If the cells that a method describes are not exactly those of the two splits.
    """
    truth, trained = _read_truth(descriptions)
    truth = _clean(truth.merge(CELLS.read(corpus, ["cell_id", "donor"]), on="cell_id", validate="1:1"))
    methods = {
        method: _clean(_align(table, truth, where)) for method, table, where in _read_methods(generations, baselines)
    }
    similarities = term_similarities([truth, *methods.values()])
    term_table = TERMS.read(terms)
    names = Terms(term_table)
    rows, tables, bootstraps = [], {table: [] for table in _TABLES}, {}
    for split in EVALUATED:
        chosen = truth["split"] == split
        if not chosen.any():
            continue
        cells = truth[chosen].reset_index(drop=True)
        bootstrap = bootstraps[split] = Bootstrap(cells["donor"], replicates, seed)
        reference: dict[tuple[str, str], Score] = {}
        for method, predictions in methods.items():
            predicted = predictions[chosen].reset_index(drop=True)
            where = {"split": split, "method": method}
            scores = score_method(cells, predicted, similarities, bootstrap, trained, term_table)
            rows += [where | score.row(reference.get(score.key)) for score in scores]
            reference = reference or {score.key: score for score in scores}  # the fine-tuned model is the first method
            for slot in TERM_SLOTS:
                for table, frame in _slot_tables(slot, cells, predicted, names).items():
                    tables[table].append(frame.assign(**where, slot=slot))
            tables["calibration"].append(_programme_calibration(cells, predicted).assign(**where, slot="pathways"))
            log.info("%s: scored on %d %s cells", method, len(cells), split)
    metrics = pd.DataFrame(rows, columns=METRICS)
    _write_tsv(metrics, outputs["metrics"])
    for table, columns in _TABLES.items():
        _write_tsv(_join(tables[table], ["split", "method", "slot", *columns]), outputs[table])
    kind = config["encoder"]["kind"]
    write_json(config, outputs["config"])
    drawn = {split: {"unit": one.unit(), "donors": one.count_donors()} for split, one in bootstraps.items()}
    write_json(
        {
            "config": hash_config(config),
            "code": hash_config({path.name: library_version(path.name, kind) for path in PACKAGE.parent.glob("*.py")}),
            "seed": seed,
            "bootstrap": {"replicates": replicates, "splits": drawn},
            "descriptions": hash_file(descriptions),
            "tables": {Path(outputs[table]).name: hash_file(outputs[table]) for table in ("metrics", *_TABLES)},
            "model": _hash_files(Path(model)),
            "threads": {"finetune": read_json(Path(model) / "cell2text.json").get("threads")},
            "language_model": read_json(Path(language_model) / "source.json"),
            "packages": versions(*_PACKAGES),
            "python": platform.python_version(),
        },
        outputs["provenance"],
    )
    _log_main_metrics(metrics)


def _read_truth(path: str) -> tuple[pd.DataFrame, set[str]]:
    """Return the cells to score, sorted by id, and the cell types of the training cells."""
    parts, trained = [], set()
    for part in DESCRIPTIONS.read_parts(path):
        parts.append(part[part["split"].isin(EVALUATED)])
        trained.update(known(part.loc[part["split"] == "train", "cell_type_id"]).dropna())
    return pd.concat(parts).sort_values("cell_id", ignore_index=True), trained


def _read_methods(generations: list[str], baselines: list[str]) -> list[tuple[str, pd.DataFrame, Path]]:
    """Return name, predictions and path of each method, the fine-tuned model first."""
    generated = pd.DataFrame(chain.from_iterable(read_jsonl(path) for path in generations))
    where = Path(generations[0]).parent.parent
    read = [(Path(path).stem, PREDICTIONS.read(path), Path(path)) for path in baselines]
    return [(FINE_TUNED, generated.reindex(columns=list(PREDICTIONS.columns)), where), *read]


def _align(predicted: pd.DataFrame, truth: pd.DataFrame, where: Path) -> pd.DataFrame:
    """Return the predictions in the order of the truth.

    Raises
    ------
    InputError
        If a cell is missing, unexpected or described twice.
    """
    expected, given = (pd.MultiIndex.from_frame(table[["cell_id", "split"]]) for table in (truth, predicted))
    faults = {
        "missing": expected.difference(given),
        "unexpected": given.difference(expected),
        "described twice": given[given.duplicated()],
    }
    found = [f"{len(cells)} {fault}, such as {cells[0][0]}" for fault, cells in faults.items() if len(cells)]
    if found:
        raise InputError(
            where,
            f"does not match the {len(expected)} cells of the validation and test splits: {'; '.join(found)}",
            "Delete it and run the workflow again",
        )
    return predicted.set_index("cell_id").loc[truth["cell_id"]].reset_index()


def _clean(table: pd.DataFrame) -> pd.DataFrame:
    columns = [f"{slot}{suffix}" for slot in TERM_SLOTS for suffix in ("_id", "_reported_id")]
    return table.assign(**{column: known(table[column]) for column in columns if column in table})


def _slot_tables(slot: str, truth: pd.DataFrame, predictions: pd.DataFrame, terms: Terms) -> dict[str, pd.DataFrame]:
    true, predicted = truth[f"{slot}_id"], predictions[f"{slot}_id"]
    confidence = predictions[f"{slot}_confidence"].to_numpy(float)
    counted = (true.notna() & predicted.notna()).to_numpy() & ~np.isnan(confidence)
    return {
        "per_class": per_class(slot, true, predicted, terms),
        "confusion": confusion(slot, true, predicted, terms),
        "calibration": calibration(confidence, (true == predicted).to_numpy(), counted),
    }


def _programme_calibration(truth: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    confidence, right = rate_programmes(
        truth["pathway_ids"], predictions["pathway_ids"], predictions["pathway_confidences"]
    )
    return calibration(confidence.ravel(), right.ravel(), ~np.isnan(confidence).ravel())


def _join(frames: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    frames = [frame for frame in frames if len(frame)]
    return pd.concat(frames)[columns] if frames else pd.DataFrame(columns=columns)


def _hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder and its subfolders, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def _write_tsv(table: pd.DataFrame, path: str) -> None:
    write_tsv(table, path, float_format="%.6f")


def _log_main_metrics(metrics: pd.DataFrame) -> None:
    test = metrics[metrics["split"] == "test"]
    table = test.pivot_table(index="method", columns=["slot", "metric"], values="value")
    table = table[[column for column in _MAIN_METRICS if column in table.columns]]
    table.columns = [f"{slot} {metric}" for slot, metric in table.columns]
    table = table.loc[test["method"].unique()].rename_axis(None)
    log.info("scores on the test cells\n%s", table.to_string(float_format="{:.3f}".format, na_rep="-"))
