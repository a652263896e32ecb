"""A study that leads outside of its file, or declares what it does not hold, is refused before its values are read."""

import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from numcodecs.zstd import Zstd
from scipy import sparse

from cell2text.cells import studies
from cell2text.cells.guards import _unpacked_size
from cell2text.cells.studies import open_study
from cell2text.errors import InputError

HUGE = 10**12
SECRET = "patient 17, HIV positive\n" * 40


def write(path, cells=40, genes=30, **obs):
    rng = np.random.default_rng(0)
    study = ad.AnnData(
        sparse.csr_matrix(rng.poisson(1, (cells, genes)).astype(np.float32)),
        pd.DataFrame({"donor_id": ["d"] * cells} | obs, index=[f"c{i}" for i in range(cells)]),
        pd.DataFrame(index=[f"G{i}" for i in range(genes)]),
    )
    study.write_h5ad(path)


def changed(change):
    def make(path):
        write(path)
        with h5py.File(path, "r+") as file:
            change(file)

    return make


def replace(group, name, *given, **more):
    attributes = dict(group[name].attrs)
    del group[name]
    group.create_dataset(name, *given, **more).attrs.update(attributes)


def secret(path):
    path.with_name("secret.txt").write_text(SECRET)
    return str(path.with_name("secret.txt"))


def other(path):
    write(path.with_name("other.h5ad"))
    return "other.h5ad"


def external_storage(name, dtype, count):
    def make(path):
        write(path)
        with h5py.File(path, "r+") as file:
            replace(file, name, (count,), dtype, external=[(secret(path), 0, len(SECRET))])

    return make


def external_link(name, target):
    def make(path):
        write(path)
        with h5py.File(path, "r+") as file:
            del file[name]
            file[name] = h5py.ExternalLink(other(path), target)

    return make


def soft_link_to_a_link(path):
    write(path)
    with h5py.File(path, "r+") as file:
        file["uns/door"] = h5py.ExternalLink(other(path), "/")
        del file["X"]
        file["X"] = h5py.SoftLink("/uns/door/X")


def virtual(path):
    write(path)
    with h5py.File(path, "r+") as file:
        layout = h5py.VirtualLayout((len(file["X/data"]),), "f4")
        layout[:] = h5py.VirtualSource(other(path), "X/data", layout.shape)
        del file["X/data"]
        file["X"].create_virtual_dataset("data", layout)


def same_string(file):
    """All cells have the same name of a megabyte."""
    del file["obs/donor_id"]
    long = file.create_dataset("long", (200_000,), h5py.string_dtype(), chunks=(200_000,), compression="gzip")
    long[0] = "A" * 1_000_000
    reference = zlib.decompress(long.id.read_direct_chunk((0,))[1])[:16]
    long.id.write_direct_chunk((0,), zlib.compress(reference * 200_000))
    file["obs/donor_id"] = long
    file["obs/donor_id"].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})


def tall(file):
    """A trillion cells, by fill values."""
    replace(file["obs"], "_index", (HUGE,), h5py.string_dtype(), chunks=(1000,))


def deflated_twice(file):
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_chunk((9,))
    options.set_deflate(9)
    options.set_filter(h5py.h5z.FILTER_LZF)
    del file["X/data"]
    h5py.h5d.create(file["X"].id, b"data", h5py.h5t.NATIVE_FLOAT, h5py.h5s.create_simple((9,)), options)


def tenx(**arrays):
    def make(path):
        values = {"data": [1], "indices": [0], "indptr": [0, 1], "shape": [1, 1], "barcodes": np.array(["a"], "S")}
        with h5py.File(path, "w") as file:
            for name, value in (values | arrays).items():
                given = {"data": value} if not isinstance(value, dict) else value
                file.create_dataset(f"matrix/{name}", **given)
            for name in ("id", "name", "feature_type"):
                file[f"matrix/features/{name}"] = np.array(["LYZ"], "S")

    return make


