"""Cells and texts learn to find each other: a text comes closer to the cells that it fits than to others of a batch.

The texts are what a user may type: names, synonyms and definitions of a cell's labels and of the terms above them,
sentences, and several of these in a row. The loss is contrastive in both directions (Radford et al. 2021, arXiv
2103.00020). Every cell that a text fits is a correct match, with equal weight.
"""

import copy
import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from cell2text.contracts import NAMES, TERM_SLOTS, TERMS
from cell2text.embedding.vectors import Embeddings, Vectors
from cell2text.evaluation.baselines.slots import is_training, read_slots
from cell2text.finetuning.align import add_noise
from cell2text.finetuning.data import OTHER_NOISE, OWN_NOISE
from cell2text.grammar import PATHWAY, Slots, Terms, render
from cell2text.retrieval.retriever import Retriever, TextReader, content_words

log = logging.getLogger("cell2text.retrieval")

SLOTS = (*TERM_SLOTS, PATHWAY)
BATCH, RATE, TEMPERATURE = 256, 1e-3, 0.07
EPOCHS, PATIENCE = 40, 6  # at most, and without improvement on the validation cells
FEWEST_STEPS, MOST_STEPS = 20, 500  # of an epoch
WHOLE, NAMED, ITSELF = 0.2, 0.5, 0.5  # probability that a text names all slots; each slot; a label and no term above it
VIEW_SHARE = 0.5  # of the cells of a step that are seen as in another study
MOST_VALIDATION = 2048  # cells


