"""Alignment: the projector alone learns to place each cell near the words that describe it."""

import logging
import sys
import time

import numpy as np
import torch
from torch import Tensor

from cell2text.device import pick_precision
from cell2text.finetuning.data import Cells
from cell2text.model.alignment import DescriptionTargets, LabelTargets
from cell2text.model.cell2text import Cell2Text
from cell2text.processes import TERMINATED, listen_for_signals
from cell2text.progress import Progress
from cell2text.training import history_row, warm_up_then_decay

log = logging.getLogger("cell2text.finetuning")

ALIGN_CELLS = 256  # cells per step
ALIGN_RATE = 1e-3


def align(
    model: Cell2Text,
    targets: LabelTargets | DescriptionTargets,
    cells: Cells,
    steps: int,
    view_share: float,
    seed: int,
    device: torch.device,
    among: np.ndarray | None = None,
) -> list[dict]:
    """Train the projector alone.

    Parameters
    ----------
    model, targets, cells
        The model, and what its cells are aligned to.
    steps
        Number of steps, of ``ALIGN_CELLS`` cells each.
    view_share
        Share of the cells that are seen as in another study, see ``Cells.draw_views``.
    seed
        Seed of cells, views and noise.
    device
        Device of the model.
    among
        Rows of the cells to train on, int64; None for all.

    Returns
    -------
    list of dict
        Rows of ``contracts.HISTORY``, one for every tenth step and the last.
    """
    projector = model.projector
    adam = torch.optim.AdamW(projector.parameters(), lr=ALIGN_RATE, weight_decay=0.01, fused=True)
    schedule = warm_up_then_decay(adam, steps)
    precision = pick_precision(device)
    history, start = [], time.monotonic()
    count = len(cells.labels) if among is None else len(among)
    progress = Progress(steps, "alignment steps")
    with listen_for_signals() as stop:
        for step in range(steps):
            random = torch.Generator().manual_seed(seed * 1_000_003 + step)
            rows = torch.randint(count, (min(ALIGN_CELLS, count),), generator=random).numpy()
            rows = rows if among is None else among[rows]
            views, noise = cells.draw_views(len(rows), view_share, random)
            seen = cells.vectors.seen(rows, views)
            vectors, lengths, aligned_to = (part.to(device) for part in (*seen, cells.aligned_to[rows]))
            vectors = add_noise(vectors, noise, projector, random)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                soft, present = projector(vectors, lengths)
            loss = targets.loss(soft.float(), present, aligned_to)
            adam.param_groups[0]["lr"] = ALIGN_RATE * schedule(step)
            adam.zero_grad()
            loss.backward()
            adam.step()
            progress.advance(1)
            if step % 10 == 0 or step == steps - 1:
                value = float(loss.detach())
                rate = adam.param_groups[0]["lr"]
                history.append(history_row("align", step, 0, value, rate, start, align_loss=value))
            if stop.is_set():
                log.info("received a signal during alignment, which has no checkpoints: the next run repeats it")
                sys.exit(TERMINATED)
    adam.zero_grad()  # otherwise the first step of fine-tuning would add this gradient to its own
    return history


def add_noise(vectors: Tensor, noise: Tensor, projector: torch.nn.Module, random: torch.Generator) -> Tensor:
    """Return the vectors with Gaussian noise, drawn on the CPU so that it is the same on every device.

    Parameters
    ----------
    vectors
        float (cells, ...).
    noise
        Standard deviation of each cell's noise, as a multiple of the spread of the training cells' vectors; (cells,).
    projector
        Has the spread.
    random
        Generator on the CPU.
    """
    noise = noise.view(-1, *[1] * (vectors.dim() - 1)) * torch.randn(vectors.shape, generator=random)
    return vectors + projector.spread * noise.to(vectors.device)
