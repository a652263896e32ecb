"""Scores of the methods on a study held out of training, for new_study.py.

Studies rarely share exact cell types, so cells are compared by broad type: the first of ``BROAD_TYPES`` at or above the
cell type in the Cell Ontology. The order decides for types below several of them: a myeloid dendritic cell is a
dendritic cell, microglia are glia, a monocyte is a myeloid leukocyte and not a precursor. Types below none of them,
such as myeloid cell or lymphocyte, have no broad type. Projector and text predict the broad type with the greatest sum
over the exact types below it; the other methods predict that of their exact type. Scored are the cells whose broad type
also has training cells; the classes of macro-F1 are these types.
"""

from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from cell2text.confidence.decisions import Confidence
from cell2text.contracts import DESCRIPTIONS, PREDICTIONS, SCORES
from cell2text.evaluation import sums
from cell2text.evaluation.methods import FINE_TUNED
from cell2text.evaluation.metrics import known
from cell2text.files import read_json, read_jsonl
from cell2text.ontology import ROOTS, live_terms

BROAD_TYPES = {
    "CL:0000084": "T cell",
    "CL:0000623": "natural killer cell",
    "CL:0000945": "lymphocyte of B lineage",
    "CL:0000451": "dendritic cell",
    "CL:0000125": "glial cell",
    "CL:0000766": "myeloid leukocyte",
    "CL:0000764": "erythroid lineage cell",
    "CL:0000556": "megakaryocyte",
    "CL:0001064": "malignant cell",
    "CL:0000115": "endothelial cell",
    "CL:0000066": "epithelial cell",
    "CL:0000057": "fibroblast",
    "CL:0000192": "smooth muscle cell",
    "CL:0000540": "neuron",
    "CL:0011115": "precursor cell",
}
WHOLE = "whole"
PANELS = {f"genes_{size}": size for size in (500, 1000, 2000, 4000)}
DEPTHS = {f"depth_{percent}": percent for percent in (50, 25, 10)}
COMPONENTS, FEWEST_GENES = 50, 50  # of the refitted regression; with fewer shared genes it is not fitted
ANY, ALL = "refitted_any", "refitted_all"  # genes shared with any, and with all of the training studies


@cache
def steps_up(term: str | None) -> dict[str, int]:
    """Return the is_a steps from a cell type to itself and each of its ancestors; empty if it is not a live term."""
    terms = live_terms("CL")
    return {term: 0, **terms[term]["ancestors"]} if term in terms else {}


def broad_type(term: str | None) -> str | None:
    """Return the id of a cell type's broad type, or None."""
    return next((broad for broad in BROAD_TYPES if broad in steps_up(term)), None)


def read_results(results: Path, methods: list[str]) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, pd.DataFrame]]:
    """Return the training cells of a run, its test cells, and the predictions of each method.

    Parameters
    ----------
    results
        Folder of the run.
    methods
        Names of baselines; ``FINE_TUNED`` stands for the generated texts.

    Returns
    -------
    tuple
        Rows of ``contracts.DESCRIPTIONS`` (twice), and of ``contracts.PREDICTIONS`` by method; all with ``dataset``
        and ``barcode``, the two halves of the id.
    """
    described = _split_ids(DESCRIPTIONS.read(results / "corpus/descriptions.parquet"))
    predictions = {}
    for method in methods:
        if method == FINE_TUNED:
            files = sorted(results.glob("generations/test/*.jsonl"))
            rows = pd.DataFrame(chain.from_iterable(map(read_jsonl, files)))
        else:
            rows = PREDICTIONS.read(results / f"baselines/{method}.parquet")
        if method in (FINE_TUNED, "aligned"):
            rows["broad"] = rows["cell_id"].map(sum_by_broad_type(results, method))
        predictions[method] = _split_ids(rows[rows["split"] == "test"])
    return described[described["split"] == "train"], described[described["split"] == "test"], predictions


