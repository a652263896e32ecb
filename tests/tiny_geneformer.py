"""Tiny Geneformers in the official layout, with random weights and their own dictionaries."""

import pickle

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM

TOKENS = {"<pad>": 0, "<mask>": 1, "ENSG1": np.int16(2), "ENSG2": np.int16(3)}
MEDIANS = {"ENSG1": np.float64(2.5), "ENSG2": np.float32(0.5)}


def dump(value, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value))
    return path


def write_series(folder, tokens=TOKENS, medians=MEDIANS, names=None, mapping=None, series=""):
    dump(tokens, folder / f"token_dictionary{series}.pkl")
    dump(medians, folder / f"gene_median_dictionary{series}.pkl")
    for value, name in ((names, "gene_name_id_dict"), (mapping, "ensembl_mapping_dict")):
        if value is not None:
            dump(value, folder / f"{name}{series}.pkl")


V1 = {"pad": 0, "mask": 1, "cls": None, "eos": None}
V2 = {"pad": 0, "mask": 1, "cls": 2, "eos": 3}
GENES = 40


def tiny_bert(special, positions=20, seed=0, genes=GENES):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=genes + sum(token is not None for token in special.values()),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_act="relu",
        max_position_embeddings=positions,
        pad_token_id=0,
    )
    model = BertForMaskedLM(config)
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_(0, 0.15)  # with the default initialisation, attention would have almost no effect
    return model.eval()


def write_checkpoint(folder, special, as_bin=False, symbols=(), **options):
    """Write a folder in the layout of the official repository; return the folder and the model.

    It has one gene per symbol, or by default forty genes, the fourth of them CD3E.
    """
    options |= {"genes": len(symbols)} if symbols else {}
    model = tiny_bert(special, **options)
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    if as_bin:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder)
    own = [f"<{name}>" for name, token in special.items() if token is not None]
    genes = [f"ENSG{i:011d}" for i in range(len(symbols) or GENES)]
    names = dict(zip(symbols, genes, strict=True)) if symbols else {"CD3E": genes[3]}
    tokens = {name: np.int16(token) for token, name in enumerate(own + genes)}
    medians = {gene: np.float64(i + 1) for i, gene in enumerate(genes)}
    series = "_gc104M" if special is V2 else "_gc30M"
    write_series(folder.parent / "geneformer", tokens, medians, names=names, series=series)
    (folder.parent / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder, model
