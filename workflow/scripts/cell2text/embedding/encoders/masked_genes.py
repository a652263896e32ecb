"""Masked gene modelling: batches with masked genes, the loss, and a training loop that resumes."""

import logging
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM

from cell2text.embedding.encoders.ranked_bert import Special
from cell2text.embedding.ranked_cells import RankedSplit
from cell2text.errors import InputError
from cell2text.processes import TERMINATED, listen_for_signals
from cell2text.progress import Progress
from cell2text.settings import EncoderSettings
from cell2text.training import history_row, read_checkpoint, warm_up_then_decay, write_checkpoint

log = logging.getLogger("cell2text.encoders")

CHOSEN = 0.15  # share of a cell's genes that the model predicts
MASKED, REPLACED = 0.8, 0.1  # shares of those that become the mask or a random gene; the rest stay as they are
CHECKPOINT_STEPS = 200
BUCKET = 16  # number of batches whose cells are sorted together by their number of genes
ROWS = 1000  # approximate number of rows of the history
WEIGHT_DECAY, CLIP = 0.01, 1.0


@dataclass(frozen=True)
class Cells:
    """Ranked genes of all cells of a split, concatenated.

    Parameters
    ----------
    tokens
        int32 (genes of all cells,).
    offsets
        Start of each cell, and the end of the last one, int64 (cells + 1,).
    """

    tokens: np.ndarray
    offsets: np.ndarray

    @classmethod
    def read(cls, split: RankedSplit, room: int) -> "Cells":
        """Return the first ``room`` genes of each cell, without the cells that have no genes."""
        tokens, lengths = bytearray(), [np.empty(0, dtype=np.int64)]  # bytes grow in place, arrays are copied
        for part in split:
            ranks = np.arange(len(part.tokens)) - np.repeat(part.offsets[:-1], part.lengths)
            tokens += part.tokens[ranks < room].tobytes()
            lengths.append(np.minimum(part.lengths, room))
        lengths = np.concatenate(lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths[lengths > 0])])
        return cls(np.frombuffer(tokens, dtype=np.int32), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Number of genes of each cell, int64 (cells,)."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Batch:
    """Cells with some of their genes masked.

    Parameters
    ----------
    ids
        Input of the model, int64 (cells, tokens).
    attended
        Attention mask: false at the padding, bool (cells, tokens).
    chosen
        Which tokens the model predicts, bool (cells, tokens).
    genes
        The tokens before masking, int64 (cells, tokens).
    """

    ids: np.ndarray
    attended: np.ndarray
    chosen: np.ndarray
    genes: np.ndarray

    @classmethod
    def of(cls, cells: Cells, rows: np.ndarray, special: Special, random: np.random.Generator) -> "Batch":
        """Mask genes as BERT masks words (Devlin et al. 2019): 15 % of each cell's genes, at least one."""
        lengths = cells.lengths[rows]
        places = np.arange(lengths.max())
        present = places < lengths[:, None]
        genes = np.full((len(rows), len(places) + special.around), special.pad, dtype=np.int64)
        # ids of special tokens follow those of the genes, and padding is the first of them
        vocabulary = special.pad
        inner = genes[:, 1:-1]
        inner[present] = cells.tokens[(cells.offsets[rows][:, None] + places)[present]]
        genes[:, 0] = special.cls
        genes[np.arange(len(rows)), lengths + 1] = special.eos
        draws = np.where(present, random.random(present.shape), 2.0)
        last = np.maximum(1, np.rint(CHOSEN * lengths).astype(np.int64)) - 1
        chosen = np.zeros(genes.shape, dtype=bool)
        chosen[:, 1:-1] = draws <= np.sort(draws, axis=1)[np.arange(len(rows)), last][:, None]
        fate, others = random.random(genes.shape), random.integers(vocabulary, size=genes.shape)
        masked = np.where(fate < MASKED, special.mask, np.where(fate < MASKED + REPLACED, others, genes))
        return cls(np.where(chosen, masked, genes), genes != special.pad, chosen, genes)

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Return the input of :class:`MaskedGenes`."""
        # without padding no attention mask is needed, and attention is faster without one
        attended = None if self.attended.all() else torch.from_numpy(self.attended.astype(np.int64)).to(device)
        places, genes = (torch.from_numpy(values) for values in (np.flatnonzero(self.chosen), self.genes[self.chosen]))
        return torch.from_numpy(self.ids).to(device), attended, places.to(device), genes.to(device)


class MaskedGenes(nn.Module):
    """The model and its loss; logits are computed only for masked genes, because the vocabulary is large.

    Parameters
    ----------
    model
        BERT with its head.
    """

    def __init__(self, model: BertForMaskedLM):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, attended: Tensor | None, places: Tensor, genes: Tensor) -> Tensor:
        """Return the summed negative log likelihood of the masked genes, in nats.

        Parameters
        ----------
        ids, attended
            Tokens and their attention mask, int64 (cells, tokens); the mask is None without padding.
        places, genes
            Indices of the masked genes in the flattened ``ids``, and their true tokens, int64 (chosen,).
        """
        states = self.model.bert(input_ids=ids, attention_mask=attended).last_hidden_state
        logits = self.model.cls(states.flatten(0, 1)[places])
        return nn.functional.cross_entropy(logits.float(), genes, reduction="sum")


def batches(lengths: np.ndarray, batch_cells: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the rows of each batch of an epoch: shuffled, but with cells of similar length together.

    Parameters
    ----------
    lengths
        Number of genes of each cell, (cells,).
    batch_cells
        Maximum number of cells per batch; batch sizes differ by at most one cell.
    seed, epoch
        The same pair gives the same batches.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    bucket = np.arange(len(order)) // (BUCKET * batch_cells)
    # every other bucket is in descending order, so that a batch across two buckets has similar lengths too
    order = order[np.lexsort((lengths[order] * (1 - 2 * (bucket % 2)), bucket))]
    found = np.array_split(order, math.ceil(len(order) / batch_cells))
    return [found[i] for i in random.permutation(len(found))]


@dataclass
class State:
    """Progress of the training.

    Parameters
    ----------
    step, epoch
        Number of finished steps and epochs.
    best_loss, best_epoch
        Lowest validation loss so far and the epoch, from 0, that ended with it.
    history
        Rows of ``contracts.HISTORY``, one for every few steps: ``loss`` is the mean since the previous row, in nats per
        masked gene.
    loss, chosen
        Summed loss and number of masked genes since the last row of the history, at the time of a checkpoint.
    """

    step: int = 0
    epoch: int = 0
    best_loss: float = math.inf
    best_epoch: int = -1
    history: list[dict] = field(default_factory=list)
    loss: float = 0.0
    chosen: int = 0


class Training:
    """Masked gene modelling (Devlin et al. 2019; Theodoris et al., Nature 2023).

    Parameters
    ----------
    model
        Model with random weights.
    special
        Special tokens of the model.
    train, validation
        Cells of the two splits.
    settings
        The config's ``encoder`` section.
    seed
        Seed of batches, masked genes and dropout.
    checkpoints
        Folder for checkpoints.
    fingerprint
        Hash of everything that the result depends on; checkpoints with another one are ignored.
    device, precision
        Device and autocast dtype of the training.
    """

    def __init__(
        self,
        model: BertForMaskedLM,
        special: Special,
        train: Cells,
        validation: Cells,
        settings: EncoderSettings,
        seed: int,
        checkpoints: Path,
        fingerprint: str,
        device: torch.device,
        precision: torch.dtype,
    ):
        self.special, self.train, self.validation = special, train, validation
        self.settings, self.seed, self.device, self.precision = settings, seed, device, precision
        self.checkpoint_file, self.fingerprint = checkpoints / "last.safetensors", fingerprint
        self.masked_genes = MaskedGenes(model).to(device)
        self.parameters = dict(model.named_parameters())
        # no weight decay for biases and the scales of layer norms
        groups = [
            {
                "params": [value for value in self.parameters.values() if (value.ndim > 1) is decays],
                "weight_decay": decay,
            }
            for decays, decay in ((True, WEIGHT_DECAY), (False, 0.0))
        ]
        self.adam = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
        self.epoch_steps = math.ceil(len(train) / settings.batch_cells)
        steps = self.epoch_steps * settings.epochs
        self.schedule = warm_up_then_decay(self.adam, steps)
        self.row_steps = max(1, steps // ROWS)
        self.state = State()
        self.best: dict[str, Tensor] = {}
        self._reset_losses()

    def run(self) -> State:
        """Train for all epochs and keep the weights of the best one."""
        state = self.state
        done = round(len(self.train) * state.step / self.epoch_steps)
        self.progress = Progress(len(self.train) * self.settings.epochs, "cells", done=done)
        self.start = time.monotonic() - (state.history[-1]["seconds"] if state.history else 0)
        with listen_for_signals() as stop:
            while state.epoch < self.settings.epochs:
                self._run_epoch(stop)
        log.info("best epoch %d, validation loss %.4f", state.best_epoch + 1, state.best_loss)
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(self.best[name])
        return state

    def _run_epoch(self, stop: Event) -> None:
        state = self.state
        rows = batches(self.train.lengths, self.settings.batch_cells, self.seed, state.epoch)
        self.masked_genes.train()
        for batch in rows[state.step - state.epoch * self.epoch_steps :]:
            self._step(batch)
            state.step += 1
            at_end, at_checkpoint = state.step % self.epoch_steps == 0, state.step % CHECKPOINT_STEPS == 0
            if at_end or at_checkpoint or state.step % self.row_steps == 0:
                self._add_row()
            self.progress.advance(len(batch), f"loss {state.history[-1]['loss']:.3f}" if state.history else "")
            if (at_checkpoint or stop.is_set()) and not at_end:
                self.write_checkpoint()
                if stop.is_set():
                    log.info("received a signal: stopped after step %d, the next run resumes from here", state.step)
                    sys.exit(TERMINATED)
        loss = self.validate()
        self._check(loss)
        state.history[-1]["validation_loss"] = loss
        log.info("epoch %d: validation loss %.4f nats per masked gene", state.epoch + 1, loss)
        if loss < state.best_loss:
            state.best_loss, state.best_epoch = loss, state.epoch
            self.best = {name: value.detach().clone() for name, value in self.parameters.items()}
        state.epoch += 1
        self.write_checkpoint()

    def _step(self, rows: np.ndarray) -> None:
        random = np.random.default_rng([self.seed, self.state.step, 1])
        batch = Batch.of(self.train, rows, self.special, random)
        chosen = int(batch.chosen.sum())
        torch.manual_seed(int(random.integers(1 << 62)))  # for dropout
        loss = self._loss(batch)
        (loss / chosen).backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), CLIP)
        for group in self.adam.param_groups:
            group["lr"] = self.settings.learning_rate * self.schedule(self.state.step)
        self.adam.step()
        self.adam.zero_grad()
        # summed on the device: reading the value would make a GPU wait at every step
        self.loss, self.chosen = self.loss + loss.detach(), self.chosen + chosen

    def _loss(self, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            return self.masked_genes(*batch.inputs(self.device))

    def _add_row(self) -> None:
        state, loss = self.state, float(self.loss) / self.chosen
        self._check(loss)
        rate = self.adam.param_groups[0]["lr"]
        state.history.append(history_row("pretrain", state.step - 1, state.epoch, loss, rate, self.start))
        self._reset_losses()

    def _reset_losses(self) -> None:
        self.loss, self.chosen = torch.zeros((), device=self.device), 0

    def _check(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise InputError(
                "config: encoder.learning_rate",
                f"the loss is not finite at step {self.state.step}",
                "Lower the learning rate",
            )

    @torch.no_grad()
    def validate(self) -> float:
        """Return the mean negative log likelihood per masked gene of the validation cells, in nats."""
        self.masked_genes.eval()
        order = np.argsort(self.validation.lengths, kind="stable")
        total, chosen = torch.zeros((), device=self.device), 0
        parts = math.ceil(len(order) / self.settings.batch_cells)
        for part, rows in enumerate(np.array_split(order, parts)):
            batch = Batch.of(self.validation, rows, self.special, np.random.default_rng([self.seed, part, 2]))
            total, chosen = total + self._loss(batch), chosen + int(batch.chosen.sum())
        return float(total) / chosen

    def write_checkpoint(self) -> None:
        """Write weights, optimiser and progress in place of the last checkpoint."""
        tensors = {f"weight.{name}": value.detach() for name, value in self.parameters.items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for name, value in self.parameters.items():
            tensors |= {f"{key}.{name}": moment for key, moment in self.adam.state[value].items()}
        self.state.loss, self.state.chosen = float(self.loss), self.chosen
        write_checkpoint(self.checkpoint_file, tensors, asdict(self.state), self.fingerprint)

    def resume(self) -> None:
        """Restore the last checkpoint of this run, if there is one."""
        found = read_checkpoint(self.checkpoint_file, self.fingerprint)
        if found is None:
            return
        state, tensors = found
        self.state = State(**state)
        self.loss, self.chosen = self.loss + self.state.loss, self.state.chosen
        for name, value in self.parameters.items():
            with torch.no_grad():
                value.copy_(tensors[f"weight.{name}"])
            self.adam.state[value] = {
                key: tensors[f"{key}.{name}"].to(self.device) for key in ("step", "exp_avg", "exp_avg_sq")
            }
            if f"best.{name}" in tensors:
                self.best[name] = tensors[f"best.{name}"].to(self.device)
        log.info("resuming from step %d of epoch %d", self.state.step, self.state.epoch + 1)
