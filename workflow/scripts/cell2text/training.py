"""Fine-tuning: the projector aligned to the words for a cell, then projector and adapter trained on the texts.

The first epochs read the opening of each text alone, the sentence that names the cell type: there, a pass over the
cells costs a quarter, and to tell cells apart takes many passes, while the words that follow a name take few.

Every random choice is drawn from the seed and the number of the step, so a run that was killed goes on from
its last checkpoint through the same batches to the same weights.
"""

import json
import logging
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import Event

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cell2text.contracts import DESCRIPTIONS, HISTORY, TERM_SLOTS, TERMS, read_json, whole_file
from cell2text.descriptions import find_opening
from cell2text.device import pick_device
from cell2text.errors import InputError
from cell2text.model.alignment import DescriptionTargets, LabelTargets, number_labels
from cell2text.model.cell2text import INSTRUCTION, Cell2Text, build, save
from cell2text.model.optimiser import MasterAdamW, warm_up_then_decay
from cell2text.processes import Team, run_in_processes
from cell2text.progress import Progress
from cell2text.provenance import hash_config, hash_file
from cell2text.vectors import Embeddings, Vectors

log = logging.getLogger("cell2text.training")

ALIGN_CELLS = 256  # cells a step of alignment
ALIGN_RATE = 1e-3
INPUT_NOISE = 0.3  # of the spread of the training cells' vectors, while aligning
CELLS_TO_SCALE_BY = 4096  # whose vectors give the projector its centre and spread
# What `model.build` calls the keys of the config's `finetune` section that say what of the language model learns.
TUNING_KEYS = {
    "mode": "mode",
    "r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "targets": "lora_targets",
    "lora_dropout": "lora_dropout",
    "use_dora": "dora",
    "use_rslora": "rslora",
}
TOLD_TO_END = 128 + signal.SIGTERM  # the exit code of a run that was told to end and can go on


@dataclass
class Cells:
    """Cells of one split, as the model takes them.

    Parameters
    ----------
    vectors
        What the projector reads.
    texts
        Token ids of each description with the end token, int64.
    labels
        Class numbers, see ``alignment.number_labels``; int64 (cells, slots).
    ids
        Of the cells.
    openings
        How many tokens of each text its opening has, which names the cell type; 0 where none is named. int64 (cells,).
    aligned_to
        What the targets of alignment take: the labels, or the number of each text among the different ones, int64
        (cells,).
    """

    vectors: Vectors
    texts: list[Tensor]
    labels: Tensor
    ids: list[str]
    openings: Tensor
    aligned_to: Tensor

    def batch(self, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return vectors, lengths, texts padded on the right, which tokens are there, and what to align to."""
        texts = [self.texts[row] for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        there = torch.arange(padded.shape[1]) < torch.tensor([len(text) for text in texts])[:, None]
        parts = (*self.vectors[rows], padded, there, self.aligned_to[rows])
        return tuple(part.to(device) for part in parts)

    @cached_property
    def text_lengths(self) -> np.ndarray:
        """The number of tokens of each text, int64 (cells,)."""
        return np.array([len(text) for text in self.texts])

    def openings_alone(self) -> "Cells":
        """Return the cells with the opening of their text alone, the whole text where it has none."""
        cut = [text[:end] if end else text for text, end in zip(self.texts, self.openings.tolist(), strict=True)]
        return replace(self, texts=cut)


@dataclass(frozen=True)
class BatchSize:
    """How many cells a process reads at once.

    Parameters
    ----------
    cells
        So many, where ``tokens`` is None.
    tokens
        Else as many as fit into so many tokens, prompts counted in; at least one.
    prompt
        Tokens of a cell's prompt, soft ones counted in.
    """

    cells: int
    tokens: int | None = None
    prompt: int = 0

    def cut(self, rows: np.ndarray, text_lengths: np.ndarray) -> list[np.ndarray]:
        """Return rows, in their order, as batches."""
        if self.tokens is None:
            return [rows[start : start + self.cells] for start in range(0, len(rows), self.cells)]
        found, start = [], 0
        ends = np.concatenate([[0], np.cumsum(self.prompt + text_lengths[rows])])
        while start < len(rows):
            end = max(start + 1, np.searchsorted(ends, ends[start] + self.tokens, side="right") - 1)
            found.append(rows[start:end])
            start = end
        return found


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


def plan_epoch(
    text_lengths: np.ndarray,
    size: BatchSize,
    step_batches: int,
    seed: int,
    epoch: int,
    weights: np.ndarray | None = None,
    depths: np.ndarray | None = None,
) -> list[list[np.ndarray]]:
    """Return the steps of an epoch, each the rows of its batches.

    Cells are mixed, whatever the length of their text: texts of like length mostly tell of like cells, and the model
    reads no padding in any case.

    Parameters
    ----------
    text_lengths
        Tokens of each text, (cells,).
    size
        Of a batch.
    step_batches
        Batches of a step; the last of an epoch may have fewer.
    seed, epoch
        The same pair gives the same steps.
    weights
        How likely each cell is drawn, (cells,), for an epoch of as many cells drawn with replacement; None for each
        cell once.
    depths
        Of each cell's type in the Cell Ontology, (cells,), if the first epoch is to go from general to special types
        (curriculum learning, Bengio et al. 2009, doi 10.1145/1553374.1553380).
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(text_lengths))
    if weights is not None:
        order = random.choice(len(text_lengths), len(text_lengths), p=weights / weights.sum())
    if depths is not None and epoch == 0:
        order = order[np.argsort(depths[order], kind="stable")]
    found = size.cut(order, text_lengths)
    return [found[start : start + step_batches] for start in range(0, len(found), step_batches)]


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
            history.append(_row("align", step, 0, value, value, adam.param_groups[0]["lr"], 0, start))
    adam.zero_grad()  # else the first step of fine-tuning would take the last gradient for its own
    return history


