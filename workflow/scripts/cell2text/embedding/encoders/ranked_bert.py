"""A frozen BERT over ranked genes, as in Geneformer (Theodoris et al., Nature 2023)."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import BertModel

from cell2text.device import pick_device, pick_precision
from cell2text.embedding.ranked_cells import RankedCells, count_read
from cell2text.errors import InputError
from cell2text.files import read_json, reading, write_json
from cell2text.progress import Progress
from cell2text.weights import check_finite

log = logging.getLogger("cell2text.encoders")

CPU_TOKENS = 2048  # per batch; larger batches do not fit in the caches
GPU_TOKENS = 1 << 18  # maximum per batch; larger batches are no faster on a GPU


@dataclass(frozen=True)
class Special:
    """Special tokens; None for those that a model does not have.

    Parameters
    ----------
    pad, mask, cls, eos
        Padding of short cells, replacement of masked genes, token before the first gene, token after the last gene.
    """

    pad: int
    mask: int
    cls: int | None = None
    eos: int | None = None

    @property
    def around(self) -> int:
        """Number of special tokens around a cell's genes."""
        return (self.cls is not None) + (self.eos is not None)


class RankedBert:
    """A frozen BERT that reads a cell's genes in rank order.

    Parameters
    ----------
    bert
        The model with all layers; layers after ``layer`` are dropped.
    special
        Special tokens of the model.
    layer
        Layer whose output is used, counted from the end: -1 is the last layer, -2 the second to last.

    Attributes
    ----------
    budget
        Tokens per batch. On a GPU it is derived from the free memory, and halved if memory runs out.
    """

    kind: ClassVar[str]

    def __init__(self, bert: BertModel, special: Special, layer: int):
        self.special, self.layer = special, layer
        self.dimensions = self.pooled_dimensions = bert.config.hidden_size
        self.max_genes = bert.config.max_position_embeddings - special.around
        layers = bert.encoder.layer
        check_layer(layer, len(layers))
        bert.encoder.layer = layers[: len(layers) + layer + 1]
        bert.config.num_hidden_layers = len(bert.encoder.layer)
        self.bert = bert.eval().requires_grad_(requires_grad=False)
        self.device = bert.device
        self.budget = _find_budget(bert)

    def embed(self, cells: RankedCells, top_k: int, progress: Progress | None = None) -> dict[str, np.ndarray]:
        """Return gene vectors of the ``top_k`` highest ranked genes and the mean over all genes in the input.

        Cells are batched by length to reduce padding. Genes beyond the model's maximum input length are truncated, as
        in Geneformer.

        Returns
        -------
        dict
            ``gene_vectors`` float16 (cells, top_k, dimensions), zero-padded; ``lengths`` int32 (cells,); ``pooled``
            float32 (cells, dimensions); and ``cls``, of the same shape, if the model has that token.
        """
        lengths = np.minimum(cells.lengths, self.max_genes)
        tensors = {
            "gene_vectors": np.zeros((len(cells), top_k, self.dimensions), dtype=np.float16),
            "lengths": count_read(lengths, top_k),
            "pooled": np.zeros((len(cells), self.dimensions), dtype=np.float32),
        }
        if self.special.cls is not None:
            tensors["cls"] = np.zeros_like(tensors["pooled"])
        for rows, vectors in self._read(cells, np.argsort(-lengths, kind="stable"), lengths, top_k):
            kept = vectors["gene_vectors"]
            tensors["gene_vectors"][rows, : kept.shape[1]] = kept.half().cpu().numpy()
            for name in tensors.keys() & {"pooled", "cls"}:
                tensors[name][rows] = vectors[name].cpu().numpy()
            if progress:
                progress.advance(len(rows), f"{self.bert.dtype}, {self.budget} tokens per batch")
        return tensors

    def _read(
        self, cells: RankedCells, order: np.ndarray, lengths: np.ndarray, top_k: int
    ) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        start = 0
        while start < len(order):
            longest = int(lengths[order[start]]) + self.special.around
            if not longest:
                return  # the remaining cells have no genes
            rows = order[start : start + max(1, self.budget // longest)]
            try:
                vectors = self._vectors(*self._inputs(cells, rows, lengths[rows]), top_k)
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
                torch.cuda.empty_cache()
                self.budget //= 2
                log.info("out of GPU memory: continuing with batches of %d tokens", self.budget)
                continue
            yield rows, vectors
            start += len(rows)

    def _inputs(self, cells: RankedCells, rows: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return input ids, int64 (cells, tokens), and the number of genes of each cell, int64 (cells,)."""
        before = int(self.special.cls is not None)
        ids = np.full((len(rows), lengths.max(initial=0) + self.special.around), self.special.pad, dtype=np.int64)
        mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
        genes = cells.offsets[rows][:, None] + np.arange(mask.shape[1])
        ids[:, before : before + mask.shape[1]][mask] = cells.tokens[genes[mask]]
        if before:
            ids[:, 0] = self.special.cls
        if self.special.eos is not None:
            ids[np.arange(len(rows)), before + lengths] = self.special.eos
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(lengths).to(self.device)

    @torch.inference_mode()
    def _vectors(self, ids: Tensor, lengths: Tensor, top_k: int) -> dict[str, Tensor]:
        before, positions = int(self.special.cls is not None), torch.arange(ids.shape[1], device=self.device)
        attended = positions < lengths[:, None] + self.special.around
        # without padding no mask is needed, and attention is faster without one
        mask = None if bool(attended.all()) else attended.long()
        states = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        genes = ((positions >= before) & (positions < lengths[:, None] + before))[..., None]
        total = (states * genes).sum(1, dtype=torch.float32)
        kept = slice(before, before + top_k)
        vectors = {
            "gene_vectors": states[:, kept] * genes[:, kept],
            "pooled": total / lengths.clamp(min=1)[:, None],
        }
        return vectors | ({"cls": states[:, 0].float()} if before else {})

    def save(self, directory: Path) -> None:
        """Write the model and ``encoder.json``, which says how to use it."""
        self.bert.save_pretrained(directory)
        write_json(self._metadata() | {"layer": -1}, directory / "encoder.json")  # later layers were dropped

    def _metadata(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "layer": self.layer,
            "special": asdict(self.special),
            "dimensions": self.dimensions,
        }

    @classmethod
    def load(cls, directory: Path, precision: torch.dtype | None = None, layer: int | None = None) -> "RankedBert":
        """Load a model written by :meth:`save`, or an official checkpoint written by ``models.fetch_encoder``.

        Parameters
        ----------
        directory
            Contains ``config.json``, ``model.safetensors`` and ``encoder.json``.
        precision
            By default, bfloat16 if the device supports it at full speed, otherwise float32.
        layer
            Overrides the layer in ``encoder.json``.

        Raises
        ------
        InputError
            If a file is damaged, weights are missing, or one is not finite.
        """
        device, fix = pick_device(), f"Delete {directory} and run the workflow again"
        metadata = read_json(directory / "encoder.json", fix)
        with reading(directory / "encoder.json", fix):
            special, layer = Special(**metadata["special"]), metadata["layer"] if layer is None else layer
        with reading(directory, fix):
            bert, loading = BertModel.from_pretrained(
                directory,
                add_pooling_layer=False,
                attn_implementation="sdpa",
                dtype=precision or pick_precision(device),
                use_safetensors=True,
                output_loading_info=True,
                local_files_only=True,
            )
        if loading["missing_keys"]:
            first = sorted(loading["missing_keys"])[0]
            raise InputError(directory, f"weights are missing, such as {first}", fix)
        check_finite(bert.state_dict(), directory / "model.safetensors", fix)
        return cls(bert.to(device), special, layer)


def check_layer(layer: int, layers: int) -> None:
    """Raise an ``InputError`` if a model with so many layers has no such layer, counted from the end."""
    if not -layers <= layer <= -1:
        raise InputError(
            "config: encoder.layer",
            f"{layer} of {layers} layers does not exist",
            f"Count from the end: -1 is the last layer, {-layers} the first",
        )


def _find_budget(bert: BertModel) -> int:
    """Return the maximum number of tokens per batch."""
    if bert.device.type != "cuda":
        return CPU_TOKENS
    free, _ = torch.cuda.mem_get_info(bert.device)
    # queries, keys, values, hidden states before and after, and the feed-forward activations
    bytes_per_token = bert.dtype.itemsize * (8 * bert.config.hidden_size + 2 * bert.config.intermediate_size)
    return max(1, min(GPU_TOKENS, free // 2 // bytes_per_token))
