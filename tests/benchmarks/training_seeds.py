"""Cell type accuracy of models that differ in their training seed alone, on the split of a finished run.

    .venv/bin/python tests/benchmarks/training_seeds.py results/pbmc68k resources/models/smollm2-135m-instruct 1 2

The run's corpus, embeddings and settings are used as they are; only weights, batches and noise are drawn anew.
Prints each seed's accuracy on the test cells beside the run's own baselines.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[2] / "workflow/scripts"))

from cell2text.contracts import DESCRIPTIONS, PREDICTIONS, read_json, read_jsonl
from cell2text.generation.describe import generate_descriptions
from cell2text.training import finetune
from cell2text.vectors import Embeddings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="a finished run, as results/pbmc68k")
    parser.add_argument("language_model", help="a model directory, as resources/models/smollm2-135m-instruct")
    parser.add_argument("seeds", type=int, nargs="+")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)

    results = arguments.results
    corpus = results / "corpus"
    descriptions, terms = str(corpus / "descriptions.parquet"), str(corpus / "terms.parquet")
    embeddings = Embeddings(sorted(map(str, results.glob("embeddings/*/*.safetensors"))))
    about = read_json(results / "model/cell2text.json")
    truth = DESCRIPTIONS.read(descriptions).set_index("cell_id")["cell_type_id"]

    def accuracy(told: pd.DataFrame) -> str:
        told = told[told["split"] == "test"]
        right = told["cell_type_id"].to_numpy() == truth[told["cell_id"]].to_numpy()
        return f"{right.mean():.3f} of {len(right)} cells, {(told['status'] != 'parsed').sum()} not parsed"

    found = {path.stem: accuracy(PREDICTIONS.read(path)) for path in sorted(results.glob("baselines/*.parquet"))}
    own = [row for path in results.glob("generations/test/*.jsonl") for row in read_jsonl(path)]
    found[f"cell2text, seed {about['seed']} (the run's own)"] = accuracy(pd.DataFrame(own))
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            model, said = f"{folder}/model", f"{folder}/test.jsonl"
            finetune(
                arguments.language_model,
                descriptions,
                terms,
                embeddings,
                model,
                projector=about["projector"],
                settings=about["finetune"],
                seed=seed,
                library="",
            )
            generate_descriptions(
                model,
                arguments.language_model,
                str(corpus / "cells.parquet"),
                terms,
                embeddings,
                said,
                split="test",
                settings={"batch_cells": 64, "max_new_tokens": 256},
            )
            found[f"cell2text, seed {seed}"] = accuracy(pd.DataFrame(read_jsonl(said)))
    for name, told in found.items():
        print(f"{name:40s} {told}")


if __name__ == "__main__":
    main()
