"""Geneformer's dictionaries are read from pickles without executing code, and rejected if they are inconsistent."""

import os
import pickle

import numpy as np
import pytest

from cell2text.errors import InputError
from cell2text.models.gene_dictionaries import find_dictionaries, read_dictionary
from tiny_geneformer import MEDIANS, TOKENS, dump, write_series


class Command:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_numpy_numbers_are_read_as_python_numbers(tmp_path, protocol):
    numbers = [
        np.int8(-3),
        np.uint8(200),
        np.int64(-(2**40)),
        np.uint64(2**63),
        np.float32(0.1),
        np.float64(0.1),
        7,
        0.5,
    ]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({str(i): n for i, n in enumerate(numbers)}, protocol=protocol))
    read = read_dictionary(tmp_path / "a.pkl")
    assert list(read.values()) == [np.asarray(n).item() for n in numbers]
    assert {type(value) for value in read.values()} == {int, float}


def hostile_commands(mark):
    """Return objects that each create a file if they are unpickled."""
    return [
        Command(os.system, f"touch {mark}"),
        Command(eval, f"open('{mark}', 'w')"),
        {"a": Command(os.mkdir, str(mark))},
        Command(np.save, str(mark), 1),
    ]


@pytest.mark.parametrize("number", range(4))
def test_no_code_is_executed(tmp_path, number):
    mark = tmp_path / "mark.npy"
    dump(hostile_commands(mark)[number], tmp_path / "a.pkl")
    with pytest.raises(InputError, match="it refers to"):
        read_dictionary(tmp_path / "a.pkl")
    assert not mark.exists()
    pickle.loads((tmp_path / "a.pkl").read_bytes())  # the pickle is really hostile
    assert mark.exists()


@pytest.mark.parametrize(
    "value",
    [
        {"a": np.arange(3)},
        {"a": [1]},
        {"a": None},
        {"a": np.datetime64("2020-01-01")},
        {"a": np.array("text", dtype="S8")[()]},
        {"a": Command(np._core.multiarray.scalar, np.dtype(">i8"), b"12345678")},
        {"a": Command(np._core.multiarray.scalar, np.dtype("i8"), b"1234")},
        {1: "a"},
        ["a"],
    ],
)
def test_anything_else_is_rejected(tmp_path, value):
    dump(value, tmp_path / "a.pkl")
    with pytest.raises(InputError, match="not a dictionary of strings and numbers"):
        read_dictionary(tmp_path / "a.pkl")


def test_a_damaged_pickle_is_reported_as_input_error(tmp_path):
    whole = pickle.dumps(TOKENS)
    for text in (b"", b"no pickle", whole[:-9], whole[: len(whole) // 2]):
        (tmp_path / "a.pkl").write_bytes(text)
        with pytest.raises(InputError):
            read_dictionary(tmp_path / "a.pkl")


@pytest.mark.parametrize("place", [".", "..", "../geneformer", "../geneformer/gene_dictionaries_30m"])
def test_the_dictionaries_of_the_checkpoints_series_are_found(tmp_path, place):
    checkpoint = tmp_path / "repository/V1"
    checkpoint.mkdir(parents=True)
    (checkpoint / place).mkdir(parents=True, exist_ok=True)
    write_series((checkpoint / place).resolve(), series="_gc30M")
    more = TOKENS | {"<cls>": 4, "<eos>": 5}
    write_series(tmp_path / "repository/geneformer", tokens=more, series="_gc104M")
    assert find_dictionaries(checkpoint, 4).special == {"pad": 0, "mask": 1, "cls": None, "eos": None}
    assert find_dictionaries(checkpoint, 6).special == {"pad": 0, "mask": 1, "cls": 4, "eos": 5}
    with pytest.raises(InputError, match="the checkpoint has 9 tokens, .*token_dictionary_gc104M.pkl has 6"):
        find_dictionaries(checkpoint, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": TOKENS | {"ENSG2": 7}}, "tokens are not numbered consecutively from 0"),
        (
            {"tokens": {"ENSG3": 0, "<mask>": 1, "ENSG1": 2, "ENSG2": 3}},
            "not numbered .* or <pad> or <mask> is missing",
        ),
        ({"medians": {"ENSG1": 1.0}}, "no positive median for 1 genes, such as ENSG2"),
        ({"medians": MEDIANS | {"ENSG1": 0.0}}, "no positive median for 1 genes, such as ENSG1"),
    ],
)
def test_inconsistent_dictionaries_are_rejected(tmp_path, changes, message):
    write_series(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        find_dictionaries(tmp_path, 4)


def test_missing_dictionaries_are_reported(tmp_path):
    with pytest.raises(InputError, match="no token_dictionary"):
        find_dictionaries(tmp_path, 4)
    dump(TOKENS, tmp_path / "token_dictionary.pkl")
    with pytest.raises(InputError, match="gene_median_dictionary.pkl: no such file"):
        find_dictionaries(tmp_path, 4)


def test_the_table_has_one_row_per_id_and_symbol_of_a_gene(tmp_path):
    names = {"AAA": "ENSG1", "ABC": "ENSG1", "NONE": "ENSG9"}
    write_series(tmp_path, names=names, mapping={"ENSG1": "ENSG1", "ENSG0": "ENSG2", "ENSG8": "ENSG9"})
    table = find_dictionaries(tmp_path, 4).table()
    assert table.to_numpy().tolist() == [
        [2, "AAA", "AAA", 2.5, []],
        [2, "ABC", "AAA", 2.5, []],
        [3, "ENSG0", "ENSG2", 0.5, []],
        [2, "ENSG1", "AAA", 2.5, []],
        [3, "ENSG2", "ENSG2", 0.5, []],
    ]