def old(path):
    """Before anndata 0.7, with a matrix of zeros that are not stored."""
    shutil.copy(Path(sc.__file__).parent / "datasets/10x_pbmc68k_reduced.h5ad", path)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_dataset("X", (700, HUGE), "f4", chunks=(1, 1000))


def loop(file):
    for name in ("a", "b"):
        file[f"uns/{name}"] = file["uns"]
    file["uns/organism_ontology_term_id"] = file["uns"]


def references(file):
    names = file.create_dataset("names", (40,), h5py.ref_dtype)
    names[:] = [file["X"].ref] * 40
    replace(file["obs"], "_index", data=names[:], dtype=h5py.ref_dtype)


def deep(file):
    file.create_group("/".join(["uns", *["a"] * 300]))


def array(place, shape, dtype="i4", **more):
    return changed(lambda file: replace(file[place.rpartition("/")[0]], place.rpartition("/")[2], shape, dtype, **more))


CHUNK = {"chunks": (1000,)}
REFUSED = {
    "external storage of counts": (external_storage("X/data", "u1", 500), "X/data: its values are in another file"),
    "external storage of donors": (external_storage("obs/_index", "S10", 40), "obs/_index: its values are in another"),
    "external storage in obsm": (external_storage("X/indices", "u1", 500), "its values are in another file"),
    "an external link to X": (external_link("X", "/X"), "X: a link to another file"),
    "an external link to a column": (external_link("obs/donor_id", "/obs/donor_id"), "obs/donor_id: a link to another"),
    "an external link to nothing": (external_link("uns", "/nowhere"), "uns: a link to another file"),
    "a soft link through an external one": (soft_link_to_a_link, "uns/door: a link to another file"),
    "a virtual dataset": (virtual, "X/data: its values are in another file"),
    "a trillion cells": (changed(tall), "_index: declares 1000000000000 values"),
    "a trillion categories": (
        array("obs/donor_id/categories", (HUGE,), h5py.string_dtype(), **CHUNK), "categories: declares"),
    "a trillion codes": (array("obs/donor_id/codes", (HUGE,), "i1", **CHUNK), "codes: declares"),
    "a trillion counts": (array("X/data", (HUGE,), "f4", **CHUNK), "X: data: declares"),
    "a trillion genes of counts": (array("X/indices", (HUGE,), **CHUNK), "X: indices: declares"),
    "a trillion ends": (array("X/indptr", (HUGE,), **CHUNK), "X: indptr: declares"),
    "wide counts": (array("X/data", (500, HUGE), "f4", chunks=(1, 1000)), "X: data: 2 dimensions"),
    "a wide column": (array("obs/_index", (40, HUGE), "f4", chunks=(1, 1000)), "_index: declares"),
    "long strings": (array("obs/_index", (40,), "S100000000", chunks=(1,)), "_index: declares 40 values"),
    "huge chunks": (array("X/data", (500,), "f4", chunks=(500_000_000,), maxshape=(None,)), "X: data: chunks of 2000"),
    "counts of text": (array("X/data", (500,), "S100000000", chunks=(1,)), "X: data: 1 dimensions of values of type"),
    "one string many times": (changed(same_string), "donor_id: more text than the study has bytes"),
    "compressed twice": (changed(deflated_twice), "X/data: compressed more than once"),
    "references": (changed(references), "_index: values of an unsupported type"),
    "a group within itself": (changed(loop), "a group that contains itself"),
    "three hundred levels": (changed(deep), "32 levels"),
    "10x: a trillion counts": (tenx(data={"shape": (HUGE,), "dtype": "i4", **CHUNK}), "data: declares"),
    "10x: a trillion cells": (tenx(barcodes={"shape": (HUGE,), "dtype": "S9", **CHUNK}), "barcodes: declares"),
    "10x: external storage": (
        lambda path: tenx(data={"shape": (9,), "dtype": "u1", "external": [(secret(path), 0, 9)]})(path),
        "matrix/data: its values are in another file"),
    "before anndata 0.7": (old, "X: declares"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_a_hostile_hdf5_file_is_refused(tmp_path, case):
    make, expected = REFUSED[case]
    make(tmp_path / "x.h5ad")
    with pytest.raises(InputError) as error, open_study(str(tmp_path / "x.h5ad"), ["donor_id"]):
        pass
    message = str(error.value)
    assert "\n" not in message and "x.h5ad: " in message and expected in message
    assert "HIV" not in message


def zarr_study(path, zarr_format=3):
    write(path.with_suffix(".h5ad"))
    with ad.settings.override(zarr_write_format=zarr_format):
        ad.read_h5ad(path.with_suffix(".h5ad")).write_zarr(path)


def edit(path, change):
    text = json.loads(path.read_text())
    change(text)
    path.write_text(json.dumps(text))
    for folder in path.parents:  # metadata are also kept at the top
        for name in ("zarr.json", ".zmetadata"):
            if (folder / "obs").exists() and (folder / name).exists():
                (folder / name).unlink() if name == ".zmetadata" else edit_top(folder / name)


def edit_top(path):
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "consolidated_metadata"}))


