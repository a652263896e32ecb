"""Cells described per second by each way of naming them, against transformers' ``generate`` in the same run.

    .venv/bin/python tests/benchmarks/describe_cells.py results/pbmc68k --cells 500

Reads a finished run. All ways describe the same cells: those of the test split first, then of the others, because speed
does not depend on the split. Loading the model is not timed. ``generate`` writes whole texts of as many cells as are
given with ``--written``, in batches of the same size; for a fair comparison the model must have been trained on whole
texts (``finetune.epochs``), so that it ends them. The share of the test cells with the names of ``model`` and the
accuracy of their cell type are printed for each way.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "workflow/scripts"))

from cell2text.confidence.decisions import Confidence, read_ancestors  # noqa: E402
from cell2text.contracts import DESCRIPTIONS, TERM_SLOTS  # noqa: E402
from cell2text.embedding.vectors import Embeddings, Vectors  # noqa: E402
from cell2text.files import read_json  # noqa: E402
from cell2text.generation.score_candidates import Scorer, everybody, nobody  # noqa: E402
from cell2text.model.cell2text import Cell2Text  # noqa: E402


def main() -> None:
    """Describe the cells in each way and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="results folder of a finished run")
    parser.add_argument("--models", type=Path, default=ROOT / "resources/models")
    parser.add_argument("--cells", type=int, default=500)
    parser.add_argument("--written", type=int, default=64, help="cells that generate describes")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    about = read_json(given.run / "finetuned/cell2text.json")
    terms = str(given.run / "corpus/terms.parquet")
    scorer = Scorer(str(given.run / "finetuned"), str(given.models / about["language_model"]["name"]), terms)
    table = DESCRIPTIONS.read(given.run / "corpus/descriptions.parquet")
    table = table.iloc[np.argsort(table["split"] != "test", kind="stable")[: given.cells]].reset_index(drop=True)
    embeddings = Embeddings(sorted(map(str, (given.run / "embeddings").glob("*/*.safetensors"))))
    vectors = embeddings.vectors(table["cell_id"].to_list(), scorer.model.projector.reads)
    confidence = Confidence.load(given.run / "confidence/confidence.json")
    ancestors = read_ancestors(terms)

    def describe(needs: Callable) -> pd.DataFrame:
        return confidence.describe(scorer.score(vectors, given.batch, needs), scorer.labels, ancestors)

    ways = {"model": everybody, "cascade": confidence.needs_language_model, "projector": nobody}
    plain, rows, found = _time_generate(scorer.model, vectors, given.written, given.batch), [], {}
    for way, needs in ways.items():
        start = time.perf_counter()
        found[way] = describe(needs)
        rows.append({"way": way, "cells/s": len(table) / (time.perf_counter() - start)})
    test, named = (table["split"] == "test").to_numpy(), [f"{slot}_id" for slot in TERM_SLOTS] + ["pathway_ids"]
    for row in rows:
        one, both = found[row["way"]][test], found["model"][test]
        row |= {
            "times generate": row["cells/s"] / plain,
            "names as model": ((one[named] == both[named]) | both[named].isna()).all(axis=1).mean(),
            "cell type accuracy": (one["cell_type_id"] == table["cell_type_id"][test]).mean(),
        }
    print(f"generate: {plain:.2f} cells/s; {len(table)} cells, {test.sum()} test cells, {given.threads} threads")
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.3f"))


@torch.inference_mode()
def _time_generate(model: Cell2Text, vectors: Vectors, cells: int, batch: int) -> float:
    """Return the cells per second of transformers' greedy ``generate``."""
    rows, start = np.arange(min(cells, len(vectors))), time.perf_counter()
    for first in range(0, len(rows), batch):
        prompt, mask = model.read_cells(*(part.to(model.device) for part in vectors[rows[first : first + batch]]))
        model.language_model.generate(
            inputs_embeds=prompt,
            attention_mask=mask.long(),
            max_new_tokens=model.about["longest_text"],
            do_sample=False,
            pad_token_id=model.tokenizer.eos_token_id,
        )
    return len(rows) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
