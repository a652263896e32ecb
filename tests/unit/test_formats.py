"""Whatever a user names as a study: it is read, or one line says what it is and what to do with it."""

import errno
import fcntl
import gzip
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse

from cell2text.cells.counts import check_counts
from cell2text.cells.formats import explain_failure
from cell2text.cells.studies import Study, open_study
from cell2text.errors import InputError

COUNTS = np.arange(12, dtype=np.float32).reshape(4, 3)


def study(matrix=COUNTS):
    return ad.AnnData(matrix, pd.DataFrame(index=list("abcd")), pd.DataFrame(index=["CD3D", "LYZ", "MT-CO1"]))


def content(content):
    return lambda path: path.write_bytes(content)


def saved(path):
    study(sparse.csr_matrix(COUNTS)).write_h5ad(path)
    return path.read_bytes()


def keys(*names):
    def write(path):
        with h5py.File(path, "w") as file:
            for name in names:
                file.create_group(name)

    return write


def folder(*names):
    def write(path):
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(b"")

    return write


def zipped(*names):
    def write(path):
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                file.writestr(name, "x")

    return write


def tarred(path, mode="w"):
    with tarfile.open(path, mode) as file:
        file.addfile(tarfile.TarInfo("x"), io.BytesIO())


def truncated(path):
    path.write_bytes(saved(path)[:-700])


def open_for_writing(path):
    with h5py.File(path, "w", libver="latest") as file:
        file["x"] = 1
        file.flush()
        left = path.read_bytes()
    path.write_bytes(left)


def spatial(path):
    group = zarr.open_group(path, mode="w")
    group.create_group("tables/counts")
    group.create_group("images")


def bare_array(path):
    zarr.save_array(path, COUNTS)


def dangling(path):
    path.symlink_to("elsewhere.h5ad")


def circular(path):
    path.symlink_to(path)


def molecules(path):
    with h5py.File(path, "w") as file:
        for name in ("barcode_idx", "barcodes", "count", "umi"):
            file[name] = np.arange(3)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
PAGE = b"\n<!DOCTYPE html>\n<html><title>Sign in</title></html>"