def link_in_zarr(path):
    zarr_study(path)
    shutil.rmtree(path / "X")
    (path / "X").symlink_to(path.parent)


def pipe_in_zarr(path):
    zarr_study(path)
    os.mkfifo(path / "X/pipe")


def zarr_shape(path):
    zarr_study(path)
    edit(path / "obs/_index/zarr.json", lambda text: text.update(shape=[HUGE]))


def zarr_chunks(path):
    zarr_study(path)
    edit(path / "X/data/zarr.json", lambda text: text["chunk_grid"]["configuration"].update(chunk_shape=[HUGE]))


def zarr_outside(path):
    zarr_study(path.with_name("other.zarr"))
    zarr_study(path)
    edit(path / "obs/zarr.json", lambda text: text["attributes"].update(_index="../../other.zarr/obs/_index"))


def zarr_twice(path):
    zarr_study(path, 2)
    codec = {"id": "zlib", "level": 1}
    edit(path / "X/data/.zarray", lambda text: text.update(compressor=codec, filters=[codec]))


def zarr_bz2(path):
    zarr_study(path, 2)
    edit(path / "X/data/.zarray", lambda text: text.update(compressor={"id": "bz2", "level": 1}))


def zarr_bomb(path):
    zarr_study(path)
    chunk = next(found for found in (path / "obs/_index").rglob("0") if found.is_file())
    chunk.write_bytes(Zstd().encode(bytes(300_000_000)))
    assert chunk.stat().st_size < 40_000


