"""Whether the genes listed as evidence matter: what their removal does to the call, compared with other genes.

    python tests/benchmarks/deletion.py --results results/pbmc68k-42 \\
        --language-model resources/models/smollm2-135m-instruct [--cells 500] [--seed 0] [--kept 0.5 0] [--text]

Cells are drawn from all datasets of a finished run, or from those named. Each is called what the projector finds most
probable. The genes listed for the call are removed: their counts become zero and the counts of the cell fewer, so the
shares of its other genes grow. For comparison, as many other expressed genes are removed: for each listed gene, the one
nearest in rank. Printed is the share of cells whose call loses more log-probability by the first than by the second,
with its exact binomial 95% interval, and the mean drop of the probability by each. Chance is half of the cells.

``--kept`` compares starts of the path of pooled vectors: 0 is a cell without counts. ``--text`` also scores the names
with the language model, which takes minutes for a hundred cells on one core.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binomtest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "workflow/scripts"))
from cell2text.annotation import evidence  # noqa: E402
from cell2text.contracts import TERMS, TOKENS  # noqa: E402
from cell2text.embedding.encoders import load_encoder  # noqa: E402
from cell2text.embedding.ranked_cells import SCALE, RankedCells, read_measured  # noqa: E402
from cell2text.embedding.vectors import InMemoryVectors  # noqa: E402
from cell2text.generation.score_candidates import Scorer, score_by_projector  # noqa: E402
from cell2text.model.alignment import LabelTargets, order_slots  # noqa: E402
from cell2text.model.bundle import load_projector  # noqa: E402

MOST = 10  # genes to list
TOP_K = 64  # default of encoder.top_k
BATCH = 64


def remove(cells, removed):
    """Return the cells without some of their genes, bool (total genes,).

    The order of the other genes stays: all their counts are divided by the same smaller total.
    """
    cell = cells.cell
    share = np.expm1(cells.expression.astype(float)) / SCALE
    left = 1 - np.bincount(cell, share * removed, minlength=len(cells))
    kept = ~removed
    return replace(
        cells,
        tokens=cells.tokens[kept],
        expression=np.log1p(share / left[cell] * SCALE).astype(np.float32)[kept],
        offsets=np.concatenate([[0], np.cumsum(np.bincount(cell[kept], minlength=len(cells)))]),
        n_counts=cells.n_counts * left,
    )


def list_genes(cells, found):
    """Return which genes of the cells are listed for their calls, bool (total genes,)."""
    runs = zip(cells.offsets[:-1], cells.offsets[1:], found, strict=True)
    return np.concatenate([np.isin(cells.tokens[first:last], one.for_genes) for first, last, one in runs])


def draw_others(cells, listed, random):
    """Return as many other genes of each cell: for each listed one the nearest in rank, ties drawn."""
    others = np.zeros_like(listed)
    for first, last in zip(cells.offsets[:-1], cells.offsets[1:], strict=True):
        rank = np.arange(last - first)
        for place in random.permutation(np.flatnonzero(listed[first:last])):
            distance = np.abs(rank - place) + random.random(len(rank)) / 2
            distance[listed[first:last] | others[first:last]] = np.inf
            others[first + distance.argmin()] = True
    return others


def draw_cells(path, measured, count, random):
    """Return some cells of a dataset that express at least twice as many genes as are listed."""
    cells = RankedCells.of(TOKENS.read_arrow(path), measured)
    return cells.take(np.sort(random.permutation(np.flatnonzero(cells.lengths >= 2 * MOST))[:count]))


class Calls:
    """Log-probabilities of the cell types by a run's projector and, if wanted, by its language model."""

    def __init__(self, results, language_model, text):
        self.encoder = load_encoder(results / "encoder")
        terms = str(results / "corpus/terms.parquet")
        self.scorer = Scorer(str(results / "model"), language_model, terms) if text else None
        self.model = load_projector(results / "model", language_model)
        labels = order_slots(self.model.about["labels"])
        self.targets = LabelTargets.of_model(labels, TERMS.read(terms), self.model)

    def embed(self, cells):
        """Return the input of the projector."""
        tensors = self.encoder.embed(cells, TOP_K)
        vectors, lengths = (torch.from_numpy(tensors[name]) for name in (self.model.projector.reads, "lengths"))
        return InMemoryVectors(vectors.float()[:, None], lengths.long()[:, None])

    def name(self, cells):
        """Return the index of the cell type that the projector finds most probable, int64 (cells,)."""
        return self._by_projector(self.embed(cells)).argmax(axis=1)

    def score(self, cells):
        """Return log-probabilities, float32 (cells, labels), by scorer."""
        vectors = self.embed(cells)
        if self.scorer:
            scores = self.scorer.score(vectors, BATCH)
            return {"projector": scores["projector_cell_type"], "language model": scores["cell_type"]}
        return {"projector": self._by_projector(vectors)}

    def _by_projector(self, vectors):
        return score_by_projector(self.model, self.targets, vectors, np.arange(len(vectors)), BATCH)[0].numpy()


def compare(calls, cells, random):
    """Return the log-probability of each call by scorer: whole cells, without the listed genes, without others.

    The arrays are float32 (3, cells).
    """
    named = calls.name(cells)
    found = evidence.explain_cells(calls.model, calls.targets, calls.encoder, cells, named, MOST, TOP_K)
    listed = list_genes(cells, found)
    variants = [cells, remove(cells, listed), remove(cells, draw_others(cells, listed, random))]
    scores = [calls.score(variant) for variant in variants]
    rows = np.arange(len(cells))
    return {name: np.stack([score[name][rows, named] for score in scores]) for name in scores[0]}


def report(title, scores):
    """Print one line."""
    whole, listed, others = scores
    worse, count = int((listed < others).sum()), len(whole)
    low, high = binomtest(worse, count).proportion_ci(method="exact")
    drops = [float((np.exp(whole) - np.exp(part)).mean()) for part in (listed, others)]
    print(
        f"{title}: {worse} of {count} cells, {worse / count:.3f} [{low:.3f}, {high:.3f}]; the mean probability of the "
        f"call, {np.exp(whole).mean():.3f}, drops by {drops[0]:.3f} without the listed genes and by {drops[1]:.3f} "
        f"without others",
        flush=True,
    )


def main():
    """Print one line per dataset, start of the path and scorer, and one over all datasets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--language-model", required=True)
    parser.add_argument("--datasets", nargs="*", help="by default, all of the run")
    parser.add_argument("--cells", type=int, default=500, help="over all datasets, evenly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kept", type=float, nargs="+", default=[evidence.KEPT])
    parser.add_argument("--text", action="store_true", help="score with the language model, too")
    options = parser.parse_args()
    files = sorted(options.results.glob("tokens/*.parquet"))
    files = [path for path in files if not options.datasets or path.stem in options.datasets]
    measured = read_measured(options.results / "genes.parquet", files)
    calls = Calls(options.results, options.language_model, options.text)
    for kept in options.kept:
        evidence.KEPT = kept
        parts = []
        for path, own in zip(files, measured, strict=True):
            random = np.random.default_rng([options.seed, *path.stem.encode()])  # the same cells from any start
            cells = draw_cells(path, own, -(-options.cells // len(files)), random)
            if len(cells):
                parts.append(compare(calls, cells, random))
                for name, scores in parts[-1].items() if len(files) > 1 else ():
                    report(f"{path.stem}, path from {kept:g}, {name}", scores)
        for name in parts[0]:
            report(f"path from {kept:g}, {name}", np.concatenate([part[name] for part in parts], axis=1))


if __name__ == "__main__":
    main()
