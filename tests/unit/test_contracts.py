"""Files follow their contract and are written atomically."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from cell2text.cells.h5ad import read_blocks, read_genes, write_cells
from cell2text.contracts import EMBEDDINGS, PATHWAY_SCORES, QC, TERMS, TOKENS
from cell2text.contracts import table as table_contracts
from cell2text.errors import InputError
from cell2text.files import read_jsonl, whole_file, write_jsonl


def tensors(cells=3):
    return {
        "gene_vectors": np.arange(cells * 8, dtype=np.float16).reshape(cells, 2, 4),
        "lengths": np.arange(cells, dtype=np.int32),
        "pooled": np.arange(cells * 4, dtype=np.float32).reshape(cells, 4),
    }


def test_tensors_are_read_as_written_for_any_memory_order(tmp_path):
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
def test_tensors_that_violate_the_contract_are_not_written(tmp_path, broken):
    given = tensors()
    broken(given)
    with pytest.raises(ValueError, match="a.safetensors"):
        EMBEDDINGS.write(given, ["1", "2", "3"], tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_tables_that_violate_the_contract_are_not_written(tmp_path):
    table = pd.DataFrame([("cell_type", "CL:1", "a, b", None, 1, ["CL:0"])], columns=list(TERMS.columns))
    TERMS.write(table, tmp_path / "terms.parquet")
    assert TERMS.read(tmp_path / "terms.parquet")["name"].tolist() == ["a, b"]
    with pytest.raises(ValueError, match="missing"):
        TERMS.write(table.drop(columns="id"), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="surplus"):
        TERMS.write(table.assign(more=1), tmp_path / "other.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["terms.parquet"]
    with pytest.raises(InputError, match="not the QC metrics"):
        QC.read(tmp_path / "terms.parquet")


def test_a_repeated_key_is_an_error(tmp_path):
    row = ("a", "s", "s|d", 1.0, 1, 0.0, 0.0, 0.1, True, "")
    with pytest.raises(ValueError, match="cell_id repeats"):
        QC.write(pd.DataFrame([row, row], columns=list(QC.columns)), tmp_path / "qc.parquet")


def ranked(cells):
    """Return part of a table of tokens, in which cell i has a list of length i."""
    lists = [list(range(cell)) for cell in cells]
    return pd.DataFrame(
        {
            "cell_id": [f"d|{cell}" for cell in cells],
            "tokens": [np.array(tokens, dtype=np.int32) for tokens in lists],
            "expression": [np.array(tokens, dtype=np.float32) for tokens in lists],
            "n_counts": 1.0,
        }
    )


def test_a_table_is_read_in_the_parts_that_were_written(tmp_path):
    path = tmp_path / "tokens.parquet"
    arrow = pa.Table.from_pandas(ranked([5, 1]), preserve_index=False)  # pandas and Arrow
    TOKENS.write_parts(iter([ranked([2, 0, 3]), arrow.select(["tokens", "n_counts", "expression", "cell_id"])]), path)
    for part, cells in zip(TOKENS.read_parts(path), ([2, 0, 3], [5, 1]), strict=True):
        assert list(part) == list(TOKENS.columns)
        assert part["cell_id"].tolist() == [f"d|{cell}" for cell in cells]
        assert [list(tokens) for tokens in part["tokens"]] == [list(range(cell)) for cell in cells]


def test_parts_are_read_and_written_one_at_a_time(tmp_path):
    path, asked = tmp_path / "tokens.parquet", []

    def parts():
        for cell in range(4):
            asked.append(cell)
            yield ranked([cell])

    TOKENS.write_parts(parts(), path)
    assert asked == [0, 1, 2, 3]
    assert pq.ParquetFile(path).num_row_groups == 4
    read = TOKENS.read_parts(path, ["cell_id"])
    assert list(next(read)) == ["cell_id"] and [part["cell_id"][0] for part in read] == ["d|1", "d|2", "d|3"]
    whole = TOKENS.read(path)
    assert [list(tokens) for tokens in whole["tokens"]] == [list(range(cell)) for cell in range(4)]
    assert whole["expression"][3].dtype == np.float32


def test_a_table_without_parts_is_empty_and_has_its_columns(tmp_path):
    PATHWAY_SCORES.write_parts([], tmp_path / "scores.parquet", rest=["A", "B"])
    assert list(PATHWAY_SCORES.read(tmp_path / "scores.parquet")) == ["cell_id", "A", "B"]
    assert pq.read_schema(tmp_path / "scores.parquet").field("B").type == pa.float32()
    assert not [part for part in PATHWAY_SCORES.read_parts(tmp_path / "scores.parquet") if len(part)]


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        (lambda: [ranked([1, 2]), ranked([3, 1])], "cell_id repeats"),
        (lambda: [ranked([1]), ranked([2]).drop(columns="tokens")], "differ in their columns"),
        (lambda: [ranked([1]), ranked([2]).assign(more=1)], "differ in their columns"),
    ],
    ids=["a key in two parts", "a column missing", "a column too many"],
)
def test_parts_that_violate_the_contract_leave_no_file(tmp_path, parts, problem):
    with pytest.raises(ValueError, match=problem):
        TOKENS.write_parts(parts(), tmp_path / "tokens.parquet")
    with pytest.raises(ValueError, match="surplus"):
        TOKENS.write_parts([], tmp_path / "tokens.parquet", rest=["more"])
    assert not list(tmp_path.iterdir())


def test_interrupted_parts_leave_the_old_file(tmp_path):
    path = tmp_path / "tokens.parquet"
    TOKENS.write(ranked([1]), path)

    def parts():
        yield ranked([2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TOKENS.write_parts(parts(), path)
    assert TOKENS.read(path)["cell_id"].tolist() == ["d|1"]
    assert [found.name for found in tmp_path.iterdir()] == ["tokens.parquet"]


def test_a_long_table_is_written_in_row_groups_with_categories_as_text(tmp_path, monkeypatch):
    monkeypatch.setattr(table_contracts, "ROWS_AT_ONCE", 2)
    rows = [("stage", str(i), f"name {i % 2}", None, None if i else 3.0, ["a"]) for i in range(5)]
    table = pd.DataFrame(rows, columns=list(TERMS.columns))
    TERMS.write(table.assign(name=table["name"].astype("category")), tmp_path / "terms.parquet")
    assert pq.ParquetFile(tmp_path / "terms.parquet").num_row_groups == 3
    found = TERMS.read(tmp_path / "terms.parquet")
    pd.testing.assert_frame_equal(found.assign(ancestors=found["ancestors"].map(list)), table)
    assert TERMS.read(tmp_path / "terms.parquet", categories=["name"])["name"].dtype == "category"


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
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


def damaged(content, step):
    """Yield the content cut at, and with a bit flipped in, every ``step``-th byte."""
    for position in range(0, len(content), step):
        yield content[:position]
        yield content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]


def read_or_none(read, path):
    """Return what is read, or None if the damage is reported in one line that names the file and the remedy."""
    try:
        return read(path)
    except InputError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        assert "run the workflow again" in str(error)
        return None


def test_a_cut_or_flipped_table_is_never_read_as_another(tmp_path):
    table = pd.DataFrame({"cell_id": [f"s|{i}" for i in range(40)], "A": np.linspace(0, 1, 40, dtype=np.float32)})
    path = tmp_path / "scores.parquet"
    PATHWAY_SCORES.write(table, path)
    reported = 0
    for content in damaged(path.read_bytes(), 3):
        path.write_bytes(content)
        read = read_or_none(PATHWAY_SCORES.read, path)
        reported += read is None
        assert read is None or read.equals(table)
    assert reported > 200
    path.unlink()
    assert read_or_none(PATHWAY_SCORES.read, path) is None


def test_cut_or_flipped_tensors_are_never_read_as_others(tmp_path):
    path, ids = tmp_path / "a.safetensors", ["s|1", "s|2", "s|3"]
    EMBEDDINGS.write(tensors(), ids, path)
    content = path.read_bytes()
    for cut in damaged(content, 5):
        path.write_bytes(cut)
        read = read_or_none(EMBEDDINGS.read, path)
        if read is not None:
            assert read[1] == ids
            for name, tensor in tensors().items():
                np.testing.assert_array_equal(read[0][name], tensor)


def test_cut_or_flipped_lines_of_json_are_reported(tmp_path):
    path, rows = tmp_path / "a.jsonl", [{"cell_id": "s|1", "text": "é"}, {"cell_id": "s|2", "text": "b"}]
    write_jsonl(rows, path)
    for content in damaged(path.read_bytes(), 1):
        path.write_bytes(content)
        read = read_or_none(lambda path: list(read_jsonl(path)), path)
        assert read is None or len(read) <= 2
    path.write_text('{"a": 1}\n[1]\n')
    assert read_or_none(lambda path: list(read_jsonl(path)), path) is None


def test_a_cut_or_flipped_file_of_counts_is_reported_or_read_whole(tmp_path):
    path, ids = tmp_path / "a.h5ad", np.array([f"s|{i}" for i in range(50)], dtype=object)
    counts = sparse.random(50, 20, 0.3, "csr", np.float32, random_state=0)
    write_cells(
        path, [counts], [ids], pd.DataFrame(index=range(50)), pd.DataFrame({"symbol": list("abcdefghijklmnopqrst")}), {}
    )

    def read(path):
        read_genes(path)
        return [(list(ids), block.toarray()) for ids, block in read_blocks(path, np.ones(50, dtype=bool))]

    content, reported = path.read_bytes(), 0
    for part in damaged(content, max(1, len(content) // 60)):
        path.write_bytes(part)
        found = read_or_none(read, path)
        reported += found is None
    assert reported >= 60
    path.unlink()
    assert read_or_none(read, path) is None
