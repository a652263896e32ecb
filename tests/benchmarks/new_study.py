"""Leave one study out: how well cells of a new study are described, by gene panel and sequencing depth.

    .venv/bin/python tests/benchmarks/new_study.py --work somewhere --text pbmc3k nsclc_zilionis pdac_moncada \\
        --plot docs/new_study.svg

Each study of tests/config/studies.tsv is held out in turn. The workflow trains one model on the others and describes
the same cells of the held-out study as they are, through random panels of 500 to 4,000 of its genes (the rest is
unmeasured), and thinned binomially to 50, 25 and 10% of their counts. ``--text`` fine-tunes the language model and
writes texts for the named studies, or for all if none is named; for the others only the projector is trained.

Cells are drawn at random, except for a share that is drawn evenly over the cell types, so that rare ones are included.
Nine in ten cells of the training studies are for training, the others for validation. ``refitted_any`` and
``refitted_all`` are logistic regressions fitted again for each study and panel, on the genes shared with any or all of
the training studies. new_study_scores.py defines the scores and the broad cell types.

``{work}/new_study.tsv`` has the scores (study, variant, method, metric, value, n). An interrupted run resumes. Use one
work folder per seed and per set of ``--set`` values: a change of either repeats what depends on it.
"""

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import matplotlib
import numpy as np
import pandas as pd
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "workflow/scripts"))
sys.path.insert(0, str(Path(__file__).parent))

from new_study_scores import (  # noqa: E402
    ALL,
    ANY,
    DEPTHS,
    PANELS,
    WHOLE,
    mean_over,
    pool_whole,
    read_results,
    refit,
    score_study,
)

from cell2text.evaluation.methods import BASELINES, FINE_TUNED, title_of  # noqa: E402
from cell2text.files import read_json, whole_file, write_json  # noqa: E402

SHARE_BY_TYPE = 0.3  # of the drawn cells, evenly over the cell types
VALIDATION_EVERY = 10
NO_TEXT = {"opening_epochs": 0, "epochs": 0}
# QC excludes no cell of the held-out study, whatever the panel and depth
NO_LIMITS = {"min_genes": "0", "min_counts": "0", "max_mitochondrial_percent": "100"}
METHODS = [name for name in BASELINES if name not in ("shuffled", "greedy")]  # these take as long as the texts
COLUMNS = ["study", "variant", "method", "metric", "value", "n"]
MAIN = ("accuracy", "macro_f1")
# As in evaluation/compare.py; the lines also differ in marker and dash.
LINES = {
    FINE_TUNED: {"color": "#0072B2", "marker": "o", "linewidth": 2.4},
    "aligned": {"color": "#56B4E9", "marker": "s", "linewidth": 2.4},
    "refitted": {"color": "#222222", "marker": "D", "linestyle": "--"},
    "pca_logistic": {"color": "#666666", "marker": "^"},
    "knn": {"color": "#999999", "marker": "v", "linestyle": ":"},
}


def draw_cells(types: pd.Series, cells: int, rng: np.random.Generator) -> np.ndarray:
    """Return the sorted positions of drawn cells; all if there are not more than wanted."""
    order = rng.permutation(len(types))
    among_type = types.iloc[order].groupby(types.iloc[order]).cumcount().to_numpy()
    by_type = among_type < math.ceil(SHARE_BY_TYPE * cells / types.nunique())
    return np.sort(np.concatenate([order[by_type], order[~by_type]])[:cells])


def split_cells(types: pd.Series, rng: np.random.Generator) -> np.ndarray:
    """Return ``train`` or ``validation`` for each training study's cell, stratified by type; a lone cell trains."""
    order = np.lexsort((rng.permutation(len(types)), pd.factorize(types)[0]))
    split = np.full(len(types), "train", dtype=object)
    split[order[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]] = "validation"
    split[types.groupby(types).transform("size").to_numpy() == 1] = "train"
    return split


