"""The training loop: steps, validation, and checkpoints from which a killed run resumes."""

import json
import logging
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Event

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cell2text.errors import InputError
from cell2text.files import whole_file
from cell2text.finetuning.align import add_noise, history_row
from cell2text.finetuning.data import BatchSize, Cells, balance, plan_epoch
from cell2text.finetuning.optimiser import MasterAdamW, warm_up_then_decay
from cell2text.model.alignment import DescriptionTargets, LabelTargets
from cell2text.model.cell2text import Cell2Text
from cell2text.processes import Team
from cell2text.progress import Progress

log = logging.getLogger("cell2text.training")

TOLD_TO_END = 128 + signal.SIGTERM  # the exit code of a run that was told to end and can go on


@dataclass(frozen=True)
class Stage:
    """What some epochs of fine-tuning read.

    Parameters
    ----------
    name
        As ``contracts.HISTORY`` has it.
    train, validation
        Cells of the two splits, with whole texts or their openings.
    size
        Of a batch.
    """

    name: str
    train: Cells
    validation: Cells
    size: BatchSize


@dataclass
class State:
    """How far fine-tuning has come.

    Parameters
    ----------
    step, epoch
        The next step to do and the epoch it belongs to.
    best_loss, best_accuracy, best_epoch
        Validation loss and accuracy of the best epoch so far, see ``Finetuning.validate``, and which one it is.
    history
        Rows of ``contracts.HISTORY``.
    """

    step: int = 0
    epoch: int = 0
    best_loss: float = math.inf
    best_accuracy: float = -math.inf
    best_epoch: int = -1
    history: list[dict] = field(default_factory=list)


@contextmanager
def listen_for_stop() -> Iterator[Event]:
    """Give an event that is set when the process is told to end, as SLURM does before the time is up."""
    stop = Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


