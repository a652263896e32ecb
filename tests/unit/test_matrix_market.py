"""A Matrix Market file is read if each line is a gene, a cell and a count; anything else is reported for what it is."""

import gzip

import numpy as np
import pytest
from scipy import io, sparse

from cell2text.cells import matrices
from cell2text.cells.fetch_dataset import fetch_dataset
from cell2text.cells.h5ad import read_blocks
from cell2text.cells.matrix_market import EntryList
from cell2text.cells.studies import open_study
from cell2text.errors import InputError

GENES = ["CD3D", "LYZ", "MT-CO1"]
COUNTS = np.array([[1, 0, 2], [0, 3, 4], [5, 0, 0], [0, 0, 70000]])  # cells by genes
LINES = ["1 1 1", "3 1 2", "2 2 3", "3 2 4", "1 3 5", "3 4 70000"]
HEADER = "%%MatrixMarket matrix coordinate integer general"


def write(path, header=HEADER, sizes="3 4 6", lines=LINES, end="\n"):
    path.mkdir()
    text = "".join(f"{line}{end}" for line in [header, '%metadata_json: {"software": "test"}', sizes, *lines])
    (path / "matrix.mtx").write_bytes(text.encode())
    (path / "barcodes.tsv").write_text("".join(f"cell{i}\n" for i in range(4)))
    (path / "features.tsv").write_text("".join(f"{gene}\t{gene}\tGene Expression\n" for gene in GENES))
    return path


def counts(folder, scratch):
    with open_study(str(folder)) as study:
        return sparse.vstack(list(study.matrices["X"][0].blocks(scratch))).toarray()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"header": HEADER.replace("integer", "real")},
        {"header": HEADER.replace("integer", "unsigned-integer")},  # what scipy writes for unsigned types
        {"header": HEADER.upper()},
        {"header": f"\ufeff{HEADER}"},
        {"sizes": "\n  3\t4 6 "},
        {"end": "\r\n"},
        {"end": " \n"},
        {"lines": [f"  {line.replace(' ', '   ')}" for line in LINES]},
        {"lines": [f"{line}.0" for line in LINES], "header": HEADER.replace("integer", "real")},
        {"lines": [*LINES[:5], "3 4 7e4"], "header": HEADER.replace("integer", "real")},
        {"lines": [*LINES[:5], "3 4 69999", "3 4 1"], "sizes": "3 4 7"},
    ],
)
def test_usual_files_are_read(tmp_path, change):
    assert (counts(write(tmp_path / "in", **change), tmp_path / "scratch") == COUNTS).all()


def test_every_integer_type_that_scipy_writes_is_read(tmp_path):
    for dtype in (np.uint8, np.int16, np.uint64, np.float32):
        folder = write(tmp_path / np.dtype(dtype).name)
        small = (COUNTS % 100).astype(dtype)
        io.mmwrite(folder / "matrix.mtx", sparse.coo_matrix(small.T))
        assert (counts(folder, tmp_path / "scratch") == small).all()


def test_a_file_is_gzipped_or_not_whatever_its_name(tmp_path):
    folder = write(tmp_path / "in")
    (folder / "matrix.mtx").rename(folder / "matrix.mtx.gz")
    (folder / "._matrix.mtx.gz").write_bytes(b"\0\5\x16\7")  # from an archive made on macOS
    assert (counts(folder, tmp_path / "scratch") == COUNTS).all()
    (folder / "matrix.mtx.gz").write_bytes(gzip.compress((folder / "matrix.mtx.gz").read_bytes()))
    (folder / "matrix.mtx.gz").rename(folder / "matrix.mtx")
    assert (counts(folder, tmp_path / "scratch") == COUNTS).all()


