"""How many counts of a study of mice reach the right human gene: by the table of orthologues, or by capitals.

Human studies get the symbols of mouse genes, which are then mapped back. The symbols come from the same table (all its
pairs), and from a second one, Ensembl's one-to-one orthologues.

Run: python tests/benchmarks/mouse.py ../shared/data/studies [--plot docs/mouse.svg]
"""

import argparse
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "workflow/scripts"), str(ROOT / "tests")]
from cell2text.cells.orthologues import read_orthologues  # noqa: E402
from cell2text.files import whole_file  # noqa: E402
from cell2text.models.fetch_resource import ORTHOLOGUES  # noqa: E402
from mouse_names import BIOMART, fetch_table, one_to_one, read_pairs, shares  # noqa: E402

SHOWN = {"right": ("by the table of orthologues", "#0072B2"), "right in capitals": ("in capitals", "#999999")}


def plot(found, path):
    """Plot the share of the counts in the right gene, by study, as SVG."""
    table = pd.DataFrame(found).T
    # A fixed salt and no date: the same table gives the same bytes.
    with rc_context({"svg.hashsalt": "cell2text", "font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        axis = figure.subplots()
        for number, (name, (label, colour)) in enumerate(SHOWN.items()):
            places = np.arange(len(table)) + 0.38 * (number - 0.5)
            axis.barh(places, 1 - table[name], height=0.36, color=colour, label=label)
        axis.set_yticks(range(len(table)), table.index)
        axis.invert_yaxis()
        axis.set_title("Counts of genes with a mouse gene that are lost or in a wrong gene", fontsize=9.5, loc="left")
        axis.xaxis.set_major_formatter("{x:.0%}")
        axis.grid(axis="x", color="#E3E3E3", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.legend(frameon=False, loc="lower right")
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, format="svg", metadata={"Date": None, "Title": "Mouse genes read as human ones"})


def main():
    """Print a table for each source of the symbols, and plot the second one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", type=Path, help="folder of h5ad files with Ensembl ids and feature_name")
    parser.add_argument("--min-sources", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="SVG file to write")
    given = parser.parse_args()
    hcop, biomart = (fetch_table(source, ROOT) for source in (ORTHOLOGUES, BIOMART))
    orthologues = read_orthologues(hcop, given.min_sources)
    for title, pairs in {
        "names from the same table": read_pairs(hcop, given.min_sources),
        "names from Ensembl's one-to-one orthologues": one_to_one(read_pairs(biomart)),
    }.items():
        print(f"\n{title}: {pairs.index.nunique()} human genes\n")
        found = {}
        for path in sorted(given.studies.glob("*.h5ad")):
            found[path.stem] = shares(ad.read_h5ad(path), pairs, orthologues)
            if len(found) == 1:
                print("| study |", " | ".join(found[path.stem]), "|\n|---|" + "---|" * len(found[path.stem]))
            print("|", path.stem, "|", " | ".join(f"{share:.3f}" for share in found[path.stem].values()), "|")
    if given.plot:
        plot(found, given.plot)


if __name__ == "__main__":
    main()
