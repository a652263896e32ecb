"""Cells embedded per second, compared with a loop over padded batches in file order.

    python tests/benchmarks/embed_genes.py [--shape v1-10m] [--cells N] [--tokens parquet ...] [--rounds N]

The loop does the same as the usual extractor of embeddings: batches of ten cells in file order, padded to the longest
cell, float32, all layers. The weights are random, which does not affect the speed. Cells come from files of ranked
genes (``contracts.TOKENS``); without files, from the studies next to the project, ranked with Geneformer's
dictionaries, or else they have random genes. On a GPU, the share of the measured peak rate of bfloat16 matrix products
is reported, too.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "workflow/scripts"), str(ROOT / "tests")]
from cell2text.contracts import TOKENS  # noqa: E402
from cell2text.device import pick_device, pick_precision  # noqa: E402
from cell2text.embedding.encoders.ranked_bert import RankedBert, Special  # noqa: E402
from cell2text.embedding.ranked_cells import RankedCells  # noqa: E402
from ranked_files import ranked_cells  # noqa: E402

DATA = ROOT.parent / "shared/data"
SHAPES = {  # layers, hidden, heads, intermediate, positions, tokens
    "v1-10m": (6, 256, 4, 512, 2048, 25_426),
    "v2-104m": (12, 768, 12, 3072, 4096, 20_275),
    "v2-316m": (18, 1152, 18, 4608, 4096, 20_275),
}
BATCH = 10


def build(shape, dtype, device):
    """Return a BERT of the given shape with random weights."""
    layers, hidden, heads, intermediate, positions, tokens = SHAPES[shape]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokens,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        hidden_act="relu",
        max_position_embeddings=positions,
    )
    return BertModel(config, add_pooling_layer=False).to(device, dtype).eval()


def rank_studies(cells, vocabulary):
    """Return equal numbers of cells from the eight studies, ranked with the real dictionaries."""
    import anndata as ad
    import pandas as pd
    from scipy import sparse

    from cell2text.embedding.rank_genes import rank_counts
    from cell2text.models.gene_dictionaries import find_dictionaries

    genes = find_dictionaries(DATA / "geneformer", vocabulary).table().set_index("gene_id")
    median = np.full(vocabulary, np.nan)
    median[genes["token"]] = genes["median"]
    rng, parts = np.random.default_rng(0), []
    studies = sorted((DATA / "studies").glob("*.h5ad"))
    for path in studies:
        whole = ad.read_h5ad(path)
        rows = rng.choice(whole.n_obs, -(-cells // len(studies)), replace=whole.n_obs < cells // len(studies))
        token = genes["token"].reindex(whole.var_names).fillna(-1).to_numpy(dtype=np.int32)
        tokens, _, ends = rank_counts(sparse.csr_matrix(whole.X[rows], dtype=np.float32), token, median)
        parts.append(pd.Series(np.split(tokens, ends[:-1])))
    lists = pd.concat(parts, ignore_index=True)
    return cells_of(lists[:cells], vocabulary)


def draw_cells(cells, positions, vocabulary):
    """Return cells with random genes; genes per cell as in an atlas: log-normal with median 1,800."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(1800), 0.6, cells).astype(int), 50, 2 * positions)
    return cells_of([rng.integers(4, vocabulary, length, dtype=np.int32) for length in lengths], vocabulary)


def cells_of(lists, vocabulary):
    """Return cells with the given tokens; a neural encoder does not read their expression."""
    return ranked_cells(lists, [np.zeros(len(tokens)) for tokens in lists], vocabulary)


@torch.inference_mode()
def embed_by_loop(model, cells, room):
    """Embed batches of ten cells in file order, padded to the longest cell."""
    pooled = []
    for start in range(0, len(cells), BATCH):
        lists = [
            cells.tokens[cells.offsets[i] :][: min(cells.lengths[i], room)]
            for i in range(start, min(start + BATCH, len(cells)))
        ]
        longest = max(map(len, lists))
        ids = torch.tensor(np.array([np.pad(tokens, (0, longest - len(tokens))) for tokens in lists]), dtype=torch.long)
        mask = (torch.arange(longest) < torch.tensor([len(tokens) for tokens in lists])[:, None]).long()
        states = model(ids.to(model.device), mask.to(model.device), output_hidden_states=True).hidden_states[-2]
        weight = mask.to(model.device)[..., None].float()
        pooled.append(((states * weight).sum(1) / weight.sum(1)).float().cpu().numpy())
    return np.concatenate(pooled)


def matrix_rate(device):
    """Return the measured rate of bfloat16 matrix products, in floating point operations per second."""
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * size**3 / (time.perf_counter() - start)


def work(cells, shape, layers):
    """Return the number of floating point operations in matrix products and attention, without padding."""
    _, hidden, _, intermediate, positions, _ = SHAPES[shape]
    length = np.minimum(cells.lengths, positions).astype(float)
    return layers * (2 * length * (4 * hidden**2 + 2 * hidden * intermediate) + 4 * length**2 * hidden).sum()


def seconds(function, *arguments):
    """Return the run time of a call and its result."""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def main():
    """Time both methods and print their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="v1-10m")
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--tokens", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--budget", type=int, help="tokens per batch; by default derived from the free memory")
    options = parser.parse_args()
    device = pick_device()
    positions, vocabulary = SHAPES[options.shape][-2:]
    if options.tokens:
        every = np.ones(vocabulary, dtype=bool)
        cells = RankedCells.of(TOKENS.read_arrow(options.tokens[0]).slice(0, options.cells), every)
    elif (DATA / "studies").is_dir() and options.shape == "v1-10m":
        cells = rank_studies(options.cells, vocabulary)
    else:
        cells = draw_cells(options.cells, positions, vocabulary)
    precision = pick_precision(device)
    encoder = RankedBert(build(options.shape, precision, device), Special(0, 1), -2)
    encoder.budget = options.budget or encoder.budget
    plain = build(options.shape, torch.float32, device)
    read = np.minimum(cells.lengths, positions)
    print(
        f"{len(cells)} cells with {read.mean():.0f} genes on average, {options.shape}, {device}, "
        f"{torch.get_num_threads()} threads"
    )
    few = cells.take(np.arange(min(len(cells), 2 * BATCH)))
    encoder.embed(few, 64), embed_by_loop(plain, few, positions)
    times = []
    for _ in range(options.rounds):
        ours, tensors = seconds(encoder.embed, cells, 64)
        loop, expected = seconds(embed_by_loop, plain, cells, positions)
        times.append((ours, loop))
        print(f"ours {ours:.1f} s, loop {loop:.1f} s", flush=True)
    ours, loop = np.median(times, axis=0)
    difference = np.abs(tensors["pooled"] - expected).max() / np.abs(expected).max()
    print(
        f"ours {len(cells) / ours:.1f} cells/s ({precision}, {encoder.budget} tokens per batch), "
        f"loop {len(cells) / loop:.1f} cells/s (float32): {loop / ours:.2f} times as fast; "
        f"pooled vectors differ by up to {difference:.1%} of the largest value"
    )
    if device.type == "cuda":
        rate = work(cells, options.shape, SHAPES[options.shape][0] - 1) / ours
        peak = matrix_rate(device)
        print(f"{rate / 1e12:.0f} of {peak / 1e12:.0f} TFLOP/s: {rate / peak:.0%}; "
              f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")  # fmt: skip


if __name__ == "__main__":
    main()