def _split_ids(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(**rows["cell_id"].str.extract(r"^(?P<dataset>[^|]+)\|(?P<barcode>.+)$"))


def sum_by_broad_type(results: Path, method: str) -> pd.Series:
    """Return the most probable broad type of each test cell, by the sum over its exact types; indexed by cell id."""
    types = read_json(results / "finetuned/cell2text.json")["labels"]["cell_type"]
    confidence = Confidence.load(results / "confidence/confidence.json").of_new_study
    broad = pd.Series(types).map(broad_type)
    names = sorted(set(broad.dropna()))
    members = np.array([[one == name for name in names] for one in broad], dtype=float)
    found = []
    for path in sorted(results.glob("scores/test/*.safetensors")):
        scores, cells = SCORES.read(path, ["cell_type", "projector_cell_type"])
        projector = softmax(scores["projector_cell_type"].astype(float), axis=1)
        probability = projector if method == "aligned" else confidence.probabilities("cell_type", scores)
        found.append(pd.Series(np.array(names, dtype=object)[(probability @ members).argmax(axis=1)], index=cells))
    return pd.concat(found)


def cells_in_all(test: pd.DataFrame) -> pd.Index:
    """Return the barcodes that all datasets have: QC excludes cells without counts, which a small panel may have."""
    datasets = test.groupby("barcode")["dataset"].nunique()
    return datasets.index[datasets == test["dataset"].nunique()]


def score_study(
    training: pd.DataFrame, test: pd.DataFrame, predictions: dict[str, pd.DataFrame], variants: dict[str, str]
) -> pd.DataFrame:
    """Return the scores of each method on each variant of the study, on the cells that all variants have.

    The truth of all variants is that of the study itself: its programmes are those at all genes and full depth.

    Parameters
    ----------
    training, test, predictions
        From :func:`read_results`.
    variants
        Dataset of each variant.

    Returns
    -------
    DataFrame
        Columns ``variant``, ``method``, ``metric``, ``value``, ``n``.
    """
    cells = cells_in_all(test)
    truth = test[test["dataset"] == variants[WHOLE]].set_index("barcode").loc[cells]
    trained = set(training["cell_type_id"].map(broad_type))
    rows = []
    for variant, dataset in variants.items():
        for method, table in predictions.items():
            predicted = table[table["dataset"] == dataset]
            if len(predicted):
                predicted = predicted.set_index("barcode").loc[cells]
                found = score(truth, predicted, trained, writes_text=method == FINE_TUNED)
                rows += [(variant, method, metric, value, n) for metric, (value, n) in found.items()]
    return pd.DataFrame(rows, columns=["variant", "method", "metric", "value", "n"])


def pool_whole(parts: list[tuple[pd.DataFrame, pd.DataFrame]]) -> dict[str, tuple[float, int]]:
    """Return value and number of cells of each metric of exact types over the cells of all whole studies.

    The calibration error of all cells tells whether the confidences are right for new studies on average: those of one
    study may be too high as long as those of another are too low.

    Parameters
    ----------
    parts
        Test cells and predictions of texts of each study, from :func:`read_results`.
    """
    truths, texts = [], []
    for test, predicted in parts:
        whole = min(test["dataset"].unique(), key=len)
        truths.append(test[test["dataset"] == whole].set_index("cell_id"))
        texts.append(predicted.set_index("cell_id").loc[truths[-1].index])
    truth, predicted = pd.concat(truths), pd.concat(texts)
    broad = known(truth["cell_type_id"]).map(broad_type)
    found = score(truth, predicted, set(broad.dropna()), writes_text=True)
    return {name: value for name, value in found.items() if name not in ("accuracy", "macro_f1")}


def score(
    truth: pd.DataFrame, predicted: pd.DataFrame, trained: set[str | None], writes_text: bool
) -> dict[str, tuple[float, int]]:
    """Return value and number of cells of each metric that is defined for a method.

    Parameters
    ----------
    truth, predicted
        ``cell_type_id`` and, if there are, further columns of ``contracts.DESCRIPTIONS`` and ``contracts.PREDICTIONS``
        for the same cells in the same order. Without confidences, only broad types are scored.
    trained
        Broad types of the training cells.
    writes_text
        Whether the share of parsed texts is of interest.
    """
    true, ids = known(truth["cell_type_id"]), known(predicted["cell_type_id"])
    broad = true.map(broad_type)
    broad = broad.where(broad.isin(trained - {None}), None)
    scored = broad.notna().to_numpy()
    if not scored.any():
        return {}
    guess = known(predicted["broad"]) if "broad" in predicted else ids.map(broad_type)
    terms = sums.class_terms(broad, guess, pd.Index(sorted(set(broad.dropna()))))
    found = {
        "accuracy": (float((broad == guess)[scored].mean()), int(scored.sum())),
        "macro_f1": (float(sums.macro_f1(terms.sum(axis=0)[None])[0]), int(scored.sum())),
    }
    if "cell_type_confidence" not in predicted:
        return found
    correct, cells = (true == ids).to_numpy(), len(true)
    found["exact_accuracy"] = float(correct.mean()), cells
    confidence = predicted["cell_type_confidence"].to_numpy(float)
    counted = ids.notna().to_numpy() & ~np.isnan(confidence)
    if counted.any():
        bins = sums.calibration_terms(confidence, correct, counted).sum(axis=0)[None]
        found["confidence"] = float(confidence[counted].mean()), int(counted.sum())
        found["calibration_error"] = float(sums.calibration_error(bins)[0]), int(counted.sum())
    if "pathway_ids" in predicted and predicted["pathway_ids"].explode().notna().any():
        equal, jaccard = sums.compare_sets(truth["pathway_ids"], predicted["pathway_ids"])
        found |= {"programmes_jaccard": (float(jaccard.mean()), cells), "both_right": (float(equal.mean()), cells)}
    if writes_text:
        found["parsed"] = float((predicted["status"] == "parsed").mean()), cells
    if "cell_type_reported_id" in predicted:
        found |= _score_reported(true, known(predicted["cell_type_reported_id"]))
    if "novel" in predicted and predicted["novel"].notna().any():
        found["novel"] = float(predicted["novel"].mean()), cells
    return found


def _score_reported(true: pd.Series, reported: pd.Series) -> dict[str, tuple[float, int]]:
    """Return how many cells have a reported term, how many of these are the truth or above it, and the mean depth."""
    given = reported.notna().to_numpy()
    pairs = list(zip(true[given], reported[given], strict=True))
    found = {"coverage": (float(given.mean()), len(given))}
    if pairs:
        found["precision"] = float(np.mean([term in steps_up(cell_type) for cell_type, term in pairs])), len(pairs)
        depths = [steps_up(term).get(ROOTS["cell_type"], 0) for _, term in pairs]
        found["depth"] = float(np.mean(depths)), len(pairs)
    return found


def refit(
    studies: dict[str, ad.AnnData], training: pd.DataFrame, variants: dict[str, str], seed: int
) -> dict[str, pd.DataFrame]:
    """Return the predictions of a logistic regression that is fitted again for the genes of each variant.

    It reads 50 principal components of the training cells' log-normalised counts over the genes that the variant shares
    with any training study (zero where a training study does not measure a gene), or with all of them. It learns exact
    types and, in ``..._broad``, broad types.

    Parameters
    ----------
    studies
        Counts of each dataset, genes in ``var_names``, cells by id.
    training
        From :func:`read_results`.
    variants
        Dataset of each variant.
    seed
        Seed of the PCA solver.

    Returns
    -------
    dict
        By method; ``cell_type_id``, ``cell_type_confidence`` (exact types only), ``dataset`` and ``barcode``.
    """
    trained_on = dict(list(training.groupby("dataset")))
    known_cells = {name: studies[name][rows["cell_id"].to_numpy()] for name, rows in trained_on.items()}
    labels = pd.concat(rows["cell_type_id"] for rows in trained_on.values())
    measured = [study.var_names for study in known_cells.values()]
    tables: dict[str, list[pd.DataFrame]] = {}
    fits: dict[tuple[str, ...], tuple] = {}
    for dataset in variants.values():
        new = studies[dataset]
        in_all = new.var_names[np.all([new.var_names.isin(genes) for genes in measured], axis=0)]
        in_any = new.var_names[np.any([new.var_names.isin(genes) for genes in measured], axis=0)]
        for method, genes in ((ANY, in_any), (ALL, in_all)):
            if len(genes) < FEWEST_GENES:
                continue
            if tuple(genes) not in fits:
                counts = sparse.vstack([log_counts(study, genes) for study in known_cells.values()], format="csr")
                fits[tuple(genes)] = _fit(counts, labels, seed)
            components, regressions = fits[tuple(genes)]
            coordinates = components.transform(log_counts(new, genes))
            for ending, regression in regressions.items():
                probability = regression.predict_proba(coordinates)
                table = {"cell_id": new.obs_names, "cell_type_id": regression.classes_[probability.argmax(axis=1)]}
                if not ending:
                    table["cell_type_confidence"] = probability.max(axis=1)
                tables.setdefault(f"{method}{ending}", []).append(_split_ids(pd.DataFrame(table)))
    return {method: pd.concat(parts, ignore_index=True) for method, parts in tables.items()}


def _fit(counts: sparse.csr_matrix, labels: pd.Series, seed: int) -> tuple[PCA, dict[str, LogisticRegression]]:
    components = PCA(min(COMPONENTS, *(np.array(counts.shape) - 1)), svd_solver="arpack", random_state=seed)
    coordinates = components.fit_transform(counts)
    broad = labels.map(broad_type)
    classes = {"": labels, "_broad": broad}
    fitted = {
        ending: LogisticRegression(max_iter=5000).fit(coordinates[given.notna()], given.dropna().astype(str))
        for ending, given in classes.items()
    }
    return components, fitted


def log_counts(study: ad.AnnData, genes: pd.Index) -> sparse.csr_matrix:
    """Return log1p of the counts per 10,000 counts of the given genes, (cells, genes); unmeasured genes are zero."""
    column = genes.get_indexer(study.var_names)
    counts = sparse.csr_matrix(study.X[:, np.flatnonzero(column >= 0)], dtype=np.float64)
    totals = np.asarray(counts.sum(axis=1)).ravel()
    logs = np.log1p(counts.data / np.repeat(totals, np.diff(counts.indptr)) * 1e4)
    return sparse.csr_matrix((logs, column[column >= 0][counts.indices], counts.indptr), (len(totals), len(genes)))


def mean_over(table: pd.DataFrame, studies: list[str]) -> pd.DataFrame:
    """Return the mean of each score over some studies, for the methods that have it on all of them.

    A study that measures fewer genes than a panel counts with all of its genes. Where too few genes are shared by all
    studies, the regression on them counts with those shared by any.

    Parameters
    ----------
    table
        Columns ``study``, ``variant``, ``method``, ``metric``, ``value``.
    studies
        Studies to average over.

    Returns
    -------
    DataFrame
        Columns ``variant``, ``method``, ``metric``, ``value``.
    """
    table = table[table["study"].isin(studies)]
    table = pd.concat([table, *_fill_panels(table)])
    keys = ["study", "variant", "metric"]
    wide = table.pivot_table(index=keys, columns="method", values="value", sort=False)
    for ending in ("", "_broad"):
        if {ALL + ending, ANY + ending} <= set(wide):
            wide[ALL + ending] = wide[ALL + ending].fillna(wide[ANY + ending])
    values = wide.reset_index().melt(keys, var_name="method").dropna(subset="value")
    grouped = values.groupby(["variant", "method", "metric"], sort=False)["value"]
    return grouped.mean()[grouped.size() == len(studies)].reset_index()


def _fill_panels(table: pd.DataFrame) -> Iterator[pd.DataFrame]:
    for _, rows in table.groupby("study"):
        for panel in PANELS:
            if panel not in set(rows["variant"]):
                yield rows[rows["variant"] == WHOLE].assign(variant=panel)
