"""Encoders by name: each turns a cell's ranked genes into one vector a gene and vectors of the whole cell.

A new encoder is one module with a class like :class:`Encoder`, and one line in ``ENCODERS``.
"""

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cell2text.embedding.ranked_cells import RankedCells, RankedSplit
from cell2text.files import read_json
from cell2text.progress import Progress


class Encoder(Protocol):
    """What every encoder can do."""

    dimensions: int  # of a gene's vector

    @classmethod
    def fit(
        cls, train: RankedSplit, validation: RankedSplit, settings: dict[str, Any], seed: int, checkpoints: Path
    ) -> "Encoder":
        """Learn from training cells.

        Parameters
        ----------
        train, validation
            Cells to learn from, and to choose by.
        settings
            The config's ``encoder`` section.
        seed
            Of anything random.
        checkpoints
            Folder for what a killed run goes on from; it need not exist.
        """

    def save(self, directory: Path) -> None:
        """Write what was learnt into an existing directory."""

    @classmethod
    def load(cls, directory: Path) -> "Encoder":
        """Read what :meth:`save` wrote."""

    def embed(self, cells: RankedCells, top_k: int, progress: Progress | None = None) -> dict[str, np.ndarray]:
        """Return the tensors of ``contracts.EMBEDDINGS`` for some cells.

        Parameters
        ----------
        cells
            Their ranked genes.
        top_k
            Gene vectors to keep of a cell, those of its highest ranked genes.
        progress
            Told of the cells that are done.
        """


ENCODERS = {
    "coexpression": "coexpression.Coexpression",
    "geneformer": "geneformer.Geneformer",
    "pretrain": "pretrain.Pretrained",
}


def encoder_class(kind: str) -> type[Encoder]:
    """Return the class of an encoder; only its own module is imported."""
    module, name = ENCODERS[kind].split(".")
    return getattr(import_module(f"cell2text.embedding.encoders.{module}"), name)


def load_encoder(directory: str | Path) -> Encoder:
    """Return the encoder that a directory holds."""
    return encoder_class(read_json(Path(directory) / "encoder.json")["kind"]).load(Path(directory))