# The name, what is written there, and what the message says
SOURCES = {
    "nothing": ("x.h5ad", lambda path: None, ["no such file", "column `source`"]),
    "a path through a file": ("x.h5ad", lambda path: None, ["no such file"]),
    "empty": ("x.h5ad", content(b""), ["an empty file", "Download"]),
    "zeros": ("x.h5ad", content(bytes(5000)), ["zeros", "not finished"]),
    "truncated": ("x.h5ad", truncated, ["cut off: ", "stopped early"]),
    "being downloaded": ("x.h5ad.part", saved, ["download is not finished"]),
    "being downloaded by a browser": ("x.h5ad.crdownload", content(b"?"), ["download is not finished"]),
    "written now, or left": ("x.h5ad", open_for_writing, ["open for writing, or its writer was killed", "h5clear"]),
    "a dangling link": ("x.h5ad", dangling, ["a link to elsewhere.h5ad, which does not exist"]),
    "a circular link": ("x.h5ad", circular, ["a link that leads back to itself"]),
    "a pipe": ("x.h5ad", os.mkfifo, ["not a file, but a pipe"]),
    "gzipped": ("x.h5ad.gz", lambda path: path.write_bytes(gzip.compress(saved(path))), ["gunzip < x.h5ad.gz > new"]),
    "gzipped, name lost": ("x.h5ad", lambda path: path.write_bytes(gzip.compress(saved(path))), ["a gzipped HDF5"]),
    "rds": ("x.rds", content(gzip.compress(b"X\n\0\0\0\3\0\4\1\2")), ["an R object (.rds)", "writeH5AD"]),
    "rds, not compressed": ("x.rds", content(b"X\n\0\0\0\3\0\4\1\2"), ["an R object (.rds)", "writeH5AD"]),
    "rda": ("x.rda", content(gzip.compress(b"RDX3\nX\n\0\0\0\3")), ["an R file (.rda)", "writeH5AD"]),
    "rds in bzip2": ("x.rds", content(b"BZh91AY&SY"), ["bzip2"]),
    "xz": ("x.h5ad.xz", content(b"\xfd7zXZ\0"), ["unxz"]),
    "zstd": ("x.h5ad.zst", content(b"\x28\xb5\x2f\xfd\x20\1\0"), ["unzstd"]),
    "a zip": ("x.zip", zipped("study.h5ad"), ["a zip archive", "unzip"]),
    "an Excel table": ("x.xlsx", zipped("[Content_Types].xml", "xl/workbook.xml"), ["Excel", "read_excel"]),
    "an old Excel table": ("x.xls", content(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"), ["Excel"]),
    "a zipped zarr": ("x.zarr.zip", zipped("obs/.zgroup"), ["a zipped Zarr folder", "unzip"]),
    "npz": ("x.npz", zipped("data.npy"), ["NumPy arrays"]),
    "npy": ("x.npy", content(b"\x93NUMPY\1\0"), ["a NumPy array"]),
    "tar": ("x.tar", tarred, ["tar archive", "tar -xf"]),
    "tar.gz": ("x.tar.gz", lambda path: tarred(path, "w:gz"), ["tar archive", "tar -xzf"]),
    "csv": ("x.csv", content(b"cell,CD3D,LYZ\na,1,2\n"), ["a table of text", "read_csv"]),
    "tsv.gz": ("x.tsv.gz", content(gzip.compress(b"gene\ta\tb\n")), ["gzipped: a table of text", "read_csv"]),
    "parquet": ("x.parquet", content(b"PAR1\x15\x04"), ["a Parquet table", "read_parquet"]),
    "mtx": ("matrix.mtx", content(b"%%MatrixMarket matrix"), ["Matrix Market file", "folder"]),
    "mtx.gz": ("matrix.mtx.gz", content(gzip.compress(b"%%MatrixMarket m")), ["Matrix Market file", "folder"]),
    "pickle": ("x.pkl", content(pickle.dumps([1])), ["a Python pickle"]),
    "LFS": ("x.h5ad", content(LFS), ["a Git LFS pointer", "git lfs pull"]),
    "a web page": ("x.h5ad", content(PAGE), ["a web page", "login"]),
    "an error message": ("x.h5ad", content(b'{"error": "not found"}'), ["a server's error"]),
    "text": ("x.h5ad", content(b"hello"), ["nor any other supported format", "10x folder"]),
    "loom": ("x.loom", keys("matrix", "row_attrs", "col_attrs"), ["a Loom file", "read_loom"]),
    "h5Seurat": ("x.h5Seurat", keys("assays", "cell.names", "meta.data"), ["h5Seurat", "SeuratDisk"]),
    "h5mu": ("x.h5mu", keys("obs", "var", "mod"), ["MuData", "'rna'"]),
    "molecules": ("molecule_info.h5", molecules, ["molecule_info.h5", "filtered_feature_bc_matrix.h5"]),
    "another HDF5": ("x.h5", keys("weights"), ["contains weights"]),
    "an empty HDF5": ("x.h5", keys(), ["contains nothing"]),
    "SpatialData": ("x.zarr", spatial, ["SpatialData", "tables/NAME"]),
    "a Zarr array": ("x.zarr", bare_array, ["a single Zarr array"]),
    "Cell Ranger's output": (
        "outs", folder("filtered_feature_bc_matrix/matrix.mtx", "web_summary.html"),
        ["Cell Ranger's output folder", "Give filtered_feature_bc_matrix"]),
    "Velocyto": ("Velocyto", folder("spliced.mtx", "barcodes.tsv", "features.tsv"), ["Velocyto", "Gene or GeneFull"]),
    "Solo.out": ("Solo.out", folder("Gene/filtered/matrix.mtx", "Barcodes.stats"), ["STARsolo", "Gene/filtered"]),
    "kallisto": ("counts", folder("cells_x_genes.mtx"), ["kallisto", "--h5ad"]),
    "a folder of studies": ("studies", folder("a.h5ad", "b.h5ad"), ["a folder of h5ad files", "own row"]),
    "a folder named h5ad": ("x.h5ad", folder("readme.txt"), ["expected one file matrix.mtx, found none"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SOURCES)
def test_what_people_bring_is_recognised(tmp_path, case):
    name, write, expected = SOURCES[case]
    path = tmp_path / name
    write(path)
    source = path / "in/it.h5ad" if case == "a path through a file" else path
    with pytest.raises(InputError) as error, open_study(str(source)):
        pass
    assert "\n" not in str(error.value)
    for part in [str(path), *expected]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EACCES, "permission denied. Ask its owner"),
        (errno.EIO, "read error. Check the disk"),
        (errno.EMFILE, "ulimit"),
        (errno.ENAMETOOLONG, "the path is too long"),
        (errno.ETIMEDOUT, "cannot be read: "),
    ],
)
def test_the_reason_is_the_one_that_the_system_gives(tmp_path, monkeypatch, number, expected):
    saved(tmp_path / "x.h5ad")

    def refuse(*given, **more):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=expected), open_study(str(tmp_path / "x.h5ad")):
        pass


