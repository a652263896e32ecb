"""Encoders by name: each turns a cell's ranked genes into one vector a gene and a pooled vector.

A new encoder is one module with a class like :class:`Encoder`, and one line in ``ENCODERS``.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import scipy.sparse

from cell2text.contracts import read_json
from cell2text.encoders.coexpression import Coexpression


class Encoder(Protocol):
    """What every encoder can do."""

    dimensions: int

    @classmethod
    def fit(cls, cells: scipy.sparse.csr_matrix, settings: dict, seed: int) -> "Encoder":
        """Learn from training cells, (cells, genes) of log1p of counts per 10,000."""

    def save(self, directory: Path) -> None:
        """Write what was learnt into an existing directory."""

    @classmethod
    def load(cls, directory: Path) -> "Encoder":
        """Read what :meth:`save` wrote."""

    def embed(self, ranked: pd.DataFrame, top_k: int) -> dict[str, np.ndarray]:
        """Return the tensors of ``contracts.EMBEDDINGS`` for rows of ``contracts.TOKENS``."""


ENCODERS: dict[str, type[Encoder]] = {"coexpression": Coexpression}


def load_encoder(directory: str | Path) -> Encoder:
    """Return the encoder that a directory holds."""
    kind = read_json(Path(directory) / "encoder.json")["kind"]
    return ENCODERS[kind].load(Path(directory))
