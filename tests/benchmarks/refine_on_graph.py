"""Cell types predicted by a method, refined on a mutual, a symmetric and a shuffled graph of cells.

    for seed in 42 43 44; do
      .venv/bin/snakemake embeddings results/studies-$seed/baselines/pca_logistic.parquet --cores 1 \\
        --configfile tests/config/studies_2000.yaml --config run=studies-$seed seed=$seed
    done
    .venv/bin/python tests/benchmarks/refine_on_graph.py results/studies-{42,43,44} [--plot docs/neighbours.svg]

Each folder is that of a run with descriptions, embeddings and predictions, by default those of PCA + logistic
regression; ``--method cell2text`` takes those of the fine-tuned model, which need a finished run. The weight of each
graph is the one that ``refine_on_graph`` would choose on the validation cells. Scores are of the test cells: accuracy,
macro-F1, mean F1 of rare types (fewer than ``RARE`` training cells), and the calibration error of confidences.
Differences to the method itself have 95% intervals from resampling donors. ``--bilevel`` adds the baseline of that name
and its control, the same on the shuffled graph; they do not depend on the method, and take 90 s per run.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "workflow/scripts"))
from cell2text.confidence.graph import join_neighbours, shuffle_cells  # noqa: E402
from cell2text.contracts import CELLS, datasets_of  # noqa: E402
from cell2text.embedding.vectors import Embeddings  # noqa: E402
from cell2text.evaluation.baselines.bilevel import Cells, teach_in_turn  # noqa: E402
from cell2text.evaluation.baselines.slots import is_training, read_pooled, read_slots  # noqa: E402
from cell2text.evaluation.bootstrap import Bootstrap, interval  # noqa: E402
from cell2text.evaluation.refine_on_graph import (  # noqa: E402
    WEIGHTS,
    choose_weight,
    initial_probabilities,
    propagate,
    read_predictions,
)
from cell2text.evaluation.sums import (  # noqa: E402
    calibration_error,
    calibration_terms,
    class_terms,
    macro_f1,
    mean_terms,
    ratio,
)
from cell2text.evaluation.tables import per_class  # noqa: E402
from cell2text.files import whole_file  # noqa: E402
from cell2text.grammar import Terms  # noqa: E402

SLOT, NEIGHBOURS, RARE = "cell_type", 15, 10
NO_NAMES = Terms(pd.DataFrame({"slot": [], "id": [], "name": [], "definition": []}))
COLOURS = {"mutual": "#0072B2", "symmetric": "#D55E00", "shuffled": "#666666"}
SCORES = ("accuracy", "macro-F1", "F1 of rare types", "calibration error")
DIFFERENCES = ["accuracy, difference", "macro-F1, difference"]


def score(true: pd.Series, probabilities: np.ndarray, labels: np.ndarray, training: pd.Series) -> tuple[float, ...]:
    """Return ``SCORES`` of probabilities, (cells, labels); cells without a true label are not counted."""
    probabilities, true = probabilities[true.notna()], true.dropna().reset_index(drop=True)
    predicted, every = pd.Series(labels[probabilities.argmax(axis=1)], dtype=object), np.ones(len(true), dtype=bool)
    classes = per_class(SLOT, true, predicted, NO_NAMES).set_index("id")["f1"]
    rare = training.value_counts().reindex(classes.index, fill_value=0) < RARE
    correct = (true == predicted).to_numpy()
    error = calibration_error(calibration_terms(probabilities.max(axis=1), correct, every).sum(axis=0)[None])[0]
    return correct.mean(), classes.mean(), classes[rare].mean(), error


def compare(true: pd.Series, before: np.ndarray, after: np.ndarray, donors: pd.Series) -> list[str]:
    """Return ``DIFFERENCES`` of predicted labels, with 95% intervals from resampling donors."""
    labelled = true.notna().to_numpy()
    true, donors = true[labelled].reset_index(drop=True), donors[labelled]
    resamples, classes, found = Bootstrap(donors, 1000, 0), pd.Index(sorted(true.unique())), []
    for labels in (before[labelled], after[labelled]):
        right, terms = mean_terms((labels == true).to_numpy()), class_terms(true, pd.Series(labels), classes)
        unit = resamples.unit()
        found.append([ratio(resamples.sum_up(right, unit)), macro_f1(resamples.sum_up(terms, unit))])
    return ["{:+.3f} [{:.3f}, {:.3f}]".format(*interval(b - a)) for a, b in zip(*found, strict=True)]


def refine(results: Path, method: str, bilevel: bool) -> pd.DataFrame:
    """Return a row per graph and weight: whether it is the chosen weight, the mean degree, scores and differences."""
    described = read_slots(results / "corpus/descriptions.parquet")
    generated = method == "cell2text"
    files = results.glob("generations/*/*.jsonl") if generated else [results / f"baselines/{method}.parquet"]
    given = read_predictions(sorted(files))
    given = given.set_index("cell_id").reindex(described["cell_id"]).reset_index()
    studies, new = datasets_of(described["cell_id"]).to_numpy(), ~is_training(described)
    files = [str(path) for path in results.glob("embeddings/*/*.safetensors")]
    vectors, true = read_pooled(files, described["cell_id"]), described[f"{SLOT}_id"]
    training, validation = true.mask(new, None), true.where(described["split"] == "validation", None)
    test = (described["split"] == "test").to_numpy()
    labels, start = initial_probabilities(given[f"{SLOT}_id"], given[f"{SLOT}_confidence"], training)
    known = training.notna().to_numpy()
    mutual, symmetric = (join_neighbours(vectors, studies, NEIGHBOURS, kind) for kind in (True, False))
    graphs = {"mutual": mutual, "symmetric": symmetric, "shuffled": shuffle_cells(mutual, studies, 0)}
    donors = described["cell_id"].map(CELLS.read(results / "corpus/cells.parquet").set_index("cell_id")["donor"])[test]
    named, rows = labels[start[test].argmax(axis=1)], []
    for name, graph in graphs.items():
        chosen, degrees = choose_weight(start, known, graph, labels, validation), np.diff(graph.indptr)
        for weight in WEIGHTS:
            found = propagate(start, known, graph, weight)[test]
            differences = compare(true[test], named, labels[found.argmax(axis=1)], donors)
            scores = score(true[test], found, labels, training)
            rows.append((name, weight, weight == chosen, degrees.mean(), (degrees == 0).mean(), *scores, *differences))
    if bilevel:
        codes, ids = pd.factorize(training, sort=True)
        ids = np.array(ids, dtype=object)
        cells = Cells.of(Embeddings(sorted(files)).vectors(described["cell_id"], "gene_vectors"), vectors, ~new)
        for name, shuffled in (("bilevel", False), ("bilevel, shuffled", True)):
            found = teach_in_turn(cells, codes, studies, NEIGHBOURS, 0, shuffled)[test]
            differences = compare(true[test], named, ids[found.argmax(axis=1)], donors)
            rows.append((name, np.nan, True, *[np.nan] * 2, *score(true[test], found, ids, training), *differences))
    return pd.DataFrame(rows, columns=["graph", "weight", "chosen", "neighbours", "isolated", *SCORES, *DIFFERENCES])


def plot(table: pd.DataFrame, path: Path) -> None:
    """Plot accuracy and macro-F1 against the weight, means over the runs, as SVG."""
    means = table.groupby(["graph", "weight"])[list(SCORES[:2])].mean()
    # A fixed salt and no date: the same table gives the same bytes.
    with rc_context({"svg.hashsalt": "cell2text", "font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        for axis, metric in zip(figure.subplots(1, 2, sharey=True), SCORES[:2], strict=True):
            for name, colour in COLOURS.items():
                axis.plot(range(len(WEIGHTS)), means.loc[name, metric], "o-", color=colour, label=name, markersize=4)
            axis.set_title(f"Cell type, {metric}", fontsize=9.5, color="#222222", loc="left")
            axis.set_xticks(range(len(WEIGHTS)), [f"{weight:g}" for weight in WEIGHTS])
            axis.set(xlabel="weight of the graph", ylim=(0, 1))
            axis.grid(axis="y", color="#E3E3E3", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.spines[:].set_visible(False)
        figure.axes[0].legend(title="graph", frameon=False, loc="lower left")
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, format="svg", metadata={"Date": None, "Title": "Refined on a graph of cells"})


def main() -> None:
    """Print the scores of each run, and their means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--method", default="pca_logistic", help="cell2text, or the name of a baseline")
    parser.add_argument("--bilevel", action="store_true", help="also train the baseline of this name")
    parser.add_argument("--plot", type=Path, help="SVG file to write")
    given = parser.parse_args()
    tables = [refine(results, given.method, given.bilevel).assign(run=results.name) for results in given.results]
    table = pd.concat(tables)
    before = table[(table["weight"] == 0) & (table["graph"] == "mutual")].assign(graph="none")
    shown = pd.concat([before, table[table["chosen"]]])
    print(shown.drop(columns="chosen").set_index("run").to_string(float_format="{:.3f}".format))
    print("\nmeans, weight chosen on validation cells")
    print(shown.groupby("graph", sort=False)[list(SCORES)].mean().to_string(float_format="{:.3f}".format))
    print("\nmeans by weight")
    print(table.groupby(["graph", "weight"])[list(SCORES)].mean().to_string(float_format="{:.3f}".format))
    if given.plot:
        plot(table, given.plot)


if __name__ == "__main__":
    main()
