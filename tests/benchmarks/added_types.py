"""Cell types that a few labelled cells add to a model: what is found, and what is taken for them by mistake.

    for seed in 42 43 44; do
      .venv/bin/snakemake --cores 1 --configfile tests/config/studies_2000.yaml --config run=studies-$seed seed=$seed
    done
    .venv/bin/python tests/benchmarks/added_types.py results/studies-{42,43,44} [--shots 3 5 10]

One cell type of one study at a time is unknown: the projector's scores of its name are removed. A few labelled cells of
each type of the study with enough cells, drawn five times, then add it to the model.

- known study: the test cells of the study are described. The labelled cells are training cells of the study.
- new study: the training cells of the study are described from the scores of a projector that has not seen the study.
  The encoder has seen it, without labels.
- all types unknown: the same, and no type of the study with enough cells is known.
- permuted: the same with the labels of the labelled cells permuted, which should gain nothing.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "workflow/scripts"))
from cell2text.confidence.added_types import AddedTypes  # noqa: E402
from cell2text.confidence.decisions import read_ancestors  # noqa: E402
from cell2text.confidence.novelty import Reference  # noqa: E402
from cell2text.contracts import DESCRIPTIONS, EMBEDDINGS, PREDICTIONS, SCORES, datasets_of  # noqa: E402
from cell2text.files import read_json  # noqa: E402

DRAWS, FEWEST, CONFIDENCE = 5, 8, 0.8
SCORE = "projector_cell_type"
COLUMNS = ["setting", "cells", "recall", "precision", "precision_reported", "others_taken"]
COLUMNS += ["accuracy_before", "accuracy_after"]


class Run:
    """Cells of a finished run with their types, vectors and the projector's scores."""

    def __init__(self, results: Path):
        described = DESCRIPTIONS.read(results / "corpus/descriptions.parquet", ["cell_id", "split", "cell_type_id"])
        self.cells = described[described["cell_type_id"].notna()].reset_index(drop=True)
        self.cells["study"] = datasets_of(self.cells["cell_id"]).to_numpy()
        files = sorted(results.glob("embeddings/*/*.safetensors"))
        self.vectors = EMBEDDINGS.read_cells(files, self.cells["cell_id"], ["pooled"])["pooled"]
        self.labels = np.array(read_json(results / "finetuned/cell2text.json")["labels"]["cell_type"])
        self.known = self.read_scores(sorted(results.glob("scores/test/*.safetensors")))
        self.new = self.read_scores([results / "scores/left_out_studies.safetensors"])
        self.ancestors = read_ancestors(results / "corpus/terms.parquet")["cell_type"]
        self.training = (self.cells["split"] == "train").to_numpy()
        self.types = pd.Index(self.labels).get_indexer(self.cells["cell_type_id"])

    def read_scores(self, files: list[Path]) -> np.ndarray:
        """Return the projector's scores, float32 (cells, labels); NaN for cells that are not in the files."""
        parts = [SCORES.read(path, [SCORE]) for path in files]
        rows = pd.concat([pd.DataFrame(tensors[SCORE], index=cells) for tensors, cells in parts])
        return rows.reindex(self.cells["cell_id"]).to_numpy()

    def describe(
        self, scores: np.ndarray, query: np.ndarray, unknown: list[str], examples: pd.Series
    ) -> tuple[np.ndarray, pd.DataFrame]:
        """Return the guesses without the unknown types, and the descriptions with the types that examples add.

        Parameters
        ----------
        scores
            Of all cells, (cells, labels).
        query
            The cells to describe, bool (cells,).
        unknown
            Labels that the model does not have.
        examples
            Type of each labelled cell, indexed by its row.
        """
        labels = self.labels[~np.isin(self.labels, unknown)]
        guesses = labels[scores[query][:, np.isin(self.labels, labels)].argmax(axis=1)]
        types = pd.Index(labels).get_indexer(self.cells["cell_type_id"])
        reference = Reference(
            self.vectors[self.training], np.empty(0), np.where(self.training, types, -1)[self.training]
        )
        added = AddedTypes.fit(reference, labels, self.vectors[examples.index], examples, self.ancestors, CONFIDENCE)
        table = pd.DataFrame(index=range(len(guesses)), columns=list(PREDICTIONS.columns), dtype=object)
        table = table.assign(cell_type_id=guesses, cell_type_reported_id=guesses)
        return guesses, added.apply(table, self.vectors[query])


def measure(run: Run, shots: int) -> Iterator[tuple]:
    """Yield setting, number of cells and scores for each draw."""
    true, rng = run.cells["cell_type_id"].to_numpy(dtype=str), np.random.default_rng([42, shots])
    for study in np.unique(run.cells["study"]):
        own = (run.cells["study"] == study).to_numpy()
        enough = pd.Series(true[own & run.training]).value_counts()
        enough = sorted(enough.index[enough >= shots + FEWEST])
        for setting, scores in (("known study", run.known), ("new study", run.new)):
            query = own & ~np.isnan(scores).any(axis=1)
            for _ in range(DRAWS if len(enough) > 1 and query.any() else 0):
                rows = [
                    rng.choice(np.flatnonzero(own & run.training & (true == one)), shots, replace=False)
                    for one in enough
                ]
                examples = pd.Series(np.repeat(enough, shots), index=np.concatenate(rows))
                permuted = pd.Series(rng.permutation(examples), index=examples.index)
                asked = query & ~np.isin(np.arange(len(own)), examples.index)
                for name, given in ((setting, examples), (f"{setting}, permuted", permuted)):
                    for one in enough:
                        yield name, *score(true[asked], [one], *run.describe(scores, asked, [one], given))
                    found = run.describe(scores, asked, enough, given)
                    yield (
                        f"{setting}, all types unknown{name.removeprefix(setting)}",
                        *score(true[asked], enough, *found),
                    )


def score(true: np.ndarray, added: list[str], before: np.ndarray, table: pd.DataFrame) -> tuple:
    """Return cells of added types, recall, precision, precision where reported, false positives, and accuracies."""
    after = table["cell_type_id"].to_numpy()
    own, named, right = np.isin(true, added), np.isin(after, added), after == true
    reported = named & (table["cell_type_reported_id"] == table["cell_type_id"]).to_numpy()
    shares = [right[some].mean() if some.any() else np.nan for some in (own, named, reported)]
    taken = named[~own].mean() if not own.all() else np.nan
    return own.sum(), *shares, taken, (before == true).mean(), right.mean()


def main() -> None:
    """Print the means over types and draws, for each number of labelled cells."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--shots", nargs="+", type=int, default=[3, 5, 10])
    given = parser.parse_args()
    for shots in given.shots:
        found = [pd.DataFrame(measure(Run(one), shots), columns=COLUMNS).assign(run=one.name) for one in given.results]
        means = pd.concat(found).groupby(["setting", "run"]).mean().groupby("setting")
        print(f"\n{shots} labelled cells: means of {len(found)} runs, and their standard deviation")
        print(means.mean().round(3).to_string())
        if len(found) > 1:
            print(means.std().round(3).to_string())


if __name__ == "__main__":
    main()
