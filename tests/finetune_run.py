"""A fine-tuning of a tiny real model on thirty cells, and what it leaves."""

import numpy as np
import pandas as pd
import torch

from cell2text.contracts import DESCRIPTIONS, EMBEDDINGS, HISTORY, TERMS
from cell2text.embedding.vectors import Embeddings
from cell2text.files import write_json
from cell2text.finetuning import finetune as finetune_module
from cell2text.grammar import Slots, Terms, render
from cell2text.training import warm_up_then_decay
from default_settings import finetune_settings, projector_settings
from tests_terms import small_table

TYPES = ["CL:0000236", "CL:0000623", "CL:0001054"]
SETTINGS = {
    "align_steps": 30,
    "opening_epochs": 0,
    "epochs": 3,
    "patience": 3,
    "batch_cells": 4,
    "learning_rate": 0.01,
    "projector_learning_rate": 0.002,
    "lora_rank": 4,
    "lora_alpha": 8,
    "checkpoint_steps": 2,
}
PROJECTOR = {"kind": "pooled", "soft_tokens": 2, "hidden": 16}


def write_files(tmp_path, tiny_model, studies=("study",) * 30):
    """Input files of fine-tuning, with thirty cells of three well separated types."""
    random = np.random.default_rng(0)
    ids = [f"{study}|{i}" for i, study in enumerate(studies)]
    labels = [TYPES[i % 3] for i in range(30)]
    pooled = (np.eye(3, 6)[np.arange(30) % 3] * 4 + random.normal(0, 0.3, (30, 6))).astype(np.float32)
    EMBEDDINGS.write(
        {
            "pooled": pooled,
            "gene_vectors": np.zeros((30, 2, 6), dtype=np.float16),
            "lengths": np.full(30, 2, dtype=np.int32),
        },
        ids,
        tmp_path / "embeddings.safetensors",
    )
    terms = Terms(small_table())
    slots = [Slots(label, "UBERON:0000178", "PATO:0000461") for label in labels]
    DESCRIPTIONS.write(
        pd.DataFrame(
            {
                "cell_id": ids,
                "split": ["train"] * 21 + ["validation"] * 9,
                "cell_type_id": labels,
                "tissue_id": "UBERON:0000178",
                "disease_id": "PATO:0000461",
                "sex_id": None,
                "stage_id": None,
                "pathway_ids": [[]] * 30,
                "text": [render(slot, terms) for slot in slots],
            }
        ),
        tmp_path / "descriptions.parquet",
    )
    TERMS.write(small_table(), tmp_path / "terms.parquet")
    write_json({"source": "a tiny model"}, tiny_model / "source.json")
    return tmp_path


def finetune(
    files, tiny_model, name, embeddings=None, projector=PROJECTOR, processes=1, max_new_tokens=None, **changes
):
    finetune_module.finetune(
        str(tiny_model),
        str(files / "descriptions.parquet"),
        str(files / "terms.parquet"),
        embeddings or Embeddings([str(files / "embeddings.safetensors")]),
        str(files / name),
        projector=projector_settings(**projector),
        settings=finetune_settings(**SETTINGS | changes),
        seed=3,
        library="test",
        processes=processes,
        max_new_tokens=max_new_tokens,
    )
    return files / name


def weights(directory):
    return [(directory / name).read_bytes() for name in ("projector.safetensors", "adapter/adapter_model.safetensors")]


def losses(directory):
    return HISTORY.read(directory / "history.parquet").drop(columns="seconds")


def schedule(steps):
    return warm_up_then_decay(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), steps)
