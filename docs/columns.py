"""Write the tables of columns in docs/stages/: names and types from the contracts, meanings as the page has them.

`make docs` runs it. The meaning of a new column is left empty, to be written in the page; a test finds it.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "workflow/scripts"))
from cell2text import contracts  # noqa: E402
from cell2text.contracts import TableContract, TensorContract  # noqa: E402

PAGES = sorted((ROOT / "docs/stages").glob("*.md"))
TABLE = re.compile(r"^(<!-- columns of (\w+) -->\n\n)((?:\|.*\n)*)", re.MULTILINE)


def list_columns(contract: TableContract | TensorContract | tuple[str, ...]) -> dict[str, str]:
    """Return the type of each column of a table, or of each tensor, as words."""
    if isinstance(contract, tuple):  # of a TSV file
        return dict.fromkeys(contract, "TSV")
    if isinstance(contract, TensorContract):
        required = {name: f"{dtype}, {n} dimensions" for name, (dtype, n) in contract.tensors.items()}
        return required | {name: f"{dtype}, {n} dimensions, optional" for name, (dtype, n) in contract.optional.items()}
    types = {name: re.sub(r"list<\w+: (\w+)>", r"list of \1", str(kind)) for name, kind in contract.columns.items()}
    return types | ({"others": str(contract.rest)} if contract.rest else {})


def render(text: str) -> str:
    """Return a page with its tables of columns as the contracts have them."""

    def table(found: re.Match) -> str:
        rows = [re.fullmatch(r"\| `?(\w+)`? \| .*? \| (.*) \|", row) for row in found[3].splitlines()]
        meanings = {row[1]: row[2].strip() for row in rows if row}
        types = list_columns(getattr(contracts, found[2]))
        lines = [f"| `{name}` | {kind} | {meanings.get(name, '')} |\n" for name, kind in types.items()]
        return "".join([found[1], "| column | type | meaning |\n|---|---|---|\n", *lines])

    return TABLE.sub(table, text)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(render(path.read_text()))
