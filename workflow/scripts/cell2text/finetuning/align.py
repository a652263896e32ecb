"""Alignment: the projector alone learns to place each cell at the words for it."""

import math
import time

import torch
from torch import Tensor

from cell2text.finetuning.data import Cells
from cell2text.finetuning.optimiser import warm_up_then_decay
from cell2text.model.alignment import DescriptionTargets, LabelTargets
from cell2text.model.cell2text import Cell2Text
from cell2text.progress import Progress

ALIGN_CELLS = 256  # cells a step of alignment
ALIGN_RATE = 1e-3
INPUT_NOISE = 0.3  # of the spread of the training cells' vectors, while aligning


def align(
    model: Cell2Text,
    targets: LabelTargets | DescriptionTargets,
    cells: Cells,
    steps: int,
    seed: int,
    device: torch.device,
) -> list[dict]:
    """Train the projector alone, to place each cell at the words for it.

    Returns
    -------
    list of dict
        Rows of ``contracts.HISTORY``, one for every tenth step.
    """
    projector = model.projector
    adam = torch.optim.AdamW(projector.parameters(), lr=ALIGN_RATE, weight_decay=0.01)
    schedule = warm_up_then_decay(steps)
    history, start = [], time.monotonic()
    progress = Progress(steps, "alignment steps")
    for step in range(steps):
        random = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(cells.labels), (min(ALIGN_CELLS, len(cells.labels)),), generator=random).numpy()
        vectors, lengths, aligned_to = (part.to(device) for part in (*cells.vectors[rows], cells.aligned_to[rows]))
        loss = targets.loss(*projector(add_noise(vectors, lengths, projector, random), lengths), aligned_to)
        adam.param_groups[0]["lr"] = ALIGN_RATE * schedule(step)
        adam.zero_grad()
        loss.backward()
        adam.step()
        progress.advance(1)
        if step % 10 == 0 or step == steps - 1:
            value = float(loss.detach())
            history.append(history_row("align", step, 0, value, value, adam.param_groups[0]["lr"], 0, start))
    adam.zero_grad()  # else the first step of fine-tuning would take the last gradient for its own
    return history


def add_noise(vectors: Tensor, lengths: Tensor, projector: torch.nn.Module, random: torch.Generator) -> Tensor:
    """Return the vectors with normal noise, drawn on the CPU so that every device gets the same."""
    noise = torch.randn(vectors.shape, generator=random).to(vectors.device)
    return vectors + INPUT_NOISE * projector.spread * noise


def history_row(
    stage: str, step: int, epoch: int, loss: float, align_loss: float, rate: float, tokens: int, start: float
) -> dict:
    """Return a row of ``contracts.HISTORY``; ``start`` is when the stage began, by the monotonic clock."""
    return {
        "stage": stage,
        "step": step,
        "epoch": epoch,
        "loss": loss,
        "align_loss": align_loss,
        "validation_loss": math.nan,
        "validation_accuracy": math.nan,
        "learning_rate": rate,
        "tokens": tokens,
        "seconds": time.monotonic() - start,
    }
