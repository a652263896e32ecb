"""Alignment: a cell's soft tokens are drawn to the language model's own embeddings of its labels' names.

Done before fine-tuning, with the projector alone and without a forward pass of the language model, it takes
seconds and puts each cell where the language model already knows the words for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from cell2text.model.cell2text import Cell2Text

TEMPERATURE = 0.05


class LabelTargets:
    """The names of each slot's labels as one direction each in the space of token embeddings.

    A cell has one direction, the mean of its soft tokens, and it is compared with the labels of one slot at a time:
    so it can be near the name of its cell type and near that of its tissue at once.

    Parameters
    ----------
    directions
        Unit vectors of the labels of each slot, float32 (labels, width).
    """

    def __init__(self, directions: Sequence[Tensor]):
        self.directions = list(directions)

    @classmethod
    def of(cls, names: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, embeddings: Tensor) -> LabelTargets:
        """Average the token embeddings of each name.

        Parameters
        ----------
        names
            Of the labels of each slot, in the order of their class numbers.
        tokenizer, embeddings
            Of the language model; embeddings (vocabulary, width).
        """

        def direction(name: str) -> Tensor:
            # with the space before it that a name has within a sentence
            ids = tokenizer(f" {name}", add_special_tokens=False)["input_ids"]
            return functional.normalize(embeddings[torch.tensor(ids, device=embeddings.device)].float().mean(0), dim=-1)

        return cls([torch.stack([direction(name) for name in of_slot]) for of_slot in names])

    @classmethod
    def of_labels(cls, labels: Mapping[str, Sequence[str]], terms: pd.DataFrame, model: Cell2Text) -> LabelTargets:
        """Return the targets of the labels of each slot, by id, with their names from ``contracts.TERMS``."""
        names = terms.set_index(["slot", "id"])["name"]
        embeddings = model.language_model.get_input_embeddings().weight.detach()
        return cls.of(
            [[names[slot, label] for label in ids] for slot, ids in labels.items()], model.tokenizer, embeddings
        )

    def scores(self, soft: Tensor, there: Tensor) -> list[Tensor]:
        """Return the cosine of each cell's mean soft token with each label, over the temperature.

        Parameters
        ----------
        soft, there
            As a projector gives them.

        Returns
        -------
        list of Tensor
            For each slot, float32 (cells, labels).
        """
        mean = functional.normalize(soft.sum(1) / there.sum(1, keepdim=True).clamp(min=1), dim=-1)
        return [mean @ directions.T / TEMPERATURE for directions in self.directions]

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
