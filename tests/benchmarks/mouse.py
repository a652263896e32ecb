"""How many counts of a study of mice reach the right human gene: by the table of orthologues, or by capitals.

Human studies get the symbols of mouse genes, which are then mapped back. The symbols come from the same table (all its
pairs), and from a second one, Ensembl's one-to-one orthologues.

Run: python tests/benchmarks/mouse.py ../shared/data/studies
"""

import argparse
import sys
from pathlib import Path

import anndata as ad

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "workflow/scripts"), str(ROOT / "tests")]
from cell2text.cells.orthologues import read_orthologues  # noqa: E402
from cell2text.models.fetch_resource import ORTHOLOGUES  # noqa: E402
from mouse_names import BIOMART, fetch_table, one_to_one, read_pairs, shares  # noqa: E402


def main():
    """Print a table for each source of the symbols."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", type=Path, help="folder of h5ad files with Ensembl ids and feature_name")
    parser.add_argument("--min-sources", type=int, default=3)
    given = parser.parse_args()
    hcop, biomart = (fetch_table(source, ROOT) for source in (ORTHOLOGUES, BIOMART))
    orthologues = read_orthologues(hcop, given.min_sources)
    for title, pairs in {
        "names from the same table": read_pairs(hcop, given.min_sources),
        "names from Ensembl's one-to-one orthologues": one_to_one(read_pairs(biomart)),
    }.items():
        print(f"\n{title}: {pairs.index.nunique()} human genes\n")
        for number, path in enumerate(sorted(given.studies.glob("*.h5ad"))):
            found = shares(ad.read_h5ad(path), pairs, orthologues)
            if not number:
                print("| study |", " | ".join(found), "|\n|---|" + "---|" * len(found))
            print("|", path.stem, "|", " | ".join(f"{share:.3f}" for share in found.values()), "|")


if __name__ == "__main__":
    main()
