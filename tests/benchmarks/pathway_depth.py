"""Which scores of gene sets survive a change of sequencing depth, and which say something about the cell.

    python tests/benchmarks/pathway_depth.py ../shared/data/studies/pbmc3k.h5ad ... [--sets resources/programmes.gmt]

Each study is used as it is and thinned to a fifth of its counts, binomially and twice; whatever is fitted is fitted on
seven in ten of its cells, at both depths together. One line per score, the mean over the studies:

    same pair    Jaccard index of a cell's two sets, as it is and thinned
    bound        the same between the two thinned copies: a score that changes with nothing but chance reaches it
    shift        change of a set's mean score through thinning, in its standard deviations; median over the sets
    panel        as `same pair`, as it is and with its 2,000 most variable genes only
    linear       Jaccard index, in the other cells, with the sets that a ridge regression on 30 principal components of
                 the log-normalised counts predicts
    type         mutual information of the cell type and a set of the cell, in bits
    us           microseconds per cell
"""

import argparse
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.metrics import mutual_info_score

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "workflow/scripts"))
from cell2text.corpus import score_pathways  # noqa: E402
from cell2text.corpus.gene_sets import read_gene_sets  # noqa: E402
from cell2text.corpus.pathways import choose_pathways, fit_sets  # noqa: E402


def aucell(top):
    """Return AUCell with the given number of top genes, ties in one random order of the genes as in decoupler."""

    def score(counts, members):
        genes = counts.shape[1]
        place = np.random.default_rng(0).permutation(genes) / genes
        rank = np.argsort(np.argsort(place - counts.toarray(), axis=1), axis=1) + 1
        n = np.maximum(np.broadcast_to(top(counts), len(rank)), 2)[:, None]
        size = np.minimum(np.asarray(members.sum(axis=0)), n)
        return np.clip(n - rank, 0, None) @ members / np.maximum(size * n - size * (size + 1) / 2, 1)

    return score


def expressed(counts):
    return np.diff(counts.indptr)


def before(counts):
    return min(np.ceil(0.05 * counts.shape[1]), int(np.quantile(expressed(counts), 0.05)))


def share_of_counts(counts, members):
    return (counts @ members).toarray() / totals(counts)[:, None]


def thinned(to):
    def score(counts, members):
        score_pathways.THINNED_TO = to
        return score_pathways.count_expressed(counts, members)

    return score


def totals(counts):
    return np.asarray(counts.sum(axis=1)).ravel()


