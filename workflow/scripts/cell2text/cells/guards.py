"""Checks of a study that someone else wrote, before its values are read.

A file must not lead outside of itself, and must not declare much more than it holds: a few kilobytes can declare
terabytes, through fill values, compression or references to the same string. With ``stored``, the bytes that the
study takes on disk, the limits are

- what is read whole (a column, names, categories): ``stored`` + a million values of at most 64 bytes on average,
  because every cell and every gene takes at least one byte somewhere in the file;
- a chunk, and all values of a sparse matrix: 1,032 x ``stored`` + 64 MiB, because deflate compresses no better.

So a column of a file of a few kilobytes takes at most about 64 MiB. Matrices are read in blocks, whatever their size.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from cell2text.errors import InputError

MOST_OBJECTS = 100_000
DEEPEST = 32
COMPRESSION = 1032
ROOM = 64 * 2**20
MOST_ROWS = 2**20
ROW_BYTES = 64
FILTERS = {4: "szip", 307: "bzip2", 32000: "lzf", 32001: "blosc", 32004: "lz4", 32008: "bitshuffle", 32013: "zfp",
           32015: "zstd", 32026: "blosc2"}  # fmt: skip
# Attributes that AnnData reads. One value each: all values of an array could refer to the same long string.
SINGLE = (b"encoding-type", b"encoding-version", b"_index", b"h5sparse_format", b"ordered", b"categories")
ARRANGING = {"bytes", "transpose", "shuffle", "crc32c", "sharding_indexed", "vlen-utf8", "vlen-bytes"}
COMPRESSING = {"blosc", "zstd", "gzip", "zlib", "lz4"}
_OWN = "Write one file that holds all its data"
_REWRITE = "Download or write the file again"


def check_hdf5(file: h5py.File, source: str) -> None:
    """Check all objects of an HDF5 file, without following links.

    Raises
    ------
    InputError
        If data or links lead outside of the file, a compression filter is missing, or there are too many objects.
    """
    seen = 0

    def check(name: bytes, link: Any) -> InputError | None:
        nonlocal seen
        seen += 1
        where = f"{source}: {os.fsdecode(name)}"
        if seen > MOST_OBJECTS or name.count(b"/") > DEEPEST:
            limits = f"more than {MOST_OBJECTS} objects or {DEEPEST} levels"
            return InputError(where, limits, "Write the study again without what is not needed (for example uns)")
        if link.type == h5py.h5l.TYPE_SOFT:
            return None  # its target is in this file
        if link.type != h5py.h5l.TYPE_HARD:
            return InputError(where, "a link to another file, which is not followed", _OWN)
        found = h5py.h5o.open(file.id, name)
        for attribute in SINGLE:
            if h5py.h5a.exists(found, attribute) and math.prod(h5py.h5a.open(found, attribute).shape or ()) > 1:
                return InputError(f"{where}: {attribute.decode()}", "several values in place of one", _REWRITE)
        return _check_storage(found, where) if isinstance(found, h5py.h5d.DatasetID) else None

    error = file.id.links.visit(check, info=True)
    if error is not None:
        raise error


def _check_storage(dataset: h5py.h5d.DatasetID, where: str) -> InputError | None:
    created = dataset.get_create_plist()
    if created.get_external_count() or created.get_layout() == h5py.h5d.VIRTUAL:
        return InputError(where, "its values are in another file, which is not read", _OWN)
    codes = [created.get_filter(number)[0] for number in range(created.get_nfilters())]
    if sum(code not in (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32) for code in codes) > 1:
        return InputError(where, "compressed more than once", _REWRITE)
    for code in codes:
        if not h5py.h5z.filter_avail(code):
            name = FILTERS.get(code, f"HDF5 filter {code}")
            return InputError(
                where,
                f"compressed with {name}, which is not installed here",
                "Where the package hdf5plugin is installed, import hdf5plugin and write the file again: "
                'anndata.read_h5ad(file).write_h5ad(new, compression="gzip")',
            )
    return None


class GuardedStore(LocalStore):
    """A Zarr folder whose chunks must not unpack to more than ``most_bytes``; only zstd has no limit of its own."""

    most_bytes: float = math.inf

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the bytes of a file of the folder, or None if it is not there."""
        value = await super().get(key, prototype, byte_range)
        if value is not None and _unpacked_size(value.as_array_like()[:18].tobytes()) > self.most_bytes:
            raise InputError(self.root / key, "a chunk that unpacks to more than it should", _REWRITE)
        return value


def open_zarr(folder: Path) -> tuple[GuardedStore, "Bounds"]:
    """Open a Zarr folder; also return its bounds.

    Raises
    ------
    InputError
        If a part of it is a link, a pipe or a device.
    """
    bounds = Bounds(sum(entry.stat(follow_symlinks=False).st_size for entry in _files(folder)))
    store = GuardedStore(folder, read_only=True)
    store.most_bytes = bounds.most_bytes
    return store, bounds


def _unpacked_size(start: bytes) -> float:
    """Return the size that a zstd frame declares (RFC 8878), infinite if none, zero if it is not zstd."""
    if start[:4] != b"\x28\xb5\x2f\xfd" or len(start) < 6:
        return 0
    flags = start[4]
    single = flags >> 5 & 1
    width = (single, 2, 4, 8)[flags >> 6]
    first = 5 + (not single) + (0, 1, 2, 4)[flags & 3]
    size = int.from_bytes(start[first : first + width], "little")
    return size + 256 * (width == 2) if width else math.inf