ZARR = {
    "a link": (link_in_zarr, "x.zarr/X: a link, which is not read. Copy the folder with `cp -rL`"),
    "a pipe": (pipe_in_zarr, "x.zarr/X/pipe: a pipe or a device"),
    "a trillion cells": (zarr_shape, "_index: declares 1000000000000 values"),
    "huge chunks": (zarr_chunks, "X: data: chunks of"),
    "a path that leads outside": (zarr_outside, "x.zarr"),
    "compressed twice": (zarr_twice, "X: data: unsupported compression (zlib, zlib)"),
    "another compression": (zarr_bz2, "X: data: unsupported compression (bz2)"),
    "a chunk that unpacks to 300 MB": (zarr_bomb, "a chunk that unpacks to more than it should"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ZARR)
def test_a_hostile_zarr_folder_is_refused(tmp_path, case):
    make, expected = ZARR[case]
    make(tmp_path / "x.zarr")
    with pytest.raises(InputError) as error, open_study(str(tmp_path / "x.zarr")) as study:
        next(study.matrices["X"][0].blocks(tmp_path))
    assert "\n" not in str(error.value) and "x.zarr" in str(error.value) and expected in str(error.value)


MEMORY = """
import resource, sys
from cell2text.cells.studies import open_study
from cell2text.errors import InputError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for source in sys.argv[1:]:
    try:
        with open_study(source, ["donor_id"]):
            print("opened", source)
    except InputError:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.filterwarnings("ignore")
def test_hostile_files_take_little_memory(tmp_path):
    paths = []
    for number, (make, _) in enumerate(REFUSED.values()):
        (tmp_path / str(number)).mkdir()
        paths.append(tmp_path / str(number) / "x.h5ad")
        make(paths[-1])
        assert paths[-1].stat().st_size < 5_000_000
    command = [sys.executable, "-W", "ignore", "-c", MEMORY, *map(str, paths)]
    scripts = Path(studies.__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(scripts)})
    *opened, kilobytes = result.stdout.split("\n")[:-1]
    assert not opened
    assert int(kilobytes) < 150_000


def compressible(path, kind, **more):
    """Constant columns, and a dense matrix of zeros beside the counts."""
    rng = np.random.default_rng(0)
    cells = 3000
    study = ad.AnnData(
        kind(rng.poisson(0.05, (cells, 40)).astype(np.float32)),
        pd.DataFrame({"donor_id": "d", "batch": 1.0}, index=[str(i) for i in range(cells)]),
        pd.DataFrame(index=[f"G{i}" for i in range(40)]),
        layers={"zeros": np.zeros((cells, 40), np.float32), "ones": sparse.csr_matrix(np.ones((cells, 40)))},
    )
    getattr(study, "write_zarr" if path.suffix == ".zarr" else "write_h5ad")(path, **more)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
@pytest.mark.parametrize("more", [{"compression": "gzip"}, {"compression": "lzf"}, {}, "zarr"])
def test_data_that_compress_well_are_read(tmp_path, monkeypatch, kind, more):
    monkeypatch.setattr("cell2text.cells.guards.ROOM", 0)  # so that small data are as strictly judged as large
    monkeypatch.setattr("cell2text.cells.guards.MOST_ROWS", 0)
    path = tmp_path / ("x.zarr" if more == "zarr" else "x.h5ad")
    compressible(path, kind, **({} if more == "zarr" else more))
    with open_study(str(path), ["donor_id", "batch"]) as study:
        assert len(study.obs) == 3000 and set(study.obs["donor_id"]) == {"d"}
        for place in ("X", 'layers["zeros"]', 'layers["ones"]'):
            assert sum(block.shape[0] for block in study.matrices[place][0].blocks(tmp_path / "scratch")) == 3000


def test_a_soft_link_within_the_file_is_followed(tmp_path):
    write(tmp_path / "x.h5ad")
    with h5py.File(tmp_path / "x.h5ad", "r+") as file:
        file.move("X", "uns/counts")
        file["X"] = h5py.SoftLink("/uns/counts")
    with open_study(str(tmp_path / "x.h5ad")) as study:
        assert study.matrices["X"][0].shape == (40, 30)


@pytest.mark.parametrize("size", [1, 200, 255, 256, 257, 65791, 65792, 10**6, 3 * 10**8])
def test_the_declared_size_of_a_zstd_chunk(size):
    assert _unpacked_size(Zstd().encode(bytes(size))[:18]) == size
    assert _unpacked_size(b"\x02\x01abcdefgh") == 0


def test_real_studies_are_within_the_bounds(request, monkeypatch):
    monkeypatch.setattr("cell2text.cells.guards.ROOM", 0)
    monkeypatch.setattr("cell2text.cells.guards.MOST_ROWS", 0)
    found = sorted((request.config.rootpath.parent / "shared/data/studies").glob("*.h5ad"))
    if not found:
        pytest.skip("no studies in ../shared/data")
    for path in found:
        with open_study(str(path), ["donor_id", "cell_type", "cell_type_ontology_term_id"]) as study:
            assert len(study.obs) and study.matrices