AUCELL_BEFORE = aucell(before)
# name: score, whether it is fitted on each depth alone, whether on the logarithm of the counts, and the counts to which
# it thins: then sets count by their reliability
CANDIDATES = {
    "AUCell, top genes by dataset (before)": (AUCELL_BEFORE, False, False, 0),
    "  standardised per dataset": (AUCELL_BEFORE, True, False, 0),
    "  residuals on log counts": (AUCELL_BEFORE, False, True, 0),
    "AUCell, top 5% of the genes": (aucell(lambda counts: np.ceil(0.05 * counts.shape[1])), False, False, 0),
    "AUCell, all expressed genes": (aucell(expressed), False, False, 0),
    "AUCell, half of the expressed genes": (aucell(lambda counts: expressed(counts) // 2), False, False, 0),
    "AUCell, top 100 genes": (aucell(lambda counts: 100), False, False, 0),
    "AUCell, top 50 genes": (aucell(lambda counts: 50), False, False, 0),
    "share of the counts": (share_of_counts, False, False, 0),
    "genes left at 50 counts, unweighted": (thinned(50), False, False, 0),
    "genes left at 20 counts": (thinned(20), False, False, 20),
    "genes left at 50 counts (chosen)": (thinned(50), False, False, 50),
    "genes left at 100 counts": (thinned(100), False, False, 100),
    "genes left at 300 counts": (thinned(300), False, False, 300),
}


def jaccard(first, second):
    shared = (first[:, :, None] == second[:, None, :]).sum(axis=(1, 2))
    return np.mean(shared / (first.shape[1] + second.shape[1] - shared))


def residuals(scores, counts, fitted):
    """Return scores minus a parabola in the logarithm of the counts, fitted on some cells at both depths."""
    depth = {name: np.vander(np.log(totals(matrix)) - 7, 3) for name, matrix in counts.items()}
    x, y = (np.concatenate([values[name][fitted] for name in ("whole", "fifth")]) for values in (depth, scores))
    line = np.linalg.lstsq(x, y, rcond=None)[0]
    # choose_pathways takes no set with a score of zero or less
    return {name: values - depth[name] @ line + 1000 for name, values in scores.items()}


def measure(path, gene_sets):
    """Yield the figures of each candidate on a study."""
    study, rng = ad.read_h5ad(path), np.random.default_rng(0)
    symbols = study.var["feature_name"].astype(str).reset_index(drop=True)
    unique = ~symbols.duplicated()
    whole, symbols = sparse.csr_matrix(study.X[:, unique.to_numpy()], dtype=np.float64), symbols[unique]
    members = np.column_stack([symbols.isin(genes) for genes in gene_sets.values()]).astype(float)
    counts = {"whole": whole}
    for name in ("fifth", "again"):
        counts[name] = whole.copy()
        counts[name].data = rng.binomial(whole.data.astype(int), 0.2).astype(float)
    enough = np.minimum(totals(counts["fifth"]), totals(counts["again"])) >= 50
    for name in counts:
        counts[name] = counts[name][enough]
        counts[name].eliminate_zeros()
    whole, types = counts["whole"], study.obs["cell_type"].astype(str).to_numpy()[enough]
    logs = np.log1p(whole.toarray() / totals(whole)[:, None] * 1e4)
    panel = np.argsort(-logs.var(axis=0))[:2000]
    counts["panel"] = whole[:, np.sort(panel)]
    fitted = rng.random(len(logs)) < 0.7
    axes = PCA(30, random_state=0).fit(logs[fitted]).transform(logs)
    for label, (score, alone, on_depth, thins_to) in CANDIDATES.items():
        start = time.perf_counter()
        of = {name: members[np.sort(panel)] if name == "panel" else members for name in counts}
        scores = {name: np.asarray(score(matrix, sparse.csc_matrix(of[name]))) for name, matrix in counts.items()}
        seconds = time.perf_counter() - start
        if on_depth:
            scores = residuals(scores, counts, fitted)
        tables = {name: pd.DataFrame(values, columns=list(gene_sets)) for name, values in scores.items()}

        def fit(*names, tables=tables, thins_to=thins_to):
            kept = {name: np.minimum(thins_to / totals(counts[name]), 1)[fitted] for name in names}
            return fit_sets(lambda: [(tables[name][fitted], kept[name]) for name in names], 2, 0)

        fits = {name: fit(name) if alone else fit("whole", "fifth") for name in counts}
        position = pd.Index(gene_sets).get_indexer  # fits may lack different sets
        pairs = {
            name: np.append(position(fits[name].index), -1)[choose_pathways(table, fits[name], 2)]
            for name, table in tables.items()
        }
        sets = fits["whole"]
        active = (tables["whole"][sets.index] - sets["mean"]) / sets["sd"] * np.sqrt(sets["reliability"])
        predicted = Ridge(10).fit(axes[fitted], active[fitted]).predict(axes[~fitted])
        change = tables["fifth"][sets.index].mean() - tables["whole"][sets.index].mean()
        yield {
            "score": label,
            "same pair": jaccard(pairs["whole"], pairs["fifth"]),
            "bound": jaccard(pairs["fifth"], pairs["again"]),
            "shift": (change.abs() / tables["whole"][sets.index].std()).median(),
            "panel": jaccard(pairs["whole"], pairs["panel"]),
            "linear": jaccard(position(sets.index)[np.argsort(-predicted, axis=1)[:, :2]], pairs["whole"][~fitted]),
            "type": mutual_info_score(np.repeat(types, 2), pairs["whole"].ravel()) / np.log(2),
            "us": 1e6 * seconds / len(counts) / len(logs),
        }


def main():
    """Print one line per candidate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path)
    parser.add_argument("--sets", type=Path, default=ROOT / "resources/programmes.gmt")
    options = parser.parse_args()
    rows = [row for path in options.studies for row in measure(path, read_gene_sets(options.sets))]
    print(pd.DataFrame(rows).groupby("score", sort=False).mean().round(3).to_string())


if __name__ == "__main__":
    main()