def _files(folder: Path) -> Iterator[os.DirEntry]:
    folders = [str(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    yield entry
                else:
                    kind = "a link" if entry.is_symlink() else "a pipe or a device"
                    raise InputError(entry.path, f"{kind}, which is not read", "Copy the folder with `cp -rL`")


@dataclass(frozen=True)
class Bounds:
    """How much a study may declare, see above.

    Parameters
    ----------
    stored
        Bytes that the study takes on disk.
    """

    stored: int

    def check_whole(self, element: Any, where: str) -> None:
        """Check an array, or all arrays of a group, before it is read whole.

        Raises
        ------
        InputError
            If it declares too many values, or values of an unsupported type.
        """
        most = self.stored + MOST_ROWS
        self._check_sum(element, where, most, most * ROW_BYTES)

    def check_file(self, file: h5py.File, where: str) -> None:
        """Check a file that is read whole, matrices included; errors as in ``check_whole``."""
        self._check_sum(file, where, math.inf, self.most_bytes)

    def _check_sum(self, element: Any, where: str, most_values: float, most_bytes: float) -> None:
        values, width = 0, 0
        for name, array in _arrays(element, where):
            values += math.prod(array.shape)
            width += math.prod(array.shape) * array.dtype.itemsize
            if values > most_values or width > most_bytes:
                raise InputError(name, f"declares {values} values, in a study of {self.stored} bytes", _REWRITE)
            self._check_array(array, name)
            if isinstance(array, h5py.Dataset):
                self._check_strings(array, name)

    def check_blocks(self, array: Any, dimensions: int, where: str) -> None:
        """Check an array of numbers before it is read in blocks.

        Raises
        ------
        InputError
            If it has another number of dimensions or another type, or declares too many values.
        """
        if len(array.shape) != dimensions or array.dtype.kind not in "fiubc":
            raise InputError(where, f"{len(array.shape)} dimensions of values of type {array.dtype}", _REWRITE)
        # the shape of a dense matrix is compared with its tables
        if dimensions == 1 and array.size * array.dtype.itemsize > self.most_bytes:
            raise InputError(where, f"declares {array.size} values, in a study of {self.stored} bytes", _REWRITE)
        self._check_array(array, where)

    @property
    def most_bytes(self) -> int:
        """Most bytes of a chunk, and of all values of a sparse matrix."""
        return COMPRESSION * self.stored + ROOM

    def _check_array(self, array: Any, where: str) -> None:
        width = array.dtype.itemsize
        chunk = getattr(array, "shards", None) or array.chunks
        if chunk and math.prod(chunk) * width > self.most_bytes:
            raise InputError(where, f"chunks of {math.prod(chunk) * width} bytes", "Write it again in smaller chunks")
        if not isinstance(array, h5py.Dataset):
            _check_codecs(array, where)

    def _check_strings(self, dataset: h5py.Dataset, where: str) -> None:
        """Check the total length of strings, of which no single one is longer than the file."""
        names = dataset.dtype.names or [None]
        types = [dataset.dtype if name is None else dataset.dtype[name] for name in names]
        if any(kind.kind == "O" and h5py.check_string_dtype(kind) is None for kind in types):
            raise InputError(where, "values of an unsupported type (references or lists)", "Write text or numbers")
        total, at_once = 0, 64 + ROOM // max(self.stored, 1)
        for name, kind in zip(names, types, strict=True):
            if kind.kind != "O" or not dataset.ndim:
                continue
            column = dataset if name is None else dataset.fields(name)
            for start in range(0, len(dataset), at_once):
                total += sum(map(len, column[start : start + at_once].ravel()))
                if total > self.stored + ROOM:
                    raise InputError(where, f"more text than the study has bytes ({self.stored})", _REWRITE)


def _arrays(element: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield all arrays of a group, as often as links lead to them: that is how often they would be read."""
    if hasattr(element, "keys"):
        for name in element:
            yield from _arrays(element[name], f"{where}/{name}")
    elif element.shape is not None:
        yield where, element


def _check_codecs(array: Any, where: str) -> None:
    """Check that a Zarr array is compressed once, in a usual way; a codec could unpickle."""
    stored = array.metadata.to_dict()
    codecs = stored["codecs"] if "codecs" in stored else [*(stored["filters"] or ()), stored["compressor"]]
    names = list(_codec_names(codecs))
    unusual = set(names) - ARRANGING - COMPRESSING
    if unusual or sum(name in COMPRESSING for name in names) > 1:
        used = ", ".join(sorted(unusual or names))
        raise InputError(where, f"unsupported compression ({used})", "Write it again as AnnData does by default")


def _codec_names(codecs: Any) -> Iterator[str]:
    for codec in codecs:
        if codec is not None:
            codec = codec if isinstance(codec, dict) else codec.get_config()
            yield str(codec.get("name", codec.get("id"))).removeprefix("numcodecs.")
            yield from _codec_names(codec.get("configuration", {}).get("codecs", ()))