def make_variants(study: ad.AnnData, rng: np.random.Generator) -> Iterator[tuple[str, ad.AnnData]]:
    """Yield the study, its panels (each includes the smaller ones) and its thinned copies, by name."""
    yield WHOLE, study
    order = rng.permutation(study.n_vars)
    for name, size in PANELS.items():
        if size < study.n_vars:
            yield name, study[:, np.sort(order[:size])].copy()
    for name, percent in DEPTHS.items():
        thinned = study.copy()
        thinned.X.data = rng.binomial(thinned.X.data.astype(np.int64), percent / 100).astype(np.float32)
        thinned.X.eliminate_zeros()
        yield name, thinned


def read_study(name: str, source: str, cells: int, seed: int) -> ad.AnnData:
    """Return counts, labels and genes of some labelled cells of a study."""
    study = ad.read_h5ad(ROOT / source)
    types = study.obs["cell_type_ontology_term_id"].astype(str)
    labelled = np.flatnonzero(types.str.startswith("CL:"))
    rng = np.random.default_rng([seed, *name.encode()])  # the same cells of a study, whatever the other studies are
    rows = labelled[draw_cells(types.iloc[labelled], cells, rng)]
    return ad.AnnData(study.X[rows], obs=study.obs.iloc[rows], var=study.var)


def dataset_of(held_out: str, variant: str) -> str:
    """Return the dataset id of a variant."""
    return held_out if variant == WHOLE else f"{held_out}.{variant}"


def write_inputs(held_out: str, sources: dict[str, str], folder: Path, given: argparse.Namespace) -> None:
    """Write studies, sheet and split of the run that holds a study out, unless they are there."""
    drawn = {"train_cells": given.train_cells, "test_cells": given.test_cells, "seed": given.seed}
    if (folder / "drawn.json").exists() and read_json(folder / "drawn.json") == drawn:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "drawn.json").unlink(missing_ok=True)
    rng = np.random.default_rng(given.seed)
    sheet, cells = [], []
    for name in sources:
        if name != held_out:
            study = read_study(name, sources[name], given.train_cells, given.seed)
            sheet.append(_write_dataset(study, name, folder))
            cells.append(_list_cells(study, name))
    training = pd.concat(cells, ignore_index=True)
    training["split"] = split_cells(training["type"], rng)
    study = read_study(held_out, sources[held_out], given.test_cells, given.seed)
    tested = []
    for variant, part in make_variants(study, rng):
        dataset = dataset_of(held_out, variant)
        sheet.append(_write_dataset(part, dataset, folder) | NO_LIMITS)
        tested.append(_list_cells(part, dataset).assign(split="test"))
    pd.DataFrame(sheet).to_csv(folder / "datasets.tsv", sep="\t", index=False)
    split = pd.concat([training, *tested])[["cell_id", "split"]]
    split.to_csv(folder / "split.tsv", sep="\t", index=False)
    write_json(drawn, folder / "drawn.json")


def _write_dataset(study: ad.AnnData, dataset: str, folder: Path) -> dict[str, str]:
    study.write_h5ad(folder / f"{dataset}.h5ad", compression="gzip")
    return {"dataset": dataset, "source": f"inputs/{folder.name}/{dataset}.h5ad"}


def _list_cells(study: ad.AnnData, dataset: str) -> pd.DataFrame:
    types = study.obs["cell_type_ontology_term_id"].astype(str).to_numpy()
    return pd.DataFrame({"cell_id": [f"{dataset}|{barcode}" for barcode in study.obs_names], "type": types})


def write_config(held_out: str, folder: Path, text: bool, given: argparse.Namespace) -> Path:
    """Write the configuration of the run; its paths are relative to the work folder."""
    config = {
        "run": f"new-study-{held_out}",
        "seed": given.seed,
        "datasets": f"inputs/{held_out}/datasets.tsv",
        "split": f"inputs/{held_out}/split.tsv",
        "qc": {"mads": None, "score_doublets": False},
        "pathways": {
            "gene_sets": str(ROOT / "resources/programmes.gmt"),
            "descriptions": str(ROOT / "resources/programmes.tsv"),
        },
        "finetune": {},
    }
    for change in given.set:
        key, value = change.split("=", 1)
        *sections, name = key.split(".")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = yaml.safe_load(value)
    if not text:
        config["finetune"] |= NO_TEXT
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def run_workflow(config: Path, targets: list[str], given: argparse.Namespace) -> None:
    """Let Snakemake make the targets in the work folder; its output goes to a log beside the configuration."""
    command = [sys.executable, "-m", "snakemake", *targets, "--snakefile", ROOT / "Snakefile"]
    # no lock, which a killed run would leave; runs of several studies have no output in common
    command += ["--directory", given.work, "--configfile", config, "--cores", str(given.cores), "--nolock"]
    with config.with_name("snakemake.log").open("w") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        sys.exit(f"{config.with_name('snakemake.log')}:\n{config.with_name('snakemake.log').read_text()[-3000:]}")