REFUSED = {
    "several values": ({"lines": [f"{line} 2 0" for line in LINES]}, ["line 4: 3 values ('1 1 1 2 0')", "GeneFull"]),
    "two values": ({"lines": [f"{line} 2" for line in LINES]}, ["line 4: 2 values", "not Velocyto"]),
    "several values, later": ({"lines": [*LINES[:4], "1 3 5 9", LINES[5]]}, ["line 8: 2 values ('1 3 5 9')"]),
    "many values, later": ({"lines": [*LINES[:4], "1 3 5 9 9 9 9", LINES[5]]}, ["line 8: 5 values"]),
    "NaN as a second value": ({"lines": [f"{line} nan" for line in LINES]}, ["line 4: '1 1 1 nan' is not the"]),
    "NA as a second value": ({"lines": [f"{line} NA" for line in LINES]}, ["line 4: '1 1 1 NA' is not the number"]),
    "fewer values": ({"lines": [*LINES[:5], "3 4"]}, ["line 9: '3 4' is not the number of a gene, of a cell and"]),
    "one value": ({"lines": [*LINES[:5], "3"]}, ["line 9: '3' is not"]),
    "text after a value": ({"lines": [*LINES[:5], "3 4 70000 # end"]}, ["line 9: '3 4 70000 # end' is not"]),
    "text after all": ({"lines": [*LINES, "end of file"]}, ["line 10: 'end of file' is not"]),
    "commas": ({"lines": [line.replace(" ", ",") for line in LINES]}, ["line 4: '1,1,1' is not"]),
    "a decimal comma": ({"lines": ["1 1 1,5", *LINES[1:]]}, ["line 4: '1 1 1,5' is not"]),
    "a quotation mark": ({"lines": ['1 1 "1', *LINES[1:]]}, ["line 4: '1 1 \"1' is not"]),
    "a long line": ({"lines": ["1 " * 9999, *LINES[1:]]}, ["line 4: 9997 values", "...'"]),
    "a huge number": ({"lines": ["1" * 40 + " 1 1", *LINES[1:]]}, ["matrix.mtx", "damaged"]),
    "numbered from zero": ({"lines": ["0 1 1", *LINES[1:]]}, ["gene index -1, but there are 3 genes"]),
    "a missing value": ({"lines": ["1 1 nan", *LINES[1:]]}, ["line 4: '1 1 nan' is not the number"]),
    "pattern": ({"header": HEADER.replace("integer", "pattern")}, ["line 1: positions without counts (pattern)"]),
    "complex": ({"header": HEADER.replace("integer", "complex")}, ["line 1: complex numbers"]),
    "symmetric": ({"header": HEADER.replace("general", "symmetric")}, ["symmetric matrix", 'symmetry="general"']),
    "skew": ({"header": HEADER.replace("general", "skew-symmetric")}, ["skew-symmetric matrix"]),
    "hermitian": ({"header": HEADER.replace("general", "hermitian")}, ["Hermitian"]),
    "array": ({"header": "%%MatrixMarket matrix array integer general"}, ["dense matrix (array)", "coo_matrix"]),
    "another field": ({"header": HEADER.replace("integer", "quaternion")}, ["line 1: unknown header", "Cell Ranger"]),
    "a vector": ({"header": HEADER.replace("matrix coord", "vector coord")}, ["line 1: unknown header"]),
    "a word too many": ({"header": HEADER + " sorted"}, ["line 1: unknown header"]),
    "a word too few": ({"header": HEADER[:-8]}, ["line 1: unknown header"]),
    "no header": ({"header": "3 4 6"}, ["line 1: no Matrix Market header"]),
    "sizes that are not whole": ({"sizes": "3 4 6.0"}, ["line 3: '3 4 6.0' are not numbers of genes, cells"]),
    "negative sizes": ({"sizes": "3 4 -6"}, ["line 3: '3 4 -6' are not"]),
    "two sizes": ({"sizes": "3 4"}, ["line 3: '3 4' are not"]),
    "four sizes": ({"sizes": "3 4 6 1"}, ["line 3: '3 4 6 1' are not"]),
    "digits of another script": ({"sizes": "3 4 ٦"}, ["line 3: '3 4 ٦' are not"]),
    "a size of a thousand digits": ({"sizes": f"3 4 {'9' * 1000}"}, ["line 3: '3 4 999"]),
    "more entries than places": ({"sizes": "3 4 13"}, ["line 3: 13 entries in 3 x 4"]),
    "cells by genes": ({"sizes": "4 3 6"}, ["cells by genes (4 x 3)", ".T"]),
    "another shape": ({"sizes": "3 5 6"}, ["(5, 3) values for 4 cells and 3 genes"]),
    "no sizes": ({"sizes": "%", "lines": ["%"]}, ["no line with the numbers of genes, cells and entries"]),
    "more entries than announced": ({"sizes": "3 4 5"}, ["6 entries, but the header says 5"]),
    "fewer entries": ({"sizes": "3 4 7"}, ["6 entries, but the header says 7"]),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("at_once", [4_000_000, 2])
def test_other_files_are_reported_for_what_they_are(tmp_path, monkeypatch, case, at_once):
    monkeypatch.setattr(matrices, "VALUES_AT_ONCE", at_once)
    monkeypatch.setattr(matrices, "FIRST_VALUES", at_once)
    change, expected = REFUSED[case]
    folder = write(tmp_path / "in", **change)
    with pytest.raises(InputError) as error:
        fetch_dataset({"dataset": "s", "source": str(folder)}, tmp_path / "out.h5ad")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 + len(str(tmp_path))
    for part in [str(folder), *expected]:
        assert part in str(error.value)


def test_a_header_without_end_is_not_read_whole(tmp_path):
    folder = write(tmp_path / "in")
    with gzip.open(folder / "matrix.mtx", "wb") as file:
        file.write(HEADER.encode() + bytes(10_000_000))
    with pytest.raises(InputError, match="line 1: unknown header"):
        EntryList.open(folder / "matrix.mtx")


def test_counts_beyond_a_block_are_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(matrices, "VALUES_AT_ONCE", 2)
    fetch_dataset({"dataset": "s", "source": str(write(tmp_path / "in"))}, tmp_path / "out.h5ad")
    blocks = [block for _, block in read_blocks(tmp_path / "out.h5ad", np.ones(4, dtype=bool))]
    assert len(blocks) > 1 and (sparse.vstack(blocks).toarray() == COUNTS).all()