@dataclass(frozen=True)
class Texts:
    """What can be said of cells: terms, each in several wordings.

    Parameters
    ----------
    fits
        Which terms fit a kind of cells, bool (kinds, terms). Cells of one kind have the same labels.
    labels
        Which of these are the labels themselves, and not terms above them, bool (kinds, terms).
    slots
        Slot of each term, int64 (terms,).
    sums
        Sum of the token embeddings of each wording, float32 (wordings, width).
    starts
        Term i has wordings ``starts[i]`` to ``starts[i + 1] - 1``, the first of them a sentence; int64 (terms + 1,).
    """

    fits: np.ndarray
    labels: np.ndarray
    slots: np.ndarray
    sums: Tensor
    starts: np.ndarray

    def draw(self, kinds: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a text for a cell of each kind.

        Returns
        -------
        sums
            Sum of the token embeddings of each text, float32 (texts, width).
        fits
            Whether a text fits a cell, bool (texts, cells).
        counted
            Whether a cell has a label in every slot that a text names, bool (texts, cells).
        """
        fits, slots, cells = self.fits[kinds], np.eye(len(SLOTS), dtype=bool)[self.slots].T, np.arange(len(kinds))
        present = np.stack([(fits & slot).any(axis=1) for slot in slots], axis=1)
        whole, drawn = rng.random(len(kinds)) < WHOLE, rng.random(present.shape) * present
        chosen = present & (whole[:, None] | (drawn > 1 - NAMED) | (drawn == drawn.max(axis=1, keepdims=True)))
        named, sums = np.zeros(fits.shape, dtype=np.float32), torch.zeros(len(kinds), self.sums.shape[1])
        for slot, mine in zip(slots, chosen.T, strict=True):
            own = fits & slot & self.labels[kinds]
            itself = (whole | (rng.random(len(kinds)) < ITSELF)) & own.any(axis=1)
            term = (np.where(itself[:, None], own, fits & slot) * rng.random(fits.shape)).argmax(axis=1)
            wording = np.where(whole, 0, rng.random(len(kinds)) * np.diff(self.starts)[term]).astype(int)
            named[cells[mine], term[mine]] = 1
            sums[mine] += self.sums[self.starts[term] + wording][mine]
        matches = named @ fits.T.astype(np.float32) == named.sum(axis=1, keepdims=True)
        unknown = named @ slots.T.astype(np.float32) @ ~present.T
        return sums, torch.from_numpy(matches), torch.from_numpy(unknown == 0)


def fit_retriever(
    language_model: str,
    descriptions: str,
    terms: str,
    names: str,
    embeddings: Embeddings,
    path: str,
    dimensions: int,
    seed: int,
) -> None:
    """Train a retriever on the training cells and save the epoch with the lowest loss on the validation cells.

    Parameters
    ----------
    language_model
        A Hugging Face directory, for its token embeddings.
    descriptions, terms, names
        Files of ``contracts.DESCRIPTIONS``, ``contracts.TERMS`` and ``contracts.NAMES``.
    embeddings
        Embeddings of the cells.
    path
        The safetensors file to write.
    dimensions
        Dimensions of the common space.
    seed
        Seed of weights, texts, views and noise.
    """
    described, reader = read_slots(descriptions), TextReader(language_model)
    training, validation = is_training(described), (described["split"] == "validation").to_numpy()
    kinds, texts, wordings = read_texts(described, TERMS.read(terms), NAMES.read(names), reader)
    cells = described["cell_id"]
    seen = embeddings.vectors(cells[training].tolist(), "pooled", embeddings.count_views())
    others = np.flatnonzero(validation)[:MOST_VALIDATION]
    others = others[texts.fits[kinds[others]].any(axis=1)]
    held = embeddings.vectors(cells[others].tolist(), "pooled")[np.arange(len(others))][0]
    torch.manual_seed(seed)
    retriever = Retriever(seen[np.array([0])][0].shape[1], texts.sums.shape[1], dimensions)
    retriever.words = frozenset(word for text in wordings for word in content_words(text))
    train(retriever, texts, seen, kinds[training], held, kinds[others], seed)
    firsts = retriever.embed_texts(texts.sums[texts.starts[:-1]])
    if len(others):
        retriever.best_scores = (firsts @ retriever.embed_cells(held).T).amax(dim=1).sort()[0]
    retriever.save(path)


def read_texts(
    described: pd.DataFrame, terms: pd.DataFrame, names: pd.DataFrame, reader: TextReader
) -> tuple[np.ndarray, Texts, list[str]]:
    """Return the kind of each cell, what can be said of each kind, and all wordings.

    Parameters
    ----------
    described, terms, names
        Rows of ``contracts.DESCRIPTIONS``, ``contracts.TERMS`` and ``contracts.NAMES``.
    reader
        Reads the wordings.
    """
    known, above = Terms(terms), terms.set_index(["slot", "id"])["ancestors"].to_dict()
    columns = [*(described[f"{slot}_id"] for slot in TERM_SLOTS), described["pathway_ids"].map(tuple)]
    kinds, distinct = pd.factorize(pd.Series(list(zip(*columns, strict=True)), dtype=object))
    groups = list(names.groupby(["slot", "id"], sort=False))
    place = {term: number for number, (term, _) in enumerate(groups)}
    fits = np.zeros((len(distinct), len(place)), dtype=bool)
    labels = fits.copy()
    for number, kind in enumerate(distinct):
        for slot, given in zip(SLOTS, kind, strict=True):
            for label in given if slot == PATHWAY else [given] if isinstance(given, str) else []:
                at_or_above = (label,) if slot == PATHWAY else (label, *above[slot, label])
                found = [place[slot, term] for term in at_or_above if (slot, term) in place]
                fits[number, found] = True
                labels[number, place.get((slot, label), [])] = True
    wordings, starts = [], [0]
    for (slot, term), rows in groups:
        one = {"pathways": (term,)} if slot == PATHWAY else {slot: term}
        sentence = render(Slots(**one), known).split(" Definitions. ")[0]
        plurals = [f"{name}s" for name in rows["name"] if slot == "cell_type" and name.endswith(("l", "e", "t"))]
        wordings += [sentence, *rows["name"], *plurals]
        starts.append(len(wordings))
    slots = np.array([SLOTS.index(slot) for slot, _ in place])
    return kinds, Texts(fits, labels, slots, reader.sums(wordings), np.array(starts)), wordings


def train(
    retriever: Retriever,
    texts: Texts,
    seen: Vectors,
    kinds: np.ndarray,
    held: Tensor,
    held_kinds: np.ndarray,
    seed: int,
) -> None:
    """Train a retriever in place; it ends with the weights of the best epoch.

    Parameters
    ----------
    retriever, texts
        The two towers, and what can be said of each kind of cells.
    seen, kinds
        Vectors of the training cells and of their views, and the kind of each, int64 (cells,).
    held, held_kinds
        Pooled vectors and kinds of the validation cells; with none, the last epoch is kept.
    seed
        Seed of texts, views and noise.
    """
    rng, random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    kinds_of = np.flatnonzero(texts.fits[kinds].any(axis=1))
    sample, _ = seen[rng.permutation(kinds_of)[:4096]]
    retriever.centre.copy_(sample.mean(0))
    retriever.spread.fill_((sample - retriever.centre).square().mean().sqrt().clamp(min=1e-6))
    retriever.text_centre.copy_(functional.normalize(texts.sums, dim=-1).mean(0))
    adam = torch.optim.AdamW(retriever.parameters(), lr=RATE, weight_decay=0.01)
    steps = int(np.clip(len(kinds_of) // BATCH, FEWEST_STEPS, MOST_STEPS))
    lowest, best, since = np.inf, copy.deepcopy(retriever.state_dict()), 0
    for epoch in range(EPOCHS):
        total = 0.0
        for _ in range(steps):
            rows = rng.choice(kinds_of, min(BATCH, len(kinds_of)), replace=False)
            views = np.where(rng.random(len(rows)) < VIEW_SHARE, rng.integers(max(seen.views, 1), size=len(rows)), -1)
            size = torch.where(
                torch.from_numpy(views) < 0, OWN_NOISE, OTHER_NOISE * torch.rand(len(rows), generator=random)
            )
            pooled, _ = seen.seen(rows, views if seen.views else np.full(len(rows), -1))
            loss = contrast(retriever, add_noise(pooled, size, retriever, random), *texts.draw(kinds[rows], rng))
            adam.zero_grad()
            loss.backward()
            adam.step()
            total += float(loss.detach())
        if not len(held):
            best = retriever.state_dict()
            continue
        fixed, losses = np.random.default_rng(seed), []
        with torch.no_grad():
            for rows in np.array_split(np.arange(len(held)), -(-len(held) // BATCH)):
                losses.append(float(contrast(retriever, held[rows], *texts.draw(held_kinds[rows], fixed))))
        log.info("epoch %d: loss %.3f, validation loss %.3f", epoch, total / steps, np.mean(losses))
        since += 1
        if np.mean(losses) < lowest:
            lowest, best, since = np.mean(losses), copy.deepcopy(retriever.state_dict()), 0
        if since == PATIENCE:
            break
    retriever.load_state_dict(best)
    retriever.eval().requires_grad_(False)


def contrast(retriever: Retriever, pooled: Tensor, sums: Tensor, fits: Tensor, counted: Tensor) -> Tensor:
    """Return the mean of the cross-entropies from text to cell and from cell to text.

    Parameters
    ----------
    retriever
        The two towers.
    pooled
        Vectors of the cells, float32 (cells, dimensions).
    sums, fits, counted
        As :meth:`Texts.draw` returns them. Pairs that do not count are neither matches nor others.
    """
    scores = retriever.embed_texts(sums) @ retriever.embed_cells(pooled).T / TEMPERATURE
    scores, fits = scores.masked_fill(~counted, -1e4), fits.float()
    losses = [
        functional.cross_entropy(one, match / match.sum(1, keepdim=True))
        for one, match in ((scores, fits), (scores.T, fits.T))
    ]
    return sum(losses) / 2