def add_noise(vectors: Tensor, lengths: Tensor, projector: torch.nn.Module, random: torch.Generator) -> Tensor:
    """Return the vectors with normal noise, drawn on the CPU so that every device gets the same."""
    noise = torch.randn(vectors.shape, generator=random).to(vectors.device)
    return vectors + INPUT_NOISE * projector.spread * noise


def _row(
    stage: str, step: int, epoch: int, loss: float, align_loss: float, rate: float, tokens: int, start: float
) -> dict:
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


def balance(labels: np.ndarray) -> np.ndarray:
    """Return weights with which all labels are drawn as often; -1, for none, counts as a label.

    Examples
    --------
    >>> balance(np.array([0, 0, 1])).tolist()
    [0.5, 0.5, 1.0]
    """
    _, number, cells = np.unique(labels, return_inverse=True, return_counts=True)
    return 1 / cells[number]


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
        return _row(
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


def read_cells(
    descriptions: pd.DataFrame, split: str, embeddings: Embeddings, classes: dict[str, list[str]], model: Cell2Text
) -> Cells:
    """Return the cells of one split, their texts as tokens.

    Parameters
    ----------
    descriptions
        Rows of ``contracts.DESCRIPTIONS``.
    split
        Which split to take.
    embeddings
        Of the cells.
    classes
        As :func:`find_classes` gives them.
    model
        Its projector says which vectors to read, its tokenizer makes the tokens.
    """
    rows = descriptions[descriptions["split"] == split]
    encoded = model.tokenizer(rows["text"].to_list(), add_special_tokens=False)
    end = model.tokenizer.eos_token_id
    openings = [find_opening(text) for text in rows["text"]]
    # up to the token that holds the last letter, which is the full stop
    ends = [encoded.char_to_token(i, len(text) - 1) + 1 if text else 0 for i, text in enumerate(openings)]
    labels = number_labels({slot: rows[f"{slot}_id"] for slot in classes}, classes)
    return Cells(
        embeddings.vectors(rows["cell_id"].to_list(), model.projector.reads),
        [torch.tensor([*text, end]) for text in encoded["input_ids"]],
        labels,
        rows["cell_id"].to_list(),
        torch.tensor(ends, dtype=torch.long),
        labels,
    )


def find_classes(training: pd.DataFrame) -> dict[str, list[str]]:
    """Return the sorted ids that each slot of training cells takes; slots without any are left out.

    Parameters
    ----------
    training
        Rows of ``contracts.DESCRIPTIONS``.
    """
    ids = {slot: sorted(training[f"{slot}_id"].dropna().unique()) for slot in TERM_SLOTS}
    return {slot: found for slot, found in ids.items() if found}


def find_depths(cell_types: pd.Series, terms: pd.DataFrame) -> np.ndarray:
    """Return how many is_a steps each cell type is away from the root of the Cell Ontology, float64 (cells,).

    Parameters
    ----------
    cell_types
        Id of each cell's type; a cell without one is but a cell, the root.
    terms
        A table of ``contracts.TERMS``.
    """
    depths = terms[terms["slot"] == "cell_type"].set_index("id")["depth"]
    return cell_types.map(depths).fillna(0).to_numpy(dtype=float)


def finetune(
    language_model: str,
    descriptions: str,
    terms: str,
    embeddings: Embeddings,
    directory: str,
    projector: dict,
    settings: dict,
    seed: int,
    library: str,
    processes: int = 1,
) -> None:
    """Fine-tune a language model to describe cells, and save adapter, projector and history.

    Parameters
    ----------
    language_model
        A Hugging Face directory.
    descriptions, terms
        Files of ``contracts.DESCRIPTIONS`` and ``contracts.TERMS``.
    embeddings
        Of the cells.
    directory
        Where the model goes. Checkpoints lie beside it, in ``{directory}.checkpoints``, until it is there.
    projector, settings
        The config's ``projector`` and ``finetune`` sections.
    seed
        Of weights, batches and noise.
    library
        Version of the code, part of the checkpoint's fingerprint.
    processes
        How many train together, each on a GPU of its own.

    Raises
    ------
    InputError
        If the loss is not finite.
    """
    arguments = (language_model, descriptions, terms, embeddings, directory, projector, settings, seed, library)
    run_in_processes(_finetune, processes, *arguments)


def _finetune(
    team: Team,
    language_model: str,
    descriptions: str,
    terms: str,
    embeddings: Embeddings,
    directory: str,
    projector: dict,
    settings: dict,
    seed: int,
    library: str,
) -> None:
    torch.manual_seed(seed)
    device = pick_device()
    texts = DESCRIPTIONS.read(descriptions)
    training_rows = texts[texts["split"] == "train"]
    tuning = {name: settings[key] for name, key in TUNING_KEYS.items() if key in settings}
    model = build(language_model, projector, embeddings.dimensions(), tuning, device)
    classes = find_classes(training_rows)
    train, validation = (read_cells(texts, split, embeddings, classes, model) for split in ("train", "validation"))
    some = np.random.default_rng(seed).permutation(len(train.texts))[:CELLS_TO_SCALE_BY]
    vectors, lengths = train.vectors[np.sort(some)]
    if model.projector.reads == "gene_vectors":
        vectors = vectors[torch.arange(vectors.shape[1]) < lengths[:, None]]
    model.projector.fit_inputs(vectors.to(device))
    table = TERMS.read(terms)
    if settings["align_to"] == "labels":
        targets = LabelTargets.of_labels(classes, table, model)
    else:
        numbers = pd.factorize(training_rows["text"])[0]
        first = np.unique(numbers, return_index=True)[1]  # a cell of each text
        tokens = model.language_model.get_input_embeddings().weight.detach()
        train.aligned_to = torch.from_numpy(numbers)
        targets = DescriptionTargets.of([train.texts[row] for row in first], tokens)
    source = read_json(Path(language_model, "source.json"))
    fingerprint = hash_config(
        {
            "projector": projector,
            "settings": settings,
            "seed": seed,
            "library": library,
            "language_model": source,
            "top_k": embeddings.top_k,
            "processes": team.size,
            "files": [hash_file(path) for path in (descriptions, *embeddings.files)],
        }
    )
    checkpoints = Path(f"{directory}.checkpoints")
    depths = find_depths(training_rows["cell_type_id"], table) if settings["curriculum"] else None
    work = Finetuning(model, targets, train, validation, settings, seed, checkpoints, fingerprint, team, depths)
    log.info(
        "%d training and %d validation cells, %d cell types, %.1f million weights to train, on %s",
        len(train.texts),
        len(validation.texts),
        len(classes["cell_type"]),
        sum(value.numel() for value in work.optimiser.parameters.values()) / 1e6,
        device,
    )
    if not work.take_up_checkpoint():
        work.state.history = align(model, targets, train, settings["align_steps"], seed, device)
        work.optimiser.take_weights()
    state = work.run()
    if team.leads:
        _save(work, state, Path(directory), source, classes, seed)
        shutil.rmtree(checkpoints, ignore_errors=True)


def _save(
    work: Finetuning, state: State, directory: Path, source: dict, classes: dict[str, list[str]], seed: int
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    HISTORY.write(pd.DataFrame(state.history), directory / "history.parquet")
    about = {
        "language_model": source,
        "finetune": work.settings,
        "labels": classes,
        "training_cells": len(work.train.texts),
        "trainable_parameters": sum(value.numel() for value in work.optimiser.parameters.values()),
        "best_epoch": state.best_epoch + 1,
        "validation_loss": state.best_loss,
        "validation_accuracy": state.best_accuracy,
        "seed": seed,
        "instruction": INSTRUCTION,
    }
    save(work.model, directory, about)
