"""Whether a model can learn 64 cells by heart: one that cannot is broken.

    .venv/bin/python tests/benchmarks/overfit.py results/pbmc68k resources/models/smollm2-135m-instruct

Trains on 64 training cells of a finished run until the loss is low, has the same cells described, and counts for each
slot how many are right. Takes some minutes on two cores.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "workflow/scripts"))

from cell2text.contracts import DESCRIPTIONS, TERM_SLOTS, TERMS
from cell2text.device import pick_device
from cell2text.embedding.vectors import Embeddings
from cell2text.finetuning.align import align
from cell2text.finetuning.data import find_classes, read_cells
from cell2text.finetuning.loop import Finetuning
from cell2text.generation.describe import describe_cells
from cell2text.grammar import Terms
from cell2text.model.alignment import LabelTargets
from cell2text.model.bundle import build
from cell2text.processes import Team

SETTINGS = {
    "align_weight": 1.0,
    "opening_epochs": 0,
    "patience": 10**9,
    "keep_best": "loss",
    "batch_cells": 8,
    "batch_tokens": None,
    "accumulate": 1,
    "checkpoint_activations": False,
    "balance": False,
    "learning_rate": 1e-3,
    "projector_learning_rate": 5e-4,
    "checkpoint_steps": 10**9,
}


def main() -> None:
    """Train, describe and count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("language_model")
    parser.add_argument("--cells", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--projector", default="pooled")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.manual_seed(0)
    texts = DESCRIPTIONS.read(given.results / "corpus/descriptions.parquet")
    texts = texts[texts["split"] == "train"].sample(given.cells, random_state=0)
    classes = find_classes(texts)
    embeddings = Embeddings(sorted(map(str, given.results.glob("embeddings/*/*.safetensors"))))
    projector = {"kind": given.projector, "soft_tokens": 8, "hidden": 1024 if given.projector == "pooled" else 256}
    device = pick_device()
    model = build(given.language_model, projector, embeddings.dimensions(), {"r": 16, "lora_alpha": 32}, device)
    cells = read_cells(texts, "train", embeddings, classes, model)
    vectors, lengths = cells.vectors[np.arange(len(cells.texts))]
    if model.projector.reads == "gene_vectors":
        vectors = vectors[torch.arange(vectors.shape[1]) < lengths[:, None]]
    model.projector.fit_inputs(vectors.to(device))
    table = TERMS.read(given.results / "corpus/terms.parquet")
    targets = LabelTargets.of_labels(classes, table, model)
    align(model, targets, cells, 200, 0, device)
    with tempfile.TemporaryDirectory() as folder:
        settings = SETTINGS | {"epochs": given.epochs}
        state = Finetuning(model, targets, cells, cells, settings, 0, Path(folder), "", Team()).run()
    said = list(
        describe_cells(model.ready_to_write(), cells.vectors, Terms(table), {"batch_cells": 64, "max_new_tokens": 256})
    )
    print(f"{given.cells} cells, {given.epochs} epochs, {given.projector}: loss {state.best_loss:.4f} nats a token")
    for slot in TERM_SLOTS:
        truth = texts[f"{slot}_id"].to_list()
        known = [i for i, label in enumerate(truth) if label is not None]
        if known:
            right = sum(said[i][f"{slot}_id"] == truth[i] for i in known)
            print(f"  {slot}: {right} of {len(known)} right")
    sets = sum(set(row["pathway_ids"]) == set(truth) for row, truth in zip(said, texts["pathway_ids"], strict=True))
    whole = sum(row["text"] == truth for row, truth in zip(said, texts["text"], strict=True))
    print(f"  gene programmes: {sets} of {len(said)} right; texts: {whole} word for word")


if __name__ == "__main__":
    main()
