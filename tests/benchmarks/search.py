"""Search in words on finished runs: the retriever, the aligned projector, the words of predicted texts, and chance.

    for seed in 42 43 44; do
      .venv/bin/snakemake models embeddings results/studies-$seed/baselines/pca_logistic.parquet --cores 1 \\
        --configfile tests/config/studies_2000.yaml --config run=studies-$seed seed=$seed
    done
    .venv/bin/python tests/benchmarks/search.py results/studies-{42,43,44} --work somewhere [--plot docs/search.svg]

Each folder is that of a run with descriptions and embeddings; it is only read. The retriever and a projector (aligned,
without fine-tuning) are trained into ``--work``. The predicted texts are those of PCA + logistic regression. A second
retriever is trained without a third of the cell types, whose cells are then searched for by name.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "workflow/scripts"), str(ROOT / "tests")]
from cell2text.contracts import CELLS, DESCRIPTIONS, HELD_OUT, NAMES, PREDICTIONS, RETRIEVAL, SEEN, TERMS  # noqa: E402
from cell2text.embedding.vectors import Embeddings  # noqa: E402
from cell2text.evaluation.bootstrap import Bootstrap, interval  # noqa: E402
from cell2text.files import whole_file  # noqa: E402
from cell2text.finetuning.finetune import finetune  # noqa: E402
from cell2text.model.alignment import LabelTargets  # noqa: E402
from cell2text.model.bundle import load_projector  # noqa: E402
from cell2text.retrieval.collect_names import collect_names  # noqa: E402
from cell2text.retrieval.fit_retriever import fit_retriever  # noqa: E402
from cell2text.retrieval.retriever import Retriever, TextReader  # noqa: E402
from cell2text.retrieval.score_retrieval import (  # noqa: E402
    CELLS_OF_TEXT,
    draw_cells,
    find_matches,
    list_queries,
    measure,
    score_aligned,
    score_pairs,
    score_tfidf,
    summarise,
)
from default_settings import finetune_settings, projector_settings  # noqa: E402

DIMENSIONS, BOOTSTRAP, SMALLEST = 256, 1000, 10
COLOURS = {"retriever": "#0072B2", "aligned": "#E69F00", "tfidf": "#009E73", "shuffled": "#666666"}
ALL, FREE = "names of labels, and whole texts", "free queries"
SHOWN = {
    "cell_type": "cell type",
    "synonym": "synonym",
    "general term": "general term",
    "type in tissue": "type in tissue",
    "pathway": "programme",
    "text": "whole text",
}
log = logging.getLogger("cell2text.retrieval")


def fit(descriptions: Path, terms: Path, embeddings: Embeddings, language_model: str, path: Path, seed: int) -> None:
    """Train a retriever unless it is there."""
    if path.exists():
        return
    start, names = time.monotonic(), path.with_suffix(".names.parquet")
    collect_names(str(descriptions), str(terms), str(names))
    files = (str(descriptions), str(terms), str(names), embeddings, str(path))
    fit_retriever(language_model, *files, dimensions=DIMENSIONS, seed=seed)
    log.info("%s: %.0f s", path.name, time.monotonic() - start)


def hold_out(descriptions: Path, path: Path) -> None:
    """Write descriptions in which a third of the cell types with enough cells is in the test split."""
    table = DESCRIPTIONS.read(descriptions)
    counts = table["cell_type_id"].value_counts().sort_index()
    held = table["cell_type_id"].isin(counts.index[counts >= SMALLEST][::3])
    DESCRIPTIONS.write(table.assign(split=table["split"].mask(held, "test")), path)


@torch.no_grad()
def score(results: Path, descriptions: Path, retriever: Path, language_model: str, model: Path | None) -> pd.DataFrame:
    """Return the rows of ``contracts.RETRIEVAL`` of each method on the test cells."""
    described, terms = DESCRIPTIONS.read(descriptions), TERMS.read(results / "corpus/terms.parquet")
    embeddings = Embeddings(sorted(map(str, results.glob("embeddings/*/*.safetensors"))))
    test = draw_cells(described, 0)
    queries = list_queries(test, terms)
    cells, matches = test["cell_id"].tolist(), find_matches(test, queries)
    donors = test["cell_id"].map(CELLS.read(results / "corpus/cells.parquet").set_index("cell_id")["donor"])
    training = described[described["split"] == "train"]
    pooled, _ = embeddings.vectors(cells, "pooled")[np.arange(len(cells))]
    scores = {"retriever": score_pairs(Retriever.load(retriever), TextReader(language_model), pooled, queries)}
    if model:
        scores["aligned"] = score_aligned(str(model), language_model, terms, embeddings, cells, queries, matches)
        predicted = PREDICTIONS.read(results / "baselines/pca_logistic.parquet").set_index("cell_id")["text"]
        scores["tfidf"] = score_tfidf(training["text"], test["cell_id"].map(predicted), queries)
    scores["shuffled"] = scores["retriever"][np.random.default_rng(0).permutation(len(cells))]
    given = (matches, queries, donors, set(training["cell_type_id"]), BOOTSTRAP, 0)
    return pd.DataFrame([{"method": name} | row for name, found in scores.items() for row in summarise(found, *given)])


def list_free_queries(test: pd.DataFrame, terms: pd.DataFrame, names: pd.DataFrame) -> Iterator[tuple]:
    """Yield kind, words and matching cells of queries that are not the names of labels.

    Synonyms of cell types; names of terms above the cell types that fit at most half of the cells; and cell types in
    one of the several tissues that have them.
    """
    table, called = terms.set_index(["slot", "id"]), names[names["slot"] == "cell_type"]
    types, tissues = test["cell_type_id"], test["tissue_id"]
    above = {label: {label, *table.loc[("cell_type", label), "ancestors"]} for label in types.unique()}
    for term, rows in called.groupby("id"):
        known, synonyms = table.loc[("cell_type", term)], rows["name"]
        fits = np.array([term in above[label] for label in types])
        if (types == term).any():
            for synonym in synonyms[~synonyms.isin([known["name"], known["definition"]])]:
                yield "synonym", synonym, types == term
        elif 0 < fits.mean() <= 0.5:
            yield "general term", known["name"], fits
    for label in sorted(types.unique()):
        found = sorted(tissues[types == label].dropna().unique())
        for tissue in found if len(found) > 1 else []:
            words = f"{table.loc[('cell_type', label), 'name']} in {table.loc[('tissue', tissue), 'name']}"
            yield "type in tissue", words, (types == label) & (tissues == tissue)


@torch.no_grad()
def score_free(results: Path, retriever: Path, language_model: str, model: Path) -> pd.DataFrame:
    """Return value, interval and chance per kind of free query, metric and method; n is the number of queries.

    The projector has soft tokens for each slot, and a free query names none: its score is that of the slot whose soft
    tokens are nearest to its words.
    """
    described, terms = (
        contract.read(results / "corpus" / name)
        for contract, name in ((DESCRIPTIONS, "descriptions.parquet"), (TERMS, "terms.parquet"))
    )
    embeddings, test = (
        Embeddings(sorted(map(str, results.glob("embeddings/*/*.safetensors")))),
        draw_cells(described, 0),
    )
    names = NAMES.read(retriever.with_suffix(".names.parquet"))
    kinds, words, fits = zip(*list_free_queries(test, terms, names), strict=True)
    kinds, queries, fits = np.array(kinds), pd.DataFrame({"words": words}), np.array(fits, dtype=bool)
    cells = test["cell_id"].tolist()
    pooled, lengths = embeddings.vectors(cells, "pooled")[np.arange(len(cells))]
    projector = load_projector(model, language_model, torch.device("cpu"))
    matrix, slots = projector.language_model.get_input_embeddings().weight, len(projector.about["labels"])
    targets = LabelTargets.of([words] * slots, projector.tokenizer, matrix, apart=True)
    nearest = torch.stack(targets.scores(*projector.projector(pooled, lengths))).amax(dim=0)
    predicted = PREDICTIONS.read(results / "baselines/pca_logistic.parquet").set_index("cell_id")["text"]
    training = described.loc[described["split"] == "train", "text"]
    scores = {"retriever": score_pairs(Retriever.load(retriever), TextReader(language_model), pooled, queries)}
    scores |= {"aligned": nearest.numpy(), "tfidf": score_tfidf(training, test["cell_id"].map(predicted), queries)}
    scores["shuffled"] = scores["retriever"][np.random.default_rng(0).permutation(len(cells))]
    rows = []
    for kind in dict.fromkeys(kinds):
        chosen = kinds == kind
        drawn = Bootstrap(pd.Series(range(chosen.sum())), BOOTSTRAP, 0)
        for method, found in scores.items():
            for metric, (values, chance) in measure(found.T[chosen], fits[chosen]).items():
                value, low, high = interval(drawn.sum_up(values[:, None], drawn.unit())[:, 0] / len(values))
                rows.append((method, CELLS_OF_TEXT, kind, metric, value, low, high, np.mean(chance), len(values)))
    return pd.DataFrame(rows, columns=list(RETRIEVAL))


def run(results: Path, work: Path, language_model: str, seed: int) -> dict[str, pd.DataFrame]:
    """Return rows of ``contracts.RETRIEVAL`` by title."""
    corpus, folder = results / "corpus", work / results.name
    folder.mkdir(parents=True, exist_ok=True)
    embeddings = Embeddings(sorted(map(str, results.glob("embeddings/*/*.safetensors"))))
    given = (corpus / "terms.parquet", embeddings, language_model)
    fit(corpus / "descriptions.parquet", *given, folder / "retriever.safetensors", seed)
    hold_out(corpus / "descriptions.parquet", folder / "held_out.parquet")
    fit(folder / "held_out.parquet", *given, folder / "held_out.safetensors", seed)
    if not (folder / "finetuned").exists():
        settings = projector_settings(), finetune_settings(opening_epochs=0)
        files = (str(corpus / "descriptions.parquet"), str(corpus / "terms.parquet"), embeddings)
        finetune(language_model, *files, str(folder / "finetuned"), *settings, seed, "benchmark")
    every = score(results, corpus / "descriptions.parquet", folder / "retriever.safetensors", language_model,
                  folder / "finetuned")  # fmt: skip
    new = score(results, folder / "held_out.parquet", folder / "held_out.safetensors", language_model, None)
    free = score_free(results, folder / "retriever.safetensors", language_model, folder / "finetuned")
    return {ALL: every, "a third of the types held out": new[new["slot"].isin([SEEN, HELD_OUT])], FREE: free}


def plot(table: pd.DataFrame, path: Path) -> None:
    """Plot recall@1 and AUROC of the searches, means over the runs, and chance, as SVG."""
    means = table[table["direction"] == CELLS_OF_TEXT].groupby(["metric", "method", "slot"])[["value", "chance"]].mean()
    # A fixed salt and no date: the same table gives the same bytes.
    with rc_context({"svg.hashsalt": "cell2text", "font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        for axis, metric in zip(figure.subplots(1, 2, sharey=True), ("recall@1", "auroc"), strict=True):
            for number, (name, colour) in enumerate(COLOURS.items()):
                places = np.arange(len(SHOWN)) + (number - 1.5) * 0.2
                axis.bar(places, means.loc[metric, name].loc[list(SHOWN), "value"], 0.18, color=colour, label=name)
            chance = means.loc[metric, "retriever"].loc[list(SHOWN), "chance"]
            axis.hlines(chance, np.arange(len(SHOWN)) - 0.42, np.arange(len(SHOWN)) + 0.42, "#222222", label="chance")
            axis.set_title(f"Cells of a text, {metric}", fontsize=9.5, color="#222222", loc="left")
            axis.set_xticks(range(len(SHOWN)), list(SHOWN.values()), rotation=35, ha="right")
            axis.set_ylim(0, 1)
            axis.grid(axis="y", color="#E3E3E3", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.spines[:].set_visible(False)
        figure.legend(*axis.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, format="svg", metadata={"Date": None, "Title": "Search in words"})


def main() -> None:
    """Print the scores of each run with intervals, and their means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--work", type=Path, required=True, help="folder for the trained models")
    parser.add_argument("--language-model", default="resources/models/smollm2-135m-instruct")
    parser.add_argument("--plot", type=Path, help="SVG file to write")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    runs = [run(results, given.work, given.language_model, 42 + number) for number, results in enumerate(given.results)]
    for title in runs[0]:
        tables = [found[title].assign(run=results.name) for found, results in zip(runs, given.results, strict=True)]
        table, keys = pd.concat(tables), ["direction", "slot", "metric", "method"]
        text = [f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in table.itertuples()]
        print(f"\n{title}")
        each = table.assign(text=text).set_index([*keys, "run"])["text"].unstack()  # noqa: PD010 - text is not aggregated
        print(table.groupby(keys)[["value", "chance", "n"]].mean().round(3).join(each).to_string())
    if given.plot:
        plot(pd.concat([found[title] for found in runs for title in (ALL, FREE)]), given.plot)


if __name__ == "__main__":
    main()
