"""The candidate names of each slot, scored by the language model and by the projector for the cells of one shard."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cell2text.confidence.decisions import Confidence
from cell2text.contracts import SCORES, TERMS
from cell2text.embedding.vectors import Embeddings, Vectors
from cell2text.generation.candidates import Candidates, find_candidates
from cell2text.generation.describe import cells_in
from cell2text.generation.score import score_names
from cell2text.grammar import PATHWAY, Terms
from cell2text.model.alignment import LabelTargets, order_slots
from cell2text.model.bundle import load, load_projector
from cell2text.model.cell2text import Cell2Text

log = logging.getLogger("cell2text.generation")


def score_candidates(
    model: str,
    language_model: str,
    corpus: str,
    terms: str,
    embeddings: Embeddings,
    scores: str,
    split: str,
    batch_cells: int,
    by: str = "model",
    calibration: str | None = None,
) -> None:
    """Score the candidate names of the cells of a split in the given shards of embeddings.

    If only the projector was trained, the language model has learnt nothing: to it, all candidates are alike.

    Parameters
    ----------
    model, language_model
        Directories of the fine-tuned and the original model.
    corpus, terms
        Files of ``contracts.CELLS`` and ``contracts.TERMS``.
    embeddings
        Embeddings of the cells.
    scores
        Output file (``contracts.SCORES``).
    split
        Name of the split.
    batch_cells
        Maximum number of cells to score at a time.
    by
        The config's ``generate.by``.
    calibration
        File written by ``calibrate``, which tells cells that the language model need not read; None for cells that
        calibration itself reads.
    """
    scorer = Scorer(model, language_model, terms)
    needs = (
        nobody if by == "projector" else Confidence.load(calibration).needs_language_model if calibration else everybody
    )
    cells = cells_in(embeddings.files, corpus, split)["cell_id"].to_list()
    vectors = embeddings.vectors(cells, scorer.model.projector.reads)
    SCORES.write(scorer.score(vectors, batch_cells, needs), cells, scores)
    log.info("scored the names of %d cells of %s", len(cells), split)


def everybody(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return that the language model reads every cell."""
    return np.ones(len(next(iter(scores.values()))), dtype=bool)


def nobody(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return that the language model reads no cell."""
    return ~everybody(scores)


class Scorer:
    """A fine-tuned model that scores the candidate names of cells.

    Parameters
    ----------
    model, language_model
        Directories of the fine-tuned and the original model.
    terms
        File of ``contracts.TERMS``.
    """

    def __init__(self, model: str, language_model: str, terms: str):
        loaded, table = load(model, language_model), TERMS.read(terms)
        self.labels = order_slots(loaded.about["labels"])
        # full fine-tuning changes the embeddings of the words that the projector is aligned to
        original = load_projector(model, language_model) if loaded.about["finetune"]["mode"] == "full" else loaded
        self.targets = LabelTargets.of_model(self.labels, table, original)
        self.model = loaded.ready_to_write()
        programmes = loaded.about["programmes_per_cell"] if PATHWAY in self.labels else 0
        self.candidates = find_candidates(self.labels, programmes, Terms(table), loaded.tokenizer)

    def score(
        self,
        vectors: Vectors,
        batch_cells: int,
        needs: Callable[[Mapping[str, np.ndarray]], np.ndarray] = everybody,
    ) -> dict[str, np.ndarray]:
        """Return the tensors of ``contracts.SCORES`` for cells.

        Parameters
        ----------
        vectors
            Input of the projector.
        batch_cells
            Maximum number of cells to read at a time.
        needs
            Returns from the projector's scores which cells the language model reads, bool (cells,). To the others, all
            names are alike. It takes nearly all of the time.
        """
        scores = self._score_by_projector(vectors, batch_cells)
        learnt = self.model.about["finetune"]["opening_epochs"] + self.model.about["finetune"]["epochs"] > 0
        read = np.flatnonzero(needs(scores)) if learnt else np.empty(0, dtype=int)
        shapes = [(len(vectors), len(step.ids)) for step in self.candidates]
        steps = [np.full(shape, -np.log(shape[1]), dtype=np.float32) for shape in shapes]
        if len(read):
            drafts, start = draft_names(self.candidates, scores)[read], 0
            order = np.argsort(count_tokens(self.candidates, drafts), kind="stable")  # batches with little padding
            read, drafts = read[order], drafts[order]
            for batch in score_names(self.model, vectors, read, self.candidates, drafts, batch_cells):
                rows = read[start : start + len(batch[0])]
                for step, found in zip(steps, batch, strict=True):
                    step[rows] = found.numpy()
                start += len(rows)
        log.info("the language model read %d of %d cells", len(read), len(vectors))
        return scores | self._by_slot(steps)

    def _score_by_projector(self, vectors: Vectors, batch_cells: int) -> dict[str, np.ndarray]:
        scores = score_by_projector(self.model, self.targets, vectors, np.arange(len(vectors)), batch_cells)
        return {f"projector_{slot}": part.numpy() for slot, part in zip(self.labels, scores, strict=True)}

    def _by_slot(self, parts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        steps = [(step.slot, scores) for step, scores in zip(self.candidates, parts, strict=True)]
        tensors = {slot: scores for slot, scores in steps if slot != PATHWAY}
        ranked = [scores for slot, scores in steps if slot == PATHWAY]
        return tensors | ({PATHWAY: np.stack(ranked, axis=1)} if ranked else {})


def draft_names(steps: Sequence[Candidates], scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the projector's best candidate of each step, int64 (cells, steps), no gene programme twice.

    Parameters
    ----------
    steps
        The candidates of each step.
    scores
        The projector's scores, as in ``contracts.SCORES``.
    """
    places = Counter[str]()
    drafts = []
    for step in steps:
        ranked = np.argsort(-scores[f"projector_{step.slot}"], axis=1, kind="stable")
        drafts.append(ranked[:, places[step.slot]])
        places[step.slot] += 1
    return np.stack(drafts, axis=1)


def count_tokens(steps: Sequence[Candidates], drafts: np.ndarray) -> np.ndarray:
    """Return the number of tokens of each draft, int64 (cells,).

    Parameters
    ----------
    steps
        The candidates of each step.
    drafts
        Index of a candidate of each step, int64 (cells, steps).
    """
    counts = [np.array([len(tokens) for tokens in step.tokens])[drafts[:, n]] for n, step in enumerate(steps)]
    return np.sum(counts, axis=0)


@torch.no_grad()
def score_by_projector(
    model: Cell2Text, targets: LabelTargets, vectors: Vectors, rows: np.ndarray, batch_cells: int
) -> list[Tensor]:
    """Return the log-probabilities of the labels of each slot, float32 (cells, labels), on the CPU.

    Parameters
    ----------
    model
        Only its projector is run.
    targets
        The labels of each slot.
    vectors, rows
        Input of the projector, and the cells to score.
    batch_cells
        Maximum number of cells to read at a time.
    """
    parts = [[torch.empty(0, len(directions))] for directions in targets.directions]
    for start in range(0, len(rows), batch_cells):
        batch = [part.to(model.device) for part in vectors[rows[start : start + batch_cells]]]
        for part, scores in zip(parts, targets.scores(*model.projector(*batch)), strict=True):
            part.append(scores.log_softmax(-1).float().cpu())
    return [torch.cat(part) for part in parts]
