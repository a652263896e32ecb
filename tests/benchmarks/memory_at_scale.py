"""Peak memory of every rule, from ingestion to report and annotated file, on simulated files of several sizes.

    .venv/bin/python tests/benchmarks/memory_at_scale.py --cells 20000 200000 --folder somewhere
    .venv/bin/python tests/benchmarks/memory_at_scale.py --cells 20000 200000 --folder somewhere --on-the-fly

Snakemake runs the workflow rule by rule on one simulated study in one shard, with the default configuration except for
what ``CONFIG`` says: all cells are used, 80% of them for training, and the language model is that of the tests, so that
what remains is the memory that cells take. Two small studies are added, because with fewer than three none is excluded
from alignment. The packed model then annotates the file of the large study, in which it ignores the labels.
``--on-the-fly`` computes gene vectors in each step instead of storing them, and measures the rules that do so.
docs/memory.md has the results and says what the memory of each rule depends on.

While a job runs, /proc tells the maximum resident memory of its process so far, imports included, and its private
memory at the moment, which is what must be requested: the rest are pages of files, which the system drops when memory
is scarce. Both are read ten times per second, so that private memory may miss a short peak; the resident maximum does
not.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
RULES = [
    "fetch_language_model",
    "fetch_dataset",
    "filter_cells",
    "sample_cells",
    "split_donors",
    "score_pathways",
    "write_descriptions",
    "measure_genes",
    "rank_genes",
    "fit_encoder",
    "embed_genes",
    "finetune",
    "score_left_out_studies",
    "score_candidates",
    "calibrate",
    "choose_thresholds",
    "generate_descriptions",
    "baseline_majority",
    "baseline_pca_logistic",
    "baseline_knn",
    "baseline_nearest_text",
    "baseline_shuffled",
    "baseline_aligned",
    "evaluate",
    "compare",
    "render_report",
    "pack_model",
    "hide_labels",
    "fetch_query",
    "flag_query",
    "rank_query",
    "embed_query",
    "score_query",
    "describe_query",
    "cluster_query",
    "explain_query",
    "annotate_query",
    "render_query",
]
# those that read gene vectors, and so compute them if they are not stored
ON_THE_FLY = ["embed_genes", "finetune", "score_left_out_studies", "score_candidates"]
ON_THE_FLY += ["baseline_shuffled", "baseline_aligned"]
NOT_MEASURED = {
    "choose_census_cells": "reads the Census",
    "fetch_census_shard": "reads the Census",
    "fetch_encoder": "reads no cells, and the default encoder is not fetched",
    "refine_on_graph": "off by default; its memory is that of the probabilities, which the number of labels determines",
    "fit_refinement": "off by default; it reads at most 20,000 cells",
    "refine_query": "off by default; its memory is that of the probabilities, which the number of labels determines",
    "baseline_bilevel": "off by default; its memory is that of pooled vectors, and of the gene vectors of 1,024 cells",
    "fetch_examples": "reads its study as fetch_query does",
    "baseline_contrast": "off by default; its memory is that of pooled vectors and probabilities",
    "few_shot": "off by default; its memory is that of the pooled vectors",
    "collect_names": "off by default; its memory is that of the labels of all cells",
    "fit_retriever": "off by default; its memory is that of the pooled vectors of the training cells and their views",
    "score_retrieval": "off by default; it scores at most 5,000 cells",
    "search_cells": "off by default; its memory is that of the pooled vectors and of the table of cells",
    "fetch_resource": "reads no cells, and fetches tables of 6 to 12 MB only for studies of mice and texts about genes",
    "describe_genes": "reads no cells, and runs only for the encoder gene_text",
    "baseline_greedy": "off by default, and takes hours: it writes word by word",
}
# Targets of rules that are not run for all results, or that another rule comes between, as the calibration between the
# scores of validation cells and those of test cells
TARGETS = {
    "score_candidates": "results/scale/scores/validation/0.safetensors",
    "hide_labels": "results/scale/unlabelled/simulated.h5ad",
}
DONORS, GENE_SETS, GENES_PER_SET = 200, 20, 40
SMALL_STUDIES, SMALL = ("second", "third"), 1_000  # cells
CONFIG = {
    "run": "scale",
    "datasets": "datasets.tsv",
    "sample": {"cells": 10**9},
    "pathways": {"gene_sets": "sets.gmt", "descriptions": None},
    "language_model": {"name": "tiny", "source": "tiny-model"},
    # reads gene vectors, unlike the default, which reads pooled ones
    "projector": {"kind": "mlp", "hidden": 32},
    "finetune": {"align_steps": 20, "opening_epochs": 0, "epochs": 1, "batch_cells": 64},
}


def prepare(folder: Path, cells: int) -> None:
    """Write the input of a run: simulated studies, their sheet, gene sets and a tiny language model."""
    from simulate_cells import name_genes

    from tiny_model import write_tiny_model

    folder.mkdir(parents=True)
    sizes = {"simulated": cells} | dict.fromkeys(SMALL_STUDIES, SMALL)
    for seed, (name, size) in enumerate(sizes.items()):
        simulate = [sys.executable, ROOT / "tests/benchmarks/simulate_cells.py", folder / f"{name}.h5ad"]
        simulate += ["--cells", str(size), "--donors", str(DONORS), "--seed", str(seed)]
        subprocess.run(simulate, check=True)
    rows = "".join(f"{name}\t{name}.h5ad\n" for name in sizes)
    (folder / "datasets.tsv").write_text(f"dataset\tsource\n{rows}")
    symbols, rng = name_genes(20_000)["symbol"].to_numpy(), np.random.default_rng(0)
    sets = [[f"set {i}", "-", *rng.choice(symbols, GENES_PER_SET, replace=False)] for i in range(GENE_SETS)]
    (folder / "sets.gmt").write_text("".join("\t".join(line) + "\n" for line in sets))
    write_tiny_model(folder / "tiny-model")


def run_rule(rule: str, folder: Path, on_the_fly: bool) -> dict[str, float]:
    """Run a rule again, on the results of those before it; return its peaks in MB and its duration in seconds."""
    config = CONFIG | {"encoder": {"cache": not on_the_fly}}
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--directory", folder]
    if rule in TARGETS:
        command.append(TARGETS[rule])
    elif rule.endswith("_query"):
        command += ["annotate", "--config", "query=simulated.h5ad", "model=results/scale/model"]
    command += ["--configfile", folder / "config.yaml", "--workflow-profile", "none", "--cores", "1", "--notemp"]
    command += ["--until", rule, "--forcerun", rule, "--rerun-triggers", "mtime"]
    peaks = {"resident": 0.0, "private": 0.0, "seconds": 0.0}
    with (folder / "log.txt").open("w") as log:
        run = psutil.Popen(command, stdout=log, stderr=log)
        while run.poll() is None:
            for process in run.children(recursive=True):
                watch(process, rule, peaks)
            time.sleep(0.1)
    if run.returncode or not peaks["resident"]:
        sys.exit((folder / "log.txt").read_text()[-3000:] or f"{rule} did not run")
    return peaks


def watch(process: psutil.Process, rule: str, peaks: dict[str, float]) -> None:
    """Raise the peaks to those of a process, if it runs the rule's script."""
    try:
        if not any(part.endswith(f".{rule}.py") for part in process.cmdline()):
            return
        status = Path(f"/proc/{process.pid}/status").read_text()
        seconds = time.time() - process.create_time()
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return
    sizes = {name: int(kilobytes) / 1024 for name, kilobytes in re.findall(r"(\w+):\s+(\d+) kB", status)}
    found = {"resident": sizes.get("VmHWM", 0), "private": sizes.get("RssAnon", 0), "seconds": seconds}
    peaks |= {name: max(value, peaks[name]) for name, value in found.items()}


