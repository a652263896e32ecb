"""Fine-tuning: the projector is aligned to the words for a cell, then trained on the texts with the language model.

The first epochs read only the opening of each text, which has all its names and a third of its tokens. The explanations
follow from the names: only a model that is to write them itself needs epochs over whole texts.

Every random choice is drawn from the seed and the number of the step, so a run that was killed resumes from its last
checkpoint through the same batches to the same weights.
"""

import logging
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cell2text.contracts import DESCRIPTIONS, HISTORY, TERM_SLOTS, TERMS
from cell2text.device import pick_device
from cell2text.embedding.vectors import Embeddings
from cell2text.files import read_json, whole_folder
from cell2text.finetuning.align import align
from cell2text.finetuning.data import Cells, check_lengths, find_classes, find_depths, find_programmes, read_cells
from cell2text.finetuning.loop import Finetuning, State
from cell2text.grammar import PATHWAY
from cell2text.model import fast
from cell2text.model.alignment import DescriptionTargets, LabelTargets
from cell2text.model.bundle import build, save
from cell2text.model.cell2text import Cell2Text
from cell2text.model.projectors import PROJECTORS
from cell2text.model.prompt import INSTRUCTION
from cell2text.processes import Team, run_in_processes
from cell2text.provenance import hash_config, hash_file, versions
from cell2text.settings import FinetuneSettings, ProjectorSettings

log = logging.getLogger("cell2text.finetuning")

CELLS_TO_SCALE_BY = 4096  # number of cells from which the projector's centre and spread are computed
CELLS_TO_CHECK = 4  # number of cells on which the fast path is compared with the plain one


def finetune(
    language_model: str,
    descriptions: str,
    terms: str,
    embeddings: Embeddings,
    directory: str,
    projector: ProjectorSettings,
    settings: FinetuneSettings,
    seed: int,
    library: str,
    processes: int = 1,
    max_new_tokens: int | None = None,
) -> None:
    """Fine-tune a language model to describe cells, and save adapter, projector and history.

    Parameters
    ----------
    language_model
        A Hugging Face directory.
    descriptions, terms
        Files of ``contracts.DESCRIPTIONS`` and ``contracts.TERMS``.
    embeddings
        Embeddings of the cells.
    directory
        Output directory of the model. Checkpoints are in ``{directory}.checkpoints`` until training is finished.
    projector, settings
        The config's ``projector`` and ``finetune`` sections.
    seed
        Seed of weights, batches and noise.
    library
        Version of the code, part of the checkpoint's fingerprint.
    processes
        Number of processes that train together, each on its own GPU.
    max_new_tokens
        The config's ``generate.max_new_tokens``, only to refuse it before training if it would truncate the texts.

    Raises
    ------
    InputError
        If the texts are too long for the language model or for ``max_new_tokens``, or the loss is not finite.
    """
    arguments = (language_model, descriptions, terms, embeddings, directory, projector, settings, seed, library)
    arguments += (max_new_tokens,)
    run_in_processes(_finetune, processes, *arguments)


def _finetune(
    team: Team,
    language_model: str,
    descriptions: str,
    terms: str,
    embeddings: Embeddings,
    directory: str,
    projector: ProjectorSettings,
    settings: FinetuneSettings,
    seed: int,
    library: str,
    max_new_tokens: int | None,
) -> None:
    device = pick_device()
    # as categories, because many cells share a text
    shared = ["split", "text", *(f"{slot}_id" for slot in TERM_SLOTS)]
    texts = DESCRIPTIONS.read(descriptions, ["cell_id", *shared], categories=shared)
    training_rows = texts[texts["split"] == "train"]

    def build_model() -> Cell2Text:
        torch.manual_seed(seed)
        dimensions = embeddings.dimensions(PROJECTORS[projector.kind].reads)
        return build(language_model, projector, dimensions, settings, device)

    model = build_model()
    classes = find_classes(training_rows)
    programmes, numbers = find_programmes(descriptions)
    train, validation = (
        read_cells(texts, split, embeddings, classes, numbers, model) for split in ("train", "validation")
    )
    labels = classes | ({PATHWAY: programmes} if programmes else {})
    longest = check_lengths(model, train, validation, max_new_tokens)
    fit_inputs(model, train, seed)
    if settings.opening_epochs + settings.epochs and settings.fast and not _try_fast(model, train):
        trained = model.projector
        model = build_model()
        model.projector = trained
    model.about["longest_text"] = longest
    table = TERMS.read(terms)
    targets = choose_targets(model, train, training_rows["text"], labels, table)
    source = read_json(Path(language_model, "source.json")) | {"name": Path(language_model).name}
    fingerprint = hash_config(
        {
            "model": model.about,
            "fast": model.fast,
            "seed": seed,
            "library": library,
            "versions": versions("torch", "transformers", "peft"),
            "language_model": source,
            "top_k": embeddings.top_k,
            "processes": team.size,
            "files": [hash_file(path) for path in (descriptions, *embeddings.files)],
        }
    )
    checkpoints = Path(f"{directory}.checkpoints")
    depths = find_depths(training_rows["cell_type_id"], table) if settings.curriculum else None
    work = Finetuning(model, targets, train, validation, settings, seed, checkpoints, fingerprint, team, depths)
    log.info(
        "%d training and %d validation cells, %d cell types, %.1f million trainable weights, on %s, %s path",
        len(train.texts),
        len(validation.texts),
        len(classes["cell_type"]),
        sum(value.numel() for value in work.optimiser.parameters.values()) / 1e6,
        device,
        "fast" if model.fast else "plain",
    )
    if not work.resume():
        work.state.history = align(model, targets, train, settings.align_steps, settings.view_share, seed, device)
        work.optimiser.take_weights()
    state = work.run()
    if team.leads:
        _save(work, state, Path(directory), source, labels, numbers.shape[1], seed)
        shutil.rmtree(checkpoints, ignore_errors=True)


