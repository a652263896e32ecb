"""The training loop: steps, validation, and checkpoints from which a killed run resumes."""

import logging
import math
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Event

import numpy as np
import torch
from torch import Tensor

from cell2text.errors import InputError, is_out_of_memory
from cell2text.finetuning.align import add_noise
from cell2text.finetuning.data import OWN_NOISE, BatchSize, Cells, balance, plan_epoch
from cell2text.finetuning.optimiser import MasterAdamW
from cell2text.model.alignment import DescriptionTargets, LabelTargets
from cell2text.model.cell2text import Cell2Text
from cell2text.processes import TERMINATED, Team, listen_for_signals
from cell2text.progress import Progress
from cell2text.settings import FinetuneSettings
from cell2text.training import history_row, read_checkpoint, warm_up_then_decay, with_prefix, write_checkpoint

log = logging.getLogger("cell2text.finetuning")


@dataclass(frozen=True)
class Stage:
    """Cells and micro-batch size of a stage of fine-tuning.

    Parameters
    ----------
    name
        ``openings`` or ``finetune``, as in ``contracts.HISTORY``.
    train, validation
        Cells of the two splits, with whole texts or only their openings.
    size
        Size of a micro-batch.
    """

    name: str
    train: Cells
    validation: Cells
    size: BatchSize


@dataclass
class State:
    """Progress of fine-tuning.

    Parameters
    ----------
    step, epoch
        The next step and the epoch it belongs to, both from 0.
    best_loss, best_accuracy, best_epoch
        Validation loss and accuracy of the best epoch so far (see ``Finetuning.validate``), and its number.
    history
        Rows of ``contracts.HISTORY``.
    """

    step: int = 0
    epoch: int = 0
    best_loss: float = math.inf
    best_accuracy: float = -math.inf
    best_epoch: int = -1
    history: list[dict] = field(default_factory=list)


