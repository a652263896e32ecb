"""Processor time of training until the names of validation cells are as probable as after the default run's training.

    .venv/bin/python tests/benchmarks/time_to_loss.py results/pbmc68k resources/models/smollm2-135m-instruct

Compares the pipeline's training (alignment, then the names of all cells once) with a stock transformers Trainer that
trains the same projector and a PEFT adapter of the same rank, with as many cells per step: on whole texts, as in the
paper, and on names alone. Both read the cells of a finished run. Every few steps, and outside the timing, the mean
negative log likelihood of the validation cells' names is computed; the Trainer stops once it is as low as ours. One
thread computes, and its processor time is counted, so that other work on the machine does not matter much.
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "workflow/scripts"))
sys.path.insert(0, str(ROOT / "tests"))

import stock_trainer  # noqa: E402

from cell2text.contracts import DESCRIPTIONS, TERMS  # noqa: E402
from cell2text.device import pick_precision  # noqa: E402
from cell2text.embedding.vectors import Embeddings  # noqa: E402
from cell2text.finetuning.align import align  # noqa: E402
from cell2text.finetuning.data import Cells, find_classes, find_programmes, read_cells  # noqa: E402
from cell2text.finetuning.finetune import choose_targets, fit_inputs  # noqa: E402
from cell2text.finetuning.loop import Finetuning  # noqa: E402
from cell2text.grammar import PATHWAY  # noqa: E402
from cell2text.model import fast  # noqa: E402
from cell2text.model.bundle import build  # noqa: E402
from cell2text.model.cell2text import Cell2Text  # noqa: E402
from cell2text.model.language_model import load_language_model  # noqa: E402
from cell2text.model.projectors import build_projector  # noqa: E402
from cell2text.processes import Team  # noqa: E402
from default_settings import finetune_settings, projector_settings  # noqa: E402

CPU = torch.device("cpu")
SEED = 42
SPLITS = ("train", "validation")


class Stock(nn.Module):
    """Plain transformers and PEFT behind the projector, as a Trainer takes it."""

    def __init__(self, model: Cell2Text):
        super().__init__()
        self.model = model

    def forward(self, vectors, lengths, text, text_mask):
        """Return the mean loss per token of a batch of texts."""
        loss, tokens = self.model.text_loss(*self.model.projector(vectors, lengths), text, text_mask)
        return {"loss": loss / tokens}


class Watch(TrainerCallback):
    """Adds up the processor seconds of the steps, and stops at a validation loss."""

    def __init__(self, model: Cell2Text, cells: Cells, goal: float, every: int):
        self.model, self.cells, self.goal, self.every = model, cells, goal, every
        self.seconds, self.found = 0.0, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.process_time() - self.start
        if state.global_step % self.every == 0 or state.global_step == args.max_steps:
            self.found.append((self.seconds, names_loss(self.model, self.cells)))
            print(f"   {self.seconds:6.0f} s, step {state.global_step}: {self.found[-1][1]:.4f}", flush=True)
            control.should_training_stop = self.found[-1][1] <= self.goal


@torch.no_grad()
def names_loss(model: Cell2Text, cells: Cells) -> float:
    """Return the mean negative log likelihood per token of the openings, which have all names, in nats."""
    training, total, tokens = model.training, 0.0, 0
    model.eval()
    for rows in np.array_split(np.arange(len(cells.ids)), max(1, len(cells.ids) // 32)):
        vectors, lengths, text, text_mask, _ = cells.batch(rows, CPU)
        loss, size = model.text_loss(*model.projector(vectors, lengths), text, text_mask)
        total, tokens = total + float(loss), tokens + int(size)
    model.train(training)
    return total / tokens


def our_seconds(run: Path, language_model: str, embeddings: Embeddings, texts) -> tuple[float, float, tuple]:
    """Return the seconds of alignment and of fine-tuning; and the validation loss, training and validation cells."""
    settings = finetune_settings()
    torch.manual_seed(SEED)
    model = build(language_model, projector_settings(), embeddings.dimensions("pooled"), settings, CPU)
    classes = find_classes(texts[texts["split"] == "train"])
    programmes, numbers = find_programmes(run / "corpus/descriptions.parquet")
    train, validation = (read_cells(texts, split, embeddings, classes, numbers, model) for split in SPLITS)
    labels, table = classes | {PATHWAY: programmes}, TERMS.read(run / "corpus/terms.parquet")
    fit_inputs(model, train, SEED)
    fast.speed_up(model)
    targets = choose_targets(model, train, texts.loc[texts["split"] == "train", "text"], labels, table)
    work = Finetuning(model, targets, train, validation, settings, SEED, Path(tempfile.mkdtemp()), "", Team())
    start = time.process_time()
    align(model, targets, train, settings.align_steps, settings.view_share, SEED, CPU)
    aligned = time.process_time()
    work.optimiser.take_weights()
    work.run()
    finished = time.process_time()
    cells = train, validation.openings_alone()
    return aligned - start, finished - aligned, (names_loss(model, cells[1]), *cells)


def stock_seconds(language_model: str, train: Cells, validation: Cells, goal: float, given) -> list[tuple]:
    """Return seconds and validation loss of a stock Trainer, every few steps."""
    torch.manual_seed(SEED)
    settings = finetune_settings()
    base, tokenizer = load_language_model(language_model, CPU, "lora")
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules="all-linear"
    )
    embeddings = base.get_input_embeddings().weight
    projector = build_projector(projector_settings(), train.vectors[np.array([0])][0].shape[-1], embeddings.shape[1])
    projector.start_at(embeddings)
    model = Cell2Text(get_peft_model(base, lora), tokenizer, projector, {})
    fit_inputs(model, train, SEED)
    random, size, batches = np.random.default_rng(SEED), settings.batch_cells, []
    for _ in range(given.epochs):
        order = random.permutation(len(train.ids))
        batches += [order[start : start + size] for start in range(0, len(order), size)]
    names = ("vectors", "lengths", "text", "text_mask")
    batches = [dict(zip(names, train.batch(rows, CPU), strict=False)) for rows in batches]
    watch = Watch(model, validation, goal, given.every)
    stock_trainer.train(Stock(model), batches, watch, settings.learning_rate, warmup=10)
    return watch.found


def main() -> None:
    """Train in each way and print seconds and losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="results folder of a finished run")
    parser.add_argument("language_model", help="a model directory, such as resources/models/smollm2-135m-instruct")
    parser.add_argument("--epochs", type=int, default=4, help="the Trainer's, with a linearly falling learning rate")
    parser.add_argument("--every", type=int, default=10, help="steps between two validations")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)

    embeddings = Embeddings(sorted(map(str, (given.run / "embeddings").glob("*/*.safetensors"))))
    texts = DESCRIPTIONS.read(given.run / "corpus/descriptions.parquet")
    aligning, reading, (goal, train, validation) = our_seconds(given.run, given.language_model, embeddings, texts)
    print(f"{len(train.ids)} training cells, {pick_precision(CPU)}")
    print(f"ours: {aligning:.0f} s alignment, {reading:.0f} s names: {goal:.4f} nats per token", flush=True)
    for way, cells in {"whole texts": train, "names alone": train.openings_alone()}.items():
        print(f"stock Trainer, {way}:", flush=True)
        found = stock_seconds(given.language_model, cells, validation, goal, given)
        reached = [seconds for seconds, loss in found if loss <= goal]
        seconds, verb = (reached[0], "takes") if reached else (found[-1][0], "has not got there in")
        print(f"   {verb} {seconds:.0f} s, {seconds / (aligning + reading):.1f} times as long as ours", flush=True)


if __name__ == "__main__":
    main()
