"""Alignment: a cell's soft tokens are drawn to the language model's own embeddings of its labels' names.

Done before fine-tuning, with the projector alone and without a forward pass of the language model, it takes
seconds and puts each cell where the language model already knows the words for it.
"""

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

TEMPERATURE = 0.05


class LabelTargets:
    """The names of a slot's labels as one direction each in the space of token embeddings.

    Parameters
    ----------
    directions
        Unit vectors, float32 (labels, width).
    """

    def __init__(self, directions: Tensor):
        self.directions = directions

    @classmethod
    def of(cls, names: list[str], tokenizer: PreTrainedTokenizerBase, embeddings: Tensor) -> "LabelTargets":
        """Average the token embeddings of each name.

        Parameters
        ----------
        names
            Of the labels, in the order of their class numbers.
        tokenizer, embeddings
            Of the language model; embeddings (vocabulary, width).
        """
        # With the space before it that a name has within a sentence.
        ids = [tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in names]
        means = torch.stack([embeddings[torch.tensor(i, device=embeddings.device)].float().mean(0) for i in ids])
        return cls(functional.normalize(means, dim=-1))

    def scores(self, soft: Tensor, there: Tensor) -> Tensor:
        """Return the cosine of each cell's mean soft token with each label, over the temperature.

        Parameters
        ----------
        soft, there
            As a projector gives them.

        Returns
        -------
        Tensor
            float32 (cells, labels).
        """
        mean = soft.sum(1) / there.sum(1, keepdim=True)
        return functional.normalize(mean, dim=-1) @ self.directions.T / TEMPERATURE

    def loss(self, soft: Tensor, there: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of the labels; cells with label -1 do not count.

        Parameters
        ----------
        soft, there
            As a projector gives them.
        labels
            Class numbers, int64 (cells,).
        """
        if not bool((labels >= 0).any()):
            return soft.sum() * 0
        return functional.cross_entropy(self.scores(soft, there), labels, ignore_index=-1)
