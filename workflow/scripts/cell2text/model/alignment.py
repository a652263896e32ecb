"""Alignment: the projector learns to place a cell's soft tokens near the language model's embeddings of its words.

The words are the names of the cell's labels, or its whole description. Alignment runs before fine-tuning and trains
the projector alone, without a forward pass of the language model, so it takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from cell2text.confidence.back_off import TermsAbove
from cell2text.contracts import TERM_SLOTS
from cell2text.grammar import PATHWAY, Slots, Terms, render

if TYPE_CHECKING:
    from cell2text.model.cell2text import Cell2Text

TEMPERATURE = 0.05


def _mean_direction(ids: Sequence[int] | Tensor, embeddings: Tensor) -> Tensor:
    ids = torch.as_tensor(ids, device=embeddings.device)
    return functional.normalize(embeddings[ids].float().mean(0), dim=-1)


def _cell_direction(soft: Tensor, present: Tensor) -> Tensor:
    return functional.normalize(soft.sum(1) / present.sum(1, keepdim=True).clamp(min=1), dim=-1)


def _centre(directions: Tensor) -> Tensor:
    # Texts from one template point in nearly the same direction (their mean cosine is 0.92 with SmolLM2-135M).
    # Subtracting their mean leaves what distinguishes them.
    return functional.normalize(directions - directions.mean(0), dim=-1)


class LabelTargets:
    """The label names of each slot, each as one direction in the space of token embeddings.

    The last slot may be that of gene programmes, of which a cell has several.

    With ``apart``, slot i of n has soft tokens i, i + n, i + 2n, ... of its own, and their mean is compared with the
    labels of the slot. The language model then finds the cell type at one position and the tissue at another. Without
    it, or with fewer soft tokens than slots, all slots use the mean of all soft tokens.

    Parameters
    ----------
    directions
        Unit vectors of the labels of each slot, float32 (labels, width).
    apart
        Whether each slot has soft tokens of its own.
    programmes
        Whether the last slot is that of gene programmes.
    above
        For each slot, which labels the ontology places at or below each of some terms, float32 (labels, terms); see
        :func:`terms_above`. None if no slot has such terms.
    """

    def __init__(
        self,
        directions: Sequence[Tensor],
        apart: bool = False,
        programmes: bool = False,
        above: Sequence[Tensor] | None = None,
    ):
        self.directions, self.apart, self.programmes = list(directions), apart, programmes
        self.above = above or [labels.new_empty(len(labels), 0) for labels in self.directions]

    @classmethod
    def of(
        cls,
        names: Sequence[Sequence[str]],
        tokenizer: PreTrainedTokenizerBase,
        embeddings: Tensor,
        apart: bool = False,
        programmes: bool = False,
    ) -> LabelTargets:
        """Average the token embeddings of each name.

        Parameters
        ----------
        names
            Label names of each slot, in the order of their class numbers.
        tokenizer, embeddings
            Tokenizer and token embeddings of the language model; embeddings (vocabulary, width).
        apart, programmes
            See :class:`LabelTargets`.
        """

        def direction(name: str) -> Tensor:
            # with a leading space, so that the name is tokenised as within a sentence
            return _mean_direction(tokenizer(f" {name}", add_special_tokens=False)["input_ids"], embeddings)

        return cls([torch.stack([direction(name) for name in slot_names]) for slot_names in names], apart, programmes)

    @classmethod
    def of_labels(cls, labels: Mapping[str, Sequence[str]], terms: pd.DataFrame, model: Cell2Text) -> LabelTargets:
        """Return the targets for the label ids of each slot, with their names from ``contracts.TERMS``."""
        names = terms.set_index(["slot", "id"])["name"]
        embeddings = model.language_model.get_input_embeddings().weight.detach()
        by_slot = [[names[slot, label] for label in ids] for slot, ids in labels.items()]
        apart = not model.projector.tokens_are_genes
        targets = cls.of(by_slot, model.tokenizer, embeddings, apart, programmes=PATHWAY in labels)
        ancestors = terms.set_index(["slot", "id"])["ancestors"]
        targets.above = [
            terms_above(ids, [() if slot == PATHWAY else ancestors[slot, label] for label in ids]).to(embeddings.device)
            for slot, ids in labels.items()
        ]
        return targets

    @classmethod
    def of_sentences(cls, labels: Mapping[str, Sequence[str]], terms: pd.DataFrame, model: Cell2Text) -> LabelTargets:
        """Return the targets for the label ids of each slot, for a projector that is aligned to descriptions.

        The direction of a label is that of a description with this label alone, such as ``The sample is blood.``,
        minus the mean over the slot. The parameters are those of :meth:`of_labels`.
        """
        known, embeddings = Terms(terms), model.language_model.get_input_embeddings().weight.detach()
        directions = []
        for slot, ids in labels.items():
            one = [{"pathways": (label,)} if slot == PATHWAY else {slot: label} for label in ids]
            texts = [render(Slots(**slots), known) for slots in one]
            tokens = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
            directions.append(_centre(torch.stack([_mean_direction(text, embeddings) for text in tokens])))
        return cls(directions)

    @classmethod
    def of_model(cls, labels: Mapping[str, Sequence[str]], terms: pd.DataFrame, model: Cell2Text) -> LabelTargets:
        """Return the targets to compare the soft tokens of a trained projector with; see :meth:`of_labels`."""
        to_descriptions = model.about["finetune"]["align_to"] == "descriptions"
        return (cls.of_sentences if to_descriptions else cls.of_labels)(labels, terms, model)

    def scores(self, soft: Tensor, present: Tensor) -> list[Tensor]:
        """Return the cosine similarity of the mean of a slot's soft tokens to each label, divided by the temperature.

        Parameters
        ----------
        soft, present
            As the projector returns them.

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
            scores.append(_cell_direction(soft[:, own], present[:, own]) @ directions.T / TEMPERATURE)
        return scores

    def loss(self, soft: Tensor, present: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of the labels: the mean over the cells that have one, summed over the slots.

        That of the terms above a label is added with equal weight: a B cell that is taken for a plasma cell is nearer
        to the truth than one that is taken for a neuron.

        Gene programmes are drawn without replacement, the most active first (Plackett-Luce model): the second is scored
        against all but the first.

        Parameters
        ----------
        soft, present
            As the projector returns them.
        labels
            Class numbers, -1 where a cell has no label, int64 (cells, slots). The slot of gene programmes has as many
            columns as a cell may have programmes.
        """
        scores, columns = self.scores(soft, present), list(labels.T)
        slots = zip(scores[: len(scores) - self.programmes], columns, self.above, strict=False)
        losses = [_cross_entropy(*slot[:2]) + _cross_entropy_above(*slot) for slot in slots]
        if self.programmes:
            left = scores[-1]
            for programme in columns[len(losses) :]:
                losses.append(_cross_entropy(left, programme))
                taken = torch.arange(left.shape[1], device=left.device) == programme[:, None]
                left = left.masked_fill(taken, -torch.inf)
        return torch.stack(losses).sum() if losses else soft.sum() * 0


def _cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over the cells that have a label; 0 if none has."""
    total = functional.cross_entropy(scores, labels, ignore_index=-1, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


def _cross_entropy_above(scores: Tensor, labels: Tensor, above: Tensor) -> Tensor:
    """Return the mean over all terms above the labels of -log of the summed probability of the labels below a term."""
    known = labels >= 0
    probabilities, true = scores[known].softmax(-1) @ above, above[labels[known]]
    return -(true * probabilities.clamp(min=1e-9).log()).sum() / true.sum().clamp(min=1)


def terms_above(labels: Sequence[str], ancestors: Sequence[Sequence[str] | None]) -> Tensor:
    """Return which labels are at or below each term that tells labels apart.

    These are the terms with two or more of the labels at or below them, and not all. Of several terms with the same
    labels below them, one counts.

    Parameters
    ----------
    labels
        Ids of a slot.
    ancestors
        Ids of the ancestors of each label, or None.

    Returns
    -------
    Tensor
        1 or 0, float32 (labels, terms).
    """
    below = TermsAbove(labels, dict(zip(labels, ancestors, strict=True))).below
    several = (below.sum(axis=1) > 1) & (below.sum(axis=1) < len(labels))
    return torch.from_numpy(np.ascontiguousarray(np.unique(below[several], axis=0).T, dtype=np.float32))


class DescriptionTargets:
    """The distinct descriptions of the training cells, each as one direction in the space of token embeddings.

    The direction of a cell is the mean of its soft tokens. The loss is contrastive: it separates the description of a
    cell from those of the other cells in the batch, as in CLIP (Radford et al. 2021, arXiv 2103.00020).

    Parameters
    ----------
    directions
        Unit vectors of the descriptions, float32 (descriptions, width).
    """

    def __init__(self, directions: Tensor):
        self.directions = directions

    @classmethod
    def of(cls, texts: Sequence[Tensor], embeddings: Tensor) -> DescriptionTargets:
        """Average the token embeddings of each description and subtract the mean over all descriptions.

        Parameters
        ----------
        texts
            Token ids of each distinct description.
        embeddings
            Token embeddings of the language model, (vocabulary, width).
        """
        return cls(_centre(torch.stack([_mean_direction(text, embeddings) for text in texts])))

    def loss(self, soft: Tensor, present: Tensor, texts: Tensor) -> Tensor:
        """Return the mean of the cross-entropies from cell to description and from description to cell.

        Scores are cosine similarities divided by the temperature. Cells that share a description are all correct
        matches, with equal weight, so that no cell is pushed away from its own words.

        Parameters
        ----------
        soft, present
            As the projector returns them.
        texts
            Index of each cell's description, int64 (cells,).
        """
        scores = _cell_direction(soft, present) @ self.directions[texts].T / TEMPERATURE
        same = (texts[:, None] == texts).to(scores.dtype)
        matches = same / same.sum(1, keepdim=True)
        return (functional.cross_entropy(scores, matches) + functional.cross_entropy(scores.T, matches)) / 2


def order_slots(labels: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """Return the label ids of each slot in the order that assigns soft tokens to slots; JSON files sort their keys."""
    return {slot: labels[slot] for slot in (*TERM_SLOTS, PATHWAY) if slot in labels}


def number_labels(labels: Mapping[str, Sequence[str | None]], classes: Mapping[str, Sequence[str]]) -> Tensor:
    """Return the class number of each cell's label in each slot, -1 for no label; int64 (cells, slots).

    Parameters
    ----------
    labels
        Label id of each cell, for each slot of ``classes``.
    classes
        Ids of each slot, in the order of their class numbers.
    """
    numbers = []
    for slot, ids in classes.items():
        number = {label: i for i, label in enumerate(ids)}
        numbers.append([number.get(label, -1) for label in labels[slot]])
    return torch.tensor(numbers, dtype=torch.long).T.contiguous()
