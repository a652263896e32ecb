"""BERT over ranked genes, frozen: Geneformer's way from a cell to vectors (Theodoris et al., Nature 2023)."""

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
from cell2text.embedding.ranked_cells import RankedCells
from cell2text.errors import InputError
from cell2text.files import read_json, write_json
from cell2text.progress import Progress

log = logging.getLogger("cell2text.encoders")

CPU_TOKENS = 2048  # of a batch: more do not stay in the caches
GPU_TOKENS = 1 << 18  # of a batch at most: a GPU is no faster with more


@dataclass(frozen=True)
class Special:
    """Tokens that are no genes; those that a model does not know are None.

    Parameters
    ----------
    pad, mask, cls, eos
        Behind short cells, in the place of a gene to guess, before the first gene, behind the last.
    """

    pad: int
    mask: int
    cls: int | None = None
    eos: int | None = None

    @property
    def around(self) -> int:
        """How many stand around a cell's genes."""
        return (self.cls is not None) + (self.eos is not None)


class RankedBert:
    """A frozen BERT that reads a cell's genes in the order of their ranks.

    Parameters
    ----------
    bert
        With all its layers; those behind ``layer`` are dropped.
    special
        Its special tokens.
    layer
        Whose output is taken, counted from the end as in a list: -1 is the last layer, -2 the one before it.

    Attributes
    ----------
    budget
        Tokens of a batch. On a GPU found from its free memory, and halved when that proves too small.
    """

    kind: ClassVar[str]

    def __init__(self, bert: BertModel, special: Special, layer: int):
        self.special, self.layer, self.dimensions = special, layer, bert.config.hidden_size
        self.room = bert.config.max_position_embeddings - special.around
        layers = bert.encoder.layer
        if not -len(layers) <= layer <= -1:
            raise InputError("config: encoder.layer", f"{layer} of {len(layers)} layers", "Count from -1, the last one")
        bert.encoder.layer = layers[: len(layers) + layer + 1]
        bert.config.num_hidden_layers = len(bert.encoder.layer)
        self.bert = bert.eval().requires_grad_(requires_grad=False)
        self.device = bert.device
        self.budget = _find_budget(bert)

    def embed(self, cells: RankedCells, top_k: int, progress: Progress | None = None) -> dict[str, np.ndarray]:
        """Return gene vectors of the ``top_k`` highest ranked genes and the mean over all genes that were read.

        Cells are read in batches of like lengths, so that little is padded. What a cell holds beyond the model's
        longest input is left out, as Geneformer does.

        Returns
        -------
        dict
            ``gene_vectors`` float16 (cells, top_k, dimensions), zeros behind short cells; ``lengths`` int32 (cells,);
            ``pooled`` float32 (cells, dimensions); and ``cls`` alike, where the model has that token.
        """
        known = np.minimum(cells.lengths, self.room)
        tensors = {
            "gene_vectors": np.zeros((len(cells), top_k, self.dimensions), dtype=np.float16),
            "lengths": np.minimum(known, top_k).astype(np.int32),
            "pooled": np.zeros((len(cells), self.dimensions), dtype=np.float32),
        }
        if self.special.cls is not None:
            tensors["cls"] = np.zeros_like(tensors["pooled"])
        for rows, vectors in self._read(cells, np.argsort(-known, kind="stable"), known, top_k):
            kept = vectors["gene_vectors"]
            tensors["gene_vectors"][rows, : kept.shape[1]] = kept.half().cpu().numpy()
            for name in tensors.keys() & {"pooled", "cls"}:
                tensors[name][rows] = vectors[name].cpu().numpy()
            if progress:
                progress.advance(len(rows), f"{self.bert.dtype}, {self.budget} tokens a batch")
        return tensors

    def _read(
        self, cells: RankedCells, order: np.ndarray, known: np.ndarray, top_k: int
    ) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        start = 0
        while start < len(order):
            longest = int(known[order[start]]) + self.special.around
            if not longest:
                return  # without a gene there is nothing to read
            rows = order[start : start + max(1, self.budget // longest)]
            try:
                vectors = self._vectors(*self._inputs(cells, rows, known[rows]), top_k)
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
                torch.cuda.empty_cache()
                self.budget //= 2
                log.info("the GPU's memory is too small: batches of %d tokens from here on", self.budget)
                continue
            yield rows, vectors
            start += len(rows)

    def _inputs(self, cells: RankedCells, rows: np.ndarray, known: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return input ids, int64 (cells, tokens), and the number of genes of each cell."""
        before = int(self.special.cls is not None)
        ids = np.full((len(rows), known.max(initial=0) + self.special.around), self.special.pad, dtype=np.int64)
        there = np.arange(known.max(initial=0)) < known[:, None]
        genes = cells.offsets[rows][:, None] + np.arange(there.shape[1])
        ids[:, before : before + there.shape[1]][there] = cells.tokens[genes[there]]
        if before:
            ids[:, 0] = self.special.cls
        if self.special.eos is not None:
            ids[np.arange(len(rows)), before + known] = self.special.eos
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(known).to(self.device)

    @torch.inference_mode()
    def _vectors(self, ids: Tensor, known: Tensor, top_k: int) -> dict[str, Tensor]:
        before, places = int(self.special.cls is not None), torch.arange(ids.shape[1], device=self.device)
        attended = places < known[:, None] + self.special.around
        # without padding there is nothing to mask, and attention is faster without one
        mask = None if bool(attended.all()) else attended.long()
        states = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        genes = ((places >= before) & (places < known[:, None] + before))[..., None]
        total = (states * genes).sum(1, dtype=torch.float32)
        kept = slice(before, before + top_k)
        vectors = {
            "gene_vectors": states[:, kept] * genes[:, kept],
            "pooled": total / known.clamp(min=1)[:, None],
        }
        return vectors | ({"cls": states[:, 0].float()} if before else {})

    def save(self, directory: Path) -> None:
        """Write the model and what must be known to use it."""
        self.bert.save_pretrained(directory)
        write_json(self._about() | {"layer": -1}, directory / "encoder.json")  # the layers behind it are gone

    def _about(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "layer": self.layer,
            "special": asdict(self.special),
            "dimensions": self.dimensions,
        }

    @classmethod
    def load(cls, directory: Path, precision: torch.dtype | None = None, layer: int | None = None) -> "RankedBert":
        """Read what :meth:`save` wrote, or an official checkpoint that ``model_sources`` laid down.

        Parameters
        ----------
        directory
            Holds ``config.json``, ``model.safetensors`` and ``encoder.json``.
        precision
            bfloat16 where the device has it, by default.
        layer
            In the place of the one that ``encoder.json`` names.

        Raises
        ------
        InputError
            If weights are missing.
        """
        about, device = read_json(directory / "encoder.json"), pick_device()
        bert, loading = BertModel.from_pretrained(
            directory,
            add_pooling_layer=False,
            attn_implementation="sdpa",
            dtype=precision or pick_precision(device),
            use_safetensors=True,
            output_loading_info=True,
        )
        if loading["missing_keys"]:
            some = sorted(loading["missing_keys"])[0]
            raise InputError(directory, f"weights are missing, such as {some}", "Fetch the checkpoint again")
        return cls(bert.to(device), Special(**about["special"]), about["layer"] if layer is None else layer)


def _find_budget(bert: BertModel) -> int:
    """Return how many tokens a batch may hold."""
    if bert.device.type != "cuda":
        return CPU_TOKENS
    free, _ = torch.cuda.mem_get_info(bert.device)
    # queries, keys, values, states before and after, and what the feed-forward layer widens a token to
    a_token = bert.dtype.itemsize * (8 * bert.config.hidden_size + 2 * bert.config.intermediate_size)
    return max(1, min(GPU_TOKENS, free // 2 // a_token))
