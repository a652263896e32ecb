"""Cell types read through genes that no training cell shows: texts about genes, permuted texts and random vectors.

    for seed in 42 43 44; do
      .venv/bin/snakemake embeddings --cores 1 --configfile tests/config/studies_2000.yaml \\
        --config run=studies-$seed seed=$seed
    done
    .venv/bin/python tests/benchmarks/gene_text.py results/studies-{42,43,44} \\
      --gene-sets ../shared/data/gene_sets/ReactomePathways.gmt [--plot docs/gene_text.svg]

Each folder is that of a run with ranked genes and the embeddings of the default encoder. Genes are halved at random:
training cells show one half alone and test cells the other. Cell types are predicted by the five nearest neighbours
and by logistic regression on pooled vectors, "by itself" with test cells standardised by their own mean and spread, and
"as in annotate" with those of the training cells. "Within studies", a test cell has the types of its own study to
choose from and each study is standardised by itself, so that recognising the study by its gene panel is no help. On
shared genes, it is compared with the default encoder. Intervals come from resampling the test cells of each run.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "workflow/scripts"), str(ROOT / "tests")]
from cell2text.contracts import CELLS, GENE_TEXTS, GENES, TOKENS  # noqa: E402
from cell2text.embedding.describe_genes import describe_genes  # noqa: E402
from cell2text.embedding.encoders import gene_text  # noqa: E402
from cell2text.embedding.ranked_cells import SCALE, RankedCells, read_measured  # noqa: E402
from cell2text.evaluation.baselines.slots import read_pooled  # noqa: E402
from cell2text.files import whole_file  # noqa: E402
from cell2text.models.fetch_resource import TEXT_SOURCES  # noqa: E402
from mouse_names import fetch_table  # noqa: E402

METHODS = {"kNN": lambda: KNeighborsClassifier(5), "logistic": lambda: LogisticRegression(max_iter=2000)}
RESAMPLES, FEWEST_CELLS = 1000, 5
COLOURS = {
    "own text": "#0072B2",
    "permuted texts": "#D55E00",
    "random vectors": "#999999",
    "default encoder": "#009E73",
}


@dataclass(frozen=True)
class Held:
    """Cells in memory that are read like a ``RankedSplit``."""

    files: list[Path]
    parts: list[RankedCells]
    measured: np.ndarray
    corpus: str = "corpus"

    @property
    def genes(self) -> int:
        return self.measured.shape[1]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self):
        return iter(self.parts)

    def of_file(self, number: int) -> list[RankedCells]:
        """Return the cells of a study, in one part."""
        return [self.parts[number]]


def through(cells: RankedCells, shown: np.ndarray) -> RankedCells:
    """Return cells as if their study measured only the genes that are ``shown``, bool (genes,)."""
    kept, cell = shown[cells.tokens], cells.cell
    counts = np.expm1(cells.expression[kept].astype(float)) * cells.n_counts[cell[kept]] / SCALE
    total = np.bincount(cell[kept], counts, minlength=len(cells))
    lengths = np.bincount(cell[kept], minlength=len(cells))
    return replace(
        cells,
        tokens=cells.tokens[kept],
        expression=np.log1p(counts / total[cell[kept]] * SCALE).astype(np.float32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        n_counts=total,
        panels=cells.panels & shown,
    )


def first(cells: RankedCells, genes: int) -> RankedCells:
    """Return cells whose genes are all among the first, with a vocabulary of these alone."""
    return replace(cells, panels=cells.panels[:, :genes])


@dataclass(frozen=True)
class Run:
    """Cells of a finished run, with the genes first that training cells show, and their types and default vectors."""

    train: list[RankedCells]
    test: list[RankedCells]
    types: tuple[np.ndarray, np.ndarray]
    default: tuple[np.ndarray, np.ndarray]
    files: list[Path]
    half: int
    genes: int
    tables: dict[str, pd.DataFrame]


def read_run(results: Path, files: dict[str, Path], sources: dict[str, list[str]], folder: Path, seed: int) -> Run:
    """Halve the genes of a run, and describe them by each of the ``sources``."""
    genes, studies = GENES.read(results / "genes.parquet"), sorted(results.glob("tokens/*.parquet"))
    random = np.random.default_rng(seed)
    order = random.permutation(len(genes))
    token = np.argsort(order).astype(np.int32)
    half = len(genes) // 2
    GENES.write(genes.iloc[order].assign(token=np.arange(len(genes), dtype=np.int32)), folder / "genes.parquet")
    measured = read_measured(results / "genes.parquet", studies)[:, order]
    corpus = CELLS.read(results / "corpus/cells.parquet", ["cell_id", "split", "cell_type_id"]).set_index("cell_id")
    typed = corpus[corpus["cell_type_id"].notna()]
    typed = typed[typed["cell_type_id"].isin(typed.loc[typed["split"] == "train", "cell_type_id"])]
    parts, ids = {"train": [], "test": []}, {"train": [], "test": []}
    for number, path in enumerate(studies):
        cells = RankedCells.of(TOKENS.read_arrow(path), measured[number])
        cells = replace(cells, tokens=token[cells.tokens])
        for split, found in parts.items():
            rows = np.flatnonzero(np.isin(cells.cell_ids, typed.index[typed["split"] == split]))
            found.append(cells.take(rows))
            ids[split] += found[-1].cell_ids.tolist()
    tables = {}
    for name, texts in sources.items():
        describe_genes(folder / "genes.parquet", {key: files[key] for key in texts}, texts, folder / "texts.parquet")
        tables[name] = GENE_TEXTS.read(folder / "texts.parquet")
    types = tuple(typed["cell_type_id"].loc[ids[split]].to_numpy() for split in parts)
    stored = [str(path) for path in results.glob("embeddings/*/*.safetensors")]
    default = tuple(read_pooled(stored, pd.Series(ids[split])) for split in parts)
    return Run(parts["train"], parts["test"], types, default, studies, half, len(genes), tables)


def embed(run: Run, texts: pd.DataFrame, folder: Path, seed: int, disjoint: bool, random: bool) -> list[np.ndarray]:
    """Fit the encoder on training cells and return the pooled vectors of training and test cells."""
    GENE_TEXTS.write(texts, folder / "texts.parquet")
    train, test, own = run.train, run.test, run.half if disjoint else run.genes
    if disjoint:
        shown = np.arange(run.genes) < run.half
        train = [first(through(cells, shown), own) for cells in train]
        test = [through(cells, ~shown) for cells in test]
    noise = np.random.default_rng(seed).normal(size=(len(texts), gene_text.DIMENSIONS))
    noise[(texts["text"] == "").to_numpy()] = 0
    vectors = (lambda *_: noise) if random else gene_text.embed_texts
    with patch.object(gene_text, "embed_texts", vectors):
        held = Held(run.files, train, np.concatenate([cells.panels for cells in train]))
        encoder = gene_text.GeneText.fit(held, None, None, seed, None, folder / "texts.parquet")
    return [np.concatenate([encoder.embed(cells, 0)["pooled"] for cells in part]) for part in (train, test)]


def standardise(values: np.ndarray) -> np.ndarray:
    spread = values.std(axis=0)
    return (values - values.mean(axis=0)) / np.where(spread > 0, spread, 1)


def predict_within_studies(run: Run, train: np.ndarray, test: np.ndarray, make: Callable) -> np.ndarray:
    """Return cell types predicted from the training cells of the same study, each study standardised by itself."""
    studies = [np.repeat(np.arange(len(part)), [len(cells) for cells in part]) for part in (run.train, run.test)]
    predicted = np.empty(len(test), dtype=object)
    for number in np.unique(studies[1]):
        own, new = (study == number for study in studies)
        types = run.types[0][own]
        if len(set(types)) > 1 and len(types) >= FEWEST_CELLS:
            predicted[new] = make().fit(standardise(train[own]), types).predict(standardise(test[new]))
        else:
            predicted[new] = pd.Series(types).mode()[0]
    return predicted


def measure(run: Run, folder: Path, seed: int) -> list[tuple[str, str, str, np.ndarray]]:
    """Return genes, vectors, method and which test cells are right, bool (cells,)."""
    rows = []

    def score(genes: str, name: str, train: np.ndarray, test: np.ndarray) -> None:
        for method, make in METHODS.items():
            rows.append((genes, name, method, make().fit(train, run.types[0]).predict(test) == run.types[1]))

    full = list(run.tables)[-1]
    every = run.tables[full]
    order = np.random.default_rng(seed).permutation(len(every))
    permuted = every.assign(text=every["text"].to_numpy()[order])
    cases = {f"own text: {name}": (table, False) for name, table in run.tables.items()}
    cases |= {"permuted texts": (permuted, False), "random vectors": (every, True)}
    for name, (table, random) in cases.items():
        start = time.process_time()
        train, test = embed(run, table, folder, seed, True, random)
        print(f"{name}: fitted and embedded in {time.process_time() - start:.0f} s", file=sys.stderr)
        score("disjoint, by itself", name, standardise(train), standardise(test))
        score("disjoint, as in annotate", name, train, test)
        for method, make in METHODS.items():
            right = predict_within_studies(run, train, test, make) == run.types[1]
            rows.append(("disjoint, within studies", name, method, right))
        score("shared", name, *embed(run, table, folder, seed, False, random))
    score("shared", "default encoder", *run.default)
    common = pd.Series(run.types[0]).mode()[0]
    rows.append(("any", "most frequent type", "", run.types[1] == common))
    nothing = [np.zeros((len(types), 1)) for types in run.types]
    right = predict_within_studies(run, *nothing, lambda: DummyClassifier(strategy="most_frequent")) == run.types[1]
    rows.append(("any", "most frequent type of the study", "", right))
    return rows


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the mean accuracy over runs of each row, with a 95% interval from resampling the cells of each run."""
    random, found = np.random.default_rng(0), []
    for keys, group in rows.groupby(["genes", "vectors", "method"], sort=False):
        drawn = [
            right[random.integers(len(right), size=(RESAMPLES, len(right)))].mean(axis=1) for right in group["right"]
        ]
        low, high = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975])
        each = [right.mean() for right in group["right"]]
        found.append((*keys, np.mean(each), low, high, " ".join(f"{value:.3f}" for value in each)))
    return pd.DataFrame(found, columns=["genes", "vectors", "method", "accuracy", "low", "high", "runs"])


