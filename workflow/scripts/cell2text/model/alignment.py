"""Alignment: a cell's soft tokens are drawn to the language model's own embeddings of the words for it.

These are the names of its labels, or its whole description. Done before fine-tuning, with the projector alone and
without a forward pass of the language model, it takes seconds and puts each cell where the language model already
knows the words for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from cell2text.grammar import Slots, Terms, render, with_definition

if TYPE_CHECKING:
    from cell2text.model.cell2text import Cell2Text

TEMPERATURE = 0.05


def _mean_direction(ids: Sequence[int] | Tensor, embeddings: Tensor) -> Tensor:
    ids = torch.as_tensor(ids, device=embeddings.device)
    return functional.normalize(embeddings[ids].float().mean(0), dim=-1)


def _cell_direction(soft: Tensor, there: Tensor) -> Tensor:
    return functional.normalize(soft.sum(1) / there.sum(1, keepdim=True).clamp(min=1), dim=-1)


def _centre(directions: Tensor) -> Tensor:
    # Texts of one template point nearly the same way (their cosine is 0.92 on average with SmolLM2-135M): what tells
    # them apart is left when their mean is taken away.
    return functional.normalize(directions - directions.mean(0), dim=-1)


class LabelTargets:
    """The names of each slot's labels as one direction each in the space of token embeddings.

    A slot has soft tokens of its own, every so-manieth one, and their mean is compared with the slot's labels: so the
    language model finds the word for the cell type at one place and that for the tissue at another. Where there are
    fewer soft tokens than slots, or each stands for a gene, all slots share the mean of all.

    Parameters
    ----------
    directions
        Unit vectors of the labels of each slot, float32 (labels, width).
    apart
        Whether slots have soft tokens of their own.
    """

    def __init__(self, directions: Sequence[Tensor], apart: bool = False):
        self.directions, self.apart = list(directions), apart

    @classmethod
    def of(
        cls,
        names: Sequence[Sequence[str]],
        tokenizer: PreTrainedTokenizerBase,
        embeddings: Tensor,
        apart: bool = False,
    ) -> LabelTargets:
        """Average the token embeddings of each name.

        Parameters
        ----------
        names
            Of the labels of each slot, in the order of their class numbers.
        tokenizer, embeddings
            Of the language model; embeddings (vocabulary, width).
        apart
            Whether slots have soft tokens of their own.
        """

        def direction(name: str) -> Tensor:
            # with the space before it that a name has within a sentence
            return _mean_direction(tokenizer(f" {name}", add_special_tokens=False)["input_ids"], embeddings)

        return cls([torch.stack([direction(name) for name in of_slot]) for of_slot in names], apart)

    @classmethod
    def of_labels(cls, labels: Mapping[str, Sequence[str]], terms: pd.DataFrame, model: Cell2Text) -> LabelTargets:
        """Return the targets of the labels of each slot, by id, with their names from ``contracts.TERMS``."""
        names = terms.set_index(["slot", "id"])["name"]
        embeddings = model.language_model.get_input_embeddings().weight.detach()
        by_slot = [[names[slot, label] for label in ids] for slot, ids in labels.items()]
        return cls.of(by_slot, model.tokenizer, embeddings, apart=not model.projector.tokens_are_genes)

    @classmethod
    def of_sentences(cls, labels: Mapping[str, Sequence[str]], terms: pd.DataFrame, model: Cell2Text) -> LabelTargets:
        """Return the targets of the labels of each slot for cells that are aligned to descriptions.

        A label's direction is that of what a description says of it alone, such as ``The sample is blood.``, less
        the mean over the slot. Parameters are those of :meth:`of_labels`.
        """
        known, embeddings = Terms(terms), model.language_model.get_input_embeddings().weight.detach()
        directions = []
        for slot, ids in labels.items():
            texts = [render(with_definition(Slots(**{slot: label}), known), known) for label in ids]
            tokens = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
            directions.append(_centre(torch.stack([_mean_direction(text, embeddings) for text in tokens])))
        return cls(directions)

    def scores(self, soft: Tensor, there: Tensor) -> list[Tensor]:
        """Return the cosine of the mean of a slot's soft tokens with each of its labels, over the temperature.

        Parameters
        ----------
        soft, there
            As a projector gives them.

        Returns
        -------
        list of Tensor
            For each slot, float32 (cells, labels).
        """
        slots = len(self.directions)
        step = slots if self.apart and soft.shape[1] >= slots else 1
        scores = []
        for slot, directions in enumerate(self.directions):
            own = slice(slot % step, None, step)
            scores.append(_cell_direction(soft[:, own], there[:, own]) @ directions.T / TEMPERATURE)
        return scores

    def loss(self, soft: Tensor, there: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of the labels, the mean over the cells that have one, summed over the slots.

        Parameters
        ----------
        soft, there
            As a projector gives them.
        labels
            Class numbers, -1 where a cell has none, int64 (cells, slots).
        """
        losses = [
            functional.cross_entropy(scores, of_slot, ignore_index=-1, reduction="sum")
            / (of_slot >= 0).sum().clamp(min=1)
            for scores, of_slot in zip(self.scores(soft, there), labels.T, strict=True)
        ]
        return torch.stack(losses).sum() if losses else soft.sum() * 0


class DescriptionTargets:
    """The different descriptions of the training cells as one direction each in the space of token embeddings.

    A cell has one direction, the mean of its soft tokens, and its description is told from those of the other cells
    in the batch, as CLIP tells captions from one another (Radford et al. 2021, arXiv 2103.00020).

    Parameters
    ----------
    directions
        Unit vectors of the descriptions, float32 (descriptions, width).
    """

    def __init__(self, directions: Tensor):
        self.directions = directions

    @classmethod
    def of(cls, texts: Sequence[Tensor], embeddings: Tensor) -> DescriptionTargets:
        """Average the token embeddings of each description, less the mean over all of them.

        Parameters
        ----------
        texts
            Token ids of each different description.
        embeddings
            Of the language model's tokens, (vocabulary, width).
        """
        return cls(_centre(torch.stack([_mean_direction(text, embeddings) for text in texts])))

    def loss(self, soft: Tensor, there: Tensor, texts: Tensor) -> Tensor:
        """Return the mean of the cross-entropies from cell to description and from description to cell.

        Scores are cosines over the temperature. The descriptions of cells that share one are all right, each with
        the same share, so that no cell is pushed away from its own words.

        Parameters
        ----------
        soft, there
            As a projector gives them.
        texts
            Number of each cell's description, int64 (cells,).
        """
        scores = _cell_direction(soft, there) @ self.directions[texts].T / TEMPERATURE
        same = (texts[:, None] == texts).to(scores.dtype)
        shares = same / same.sum(1, keepdim=True)
        return (functional.cross_entropy(scores, shares) + functional.cross_entropy(scores.T, shares)) / 2


def number_labels(labels: Mapping[str, Sequence[str | None]], classes: Mapping[str, Sequence[str]]) -> Tensor:
    """Return the class number of each cell's label in each slot, -1 for none; int64 (cells, slots).

    Parameters
    ----------
    labels
        Id of each cell's label, for each slot of ``classes``.
    classes
        Ids of each slot, in the order of their class numbers.
    """
    numbers = []
    for slot, ids in classes.items():
        number = {label: i for i, label in enumerate(ids)}
        numbers.append([number.get(label, -1) for label in labels[slot]])
    return torch.tensor(numbers, dtype=torch.long).T.contiguous()
