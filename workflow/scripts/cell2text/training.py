"""Shared by all training loops: a learning rate schedule, rows of history, and checkpoints to resume from."""

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer
from transformers import get_linear_schedule_with_warmup

from cell2text.files import whole_file

log = logging.getLogger("cell2text.training")

WARM_UP = 0.05  # share of the steps in which the learning rate rises


def warm_up_then_decay(optimiser: Optimizer, steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate at each step: a linear rise, then a linear fall to zero.

    It depends on the step alone, unlike a scheduler with a state, so a resumed run needs nothing else.

    Parameters
    ----------
    optimiser
        Optimiser whose learning rates are scaled.
    steps
        Number of training steps.
    """
    warm_up = max(1, round(WARM_UP * steps))
    factor = get_linear_schedule_with_warmup(optimiser, warm_up, steps + 1).lr_lambdas[0]
    return lambda step: factor(step + 1)  # transformers' first step has a rate of zero


def history_row(stage: str, step: int, epoch: int, loss: float, rate: float, start: float, **further: float) -> dict:
    """Return a row of ``contracts.HISTORY``.

    Parameters
    ----------
    stage, step, epoch, loss
        As in the contract.
    rate
        The learning rate.
    start
        Value of the monotonic clock at the start of the stage.
    further
        Other columns; by default they are missing, and ``tokens`` is 0.
    """
    return {
        "stage": stage,
        "step": step,
        "epoch": epoch,
        "loss": loss,
        "align_loss": math.nan,
        "validation_loss": math.nan,
        "validation_accuracy": math.nan,
        "learning_rate": rate,
        "tokens": 0,
        "seconds": time.monotonic() - start,
        **further,
    }


def write_checkpoint(file: Path, tensors: dict[str, Tensor], state: dict[str, Any], fingerprint: str) -> None:
    """Replace the last checkpoint by a new one, atomically.

    Parameters
    ----------
    file
        Path of the checkpoint.
    tensors
        Weights and optimiser state, by name.
    state
        Progress of the training, JSON serialisable.
    fingerprint
        Hash of everything that the result depends on.
    """
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    with whole_file(file) as unfinished:
        save_file(tensors, unfinished, metadata={"fingerprint": fingerprint, "state": json.dumps(state)})


def read_checkpoint(file: Path, fingerprint: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return state and tensors of a checkpoint; None if there is none with this fingerprint."""
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        if metadata["fingerprint"] != fingerprint:
            log.info("the checkpoint belongs to other settings or data: training starts from the beginning")
            return None
        return json.loads(metadata["state"]), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