def print_table(folder: Path, sizes: list[int]) -> None:
    """Print the peaks measured so far, their ratio, and the slope between the smallest and the largest size."""
    peaks = [json.loads(path.read_text()) if (path := peaks_file(folder, cells)).is_file() else {} for cells in sizes]
    print("resident (private) peaks in MB; slope of the private memory in kB per cell")
    print(f"{'rule':35}", *(f"{cells:>16,}" for cells in sizes), f"{'ratio':>8}{'slope':>8}{'at 1,000,000':>14}")
    for rule in dict.fromkeys(rule for table in peaks for rule in table):
        row = [f"{rule:35}", *(_cell(table.get(rule)) for table in peaks)]
        if len(sizes) > 1 and rule in peaks[0] and rule in peaks[-1]:
            first, last = peaks[0][rule], peaks[-1][rule]
            slope = (last["private"] - first["private"]) / (sizes[-1] - sizes[0])
            million = last["private"] + slope * (10**6 - sizes[-1])
            row.append(f"{last['resident'] / first['resident']:8.2f}{slope * 1024:8.2f}{million:14,.0f}")
        print(*row, flush=True)


def _cell(peaks: dict[str, float] | None) -> str:
    return f"{peaks['resident']:,.0f} ({peaks['private']:,.0f})".rjust(16) if peaks else " " * 16


def peaks_file(folder: Path, cells: int) -> Path:
    """Return the file with the peaks of the rules at one size."""
    return folder / str(cells) / "peaks.json"


def main() -> None:
    """Measure the rules at each size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--rules", nargs="*", choices=RULES, help="by default all; none to print what was measured")
    parser.add_argument("--on-the-fly", action="store_true")
    parser.add_argument("--folder", type=Path, help="keep the files here, and reuse existing ones")
    given = parser.parse_args()
    rules = (ON_THE_FLY if given.on_the_fly else RULES) if given.rules is None else given.rules
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        for cells in sorted(given.cells):
            if rules and not (folder / str(cells)).is_dir():
                prepare(folder / str(cells), cells)
            for rule in rules:
                file = peaks_file(folder, cells)
                known = json.loads(file.read_text()) if file.is_file() else {}
                name = f"{rule}, on the fly" if given.on_the_fly else rule
                known[name] = run_rule(rule, folder / str(cells), given.on_the_fly)
                file.write_text(json.dumps(known, indent=1))
                print(f"{cells:,} cells, {name}: {known[name]['seconds']:.0f} s", flush=True)
        print_table(folder, sorted(given.cells))


if __name__ == "__main__":
    main()
