"""Speed-up by each part of the fast path: the time of a training step with one part switched off at a time.

    .venv/bin/python tests/benchmarks/fast_parts.py results/pbmc68k resources/models/smollm2-135m-instruct

All variants train the same LoRA model on the same batches of a finished run and take turns, so that changes in the
machine's speed affect all of them. A step is a forward and a backward pass; the ratio is the time without the part
divided by the time with all parts, the median over the rounds. `plain` is the model without the fast path.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[2] / "workflow/scripts"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from cell2text.contracts import DESCRIPTIONS
from cell2text.embedding.vectors import Embeddings
from cell2text.finetuning.data import BatchSize, find_classes, plan_epoch, read_cells
from cell2text.model import bundle, fast, language_model
from cell2text.model.cell2text import Cell2Text
from cell2text.model.fast import attention, layers
from default_settings import finetune_settings, projector_settings

CPU = torch.device("cpu")


OFF = ("fuse_norms", "fuse_gates", "fuse_lora", "compile", "loss", "filling", "parts", "plain")


class PlainLoss:
    """Cross-entropy of torch, with all logits in memory."""

    @staticmethod
    def apply(states, weight, bias, targets):
        return functional.cross_entropy(functional.linear(states, weight, bias).float(), targets, reduction="sum")


def build(directory: str, dimensions: int, off: str):
    """Return a model with one part of the fast path switched off."""
    torch.manual_seed(0)
    model = bundle.build(directory, projector_settings(), dimensions, finetune_settings(), CPU).train()
    if off == "plain":
        return model
    kept = {name: getattr(fast, name) for name in ("fuse_norms", "fuse_gates", "fuse_lora")}
    if off in kept:
        setattr(fast, off, lambda model: None)
    fast.speed_up(model)
    for name, function in kept.items():
        setattr(fast, name, function)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="a finished run, such as results/pbmc68k")
    parser.add_argument("language_model", help="a model directory, such as resources/models/smollm2-135m-instruct")
    parser.add_argument("--batch-cells", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="pairs of steps")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="by default that of the model on this CPU")
    parser.add_argument("--off", nargs="+", choices=OFF, default=OFF, help="parts to switch off, one at a time")
    given = parser.parse_args()
    if given.precision:
        language_model.pick_precision = lambda device: getattr(torch, given.precision)

    texts = DESCRIPTIONS.read(given.results / "corpus/descriptions.parquet")
    embeddings = Embeddings(sorted(map(str, given.results.glob("embeddings/*/*.safetensors"))))
    nothing = build(given.language_model, embeddings.dimensions("pooled"), "nothing")
    cells = read_cells(
        texts, "train", embeddings, find_classes(texts), torch.empty(len(texts), 0, dtype=torch.long), nothing
    )
    steps = [rows for (rows,) in plan_epoch(cells.text_lengths, BatchSize(given.batch_cells), 1, 0, 0)]
    own = fast.TextLoss, attention.TOKENS, attention.CELLS_IN_CACHE, layers.can_compile

    def step(name: str, model: Cell2Text, rows: np.ndarray) -> tuple[float, float]:
        fast.TextLoss = PlainLoss if name == "loss" else own[0]
        attention.TOKENS = 1 if name == "filling" else own[1]
        attention.CELLS_IN_CACHE = 10**6 if name == "parts" else own[2]
        layers.can_compile = (lambda: False) if name == "compile" else own[3]
        rows = rows[np.argsort(cells.text_lengths[rows], kind="stable")]
        start = time.process_time()
        vectors, lengths, text, mask, _ = cells.batch(rows, CPU)
        loss, _ = model.text_loss(*model.projector(vectors, lengths), text, mask)
        loss.backward()
        seconds = time.process_time() - start
        model.zero_grad()
        return seconds, float(loss.detach())

    print(f"{torch.cpu.get_capabilities()['cpu_name']}, {torch.get_num_threads()} threads, "
          f"{nothing.language_model.dtype}, {given.batch_cells} cells per step")  # fmt: skip
    for name in given.off:
        model = build(given.language_model, embeddings.dimensions("pooled"), name)
        pairs = []
        for number in range(given.rounds + 1):  # the first pair warms up
            rows = steps[number % len(steps)]
            turns = [("nothing", nothing), (name, model)]
            found = {which: step(which, one, rows) for which, one in (turns if number % 2 else turns[::-1])}
            pairs.append((*found[name], *found["nothing"]))
        pairs = pairs[1:]
        ratio = statistics.median(seconds / of_all for seconds, _, of_all, _ in pairs)
        apart = max(abs(loss - of_all) / of_all for _, loss, _, of_all in pairs)
        middle = statistics.median(pair[0] for pair in pairs)
        print(f"without {name:12s} {ratio:5.3f} times the CPU time of a step with all parts ({middle:.2f} s), "
              f"losses differ by {apart:.1e} at most", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
