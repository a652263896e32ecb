"""Geneformer as published (Theodoris et al., Nature 2023; Chen et al., 2024): a frozen official checkpoint."""

import os
import shutil
from pathlib import Path

import numpy as np

from cell2text.embedding.encoders.ranked_bert import RankedBert
from cell2text.embedding.ranked_cells import RankedSplit
from cell2text.files import read_sealed, write_json
from cell2text.settings import EncoderSettings


class Geneformer(RankedBert):
    """An official checkpoint, as written by ``models.fetch_encoder``."""

    kind = "geneformer"
    directory: Path

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
    ) -> "Geneformer":
        """Load the checkpoint without changing it.

        Parameters
        ----------
        train, validation, seed, checkpoints, programmes
            Not used.
        settings
            Only ``layer``, the layer whose output is used.
        fetched
            Directory of the checkpoint.

        Raises
        ------
        InputError
            If a file of the checkpoint has changed since it was fetched, or there is no such layer.
        """
        read_sealed(fetched, "source.json")
        encoder = cls.load(fetched, layer=settings.layer)
        encoder.directory = fetched
        return encoder

    def save(self, directory: Path) -> None:
        """Link the checkpoint, which may be over a gigabyte, and write the layer to use."""
        for name in ("config.json", "model.safetensors"):
            (directory / name).unlink(missing_ok=True)
            (directory / name).symlink_to(os.path.relpath(self.directory / name, directory))
        shutil.copyfile(self.directory / "source.json", directory / "source.json")
        write_json(self._metadata(), directory / "encoder.json")