class Finetuning:
    """Projector and language model trained together on the texts of the training cells.

    Parameters
    ----------
    model
        Model with an aligned projector.
    targets
        Targets of alignment, which stays as an auxiliary loss.
    train, validation
        Cells of the two splits.
    settings
        The config's ``finetune`` section.
    seed
        Seed of batches and noise.
    checkpoints
        Folder for checkpoints.
    fingerprint
        Hash of everything that the result depends on; checkpoints with another one are ignored.
    team
        The processes that train together; each takes some of the micro-batches of a step.
    depths
        Depth of each training cell's type in the Cell Ontology, (cells,), if the first epoch goes from general to
        specific types; else None.
    """

    def __init__(
        self,
        model: Cell2Text,
        targets: LabelTargets | DescriptionTargets,
        train: Cells,
        validation: Cells,
        settings: FinetuneSettings,
        seed: int,
        checkpoints: Path,
        fingerprint: str,
        team: Team,
        depths: np.ndarray | None = None,
    ):
        self.team, self.depths = team, depths
        self.model, self.targets, self.train = model, targets, train
        if settings.checkpoint_activations:
            model.checkpoint_activations()
        self.settings, self.seed = settings, seed
        self.checkpoint_file, self.fingerprint = checkpoints / "last.safetensors", fingerprint
        self.weights = balance(train.labels[:, 0].numpy()) if settings.balance else None
        prompt, _ = model.count_prompt(*train.vectors[np.array([0])])
        size = BatchSize(settings.batch_cells, settings.batch_tokens, prompt)
        self.texts = Stage("finetune", train, validation, size)
        self.epochs = [self.texts] * settings.epochs
        if settings.opening_epochs:
            # as many cells as have the tokens of a micro-batch of whole texts
            size = replace(size, tokens=size.tokens or round(size.cells * (size.prompt + train.text_lengths.mean())))
            openings = Stage("openings", train.openings_alone(), validation.openings_alone(), size)
            self.epochs = [openings] * settings.opening_epochs + self.epochs
        self.epoch_steps = [len(self._plan(epoch)) for epoch in range(len(self.epochs))]
        trainable = model.trainable()
        projector = {name: value for name, value in trainable.items() if name.startswith("projector.")}
        tuned = {name: value for name, value in trainable.items() if name not in projector}
        self.optimiser = MasterAdamW(
            [(settings.learning_rate, tuned), (settings.projector_learning_rate, projector)], team=team
        )
        self.schedule = warm_up_then_decay(self.optimiser.adam, sum(self.epoch_steps))
        self.state, self.stopping = State(), False
        self.cells_at_once = sys.maxsize  # fewer once memory has run out
        self.best: dict[str, Tensor] = {}

    @torch.no_grad()
    def _plan(self, epoch: int) -> list[list[np.ndarray]]:
        # micro-batches of a step accumulate gradients in turn, so only one is in memory
        step_batches = self.settings.accumulate * self.team.size
        stage = self.epochs[epoch]
        lengths = stage.train.text_lengths
        return plan_epoch(lengths, stage.size, step_batches, self.seed, epoch, self.weights, self.depths)

    @property
    def stage(self) -> Stage:
        """Stage of the current epoch; the last one once all epochs are done."""
        return self.epochs[min(self.state.epoch, len(self.epochs) - 1)]

    def run(self) -> State:
        """Train until the epochs are done or validation stops improving; keep the best epoch of the last stage."""
        if not self.epochs:
            log.info("no epochs: the language model stays as it is, only the projector was trained")
            return self.state
        self.progress = Progress(sum(self.epoch_steps), "steps", self.state.step)
        self.start = time.monotonic() - (self.state.history[-1]["seconds"] if self.state.step else 0)
        with listen_for_signals() as stop:
            while self.state.epoch < len(self.epochs) and not self._stopped_improving():
                self._run_epoch(stop)
        best = self.state.best_epoch + 1, self.state.best_loss, self.state.best_accuracy
        log.info("best epoch %d, validation loss %.4f, cell type accuracy %.4f", *best)
        self.optimiser.write_back(self.best)
        return self.state

    def _stopped_improving(self) -> bool:
        best = max(self.state.best_epoch, self.epochs.index(self.epochs[-1]) - 1)
        return self.state.epoch - 1 - best >= self.settings.patience

    def _run_epoch(self, stop: Event) -> None:
        state = self.state
        steps = self._plan(state.epoch)
        self.model.train()
        for step in steps[state.step - sum(self.epoch_steps[: state.epoch]) :]:
            state.history.append(self._step(step, stop))
            state.step += 1
            self.progress.advance(1, f"loss {state.history[-1]['loss']:.3f}")
            if self.stopping or (state.step % self.settings.checkpoint_steps == 0 and step is not steps[-1]):
                self.write_checkpoint()
            if self.stopping:
                log.info("received a signal: stopped after step %d, the next run resumes from here", state.step)
                sys.exit(TERMINATED)
        loss, accuracy = self.validate()
        state.history[-1] |= {"validation_loss": loss, "validation_accuracy": accuracy}
        log.info(
            "epoch %d of %d, %s: validation loss %.4f nats per token, cell type accuracy %.4f",
            state.epoch + 1, len(self.epochs), "whole texts" if self.stage is self.texts else "openings only",
            loss, accuracy,
        )  # fmt: skip
        better = loss < state.best_loss
        if self.settings.keep_best == "cell_type_accuracy":  # with few cells, accuracies are often equal
            better = (accuracy, -loss) > (state.best_accuracy, -state.best_loss)
        if better and self.stage is self.epochs[-1]:
            state.best_loss, state.best_accuracy, state.best_epoch = loss, accuracy, state.epoch
            self.best = {name: value.clone() for name, value in self.optimiser.masters.items()}
        state.epoch += 1
        self.write_checkpoint()

    def _step(self, batches: list[np.ndarray], stop: Event) -> dict:
        """Train on the micro-batches of a step; the loss is the mean over the tokens of all of them."""
        state = self.state
        sums = torch.zeros(5, dtype=torch.float64, device=self.model.device)  # those of _learn, and whether to stop
        for number in range(self.team.rank, len(batches), self.team.size):
            sums[:4] += self._learn(batches[number], number)
        sums[4] = stop.is_set()
        loss, tokens, align_loss, size, stopping = self.team.all_reduce(sums).tolist()
        if stopping:  # all processes must agree on the step: one may receive the signal later than the others
            self.stopping = True
            stop.set()
        if not math.isfinite(loss):
            cells = ", ".join(self.train.ids[row] for rows in batches for row in rows)
            raise InputError(
                "config: finetune.learning_rate",
                f"the loss is not finite at step {state.step + 1}, with cells {cells}",
                "Lower the learning rate, or exclude these cells, and run again",
            )
        rate = self.schedule(state.step)
        self.optimiser.step(1 / tokens, rate)
        rate *= self.settings.learning_rate
        further = {"align_loss": align_loss / tokens, "tokens": int(size)}
        return history_row(self.stage.name, state.step, state.epoch, loss / tokens, rate, self.start, **further)

    def _learn(self, rows: np.ndarray, number: int) -> Tensor:
        """Add the gradient of the ``number``-th micro-batch of a step.

        Returns
        -------
        Tensor
            float64 (4,): summed loss, number of text tokens, alignment loss times these, tokens including prompts.
        """
        model = self.model
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + 500_009 + self.state.step + number * 999_979)
        rows = rows[np.argsort(self.stage.train.text_lengths[rows], kind="stable")]  # so that attention pads little
        cells = self.stage.train
        views, _ = cells.draw_views(len(rows), self.settings.view_share, random)
        vectors, lengths, text, text_mask, aligned_to = cells.batch(rows, model.device, views)
        # strong noise, as in alignment, would keep the language model from learning to tell cells apart
        noise = torch.full((len(rows),), OWN_NOISE)
        soft, present = model.projector(add_noise(vectors, noise, model.projector, random), lengths)
        loss, gradient = self._read_texts(rows, soft, present, text, text_mask, random.initial_seed())
        tokens = text_mask.sum()
        align_loss = self.targets.loss(soft, present, aligned_to) * tokens
        torch.autograd.backward([soft, self.settings.align_weight * align_loss], [gradient, None])
        self.optimiser.take_gradients()
        size = tokens + present.sum() + len(rows) * (len(model.prompt.before) + len(model.prompt.after))
        return torch.stack([value.detach().double() for value in (loss, tokens, align_loss, size)])

    def _read_texts(
        self, rows: np.ndarray, soft: Tensor, present: Tensor, text: Tensor, text_mask: Tensor, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of the texts' loss to the language model's; return the loss and its gradient to ``soft``.

        If memory runs out, the cells are read in halves from then on. The sums remain the same except for rounding,
        and for the masks of dropout, so two runs that run out of memory at different cells differ no more than that.
        """
        loss, gradient, start = torch.zeros((), dtype=torch.float64, device=soft.device), torch.empty_like(soft), 0
        while start < len(rows):
            part = slice(start, start + self.cells_at_once)
            tokens = soft[part].detach().requires_grad_()
            torch.manual_seed(seed + start)  # for dropout, if any
            try:
                part_loss, _ = self.model.text_loss(tokens, present[part], text[part], text_mask[part])
                part_loss.backward()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                part_loss = None
            if part_loss is None:  # here, because the exception would keep the memory of the failed attempt
                self._halve(rows[part])
                continue
            self.optimiser.take_gradients()
            loss += part_loss.detach()
            gradient[part] = tokens.grad
            start += len(tokens)
        return loss, gradient

    def _halve(self, rows: np.ndarray) -> None:
        """Let the language model read fewer cells at once, after memory ran out with the cells ``rows``."""
        if len(rows) == 1:
            raise InputError(
                "config: finetune.batch_cells",
                f"memory ran out with a single cell, {self.train.ids[rows[0]]}",
                "Set finetune.checkpoint_activations: true, give the job more memory, or choose a smaller model",
            )
        for parameter in self.optimiser.parameters.values():
            parameter.grad = None
        torch.cuda.empty_cache()
        self.cells_at_once = (len(rows) + 1) // 2
        log.warning(
            "memory ran out with %d cells at once: the language model reads %d at once from now on, and the steps stay "
            "the same. Lower finetune.batch_cells or finetune.batch_tokens to avoid the failed attempt",
            len(rows), self.cells_at_once,
        )  # fmt: skip

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Evaluate on the validation texts, or their openings.

        Returns
        -------
        loss
            Mean negative log likelihood per token, in nats.
        accuracy
            Share of the cells with a cell type for which greedy decoding would write the name: each token up to the end
            of the name is the most likely one, given the tokens before it.
        """
        model = self.model.eval()
        cells, text_lengths = self.stage.validation, self.stage.validation.text_lengths
        batches = self.stage.size.cut(np.argsort(text_lengths, kind="stable"), text_lengths)
        sums = torch.zeros(4, dtype=torch.float64, device=model.device)
        for rows in batches[self.team.rank :: self.team.size]:
            vectors, lengths, text, text_mask, _ = cells.batch(rows, model.device)
            sentence = (torch.arange(text.shape[1]) < cells.first_sentences[rows][:, None]).to(model.device)
            loss, chosen = model.judge_text(*model.projector(vectors, lengths), text, text_mask, sentence)
            named = sentence.any(1)
            sums += torch.stack([loss, text_mask.sum(), (chosen.all(1) & named).sum(), named.sum()])
        total, tokens, correct, named = self.team.all_reduce(sums).tolist()
        return total / tokens, correct / max(named, 1)

    def write_checkpoint(self) -> None:
        """Write weights, optimiser and progress in place of the last checkpoint."""
        tensors = {f"optimiser.{name}": value for name, value in self.optimiser.state().items()}
        if self.state.best_epoch >= 0:
            tensors |= {f"best.{name}": value for name, value in self.optimiser.collect(self.best).items()}
        if self.team.leads:
            write_checkpoint(self.checkpoint_file, tensors, asdict(self.state), self.fingerprint)
        self.team.wait()

    def resume(self) -> bool:
        """Restore the last checkpoint of this run, and return whether there was one."""
        found = read_checkpoint(self.checkpoint_file, self.fingerprint)
        if found is None:
            return False
        state, tensors = found
        self.state = State(**state)
        self.optimiser.restore(with_prefix(tensors, "optimiser."))
        best = with_prefix(tensors, "best.")
        self.best = {name: best[name].to(self.model.device) for name in self.optimiser.masters if best}
        log.info("resuming from step %d of epoch %d", self.state.step, self.state.epoch + 1)
        return True
