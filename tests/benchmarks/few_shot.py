"""Cell types predicted from a few labelled cells per type: tables of several runs, their means, and a plot.

    for seed in 42 43 44; do
      .venv/bin/snakemake embeddings --cores 1 --configfile tests/config/studies_2000.yaml \\
        --config run=studies-$seed seed=$seed
    done
    .venv/bin/python tests/benchmarks/few_shot.py results/studies-{42,43,44} [--plot docs/few_labels.svg]

Each folder is that of a run with descriptions and embeddings. The settings are the defaults of ``few_labels`` and the
seed is the last part of the folder's name. Shown are the means of the runs of value, low and high.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import yaml
from matplotlib import rc_context
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "workflow/scripts"))
from cell2text.evaluation.few_shot import few_shot  # noqa: E402
from cell2text.evaluation.methods import title_of  # noqa: E402
from cell2text.files import whole_file  # noqa: E402

COLOURS = {"lda": "#0072B2", "contrast": "#D55E00", "knn": "#666666", "contrast_permuted": "#AAAAAA"}
METRICS = {"accuracy": "accuracy", "macro_f1": "macro-F1"}


def read_defaults() -> dict:
    """Return the default settings of ``few_labels``."""
    keys = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())["properties"]["few_labels"]
    return {key: entry["default"] for key, entry in keys["properties"].items() if key != "compare"}


def measure(results: Path, settings: dict) -> pd.DataFrame:
    """Return the table of the rule ``few_shot`` for a run."""
    files = sorted(str(path) for path in results.glob("embeddings/*/*.safetensors"))
    seed = int(results.name.rpartition("-")[2])
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "few_shot.tsv")
        few_shot(str(results / "corpus/descriptions.parquet"), files, str(table), seed=seed, **settings)
        return pd.read_csv(table, sep="\t").assign(run=results.name)


def plot(means: pd.DataFrame, path: Path) -> None:
    """Plot accuracy and macro-F1 against the number of labelled cells per type, as SVG."""
    counts, means = list(dict.fromkeys(means.index.get_level_values("shots"))), means.sort_index()
    # A fixed salt and no date: the same table gives the same bytes.
    with rc_context({"svg.hashsalt": "cell2text", "font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        for axis, (metric, title) in zip(figure.subplots(1, 2, sharey=True), METRICS.items(), strict=True):
            for method, colour in COLOURS.items():
                rows, places = means.loc[(method, metric)].loc[counts], range(len(counts))
                axis.plot(places, rows["value"], "o-", color=colour, label=title_of(method), markersize=4)
                axis.fill_between(places, rows["low"], rows["high"], color=colour, alpha=0.2, linewidth=0)
            axis.set_title(f"Cell type, {title}", fontsize=9.5, color="#222222", loc="left")
            axis.set_xticks(places, counts)
            axis.set(xlabel="labelled cells per type", ylim=(0, 1))
            axis.grid(axis="y", color="#E3E3E3", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.spines[:].set_visible(False)
        figure.axes[0].legend(frameon=False, loc="center left", bbox_to_anchor=(0, 0.3), fontsize=8)
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, format="svg", metadata={"Date": None, "Title": "Few labelled cells"})


def main() -> None:
    """Print the table of each run, and their means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--plot", type=Path, help="SVG file to write")
    given = parser.parse_args()
    settings, tables = read_defaults(), []
    for results in given.results:
        started = time.process_time()
        tables.append(measure(results, settings))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{results.name}: {time.process_time() - started:.0f} s of CPU time, {memory:.0f} MB at most", flush=True)
        print(tables[-1].to_string(index=False, float_format="{:.3f}".format), flush=True)
    columns = ["value", "low", "high"]
    means = pd.concat(tables).groupby(["method", "metric", "shots"], sort=False)[columns].mean()
    print("\nmeans of the runs")
    print(means.to_string(float_format="{:.3f}".format))
    if given.plot:
        plot(means, given.plot)


if __name__ == "__main__":
    main()