def plot(table: pd.DataFrame, path: Path) -> None:
    """Plot the accuracy of nearest neighbours on disjoint and on shared genes, as SVG."""
    last = [name for name in table["vectors"] if name.startswith("own text")][-1]
    shown = table[table["method"] == "kNN"].assign(vectors=table["vectors"].replace(last, "own text"))
    # A fixed salt and no date: the same table gives the same bytes.
    with rc_context({"svg.hashsalt": "cell2text", "font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(7.2, 2.4), layout="constrained")
        titles = {"disjoint, by itself": "Genes of no training cell", "shared": "The genes of the training cells"}
        for axis, (genes, title) in zip(figure.subplots(1, 2, sharey=True, sharex=True), titles.items(), strict=True):
            rows = shown[shown["genes"] == genes].set_index("vectors")
            for place, (name, colour) in enumerate(COLOURS.items()):
                if name in rows.index:
                    one = rows.loc[name]
                    axis.barh(place, one["accuracy"], color=colour, height=0.6)
                    axis.plot([one["low"], one["high"]], [place, place], color="#222222", linewidth=1.2)
                else:
                    axis.text(0.01, place, "cannot read them", va="center", color="#555555")
            axis.set_title(title, fontsize=9.5, color="#222222", loc="left")
            axis.set_yticks(range(len(COLOURS)), COLOURS)
            axis.set(xlabel="cell type accuracy, nearest neighbours", xlim=(0, 1))
            axis.grid(axis="x", color="#E3E3E3", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.spines[:].set_visible(False)
        figure.axes[0].invert_yaxis()
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, format="svg", metadata={"Date": None, "Title": "Texts about genes"})


def main() -> None:
    """Print a table of all scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--gene-sets", type=Path, required=True, help="GMT file of Reactome's pathways")
    parser.add_argument("--plot", type=Path, help="SVG file to write")
    given = parser.parse_args()
    files = {name: fetch_table(source, ROOT) for name, source in TEXT_SOURCES.items()} | {"r.gmt": given.gene_sets}
    sources = {
        "names": ["names"],
        "names, designations": ["names", "designations"],
        "names, designations, Reactome": ["names", "designations", "r.gmt"],
    }
    rows = []
    for seed, results in enumerate(given.results):
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(read_run(results, files, sources, Path(folder), seed), Path(folder), seed)
    table = summarise(pd.DataFrame(rows, columns=["genes", "vectors", "method", "right"]))
    print(table.to_string(index=False, float_format="{:.3f}".format))
    if given.plot:
        plot(table, given.plot)


if __name__ == "__main__":
    main()
