"""Cells described per second by each way of naming them, against transformers' ``generate`` in the same run.

    .venv/bin/python tests/benchmarks/describe_cells.py results/pbmc68k --cells 500

Reads a finished run. All ways describe the same cells: those of the test split first, then of the others, because speed
does not depend on the split. Loading the model is not timed. ``generate`` writes whole texts of as many cells as are
given with ``--written``, in batches of the same size, and so does ``drafts``: the same model checks drafts of its texts
(``evaluate.greedy``). For these two the model must have been trained on whole texts (``finetune.epochs``), so that it
ends them; the share of equal texts is printed, and that in float32 with ``--float32``. For the other ways, the share of
the test cells with the names of ``model`` and the accuracy of their cell type are printed.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "workflow/scripts"))

from cell2text.confidence.decisions import Confidence, read_ancestors  # noqa: E402
from cell2text.contracts import DESCRIPTIONS, TERM_SLOTS, TERMS  # noqa: E402
from cell2text.embedding.vectors import Embeddings, Vectors  # noqa: E402
from cell2text.files import read_json  # noqa: E402
from cell2text.generation.describe import MARGIN, describe_cells  # noqa: E402
from cell2text.generation.drafts import Drafts  # noqa: E402
from cell2text.generation.score_candidates import Scorer, everybody, nobody  # noqa: E402
from cell2text.grammar import Terms  # noqa: E402
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
    parser.add_argument("--float32", action="store_true", help="whatever this machine multiplies fastest")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    about = read_json(given.run / "finetuned/cell2text.json")
    terms = str(given.run / "corpus/terms.parquet")
    scorer = Scorer(str(given.run / "finetuned"), str(given.models / about["language_model"]["name"]), terms)
    table = DESCRIPTIONS.read(given.run / "corpus/descriptions.parquet")
    table = table.iloc[np.argsort(table["split"] != "test", kind="stable")[: given.cells]].reset_index(drop=True)
    if given.float32:
        scorer.model.language_model.float()
    embeddings = Embeddings(sorted(map(str, (given.run / "embeddings").glob("*/*.safetensors"))))
    vectors = embeddings.vectors(table["cell_id"].to_list(), scorer.model.projector.reads)
    confidence = Confidence.load(given.run / "confidence/confidence.json")
    ancestors = read_ancestors(terms)

    def describe(needs: Callable) -> pd.DataFrame:
        return confidence.describe(scorer.score(vectors, given.batch, needs), scorer.labels, ancestors)

    some = embeddings.vectors(table["cell_id"].to_list()[: given.written], scorer.model.projector.reads)
    plain, expected = _time(lambda: _generate(scorer.model, some, given.batch))
    drafted, written = _time(lambda: _write(scorer, some, given.batch, Terms(TERMS.read(terms))))
    equal = np.mean([one == other for one, other in zip(written, expected, strict=True)])
    ways, rows, found = {"model": everybody, "cascade": confidence.needs_language_model, "projector": nobody}, [], {}
    for way, needs in ways.items():
        seconds, found[way] = _time(lambda needs=needs: describe(needs))
        rows.append({"way": way, "cells/s": len(table) / seconds})
    test, named = (table["split"] == "test").to_numpy(), [f"{slot}_id" for slot in TERM_SLOTS] + ["pathway_ids"]
    for row in rows:
        one, both = found[row["way"]][test], found["model"][test]
        row |= {
            "times generate": row["cells/s"] * plain / len(expected),
            "names as model": ((one[named] == both[named]) | both[named].isna()).all(axis=1).mean(),
            "cell type accuracy": (one["cell_type_id"] == table["cell_type_id"][test]).mean(),
        }
    print(f"{len(table)} cells, {test.sum()} test cells, {given.threads} threads, {scorer.model.language_model.dtype}")
    print(f"generate: {len(expected) / plain:.2f} cells/s")
    print(
        f"drafts: {len(expected) / drafted:.2f} cells/s, {plain / drafted:.2f} times generate, {equal:.3f} texts equal"
    )
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.3f"))


def _time(work: Callable) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


@torch.inference_mode()
def _generate(model: Cell2Text, vectors: Vectors, batch: int) -> list[str]:
    """Return the texts of transformers' greedy ``generate``."""
    texts = []
    for start in range(0, len(vectors), batch):
        rows = np.arange(start, min(start + batch, len(vectors)))
        prompt, mask = model.read_cells(*(part.to(model.device) for part in vectors[rows]))
        ids = model.language_model.generate(
            inputs_embeds=prompt,
            attention_mask=mask.long(),
            max_new_tokens=math.ceil(MARGIN * model.about["longest_text"]),
            do_sample=False,
            pad_token_id=model.tokenizer.eos_token_id,
        )
        texts += model.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def _write(scorer: Scorer, vectors: Vectors, batch: int, terms: Terms) -> list[str]:
    """Return the texts of the same model with drafts."""
    drafts = Drafts(
        scorer.labels,
        scorer.model.about["programmes_per_cell"],
        terms,
        scorer.model.tokenizer,
        scorer.score(vectors, batch, nobody),
    )
    return [row["text"] for row in describe_cells(scorer.model, vectors, terms, batch, None, drafts)]


if __name__ == "__main__":
    main()
