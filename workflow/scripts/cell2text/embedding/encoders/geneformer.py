"""Geneformer as published (Theodoris et al., Nature 2023; Chen et al., 2024): an official checkpoint, frozen."""

import os
import shutil
from pathlib import Path
from typing import Any

from cell2text.embedding.encoders.ranked_bert import RankedBert
from cell2text.embedding.ranked_cells import RankedSplit
from cell2text.files import write_json


class Geneformer(RankedBert):
    """An official checkpoint as ``model_sources.fetch_encoder`` laid it down."""

    kind = "geneformer"
    directory: Path

    @classmethod
    def fit(
        cls, train: RankedSplit, validation: RankedSplit, settings: dict[str, Any], seed: int, checkpoints: Path
    ) -> "Geneformer":
        """Take the checkpoint as it is.

        Parameters
        ----------
        train, validation, seed, checkpoints
            Not needed.
        settings
            ``directory`` of the checkpoint, and the ``layer`` whose output is taken.
        """
        encoder = cls.load(Path(settings["directory"]), layer=settings["layer"])
        encoder.directory = Path(settings["directory"])
        return encoder

    def save(self, directory: Path) -> None:
        """Link the checkpoint, which takes up to a gigabyte, and write which layer is taken."""
        for name in ("config.json", "model.safetensors"):
            (directory / name).unlink(missing_ok=True)
            (directory / name).symlink_to(os.path.relpath(self.directory / name, directory))
        shutil.copyfile(self.directory / "source.json", directory / "source.json")
        write_json(self._about(), directory / "encoder.json")
