"""Peak memory and speed of the stages that process counts, on simulated files of several sizes.

    .venv/bin/python tests/benchmarks/memory_at_scale.py --cells 20000 200000 1000000

Each stage runs the rule's script in a separate process with the default configuration, except that ``sample.cells``
keeps all cells. The peak is the maximum resident memory of that process as reported by the operating system, including
imports. The last column is the ratio of the peak to that of the smallest file.
"""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]
# Input, output and params that the rule of each stage passes to its script, given folder and config.
STAGES: dict[str, Callable[[Path, dict[str, Any]], dict[str, dict[str, Any]]]] = {
    "fetch_dataset": lambda folder, config: {
        "params": {
            "row": {"dataset": "simulated", "source": str(folder / "source.h5ad")},
            "genes": {"gene_table": None, "min_counts_kept": config["genes"]["min_counts_kept"]},
        },
        "output": {"cells": folder / "raw.h5ad"},
    },
    "filter_cells": lambda folder, config: {
        "input": {"cells": folder / "raw.h5ad"},
        "params": {"limits": config["qc"], "own_limits": {}, "seed": 0},
        "output": {
            "cells": folder / "cells.h5ad",
            "table": folder / "qc.parquet",
            "summary": folder / "qc.json",
            "plot": folder / "qc.svg",
        },
    },
    "sample_cells": lambda folder, config: {
        "input": {"cells": [folder / "cells.h5ad"]},
        "params": config["sample"] | {"cells": 10**9, "seed": 0},
        "output": {"cells": folder / "sampled.parquet", "diversity": folder / "diversity.json"},
    },
    "split_donors": lambda folder, config: {
        "input": {"cells": folder / "sampled.parquet", "diversity": folder / "diversity.json"},
        "params": {"split": "donors", "shares": config["split_shares"], "held_out": [], "seed": 0},
        "output": {"cells": folder / "corpus.parquet", "audit": folder / "audit.json"},
    },
    "score_pathways": lambda folder, config: {
        "input": {
            "cells": folder / "cells.h5ad",
            "corpus": folder / "corpus.parquet",
            "gene_sets": ROOT / config["pathways"]["gene_sets"],
        },
        "params": {"min_genes": config["pathways"]["min_genes"]},
        "output": {"scores": folder / "pathways.parquet"},
    },
    "measure_genes": lambda folder, config: {
        "input": {"corpus": folder / "corpus.parquet", "cells": [folder / "cells.h5ad"], "encoder": []},
        "params": {},
        "output": {"genes": folder / "genes.parquet"},
    },
    "rank_genes": lambda folder, config: {
        "input": {
            "corpus": folder / "corpus.parquet",
            "cells": folder / "cells.h5ad",
            "genes": folder / "genes.parquet",
        },
        "params": {},
        "output": {"tokens": folder / "tokens.parquet"},
    },
}


def run_stage(name: str, folder: Path) -> None:
    """Run a rule's script as Snakemake would."""
    sys.path.insert(0, str(ROOT / "workflow/scripts"))
    from cell2text.config import check_config
    from cell2text.job import give_memory_back

    config = check_config({"run": "scale"}, ROOT / "workflow/schemas/config.schema.yaml", "defaults")
    given = {part: SimpleNamespace(**values) for part, values in STAGES[name](folder, config).items()}
    script = importlib.import_module(name)
    give_memory_back()
    script.main(SimpleNamespace(threads=2, **given))


def measure(command: list[str | Path]) -> tuple[float, float]:
    """Run a command; return its peak resident memory in MB and its duration in seconds."""
    start = time.monotonic()
    child = subprocess.Popen([sys.executable, *command])
    _, status, usage = os.wait4(child.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(f"{' '.join(map(str, command))} ended with {code}")
    return usage.ru_maxrss / 1024, time.monotonic() - start


def main() -> None:
    """Print one line per stage and size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, nargs="+", default=[20_000, 200_000, 1_000_000])
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--folder", type=Path, help="keep the files here, and reuse existing ones")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        run_stage(given.stage, given.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        smallest: dict[str, float] = {}
        print(f"{'stage':16}{'cells':>10}{'peak, MB':>10}{'cells/s':>10}{'to smallest':>13}", flush=True)
        for cells in sorted(given.cells):
            folder = (given.folder or Path(temporary)) / str(cells)
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "source.h5ad").exists():
                measure([ROOT / "tests/benchmarks/simulate_cells.py", folder / "source.h5ad", "--cells", str(cells)])
            for stage in given.stages:
                peak, seconds = measure([__file__, "--stage", stage, "--folder", folder])
                ratio = peak / smallest.setdefault(stage, peak)
                print(f"{stage:16}{cells:10}{peak:10.0f}{cells / seconds:10.0f}{ratio:13.2f}", flush=True)


if __name__ == "__main__":
    main()
