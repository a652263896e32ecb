"""A cell tower and a text tower into one space, where the cosine says how well a cell and a text fit each other."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import Tensor, nn
from torch.nn import functional

from cell2text.files import reading, whole_file
from cell2text.model.language_model import load_language_model
from cell2text.weights import read_weights

FIX = "Delete it and run the workflow again"
HIDDEN = 512


class Retriever(nn.Module):
    """The two towers: a layer and a half for pooled vectors of cells, a linear map for texts.

    Parameters
    ----------
    pooled
        Length of a cell's pooled vector.
    width
        Length of the language model's token embeddings.
    dimensions
        Dimensions of the common space.
    """

    def __init__(self, pooled: int, width: int, dimensions: int):
        super().__init__()
        self.register_buffer("centre", torch.zeros(pooled))
        self.register_buffer("spread", torch.ones(()))
        self.register_buffer("text_centre", torch.zeros(width))
        self.register_buffer("best_scores", torch.zeros(0))
        self.cells = nn.Sequential(nn.Linear(pooled, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, dimensions))
        self.texts = nn.Linear(width, dimensions)
        self.words: frozenset[str] = frozenset()

    def embed_cells(self, pooled: Tensor) -> Tensor:
        """Return unit vectors of cells from pooled vectors, float32 (cells, dimensions)."""
        return functional.normalize(self.cells((pooled - self.centre) / self.spread), dim=-1)

    def embed_texts(self, sums: Tensor) -> Tensor:
        """Return unit vectors of texts from sums of token embeddings (:class:`TextReader`), (texts, dimensions)."""
        return functional.normalize(self.texts(functional.normalize(sums, dim=-1) - self.text_centre), dim=-1)

    def save(self, path: str | Path) -> None:
        """Write weights, and the words of the training texts, as safetensors."""
        with whole_file(path) as unfinished:
            save_file(self.state_dict(), unfinished, metadata={"words": json.dumps(sorted(self.words))})

    @classmethod
    def load(cls, path: str | Path) -> Retriever:
        """Return a retriever that :meth:`save` wrote.

        Raises
        ------
        InputError
            If the file is missing or damaged.
        """
        weights = read_weights(path, FIX)
        with reading(path, FIX), safe_open(path, framework="pt") as file:
            dimensions, width = weights["texts.weight"].shape
            found = cls(len(weights["centre"]), width, dimensions)
            found.best_scores = torch.zeros_like(weights["best_scores"])
            found.load_state_dict(weights)
            found.words = frozenset(json.loads(file.metadata()["words"]))
        return found.eval()


class TextReader:
    """Texts as sums of the language model's token embeddings, so that the sum of a text is that of its parts.

    The direction of the sum is that of the mean, to which the projector is aligned, too. Case does not matter.

    Parameters
    ----------
    language_model
        A Hugging Face directory.
    """

    def __init__(self, language_model: str | Path):
        model, self.tokenizer = load_language_model(language_model, torch.device("cpu"), "lora")
        self.embeddings = model.get_input_embeddings().weight.detach()

    def sums(self, texts: Sequence[str]) -> Tensor:
        """Return the sum of the token embeddings of each text, float32 (texts, width)."""
        # with a leading space, so that the first word is tokenised as within a sentence
        tokens = self.tokenizer([f" {text.lower()}" for text in texts], add_special_tokens=False)["input_ids"]
        return torch.stack([self.embeddings[torch.tensor(one, dtype=torch.long)].float().sum(0) for one in tokens])


def content_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without those that say nothing by themselves.

    Examples
    --------
    >>> content_words("T cells in the lung")
    ['t', 'cells', 'lung']
    """
    return [word for word in re.findall(r"\w+", text.lower()) if word not in ENGLISH_STOP_WORDS]
