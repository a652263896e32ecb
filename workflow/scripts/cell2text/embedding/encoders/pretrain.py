"""A BERT of Geneformer's shape, trained from scratch on the user's own cells by masked gene modelling.

Every random choice is drawn from the seed and the number of the step, so a run that was killed goes on from
its last checkpoint through the same batches to the same weights.
"""

import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator, PartialState
from transformers import BertConfig, BertForMaskedLM, BertModel

from cell2text.device import pick_device, pick_precision
from cell2text.embedding.encoders.masked_genes import Cells, Training
from cell2text.embedding.encoders.ranked_bert import RankedBert, Special
from cell2text.embedding.ranked_cells import RankedSplit
from cell2text.errors import InputError
from cell2text.files import whole_file
from cell2text.provenance import hash_config, hash_file

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
    """A model of Geneformer's shape that has read only the user's training cells.

    Parameters
    ----------
    bert, special, layer
        As :class:`RankedBert` takes them.
    history
        Of the training, where there was one in this process; see :class:`State`.
    checkpoints
        Folder to remove when the model is saved.
    """

    kind = "pretrain"

    def __init__(
        self,
        bert: BertModel,
        special: Special,
        layer: int,
        history: list[dict] | None = None,
        checkpoints: Path | None = None,
    ):
        super().__init__(bert, special, layer)
        self.history, self.checkpoints = history, checkpoints

    @classmethod
    def fit(
        cls, train: RankedSplit, validation: RankedSplit, settings: dict[str, Any], seed: int, checkpoints: Path
    ) -> "Pretrained":
        """Train on the training cells and keep the epoch that guesses genes of the validation cells best.

        Parameters
        ----------
        train, validation
            Cells to learn from, and to choose by. The genes of each that the model can read are held in memory.
        settings
            ``size`` in ``SIZES``, ``epochs``, ``batch_cells`` of all processes together, ``learning_rate`` at its
            highest, and the ``layer`` whose output is taken.
        seed
            Of weights, batches, hidden genes and dropout.
        checkpoints
            Folder for what a killed run goes on from; :meth:`save` removes it.

        Raises
        ------
        InputError
            If the model has no such layer, or the loss is not finite.
        """
        special = Special(pad=train.genes, mask=train.genes + 1, cls=train.genes + 2, eos=train.genes + 3)
        config = shape(settings["size"], special)
        layers = config.num_hidden_layers
        if not -layers <= settings["layer"] <= -1:  # told before the training, not after it
            raise InputError(
                "config: encoder.layer", f"{settings['layer']} of {layers} layers", "Count from -1, the last one"
            )
        device = pick_device()
        precision = "bf16" if pick_precision(device) == torch.bfloat16 else "no"
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
        torch.manual_seed(seed)
        model = BertForMaskedLM(config)
        room = config.max_position_embeddings - special.around
        cells = [Cells.read(split, room) for split in (train, validation)]
        files = [hash_file(path) for path in (*train.files, train.corpus)]
        fingerprint = hash_config({"settings": settings, "seed": seed, "files": files})
        training = Training(model, special, *cells, settings, seed, checkpoints, fingerprint, accelerator)
        log.info(
            "%d training and %d validation cells, %.1f million weights, on %s, precision %s, processes: %d",
            *map(len, cells),
            model.num_parameters() / 1e6,
            accelerator.device,
            "bfloat16" if precision == "bf16" else "float32",
            accelerator.num_processes,
        )
        training.take_up_checkpoint()
        state = training.run()
        return cls(model.bert, special, settings["layer"], state.history, checkpoints)

    def save(self, directory: Path) -> None:
        """Write the model, and the course of its training as ``history.tsv`` and ``loss.svg``."""
        if not PartialState().is_main_process:
            return
        super().save(directory)
        if self.history:
            history = pd.DataFrame(self.history)
            with whole_file(directory / "history.tsv") as unfinished:
                history.to_csv(unfinished, sep="\t", index=False, float_format="%.6g")
            with whole_file(directory / "loss.svg") as unfinished:
                unfinished.write_text(draw_losses(history))
        if self.checkpoints:
            shutil.rmtree(self.checkpoints, ignore_errors=True)


def shape(size: str, special: Special) -> BertConfig:
    """Return the configuration of a size in ``SIZES``; all else as in Geneformer."""
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


def draw_losses(history: pd.DataFrame) -> str:
    """Return an SVG chart of the training loss, a running mean, and of the validation loss over the steps.

    Parameters
    ----------
    history
        Rows of :class:`State`.
    """
    smooth = history["loss"].rolling(max(1, len(history) // 50), min_periods=1).mean()
    validation = history.dropna(subset="validation_loss")
    lines = [
        ("training", "#0072b2", history["step"], smooth, 2),
        ("validation", "#d55e00", validation["step"], validation["validation_loss"], 4),
    ]
    x_ticks = ticks(0, float(history["step"].max()))
    y_ticks = ticks(min(min(line[3]) for line in lines), max(max(line[3]) for line in lines))

    def across(step: float) -> float:
        return 70 + 540 * step / x_ticks[-1]

    def down(loss: float) -> float:
        return 310 - 270 * (loss - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    def parts() -> Iterator[str]:
        yield '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 370" font-family="sans-serif" font-size="12">'
        yield '<rect width="640" height="370" fill="white"/>'
        yield '<text x="340" y="22" text-anchor="middle" font-size="14">Pretraining on masked genes</text>'
        for tick in x_ticks:
            yield f'<path d="M{across(tick):.1f} 310v5" stroke="black"/>'
            yield f'<text x="{across(tick):.1f}" y="330" text-anchor="middle">{tick:.15g}</text>'
        for tick in y_ticks:
            yield f'<path d="M65 {down(tick):.1f}h545" stroke="#dddddd"/>'
            yield f'<text x="60" y="{down(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        yield '<path d="M70 40V310H610" fill="none" stroke="black"/>'
        yield '<text x="340" y="355" text-anchor="middle">Step</text>'
        yield '<text transform="translate(18 175) rotate(-90)" text-anchor="middle">Loss (nats a hidden gene)</text>'
        for place, (name, colour, steps, losses, dot) in enumerate(lines):
            points = [(across(x), down(y)) for x, y in zip(steps, losses, strict=True)]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
            if len(points) <= 100:
                yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{dot}" fill="{colour}"/>' for x, y in points)
            yield f'<text x="600" y="{56 + 18 * place}" text-anchor="end" fill="{colour}">{name}</text>'
        yield "</svg>"

    return "\n".join(parts()) + "\n"


def ticks(low: float, high: float) -> np.ndarray:
    """Return four to nine round numbers from at most ``low`` to at least ``high``, equally far apart.

    Examples
    --------
    >>> ticks(0, 80).tolist()
    [0.0, 20.0, 40.0, 60.0, 80.0]
    """
    apart = max(high - low, 1e-3) / 5
    power = 10.0 ** math.floor(math.log10(apart))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= apart)
    return np.arange(math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1) + 1) * step
