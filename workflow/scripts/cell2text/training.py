"""Shared by all training loops: a learning rate schedule, rows of history, and checkpoints to resume from."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer
from transformers import get_linear_schedule_with_warmup

from cell2text.errors import InputError
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
    about = {"fingerprint": fingerprint, "state": json.dumps(state)}
    with whole_file(file) as unfinished:
        save_file(tensors, unfinished, metadata=about | {"sha256": _hash(tensors, about)})


def read_checkpoint(file: Path, fingerprint: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return state and tensors of a checkpoint; None if there is none with this fingerprint.

    A damaged checkpoint is reported and renamed to ``{file}.damaged``, so that training can start from the beginning.

    Raises
    ------
    InputError
        If the file may not be read.
    """
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        problem = _find_damage(tensors, about)
    except PermissionError as error:
        fix = "Make it readable, or delete it to train from the beginning"
        raise InputError(file, "the checkpoint may not be read", fix) from error
    except (SafetensorError, OSError, ValueError) as error:
        problem = str(error)
    if problem:
        damaged = file.with_name(f"{file.name}.damaged")
        log.warning(
            "%s: the checkpoint is damaged (%s): renamed to %s, training starts from the beginning",
            file, problem, damaged.name,
        )  # fmt: skip
        with suppress(FileNotFoundError):  # another process of the team was faster
            file.replace(damaged)
        return None
    if about["fingerprint"] != fingerprint:
        log.info("the checkpoint belongs to other settings, data or versions: training starts from the beginning")
        return None
    return json.loads(about["state"]), tensors


def _find_damage(tensors: dict[str, Tensor], about: dict[str, str]) -> str:
    written = about.pop("sha256", None)
    if written is None:
        return "it has no checksum"
    if written != _hash(tensors, about):
        return "its content does not match its checksum"
    infinite = [name for name, value in tensors.items() if not value.isfinite().all()]
    return f"{infinite[0]} has values that are not finite" if infinite else ""


def _hash(tensors: dict[str, Tensor], about: dict[str, str]) -> str:
    def hash_one(name: str) -> str:
        value = tensors[name]
        content = value.detach().cpu().reshape(-1).view(torch.uint8).numpy()
        return f"{name} {value.dtype} {list(value.shape)} {hashlib.sha256(content).hexdigest()}"

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # full fine-tuning has gigabytes
        parts = list(pool.map(hash_one, sorted(tensors)))
    return hashlib.sha256(json.dumps([parts, about], sort_keys=True).encode()).hexdigest()


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