class Finetuning:
    """Projector and adapter trained together on the texts of the training cells.

    Parameters
    ----------
    model
        With its projector aligned.
    targets
        Of alignment, which stays as an auxiliary loss.
    train, validation
        Cells of the two splits.
    settings
        The config's ``finetune`` section.
    seed
        Of the batches and the noise.
    checkpoints
        Folder for checkpoints.
    fingerprint
        Of everything that the result depends on; a checkpoint with another one is not taken up.
    team
        The processes that train together; each learns from some of the batches of a step.
    depths
        Of each training cell's type, (cells,), by which the first epoch goes from general to special types; None
        for an epoch as any other.
    """

    def __init__(
        self,
        model: Cell2Text,
        targets: LabelTargets | DescriptionTargets,
        train: Cells,
        validation: Cells,
        settings: dict,
        seed: int,
        checkpoints: Path,
        fingerprint: str,
        team: Team,
        depths: np.ndarray | None = None,
    ):
        self.team, self.depths = team, depths
        self.model, self.targets, self.train = model, targets, train
        if settings["checkpoint_activations"]:
            model.checkpoint_activations()
        self.settings, self.seed = settings, seed
        self.checkpoint_file, self.fingerprint = checkpoints / "last.safetensors", fingerprint
        self.weights = balance(train.labels[:, 0].numpy()) if settings["balance"] else None
        size = BatchSize(settings["batch_cells"], settings["batch_tokens"], self._count_prompt())
        self.texts = Stage("finetune", train, validation, size)
        self.epochs = [self.texts] * settings["epochs"]
        if settings["opening_epochs"]:
            # so many cells are read at once that they have as many tokens as a batch of whole texts
            size = replace(size, tokens=size.tokens or round(size.cells * (size.prompt + train.text_lengths.mean())))
            openings = Stage("openings", train.openings_alone(), validation.openings_alone(), size)
            self.epochs = [openings] * settings["opening_epochs"] + self.epochs
        self.epoch_steps = [len(self._plan(epoch)) for epoch in range(len(self.epochs))]
        self.schedule = warm_up_then_decay(sum(self.epoch_steps))
        trainable = model.trainable()
        projector = {name: value for name, value in trainable.items() if name.startswith("projector.")}
        adapter = {name: value for name, value in trainable.items() if name not in projector}
        self.optimiser = MasterAdamW(
            [(settings["learning_rate"], adapter), (settings["projector_learning_rate"], projector)], team=team
        )
        self.state = State()
        self.best: dict[str, Tensor] = {}

    @torch.no_grad()
    def _count_prompt(self) -> int:
        """Return how many tokens stand before a cell's text."""
        prompt, cell = self.model.prompt, self.train.vectors[np.array([0])]
        soft, _ = self.model.projector(*(part.to(self.model.device) for part in cell))
        return len(prompt.before) + soft.shape[1] + len(prompt.after)

    def _plan(self, epoch: int) -> list[list[np.ndarray]]:
        # one batch of a step after another adds to the gradient, so memory is that of one
        step_batches = self.settings["accumulate"] * self.team.size
        stage = self.epochs[epoch]
        lengths = stage.train.text_lengths
        return plan_epoch(lengths, stage.size, step_batches, self.seed, epoch, self.weights, self.depths)

    @property
    def stage(self) -> Stage:
        """What is read now; when all is done, whole texts."""
        return self.epochs[self.state.epoch] if self.state.epoch < len(self.epochs) else self.texts

    def run(self) -> State:
        """Train until the epochs are done or validation no longer improves; keep the best epoch of whole texts."""
        self.progress = Progress(sum(self.epoch_steps), "steps", self.state.step)
        self.start = time.monotonic() - (self.state.history[-1]["seconds"] if self.state.step else 0)
        with listen_for_stop() as stop:
            while self.state.epoch < len(self.epochs) and not self._stopped_improving():
                self._run_epoch(stop)
        best = self.state.best_epoch + 1, self.state.best_loss, self.state.best_accuracy
        log.info("best epoch %d, validation loss %.4f, cell type accuracy %.4f", *best)
        self.optimiser.write_back(self.best)
        return self.state

    def _stopped_improving(self) -> bool:
        best = max(self.state.best_epoch, self.settings["opening_epochs"] - 1)
        return self.state.epoch - 1 - best >= self.settings["patience"]

    def _run_epoch(self, stop: Event) -> None:
        state = self.state
        steps = self._plan(state.epoch)
        self.model.train()
        for step in steps[state.step - sum(self.epoch_steps[: state.epoch]) :]:
            state.history.append(self._step(step, stop))
            state.step += 1
            self.progress.advance(1, f"loss {state.history[-1]['loss']:.3f}")
            if stop.is_set() or (state.step % self.settings["checkpoint_steps"] == 0 and step is not steps[-1]):
                self.write_checkpoint()
            if stop.is_set():
                log.info("told to end after step %d: the next try goes on from here", state.step)
                sys.exit(TOLD_TO_END)
        loss, accuracy = self.validate()
        state.history[-1] |= {"validation_loss": loss, "validation_accuracy": accuracy}
        told = "epoch %d of %d, %s: validation loss %.4f nats a token, cell type accuracy %.4f"
        read = "whole texts" if self.stage is self.texts else "openings alone"
        log.info(told, state.epoch + 1, len(self.epochs), read, loss, accuracy)
        better = loss < state.best_loss
        if self.settings["keep_best"] == "cell_type_accuracy":  # of few cells, it is often the same
            better = (accuracy, -loss) > (state.best_accuracy, -state.best_loss)
        if better and self.stage is self.texts:
            state.best_loss, state.best_accuracy, state.best_epoch = loss, accuracy, state.epoch
            self.best = {name: value.clone() for name, value in self.optimiser.masters.items()}
        state.epoch += 1
        self.write_checkpoint()

    def _step(self, batches: list[np.ndarray], stop: Event) -> dict:
        """Learn from batches of cells, one at a time: the loss is the mean over the tokens of all."""
        state = self.state
        sums = torch.zeros(5, dtype=torch.float64, device=self.model.device)  # see _learn; whether to end
        for number in range(self.team.rank, len(batches), self.team.size):
            sums[:4] += self._learn(batches[number], number)
        sums[4] = stop.is_set()
        loss, tokens, align_loss, size, ending = self.team.add_up(sums).tolist()
        if ending:  # one process may have been told a step before the others
            stop.set()
        if not math.isfinite(loss):
            told = ", ".join(self.train.ids[row] for rows in batches for row in rows)
            raise InputError(
                "config: finetune.learning_rate",
                f"the loss is not finite at step {state.step + 1}, with cells {told}",
                "Lower the learning rate, or leave these cells out, and run again",
            )
        rate = self.schedule(state.step)
        self.optimiser.step(1 / tokens, rate)
        rate *= self.settings["learning_rate"]
        return history_row(
            self.stage.name, state.step, state.epoch, loss / tokens, align_loss / tokens, rate, int(size), self.start
        )

    def _learn(self, rows: np.ndarray, number: int) -> Tensor:
        """Add a batch, the so-manieth of its step, to the gradient.

        Returns
        -------
        Tensor
            float64 (4,): sum of the loss, tokens it is the sum of, alignment loss times these, tokens that are read.
        """
        model = self.model
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + 500_009 + self.state.step + number * 999_979)
        rows = rows[np.argsort(self.stage.train.text_lengths[rows], kind="stable")]  # attention pads neighbours alone
        vectors, lengths, text, there, aligned_to = self.stage.train.batch(rows, model.device)
        soft, soft_there = model.projector(add_noise(vectors, lengths, model.projector, random), lengths)
        torch.manual_seed(random.initial_seed())  # of dropout, where there is any
        loss, tokens = model.text_loss(soft, soft_there, text, there)
        align_loss = self.targets.loss(soft, soft_there, aligned_to) * tokens
        (loss + self.settings["align_weight"] * align_loss).backward()
        self.optimiser.take_gradients()
        size = tokens + soft_there.sum() + len(rows) * (len(model.prompt.before) + len(model.prompt.after))
        return torch.stack([value.detach().double() for value in (loss, tokens, align_loss, size)])

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Read the validation texts, or their openings.

        Returns
        -------
        loss
            Mean negative log likelihood of a token, in nats.
        accuracy
            Share of the cells with a cell type whose name greedy decoding would write: up to the name's end, the
            token of the text is always the likeliest one, given those before it.
        """
        model = self.model.eval()
        cells, text_lengths = self.stage.validation, self.stage.validation.text_lengths
        batches = self.stage.size.cut(np.argsort(text_lengths, kind="stable"), text_lengths)
        sums = torch.zeros(4, dtype=torch.float64, device=model.device)
        for rows in batches[self.team.rank :: self.team.size]:
            vectors, lengths, text, there, _ = cells.batch(rows, model.device)
            states = model.states_before(*model.projector(vectors, lengths), text, there)
            loss = model.loss_of(states, text[there])
            opening = (torch.arange(text.shape[1]) < cells.openings[rows][:, None]).to(model.device)
            right = torch.ones_like(there)
            right[opening] = model.head(states[opening[there]]).argmax(-1) == text[opening]
            named = opening.any(1)
            sums += torch.stack([loss, there.sum(), (right.all(1) & named).sum(), named.sum()])
        total, tokens, right, named = self.team.add_up(sums).tolist()
        return total / tokens, right / max(named, 1)

    def write_checkpoint(self) -> None:
        """Write weights, optimiser and progress, whole, in the place of the last checkpoint."""
        tensors = {f"optimiser.{name}": value.contiguous() for name, value in self.optimiser.state().items()}
        if self.state.best_epoch >= 0:
            tensors |= {f"best.{name}": value for name, value in self.optimiser.collect(self.best).items()}
        metadata = {"fingerprint": self.fingerprint, "state": json.dumps(asdict(self.state))}
        if self.team.leads:
            with whole_file(self.checkpoint_file) as unfinished:
                save_file(tensors, unfinished, metadata=metadata)
        self.team.wait()

    def take_up_checkpoint(self) -> bool:
        """Go back to the last checkpoint; return whether there was one for this very run."""
        if not self.checkpoint_file.is_file():
            return False
        with safe_open(self.checkpoint_file, framework="pt") as file:
            metadata = file.metadata()
            if metadata["fingerprint"] != self.fingerprint:
                log.info("the checkpoint belongs to other settings or data: starting anew")
                return False
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        self.state = State(**json.loads(metadata["state"]))
        self.optimiser.restore(_with_prefix(tensors, "optimiser."))
        best = _with_prefix(tensors, "best.")
        self.best = {name: best[name].to(self.model.device) for name in self.optimiser.masters if best}
        log.info("going on from step %d of epoch %d", self.state.step, self.state.epoch + 1)
        return True


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
