"""Training and validation cells as the model takes them, and their order in each epoch."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cell2text.contracts import TERM_SLOTS
from cell2text.embedding.vectors import Embeddings, Vectors
from cell2text.grammar import find_opening
from cell2text.model.alignment import number_labels
from cell2text.model.cell2text import Cell2Text


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


def balance(labels: np.ndarray) -> np.ndarray:
    """Return weights with which all labels are drawn as often; -1, for none, counts as a label.

    Examples
    --------
    >>> balance(np.array([0, 0, 1])).tolist()
    [0.5, 0.5, 1.0]
    """
    _, number, cells = np.unique(labels, return_inverse=True, return_counts=True)
    return 1 / cells[number]


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
