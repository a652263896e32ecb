"""Check that a model can memorise 64 cells: a model that cannot is broken.

    .venv/bin/python tests/benchmarks/overfit.py results/pbmc68k resources/models/smollm2-135m-instruct

Trains on 64 training cells of a finished run until the loss is low, describes the same cells, and counts the correct
predictions for each slot. Takes a few minutes on two cores.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "workflow/scripts"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from cell2text.contracts import DESCRIPTIONS, TERM_SLOTS, TERMS
from cell2text.device import pick_device
from cell2text.embedding.vectors import Embeddings
from cell2text.finetuning.align import align
from cell2text.finetuning.data import find_classes, find_programmes, read_cells
from cell2text.finetuning.loop import Finetuning
from cell2text.generation.describe import describe_cells
from cell2text.grammar import PATHWAY, Terms
from cell2text.model import fast
from cell2text.model.alignment import LabelTargets
from cell2text.model.bundle import build
from cell2text.model.projectors import PROJECTORS
from cell2text.processes import Team
from default_settings import finetune_settings, projector_settings


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
    descriptions = given.results / "corpus/descriptions.parquet"
    texts = DESCRIPTIONS.read(descriptions)
    texts = texts[texts["split"] == "train"].sample(given.cells, random_state=0)
    classes, (programmes, numbers) = find_classes(texts), find_programmes(descriptions)
    embeddings = Embeddings(sorted(map(str, given.results.glob("embeddings/*/*.safetensors"))))
    projector = projector_settings(kind=given.projector, hidden=1024 if given.projector == "pooled" else 256)
    settings = finetune_settings(opening_epochs=0, epochs=given.epochs, patience=10**9, checkpoint_steps=10**9)
    device = pick_device()
    dimensions = embeddings.dimensions(PROJECTORS[given.projector].reads)
    model = build(given.language_model, projector, dimensions, settings, device)
    fast.speed_up(model)
    cells = read_cells(texts, "train", embeddings, classes, numbers[texts.index.to_numpy()], model)
    model.about["longest_text"] = int(cells.text_lengths.max())
    vectors, lengths = cells.vectors[np.arange(len(cells.texts))]
    if model.projector.reads == "gene_vectors":
        vectors = vectors[torch.arange(vectors.shape[1]) < lengths[:, None]]
    model.projector.fit_inputs(vectors.to(device))
    table = TERMS.read(given.results / "corpus/terms.parquet")
    targets = LabelTargets.of_labels(classes | ({PATHWAY: programmes} if programmes else {}), table, model)
    align(model, targets, cells, 200, 0.0, 0, device)
    with tempfile.TemporaryDirectory() as folder:
        state = Finetuning(model, targets, cells, cells, settings, 0, Path(folder), "", Team()).run()
    described = list(describe_cells(model.ready_to_write(), cells.vectors, Terms(table), 64, None))
    print(f"{given.cells} cells, {given.epochs} epochs, {given.projector}: loss {state.best_loss:.4f} nats per token")
    for slot in TERM_SLOTS:
        truth = texts[f"{slot}_id"].to_list()
        known = [i for i, label in enumerate(truth) if label is not None]
        if known:
            correct = sum(described[i][f"{slot}_id"] == truth[i] for i in known)
            print(f"  {slot}: {correct} of {len(known)} correct")
    sets = sum(
        set(row["pathway_ids"]) == set(truth) for row, truth in zip(described, texts["pathway_ids"], strict=True)
    )
    identical = sum(row["text"] == truth for row, truth in zip(described, texts["text"], strict=True))
    print(f"  gene programmes: {sets} of {len(described)} correct; texts: {identical} identical")


if __name__ == "__main__":
    main()
