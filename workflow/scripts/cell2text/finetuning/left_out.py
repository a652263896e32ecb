"""Scores of training cells by projectors that have not seen their study: what to expect of a new study.

A new study differs from the training studies in protocol, donors and the names of its cell types, so the model is right
less often than on validation cells of its own studies. Here each study plays the new one: a projector is aligned to the
cells of the others and scores some of its cells. The language model, which takes far longer to train, is left out.
"""

import copy
import logging

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cell2text.contracts import DESCRIPTIONS, SCORES, TERM_SLOTS, TERMS, datasets_of
from cell2text.device import pick_device
from cell2text.embedding.vectors import Embeddings
from cell2text.finetuning.align import align
from cell2text.finetuning.data import find_classes, find_programmes, read_cells
from cell2text.finetuning.finetune import choose_targets, fit_inputs
from cell2text.generation.score_candidates import score_by_projector
from cell2text.grammar import PATHWAY
from cell2text.model.alignment import LabelTargets
from cell2text.model.bundle import build
from cell2text.model.projectors import PROJECTORS
from cell2text.settings import FinetuneSettings, ProjectorSettings

log = logging.getLogger("cell2text.finetuning")

FEWEST_STUDIES = 3  # with training cells
MOST_FOLDS = 8  # of more studies, several are left out at a time
CELLS_PER_STUDY = 300
CELLS_AT_ONCE = 256


def score_left_out_studies(
    language_model: str,
    descriptions: str,
    terms: str,
    embeddings: Embeddings,
    scores: str,
    projector: ProjectorSettings,
    settings: FinetuneSettings,
    seed: int,
) -> None:
    """Score up to 300 training cells of each study by a projector aligned without the study.

    The projector has the inputs, first weights and settings of the fine-tuned model's, but half of the alignment steps:
    on new studies more make no difference.
    Candidates without training cells in the other studies get the probability 0, even if these are all.

    Parameters
    ----------
    language_model
        Directory of the original language model.
    descriptions, terms
        Files of ``contracts.DESCRIPTIONS`` and ``contracts.TERMS``.
    embeddings
        Embeddings of the cells.
    scores
        Output file (``contracts.SCORES``, only of the projector); without rows if fewer than three studies have
        training cells, or there is no alignment.
    projector, settings
        The config's ``projector`` and ``finetune`` sections.
    seed
        Seed of weights, batches and noise.
    """
    shared = ["split", "text", *(f"{slot}_id" for slot in TERM_SLOTS)]
    texts = DESCRIPTIONS.read(descriptions, ["cell_id", *shared], categories=shared)
    training = texts[texts["split"] == "train"]
    study, studies = pd.factorize(datasets_of(training["cell_id"]), sort=True)
    if len(studies) < FEWEST_STUDIES or not settings.align_steps:
        log.info(
            "%d studies with training cells, %d alignment steps: none is left out", len(studies), settings.align_steps
        )
        SCORES.write({}, [], scores)
        return
    torch.manual_seed(seed)
    dimensions = embeddings.dimensions(PROJECTORS[projector.kind].reads)
    model = build(language_model, projector, dimensions, settings, pick_device())
    classes, (programmes, numbers) = find_classes(training), find_programmes(descriptions)
    labels = classes | ({PATHWAY: programmes} if programmes else {})
    train, table = read_cells(texts, "train", embeddings, classes, numbers, model), TERMS.read(terms)
    fit_inputs(model, train, seed)
    named = train.aligned_to
    targets = choose_targets(model, train, training["text"], labels, table)
    compared = LabelTargets.of_model(labels, table, model)
    first = copy.deepcopy(model.projector.state_dict())
    random, drawn, parts = np.random.default_rng(seed), [], []
    folds, steps = min(len(studies), MOST_FOLDS), -(-settings.align_steps // 2)
    for fold in range(folds):
        log.info("leaving out %s", ", ".join(studies[fold::folds]))
        rest = np.flatnonzero(study % folds != fold)
        model.projector.load_state_dict(first)
        align(model, targets, train, steps, settings.view_share, seed, model.device, among=rest)
        unseen = _find_unseen(named[rest], labels)
        for one in range(fold, len(studies), folds):
            rows = np.sort(random.permutation(np.flatnonzero(study == one))[:CELLS_PER_STUDY])
            found = score_by_projector(model, compared, train.vectors, rows, CELLS_AT_ONCE)
            parts.append([_without(*slot) for slot in zip(found, unseen, strict=True)])
            drawn.append(rows)
    by_slot = [torch.cat(part).numpy() for part in zip(*parts, strict=True)]
    tensors = {f"projector_{slot}": part for slot, part in zip(labels, by_slot, strict=True)}
    SCORES.write(tensors, [train.ids[row] for row in np.concatenate(drawn)], scores)


def _find_unseen(named: Tensor, labels: dict[str, list[str]]) -> list[Tensor]:
    """Return for each slot which labels no cell has, bool (labels,); the last columns are gene programmes."""
    unseen = []
    for slot, (name, ids) in enumerate(labels.items()):
        columns = named[:, slot:] if name == PATHWAY else named[:, slot]
        unseen.append(~torch.isin(torch.arange(len(ids)), columns))
    return unseen


def _without(scores: Tensor, unseen: Tensor) -> Tensor:
    """Return the log-probabilities if the unseen labels had none."""
    left = scores.masked_fill(unseen, -torch.inf)
    return left if unseen.all() else left.log_softmax(-1)
