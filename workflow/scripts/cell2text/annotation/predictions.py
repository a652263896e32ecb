"""What is said of each cell to annotate, in the order of the file."""

from collections.abc import Sequence

import pandas as pd
import pyarrow.compute as pc

from cell2text.contracts import PREDICTIONS, QC, TERM_SLOTS, TOKENS
from cell2text.files import read_jsonl
from cell2text.grammar import PATHWAY

NO_GENES = "no counts in genes of the model"


def read_predictions(descriptions: Sequence[str], tokens: str, qc: str, terms: pd.DataFrame) -> pd.DataFrame:
    """Return one row per cell in the order of the file: predictions, names of their terms, and what QC finds.

    Parameters
    ----------
    descriptions, tokens, qc
        Files of ``contracts.PREDICTIONS`` as JSONL, ``contracts.TOKENS`` and ``contracts.QC``.
    terms
        Rows of ``contracts.TERMS``.

    Returns
    -------
    DataFrame
        Columns of ``contracts.PREDICTIONS``, ``{slot}_name`` and ``{slot}_reported_name``, ``programmes`` (names) and
        ``flag``. Without a gene of the model a cell has no prediction, and the flag says so.
    """
    judged = QC.read(qc, ["cell_id", "reason"])
    rows = pd.DataFrame((row for path in descriptions for row in read_jsonl(path)), columns=list(PREDICTIONS.columns))
    parts = TOKENS.read_arrow_parts(tokens, ["cell_id", "tokens"])
    empty = [part["cell_id"].filter(pc.equal(pc.list_value_length(part["tokens"]), 0)).to_pylist() for part in parts]
    empty = set().union(*empty)
    rows = rows[~rows["cell_id"].isin(empty)]
    cells = rows.set_index("cell_id").reindex(judged["cell_id"]).astype(object).reset_index()
    names = {slot: dict(zip(group["id"], group["name"], strict=True)) for slot, group in terms.groupby("slot")}
    for slot in TERM_SLOTS:
        for kind in ("", "_reported"):
            cells[f"{slot}{kind}_name"] = cells[f"{slot}{kind}_id"].map(names.get(slot, {}))
    cells["pathway_ids"] = [found if isinstance(found, list) else [] for found in cells["pathway_ids"]]
    cells["programmes"] = [[names[PATHWAY][one] for one in found] for found in cells["pathway_ids"]]
    flag = judged["reason"].astype(object).fillna("")
    cells["flag"] = flag.mask(judged["cell_id"].isin(empty), NO_GENES).to_numpy()
    return cells.astype(object).where(cells.notna(), None)