def run_study(
    held_out: str, sources: dict[str, str], given: argparse.Namespace
) -> tuple[pd.DataFrame, tuple[pd.DataFrame, pd.DataFrame]]:
    """Return the scores of all methods on a held-out study, as rows of ``COLUMNS``; and its cells and texts."""
    folder, results = given.work / "inputs" / held_out, given.work / f"results/new-study-{held_out}"
    text = held_out in given.text
    write_inputs(held_out, sources, folder, given)
    datasets = pd.read_csv(folder / "datasets.tsv", sep="\t")["dataset"].to_list()
    variants = {name: dataset_of(held_out, name) for name in (WHOLE, *PANELS, *DEPTHS)}
    variants = {name: dataset for name, dataset in variants.items() if dataset in datasets}
    config = write_config(held_out, folder, text, given)
    targets = ["corpus/descriptions.parquet", *(f"baselines/{name}.parquet" for name in METHODS)]
    shards = yaml.safe_load(config.read_text()).get("shards", 1)
    targets += [f"generations/test/{shard}.jsonl" for shard in range(shards)]
    run_workflow(config, [str((results / name).relative_to(given.work)) for name in targets], given)
    training, test, predictions = read_results(results, [*METHODS, FINE_TUNED])
    studies = {name: ad.read_h5ad(results / f"cells/{name}.h5ad") for name in datasets}
    predictions |= refit(studies, training, variants, given.seed)
    scores = score_study(training, test, predictions, variants).assign(study=held_out)[COLUMNS]
    return scores, (test, predictions[FINE_TUNED])


def print_scores(title: str, table: pd.DataFrame) -> None:
    """Print accuracy / macro-F1 of the broad types by variant, and all scores on the study as it is."""
    print(f"\n{title}: accuracy / macro-F1 of broad cell types")
    wide = table.pivot_table(index="method", columns=["metric", "variant"], values="value", sort=False)
    order = [name for name in (WHOLE, *reversed(PANELS), *DEPTHS) if name in set(table["variant"])]
    pairs = {
        name: [_pair(*values) for values in wide[[(metric, name) for metric in MAIN]].to_numpy()] for name in order
    }
    print(pd.DataFrame(pairs, index=wide.index.rename(None)).to_string())
    print(f"{title}: all scores, whole study")
    whole = table[table["variant"] == WHOLE].pivot_table(index="method", columns="metric", values="value", sort=False)
    print(whole.rename_axis(index=None, columns=None).to_string(float_format="{:.3f}".format, na_rep="-"), flush=True)


def _pair(accuracy: float, macro_f1: float) -> str:
    return "-" if math.isnan(accuracy) else f"{accuracy:.2f} / {macro_f1:.2f}"


def find_reference(means: pd.DataFrame) -> str:
    """Return which of the refitted regressions is best on whole studies, by accuracy plus macro-F1."""
    refitted = [f"{genes}{classes}" for genes in (ANY, ALL) for classes in ("", "_broad")]
    rows = means[(means["variant"] == WHOLE) & means["metric"].isin(MAIN) & means["method"].isin(refitted)]
    return rows.groupby("method")["value"].sum().idxmax()


