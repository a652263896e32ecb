"""Scores of training cells by projectors that have not seen their study: what to expect of a new study.

A new study differs from the training studies in protocol, donors and the names of its cell types, so the model is right
less often than on validation cells of its own studies. Here each study plays the new one: encoder and projector are
fitted to the cells of the others, and score its own. The language model, which takes far longer to train, is left out.
"""

import copy
import logging
from contextlib import nullcontext

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cell2text.confidence.novelty import Reference, draw_cells
from cell2text.contracts import DESCRIPTIONS, EMBEDDINGS, SCORES, TERM_SLOTS, TERMS, datasets_of
from cell2text.device import pick_device
from cell2text.embedding.fit_encoder import EncoderInputs
from cell2text.embedding.refit import refit_without
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
MOST_CELLS = 50_000
CELLS_AT_ONCE = 256


def score_left_out_studies(
    language_model: str,
    descriptions: str,
    terms: str,
    embeddings: Embeddings,
    scores: str,
    vectors: str,
    projector: ProjectorSettings,
    settings: FinetuneSettings,
    seed: int,
    encoder: EncoderInputs | None = None,
) -> None:
    """Score up to 300 training cells of each study by an encoder and a projector that have not seen the study.

    The projector has the first weights and settings of the fine-tuned model's, but half of the alignment steps: on new
    studies more make no difference. Of more than 50,000 training cells, as many are used, evenly spaced.
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
        Output file (``contracts.SCORES``, only of the projector, with the novelty of the cells); without rows if fewer
        than three studies have training cells, or there is no alignment.
    vectors
        Output file (``contracts.EMBEDDINGS``, only pooled vectors) of these cells.
    projector, settings
        The config's ``projector`` and ``finetune`` sections.
    seed
        Seed of weights, batches and noise.
    encoder
        What the encoder was fitted on, to fit it again without each study; None if it takes too long, or was not fitted
        on the training cells. Then ``embeddings`` are those that the projector reads.
    """
    shared = ["split", "text", *(f"{slot}_id" for slot in TERM_SLOTS)]
    texts = DESCRIPTIONS.read(descriptions, ["cell_id", *shared], categories=shared)
    # of all training cells, as the model's: a rare label may have no cell among those that are used
    classes, (programmes, numbers) = find_classes(texts[texts["split"] == "train"]), find_programmes(descriptions)
    texts["split"] = _thin_out(texts["split"].to_numpy(dtype=object))
    training = texts[texts["split"] == "train"]
    study, studies = pd.factorize(datasets_of(training["cell_id"]), sort=True)
    reads = PROJECTORS[projector.kind].reads
    if len(studies) < FEWEST_STUDIES or not settings.align_steps:
        log.info(
            "%d studies with training cells, %d alignment steps: none is left out", len(studies), settings.align_steps
        )
        SCORES.write({}, [], scores)
        _write_vectors([np.empty((0, 1), np.float32)], np.empty(0), [], vectors)
        return
    labels, table = classes | ({PATHWAY: programmes} if programmes else {}), TERMS.read(terms)
    model, first = None, {}
    random, drawn, parts, pooled, lengths, novelty = np.random.default_rng(seed), [], [], [], [], []
    folds, steps = min(len(studies), MOST_FOLDS), -(-settings.align_steps // 2)
    for fold in range(folds):
        log.info("leaving out %s", ", ".join(studies[fold::folds]))
        rest, ids = np.flatnonzero(study % folds != fold), training["cell_id"].to_numpy()
        without = refit_without(encoder, studies[fold::folds], ids, reads == "gene_vectors") if encoder else None
        with without or nullcontext(embeddings) as seen:
            if model is None or model.about["dimensions"] != seen.dimensions(reads):
                torch.manual_seed(seed)
                model = build(language_model, projector, seen.dimensions(reads), settings, pick_device())
                first = copy.deepcopy(model.projector.state_dict())
            model.projector.load_state_dict(first)
            train = read_cells(texts, "train", seen, classes, numbers, model)
            fit_inputs(model, train, seed)
            named = train.aligned_to
            targets = choose_targets(model, train, training["text"], labels, table)
            align(model, targets, train, steps, settings.view_share, seed, model.device, among=rest)
            compared, unseen = LabelTargets.of_model(labels, table, model), _find_unseen(named[rest], labels)
            rows = [_draw(np.flatnonzero(study == one), random) for one in range(fold, len(studies), folds)]
            drawn.append(np.concatenate(rows))
            found = score_by_projector(model, compared, train.vectors, drawn[-1], CELLS_AT_ONCE)
            parts.append([_without(*slot) for slot in zip(found, unseen, strict=True)])
            read = EMBEDDINGS.read_cells(seen.files, ids[drawn[-1]], ["pooled", "lengths"])
            pooled.append(read["pooled"])
            lengths.append(read["lengths"])
            known = ids[rest[draw_cells(len(rest), seed)]]
            compared_with = Reference.of(EMBEDDINGS.read_cells(seen.files, known, ["pooled"])["pooled"])
            novelty.append(compared_with.novelty(read["pooled"]))
    by_slot = [torch.cat(part).numpy() for part in zip(*parts, strict=True)]
    tensors = {f"projector_{slot}": part for slot, part in zip(labels, by_slot, strict=True)}
    cells = training["cell_id"].iloc[np.concatenate(drawn)].to_list()
    SCORES.write(tensors | {"novelty": np.concatenate(novelty)}, cells, scores)
    _write_vectors(pooled, np.concatenate(lengths), cells, vectors)


def _thin_out(split: np.ndarray) -> np.ndarray:
    """Return the split of each cell with at most ``MOST_CELLS`` training cells, evenly spaced; the others have none."""
    rows = np.flatnonzero(split == "train")
    kept = rows[:: -(-len(rows) // MOST_CELLS) or 1]
    split[np.setdiff1d(rows, kept)] = None
    return split


def _draw(rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return np.sort(random.permutation(rows)[:CELLS_PER_STUDY])


def _write_vectors(pooled: list[np.ndarray], lengths: np.ndarray, cells: list[str], path: str) -> None:
    """Write pooled vectors of cells; those of encoders with fewer axes are padded with zeros, which moves no cell."""
    width = max(part.shape[1] for part in pooled)
    padded = np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in pooled])
    tensors = {"gene_vectors": np.empty((len(cells), 0, 1), np.float16), "lengths": lengths.astype(np.int32)}
    EMBEDDINGS.write(tensors | {"pooled": padded}, cells, path)


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