def choose_targets(
    model: Cell2Text, train: Cells, texts: pd.Series, labels: dict[str, list[str]], table: pd.DataFrame
) -> LabelTargets | DescriptionTargets:
    """Return what the training cells are aligned to, as ``finetune.align_to`` says.

    Parameters
    ----------
    model, train
        The model and its training cells. Where they are aligned to whole descriptions, ``train.aligned_to`` is set.
    texts
        Text of each training cell, may be categorical.
    labels
        Ids of each slot.
    table
        A table of ``contracts.TERMS``.
    """
    if model.about["finetune"]["align_to"] == "labels":
        return LabelTargets.of_labels(labels, table, model)
    which = pd.factorize(texts)[0]
    first = np.unique(which, return_index=True)[1]  # one cell per distinct text
    tokens = model.language_model.get_input_embeddings().weight.detach()
    train.aligned_to = torch.from_numpy(which)
    return DescriptionTargets.of([train.texts[row] for row in first], tokens)


def fit_inputs(model: Cell2Text, train: Cells, seed: int) -> None:
    """Set the projector's centre and spread from the vectors of some training cells."""
    some = np.random.default_rng(seed).permutation(len(train.texts))[:CELLS_TO_SCALE_BY]
    vectors, lengths = train.vectors[np.sort(some)]
    if model.projector.reads == "gene_vectors":
        vectors = vectors[torch.arange(vectors.shape[1]) < lengths[:, None]]
    model.projector.fit_inputs(vectors.to(model.device))


def _try_fast(model: Cell2Text, train: Cells) -> bool:
    """Speed the model up, and return whether it still computes the same loss, also on the longest texts."""
    rows = np.argsort(-train.text_lengths, kind="stable")[: CELLS_TO_CHECK // 2]
    rows = np.unique(np.concatenate([rows, np.arange(min(len(train.texts), CELLS_TO_CHECK // 2))]))
    vectors, lengths, text, text_mask, _ = train.batch(rows, model.device)
    with torch.no_grad():
        soft, present = model.projector(vectors, lengths)
    return fast.check(model, soft, present, text, text_mask)


def _save(
    work: Finetuning,
    state: State,
    directory: Path,
    source: dict,
    labels: dict[str, list[str]],
    programmes_per_cell: int,
    seed: int,
) -> None:
    about = {
        "language_model": source,
        "fast": work.model.fast,
        "labels": labels,
        "programmes_per_cell": programmes_per_cell,
        "training_cells": len(work.train.texts),
        "trainable_parameters": sum(value.numel() for value in work.optimiser.parameters.values()),
        # 0 and None if only the projector was trained
        "best_epoch": state.best_epoch + 1,
        "validation_loss": state.best_loss if work.epochs else None,
        "validation_accuracy": state.best_accuracy if work.epochs else None,
        "seed": seed,
        "processes": work.team.size,
        "threads": torch.get_num_threads(),
        "instruction": INSTRUCTION,
    }
    with whole_folder(directory, "cell2text.json") as folder:
        HISTORY.write(pd.DataFrame(state.history), folder / "history.parquet")
        save(work.model, folder, about)