def plot(means: pd.DataFrame, studies: int, path: Path) -> None:
    """Plot the mean accuracy and macro-F1 against the size of the panel and the depth, as SVG."""
    means = means.assign(method=means["method"].replace(find_reference(means), "refitted"))
    panels = {name: f"{size:,}" for name, size in PANELS.items()} | {WHOLE: "all"}
    depths = {name: str(percent) for name, percent in reversed(DEPTHS.items())} | {WHOLE: "100"}
    # A fixed salt and no date: the same table gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "cell2text", "font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(7.2, 5.6), layout="constrained")
        axes = figure.subplots(2, 2, sharey="row", sharex="col")
        for row, metric in zip(axes, MAIN, strict=True):
            for axis, variants in zip(row, (panels, depths), strict=True):
                _plot_lines(axis, means[means["metric"] == metric].set_index(["method", "variant"])["value"], variants)
        axes[0, 0].set_title("Broad cell type, accuracy", fontsize=9.5, color="#222222", loc="left")
        axes[1, 0].set_title("Broad cell type, macro-F1", fontsize=9.5, color="#222222", loc="left")
        axes[1, 0].set_xlabel("measured genes, at most", color="#666666")
        axes[1, 1].set_xlabel("percent of the counts", color="#666666")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, labelcolor="#222222")
        figure.supxlabel(f"mean over {studies} held-out studies; one model for all panels", fontsize=8, color="#666666")
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, format="svg", metadata={"Date": None, "Title": "A new study"})


def _plot_lines(axis: Axes, values: pd.Series, variants: dict[str, str]) -> None:
    for method, style in LINES.items():
        if method in values.index:
            label = "Logistic regression, refitted for each study" if method == "refitted" else title_of(method)
            heights = values[method].reindex(list(variants))
            axis.plot(range(len(variants)), heights, label=label, markersize=4.5, zorder=3, clip_on=False, **style)
    axis.set_xticks(range(len(variants)), list(variants.values()))
    axis.set_ylim(0, 1)
    axis.grid(axis="y", color="#E3E3E3", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelcolor="#666666")
    axis.spines[:].set_visible(False)


def parse_arguments(names: list[str]) -> argparse.Namespace:
    """Return the arguments of the command line, given the names of the studies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--studies", nargs="+", choices=names, default=names, metavar="STUDY", help="to hold out")
    parser.add_argument("--text", nargs="*", choices=names, metavar="STUDY", help="studies with texts; alone: all")
    parser.add_argument("--train-cells", type=int, default=400, help="cells of each training study, at most")
    parser.add_argument("--test-cells", type=int, default=150, help="cells of the held-out study, at most")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="such as finetune.epochs=2")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="SVG file to write")
    given = parser.parse_args()
    given.work = given.work.resolve()
    given.text = [] if given.text is None else given.text or given.studies
    return given


def main() -> None:
    """Run and score the studies, and print and plot the scores and their means."""
    sheet = pd.read_csv(ROOT / "tests/config/studies.tsv", sep="\t")
    sources = dict(zip(sheet["dataset"], sheet["source"], strict=True))
    given = parse_arguments(list(sources))
    file = given.work / "new_study.tsv"
    described = []
    for study in given.studies:
        start = time.monotonic()
        rows, texts = run_study(study, sources, given)
        described.append(texts)
        earlier = pd.read_csv(file, sep="\t") if file.exists() else rows[:0]
        table = pd.concat([earlier[earlier["study"] != study], rows], ignore_index=True)
        with whole_file(file) as unfinished:
            table.to_csv(unfinished, sep="\t", index=False)
        cells = rows.loc[rows["metric"] == "accuracy", "n"].max()
        print_scores(f"{study} ({cells} cells with a shared broad type, {time.monotonic() - start:.0f} s)", rows)
    print(f"\nexact types, all {len(described)} whole studies together")
    for metric, (value, cells) in pool_whole(described).items():
        print(f"{metric:20} {value:.3f} ({cells:,} cells)")
    with_text = [study for study in given.studies if study in given.text]
    for studies in [given.studies] + [with_text] * (0 < len(with_text) < len(given.studies)):
        means = mean_over(table, studies)
        print_scores(f"mean over {', '.join(studies)}", means)
        print(f"reference: {find_reference(means)}")
        if given.plot:
            plot(means, len(studies), given.plot if studies is given.studies else _beside(given.plot))


def _beside(path: Path) -> Path:
    """Return the path of the second plot, over the studies with texts."""
    return path.with_stem(f"{path.stem}_text")


if __name__ == "__main__":
    main()
