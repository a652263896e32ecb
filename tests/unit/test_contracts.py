"""Files hold what their contract says, whole or not at all."""

import numpy as np
import pandas as pd
import pytest

from cell2text.contracts import EMBEDDINGS, QC, TERMS, whole_file, write_jsonl
from cell2text.errors import InputError


def tensors(cells=3):
    return {
        "gene_vectors": np.arange(cells * 8, dtype=np.float16).reshape(cells, 2, 4),
        "lengths": np.arange(cells, dtype=np.int32),
        "pooled": np.arange(cells * 4, dtype=np.float32).reshape(cells, 4),
    }


def test_tensors_come_back_as_they_were_whatever_their_order_in_memory(tmp_path):
    path, ids = tmp_path / "a.safetensors", ["s|1", "s|2", "s,3"]
    given = tensors() | {"pooled": np.asfortranarray(tensors()["pooled"])}
    EMBEDDINGS.write(given, ids, path)
    read, cells = EMBEDDINGS.read(path)
    assert cells == ids
    for name, tensor in tensors().items():
        np.testing.assert_array_equal(read[name], tensor)


@pytest.mark.parametrize(
    "broken",
    [
        lambda t: t.pop("lengths"),
        lambda t: t.update(pooled=t["pooled"].astype(np.float64)),
        lambda t: t.update(pooled=t["pooled"][:2]),
        lambda t: t.update(more=t["pooled"]),
    ],
)
def test_tensors_that_break_the_contract_are_not_written(tmp_path, broken):
    given = tensors()
    broken(given)
    with pytest.raises(ValueError, match="a.safetensors"):
        EMBEDDINGS.write(given, ["1", "2", "3"], tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_tables_that_break_the_contract_are_not_written(tmp_path):
    table = pd.DataFrame([("cell_type", "CL:1", "a, b", None)], columns=list(TERMS.columns))
    TERMS.write(table, tmp_path / "terms.parquet")
    assert TERMS.read(tmp_path / "terms.parquet")["name"].tolist() == ["a, b"]
    with pytest.raises(ValueError, match="missing"):
        TERMS.write(table.drop(columns="id"), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="surplus"):
        TERMS.write(table.assign(more=1), tmp_path / "other.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["terms.parquet"]
    with pytest.raises(InputError, match="not the QC figures"):
        QC.read(tmp_path / "terms.parquet")


def test_a_key_may_not_repeat(tmp_path):
    row = ("a", "s", 1.0, 1, 0.0, True, "")
    with pytest.raises(ValueError, match="cell_id repeats"):
        QC.write(pd.DataFrame([row, row], columns=list(QC.columns)), tmp_path / "qc.parquet")


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl([{"a": 1}], path)

    def rows():
        yield {"a": 2}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(rows(), path)
    assert path.read_text() == '{"a": 1}\n'
    with pytest.raises(RuntimeError), whole_file(path):
        raise RuntimeError
    assert [found.name for found in tmp_path.iterdir()] == ["rows.jsonl"]
