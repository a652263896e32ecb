"""Tokens per second of a fine-tuning step, compared with a stock transformers Trainer and a PEFT adapter.

    .venv/bin/python tests/benchmarks/finetune_step.py results/pbmc68k resources/models/smollm2-135m-instruct

Both train LoRA of the same rank on every linear layer of the same model, in the precision of this machine, on the same
batches: the texts of a finished run, each after a prompt of the same length. The stock model gets placeholder tokens
instead of soft tokens, computes logits for all tokens and keeps PEFT's default float32 adapters. All methods take
turns, and each value is the median over the rounds.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from threading import Event

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[2] / "workflow/scripts"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import stock_trainer

from cell2text.contracts import DESCRIPTIONS
from cell2text.device import pick_precision
from cell2text.embedding.vectors import Embeddings
from cell2text.finetuning.data import BatchSize, plan_epoch, read_cells
from cell2text.finetuning.loop import Finetuning
from cell2text.model import fast
from cell2text.model.alignment import LabelTargets
from cell2text.model.bundle import build
from cell2text.processes import Team
from default_settings import finetune_settings, projector_settings

CPU = torch.device("cpu")
LORA = {"r": 16, "lora_alpha": 32}  # the defaults of the configuration


class StepTimes(TrainerCallback):
    """Seconds of each optimiser step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


def our_seconds(work: Finetuning, steps: list) -> list[float]:
    work.model.train()
    work.start = time.monotonic()
    seconds = []
    for batches in steps:
        start = time.perf_counter()
        work._step(batches, Event())
        work.state.step += 1
        seconds.append(time.perf_counter() - start)
    return seconds


def stock_batches(work: Finetuning, steps: list) -> list[dict]:
    prompt, soft = work.model.prompt, work.model.about["projector"]["soft_tokens"]
    before = torch.cat([prompt.before, torch.full((soft,), 5), prompt.after])
    made = []
    for (batch,) in steps:
        _, _, text, text_mask, _ = work.train.batch(batch, CPU)
        ids = torch.cat([before.expand(len(batch), -1), text], 1)
        mask = torch.cat([torch.ones(len(batch), len(before), dtype=torch.bool), text_mask], 1)
        labels = torch.where(mask, ids, -100)
        labels[:, : len(before)] = -100
        made.append({"input_ids": ids, "attention_mask": mask.long(), "labels": labels})
    return made


def stock_seconds(directory: str, made: list[dict], float32_adapters: bool) -> list[float]:
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=pick_precision(CPU), local_files_only=True)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **LORA)
    times = StepTimes()
    model = get_peft_model(base, config, autocast_adapter_dtype=float32_adapters)
    stock_trainer.train(model, made, times, learning_rate=1e-3, warmup=0)
    return times.seconds


def main() -> None:
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="a finished run, such as results/pbmc68k")
    parser.add_argument("language_model", help="a model directory, such as resources/models/smollm2-135m-instruct")
    parser.add_argument("--batch-cells", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="timed steps per round, after two warm-up steps")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    texts = DESCRIPTIONS.read(arguments.results / "corpus/descriptions.parquet")
    classes = sorted(texts["cell_type_id"].dropna().unique())
    projector = projector_settings()
    settings = finetune_settings(opening_epochs=0, epochs=1, batch_cells=arguments.batch_cells, checkpoint_steps=10**9)
    embeddings = Embeddings(sorted(map(str, arguments.results.glob("embeddings/*/*.safetensors"))))
    model = build(arguments.language_model, projector, embeddings.dimensions("pooled"), settings, CPU)
    fast.speed_up(model)
    cells = read_cells(
        texts, "train", embeddings, {"cell_type": classes}, torch.empty(len(texts), 0, dtype=torch.long), model
    )
    weight = model.language_model.get_input_embeddings().weight
    targets = LabelTargets.of([classes], model.tokenizer, weight)
    work = Finetuning(model, targets, cells, cells, settings, 0, Path(tempfile.mkdtemp()), "", Team())
    steps = plan_epoch(cells.text_lengths, BatchSize(arguments.batch_cells), 1, 0, 0)[: arguments.steps + 2]
    made = stock_batches(work, steps)
    tokens = [int(batch["attention_mask"].sum()) for batch in made][2:]
    scored = [int((batch["labels"] >= 0).sum()) for batch in made][2:]
    methods = {
        "ours": lambda: our_seconds(work, steps),
        "stock Trainer + PEFT": lambda: stock_seconds(arguments.language_model, made, True),
        "stock, bfloat16 adapters": lambda: stock_seconds(arguments.language_model, made, False),
    }
    seconds = {name: [] for name in methods}
    for _ in range(arguments.rounds):
        for name, run in methods.items():
            seconds[name].append(sum(run()[2:]))
    print(f"{sum(tokens)} tokens ({sum(scored)} scored) in {len(tokens)} steps, {torch.get_num_threads()} threads")
    ours = statistics.median(seconds["ours"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(
            f"{name:26s} {sum(tokens) / middle:7.0f} tokens/s {sum(scored) / middle:7.0f} scored tokens/s"
            f"   ours is {middle / ours:.2f} times as fast   rounds {[round(value, 2) for value in values]} s"
        )


if __name__ == "__main__":
    main()
