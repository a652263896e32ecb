"""What refining cell types among similar cells brings in studies that a model has not seen.

    .venv/bin/python tests/benchmarks/refine_new_study.py --work somewhere

The folder is that of new_study.py, whose runs are only read. For each held-out study, weight of the graph and threshold
of reported terms are fitted as by the rule ``fit_refinement``, on studies held out of alignment. Then the cells of the
held-out study are described as by ``annotate`` with and without ``annotate.graph``, and on a graph with shuffled cells,
with the same weight: as they are, through panels of genes, and at reduced depth. Accuracy and macro-F1 are of broad
types, means over studies; the other scores are pooled over the cells of all studies. Takes a minute.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import f1_score

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "workflow/scripts"))
sys.path.insert(0, str(Path(__file__).parent))
from new_study_scores import DEPTHS, PANELS, WHOLE, broad_type, read_results, steps_up  # noqa: E402

from cell2text.confidence.back_off import TermsAbove, Threshold  # noqa: E402
from cell2text.confidence.decisions import FIX, Confidence, read_ancestors, report_terms  # noqa: E402
from cell2text.confidence.graph import join_neighbours, propagate, shuffle_cells  # noqa: E402
from cell2text.confidence.novelty import Reference  # noqa: E402
from cell2text.confidence.refinement import SLOT, Refinement, fit_refinement  # noqa: E402
from cell2text.contracts import EMBEDDINGS, SCORES  # noqa: E402
from cell2text.evaluation.sums import calibration_error, calibration_terms  # noqa: E402
from cell2text.files import read_json  # noqa: E402
from cell2text.weights import read_weights  # noqa: E402

NEIGHBOURS, CONFIDENCE, SEED = 15, 0.8, 42
NONE, GRAPH, SHUFFLED = "none", "graph", "shuffled"


def describe_study(results: Path, held_out: str) -> pd.DataFrame:
    """Return one row per cell, variant and graph: true and predicted types, and confidences."""
    labels = read_json(results / "finetuned/cell2text.json")["labels"][SLOT]
    terms, embeddings = results / "corpus/terms.parquet", sorted(map(str, results.glob("embeddings/*/*.safetensors")))
    confidence = Confidence.load(results / "confidence/confidence.json").of_new_study
    reference = Reference(**read_weights(results / "confidence/reference.safetensors", FIX, "numpy"))
    refinement = fit(results, terms, embeddings)
    above = TermsAbove(labels, read_ancestors(str(terms))[SLOT])
    training, test, _ = read_results(results, [])
    trained = set(training["cell_type_id"].map(broad_type)) - {None}
    truth = test[test["dataset"] == held_out].set_index("barcode")["cell_type_id"]
    parts = []
    for dataset, cells in test.groupby("dataset"):
        scores = SCORES.read_cells(results.glob("scores/test/*"), cells["cell_id"], [SLOT, f"projector_{SLOT}"])
        vectors = EMBEDDINGS.read_cells(embeddings, cells["cell_id"], ["pooled"])["pooled"]
        scores["novelty"] = reference.novelty(vectors)
        before, study = confidence.probabilities(SLOT, scores), np.zeros(len(cells))
        shuffled = shuffle_cells(join_neighbours(vectors, study, NEIGHBOURS), study, SEED)
        free = np.zeros(len(cells), dtype=bool)
        found = {
            NONE: (before, confidence.thresholds[SLOT]),
            GRAPH: (refinement.refine(before, vectors, ~free), refinement.threshold),
            SHUFFLED: (propagate(before, free, shuffled, refinement.weight), refinement.threshold),
        }
        variant = str(dataset).removeprefix(held_out).lstrip(".") or WHOLE
        true = truth.reindex(cells["barcode"]).to_numpy()
        for graph, (probabilities, threshold) in found.items():
            table = judge(probabilities, threshold, true, labels, above, trained)
            parts.append(table.assign(variant=variant, graph=graph))
    print(f"{held_out}: weight {refinement.weight:g}, reported from {refinement.threshold.value:.2f}", flush=True)
    return pd.concat(parts).assign(study=held_out)


def fit(results: Path, terms: Path, embeddings: list[str]) -> Refinement:
    """Return the refinement of the run's model."""
    with tempfile.TemporaryDirectory() as folder:
        fit_refinement(
            str(results / "confidence/calibration.json"),
            str(results / "finetuned"),
            sorted(map(str, results.glob("scores/validation/*"))),
            str(results / "scores/left_out_studies.safetensors"),
            str(results / "corpus/descriptions.parquet"),
            str(terms),
            embeddings,
            str(results / "scores/left_out_vectors.safetensors"),
            f"{folder}/refinement.json",
            confidence=CONFIDENCE,
            neighbours=NEIGHBOURS,
            seed=SEED,
        )
        return Refinement.load(f"{folder}/refinement.json")