@pytest.mark.parametrize("closed", ["x.h5ad", "."])
def test_without_permission(tmp_path, closed):
    saved(tmp_path / "x.h5ad")
    modes = {path: path.stat().st_mode for path in [*list(tmp_path.parents)[:2], tmp_path, tmp_path / closed]}
    user = os.geteuid()
    for path in modes:
        path.chmod(0 if path == tmp_path / closed else 0o711)
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        with pytest.raises(InputError, match="x.h5ad: permission denied. Ask"), open_study(str(tmp_path / "x.h5ad")):
            pass
    finally:
        os.seteuid(user)
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Can't read data (file read failed: errno = 5, error message = 'Input/output error')", "read error"),
        ("Unable to open file (unable to lock file, errno = 37, error message = 'No locks')", "HDF5_USE_FILE_LOCKING"),
        ("Can't synchronously read data (inflate() failed)", "not a complete matrix (OSError: Can't sync"),
    ],
)
def test_reasons_inside_messages_of_hdf5_are_found(text, expected):
    assert expected in str(explain_failure(OSError(text), "x.h5ad: X", "matrix"))


def test_a_file_locked_by_another_process(tmp_path):
    saved(tmp_path / "x.h5ad")
    with (tmp_path / "x.h5ad").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="open for writing in another process"), open_study(file.name):
            pass


@pytest.mark.parametrize(("code", "name"), [(32015, "zstd"), (32001, "blosc"), (32004, "lz4"), (65123, "filter 65123")])
def test_a_missing_compression_filter_is_named(tmp_path, code, name):
    saved(tmp_path / "x.h5ad")
    with h5py.File(tmp_path / "x.h5ad", "r+") as file:
        del file["X/data"]
        options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        options.set_chunk((4,))
        options.set_filter(code, h5py.h5z.FLAG_OPTIONAL, (3,))  # an optional one can be declared without the plugin
        space = h5py.h5s.create_simple((11,))
        h5py.h5d.create(file["X"].id, b"data", h5py.h5t.NATIVE_FLOAT, space, options)
    with pytest.raises(InputError) as error, open_study(str(tmp_path / "x.h5ad")):
        pass
    for part in ["x.h5ad: X/data", "compressed with ", name, "not installed", "hdf5plugin", 'compression="gzip"']:
        assert part in str(error.value)


def test_cellbender_and_files_without_feature_types_are_read(tmp_path):
    by_cell = sparse.csr_matrix(COUNTS.astype(np.int32))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for name in ("data", "indices", "indptr"):
            file[f"matrix/{name}"] = getattr(by_cell, name)
        file["matrix/shape"], file["matrix/barcodes"] = [3, 4], np.array(list("abcd"), "S")
        file["matrix/features/name"] = np.array(["CD3D", "LYZ", "MT-CO1"], "S")
        file["droplet_latents/cell_probability"], file["metadata/fraction"] = np.ones(4), [0.1]
    with open_study(str(tmp_path / "x.h5")) as found:
        assert (sparse.vstack(list(found.matrices["X"][0].blocks(tmp_path))).toarray() == COUNTS).all()


def test_an_unfiltered_matrix_is_noticed(tmp_path, caplog):
    saved(tmp_path / "x.h5ad")
    with open_study(str(tmp_path / "x.h5ad")) as found:
        full = list(check_counts(found, "X", tmp_path))
        assert not caplog.text and (full[0].toarray() == COUNTS).all()
    empty = study(sparse.csr_matrix(COUNTS * [[0], [0], [1], [0]]))
    empty.write_h5ad(tmp_path / "x.h5ad")
    with open_study(str(tmp_path / "x.h5ad")) as found:
        list(check_counts(found, "X", tmp_path))
    assert "3 of 4 barcodes have no counts" in caplog.text


def test_a_zarr_folder_with_missing_parts_is_refused(tmp_path):
    cells = ad.AnnData(sparse.random_array((400, 300), density=0.5, rng=0, format="csr").astype(np.float32))
    cells.X.data[:] = 1
    group = zarr.open_group(tmp_path / "x.zarr", mode="w")
    ad.io.write_elem(group, "/", cells)
    for name in ("data", "indices"):
        values = group[f"X/{name}"][:]
        del group[f"X/{name}"]
        group["X"].create_array(name, data=values, chunks=(9000,))
    with open_study(str(tmp_path / "x.zarr")) as found:
        assert isinstance(found, Study)
    next(path for path in (tmp_path / "x.zarr/X/data").rglob("3") if path.is_file()).unlink()
    with pytest.raises(InputError, match="X: data: parts of the folder are missing. Copy"):
        open_study(str(tmp_path / "x.zarr")).__enter__()
