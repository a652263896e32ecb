"""Encoders by name: each turns a cell's ranked genes into one vector per gene and vectors of the whole cell.

A new encoder needs one module with a class that implements :class:`Encoder`, and one line in ``ENCODERS``.
"""

from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np

from cell2text.embedding.ranked_cells import RankedCells, RankedSplit
from cell2text.errors import InputError
from cell2text.files import read_sealed
from cell2text.progress import Progress
from cell2text.settings import EncoderSettings


class Encoder(Protocol):
    """Interface of the encoders."""

    dimensions: int  # of a gene vector
    pooled_dimensions: int  # of the pooled vector

    @classmethod
    def fit(
        cls,
        train: RankedSplit,
        validation: RankedSplit,
        settings: EncoderSettings,
        seed: int,
        checkpoints: Path,
        fetched: Path | None = None,
        programmes: np.ndarray | None = None,
    ) -> "Encoder":
        """Fit the encoder on training cells.

        Parameters
        ----------
        train, validation
            Training cells, and cells for model selection.
        settings
            The config's ``encoder`` section.
        seed
            Seed of all random choices.
        checkpoints
            Folder for checkpoints from which a killed run resumes; it need not exist.
        fetched
            Directory of the fetched encoder, or file of ``contracts.GENE_TEXTS``, if there is one.
        programmes
            The genes of each gene programme that descriptions name, bool (genes, programmes).
        """

    def save(self, directory: Path) -> None:
        """Write the encoder into an existing directory."""

    @classmethod
    def load(cls, directory: Path) -> "Encoder":
        """Load an encoder written by :meth:`save`.

        Raises
        ------
        InputError
            If a file is missing or damaged, or a value is not finite.
        """

    def embed(self, cells: RankedCells, top_k: int, progress: Progress | None = None) -> dict[str, np.ndarray]:
        """Return the tensors of ``contracts.EMBEDDINGS`` for the given cells.

        Parameters
        ----------
        cells
            Ranked genes of the cells.
        top_k
            Gene vectors per cell: those of its highest ranked genes.
        progress
            Advanced by the number of embedded cells.
        """


ENCODERS = {
    "coexpression": "coexpression.Coexpression",
    "geneformer": "geneformer.Geneformer",
    "pretrain": "pretrain.Pretrained",
    "gene_text": "gene_text.GeneText",
}


def encoder_class(kind: str) -> type[Encoder]:
    """Return the class of an encoder, importing only its module."""
    module, name = ENCODERS[kind].split(".")
    return getattr(import_module(f"cell2text.embedding.encoders.{module}"), name)


def load_encoder(directory: str | Path) -> Encoder:
    """Load the encoder from a directory.

    Raises
    ------
    InputError
        If a file is missing, has changed since it was written, or is damaged.
    """
    kind = read_sealed(directory, "encoder.json").get("kind")
    if kind not in list(ENCODERS):  # it may be anything
        raise InputError(
            Path(directory, "encoder.json"),
            f"kind is {kind}, not one of {', '.join(ENCODERS)}",
            f"Delete {directory} and run the workflow again",
        )
    return encoder_class(kind).load(Path(directory))