def judge(
    probabilities: np.ndarray,
    threshold: Threshold,
    true: np.ndarray,
    labels: list[str],
    above: TermsAbove,
    trained: set[str],
) -> pd.DataFrame:
    """Return for each cell its true and most probable broad type, and whether guess and reported term are right."""
    columns = report_terms(SLOT, labels, probabilities, above, threshold)
    broad = pd.Series(labels).map(broad_type)
    names = np.array(sorted(set(broad.dropna())), dtype=object)
    members = np.array([[one == name for name in names] for one in broad], dtype=float)
    reported = columns[f"{SLOT}_reported_id"]
    true_broad = pd.Series(true, dtype=object).map(broad_type)
    return pd.DataFrame(
        {
            "broad": true_broad.where(true_broad.isin(trained), None).to_numpy(),
            "guessed_broad": names[(probabilities @ members).argmax(axis=1)],
            "right": columns[f"{SLOT}_id"] == true,
            "confidence": columns[f"{SLOT}_confidence"],
            "reported": [one is not None for one in reported],
            "reported_right": [one in steps_up(cell_type) for one, cell_type in zip(reported, true, strict=True)],
            "reported_confidence": columns[f"{SLOT}_reported_confidence"],
        }
    )


def summarise(cells: pd.DataFrame) -> pd.Series:
    """Return the scores of one variant and graph."""
    scored = cells[cells["broad"].notna()]
    accuracy = (scored["broad"] == scored["guessed_broad"]).groupby(scored["study"]).mean()
    macro_f1 = [
        f1_score(one["broad"], one["guessed_broad"], average="macro", labels=sorted(set(one["broad"])), zero_division=0)
        for _, one in scored.groupby("study")
    ]
    reported = cells[cells["reported"]]
    wrong = (cells["reported"] & ~cells["reported_right"]).groupby(cells["study"]).mean()
    return pd.Series(
        {
            "accuracy": accuracy.mean(),
            "macro-F1": np.mean(macro_f1),
            "exact type": cells["right"].mean(),
            "off by": error(cells["confidence"], cells["right"]),
            "reported": cells["reported"].mean(),
            "of these right": reported["reported_right"].mean(),
            "off by (reported)": error(reported["reported_confidence"], reported["reported_right"]),
            "wrong, mean of studies": wrong.mean(),
        }
    )


def error(confidence: pd.Series, right: pd.Series) -> float:
    """Return the calibration error of cells."""
    values = confidence.to_numpy(float)
    terms = calibration_terms(values, right.to_numpy(bool), np.ones(len(values), dtype=bool))
    return float(calibration_error(terms.sum(axis=0)[None])[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="work folder of new_study.py")
    folders = sorted((parser.parse_args().work / "results").glob("new-study-*"))
    cells = pd.concat([describe_study(one, one.name.removeprefix("new-study-")) for one in folders])
    variants = [name for name in (WHOLE, *reversed(PANELS), *DEPTHS) if name in set(cells["variant"])]
    for variant in variants:
        rows = cells[cells["variant"] == variant]
        print(f"\n{variant}: {rows['study'].nunique()} studies, {len(rows) // 3} cells")
        table = pd.DataFrame({graph: summarise(part) for graph, part in rows.groupby("graph", sort=False)}).T
        print(table.to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
