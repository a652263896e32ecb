"""A BERT of Geneformer's shape, trained from scratch on the user's own cells by masked gene modelling.

Every random choice is drawn from the seed and the number of the step, so a run that was killed resumes from
its last checkpoint through the same batches to the same weights.
"""

import logging
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from cell2text.contracts import HISTORY
from cell2text.device import pick_device, pick_precision
from cell2text.embedding.encoders.masked_genes import Cells, Training
from cell2text.embedding.encoders.ranked_bert import RankedBert, Special, check_layer
from cell2text.embedding.ranked_cells import RankedSplit
from cell2text.provenance import hash_config, hash_file, library_version, versions
from cell2text.settings import EncoderSettings

log = logging.getLogger("cell2text.encoders")

SIZES = {
    name: {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": positions,
    }
    for name, layers, hidden, heads, intermediate, positions in (
        ("tiny", 2, 64, 2, 256, 256),
        ("small", 4, 128, 4, 256, 512),
        ("v1-10m", 6, 256, 4, 512, 2048),
        ("v2-104m", 12, 768, 12, 3072, 4096),
    )
}


class Pretrained(RankedBert):
    """A model of Geneformer's shape that was trained only on the user's training cells.

    Parameters
    ----------
    bert, special, layer
        See :class:`RankedBert`.
    history
        Rows of ``contracts.HISTORY``, if this process trained the model.
    """

    kind = "pretrain"

    def __init__(self, bert: BertModel, special: Special, layer: int, history: list[dict] | None = None):
        super().__init__(bert, special, layer)
        self.history = history

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
    ) -> "Pretrained":
        """Train on the training cells and keep the epoch that predicts masked genes of the validation cells best.

        Parameters
        ----------
        train, validation
            Cells to train on, and to select the epoch. Their genes are held in memory, up to the model's input length.
        settings
            ``size`` in ``SIZES``, ``epochs``, ``batch_cells``, the maximum ``learning_rate``, and the ``layer`` whose
            output is used.
        seed
            Seed of weights, batches, masked genes and dropout.
        checkpoints
            Folder for checkpoints, from which a killed run resumes.
        fetched, programmes
            Not used.

        Raises
        ------
        InputError
            If the model has no such layer, or the loss is not finite.
        """
        special = Special(pad=train.genes, mask=train.genes + 1, cls=train.genes + 2, eos=train.genes + 3)
        config = shape(settings.size, special)
        check_layer(settings.layer, config.num_hidden_layers)  # before the training, not after it
        device = pick_device()
        precision = pick_precision(device)
        torch.manual_seed(seed)
        model = BertForMaskedLM(config)
        room = config.max_position_embeddings - special.around
        cells = [Cells.read(split, room) for split in (train, validation)]
        files = [hash_file(path) for path in (*train.files, train.corpus)]
        code = {"library": library_version("fit_encoder.py", "pretrain"), **versions("torch", "transformers")}
        fingerprint = hash_config({"settings": asdict(settings), "seed": seed, "files": files, "code": code})
        training = Training(model, special, *cells, settings, seed, checkpoints, fingerprint, device, precision)
        log.info(
            "%d training and %d validation cells, %.1f million weights, on %s, in %s",
            *map(len, cells),
            model.num_parameters() / 1e6,
            device,
            precision,
        )
        training.resume()
        state = training.run()
        return cls(model.bert, special, settings.layer, state.history)

    def save(self, directory: Path) -> None:
        """Write the model, and the history of its training as ``history.parquet`` (``contracts.HISTORY``)."""
        super().save(directory)
        if self.history:
            HISTORY.write(pd.DataFrame(self.history), directory / "history.parquet")


def shape(size: str, special: Special) -> BertConfig:
    """Return the configuration of a size in ``SIZES``; the rest is as in Geneformer."""
    return BertConfig(
        **SIZES[size],
        vocab_size=special.pad + 4,
        pad_token_id=special.pad,
        hidden_act="relu",
        hidden_dropout_prob=0.02,
        attention_probs_dropout_prob=0.02,
        layer_norm_eps=1e-12,
        initializer_range=0.02,
        attn_implementation="sdpa",
    )
