"""What a source is, from its first bytes and its keys; for what cannot be read, what it is and what to do with it."""

import errno
import os
import re
import stat
import zlib
from collections.abc import Collection
from pathlib import Path

import h5py

from cell2text.errors import InputError

BUNDLED = "scanpy://pbmc68k_reduced"
KINDS = f"an h5ad file, an AnnData Zarr folder, a 10x HDF5 file, a 10x folder or {BUNDLED}"
_HDF5 = b"\x89HDF\r\n\x1a\n"
_AGAIN = "Download or write the file again"
_SAVED_PAGE = "Download it again: the link may need a login, or lead to a page about the file"
_IN_R = "In R: zellkonverter::writeH5AD(x, 'new.h5ad'), for a Seurat object with Seurat::as.SingleCellExperiment(x)"
_UNPACK = f"Unpack it with `{{}}`; an R file needs no unpacking. {_IN_R}"
_MATRIX = "Give the 10x folder that holds matrix.mtx, barcodes.tsv and features.tsv"
_TABLE = "In Python: scanpy.read_csv(file).write_h5ad(new), with .T after read_csv(file) if its rows are genes"
_PANDAS = "In Python: anndata.AnnData(pandas.{}(file, index_col=0)).write_h5ad(new)"
_TENX = "Give filtered_feature_bc_matrix.h5 or the folder filtered_feature_bc_matrix of the same run"

# First bytes of a file, what it is, and what to do
_STARTS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "Fetch the file with `git lfs pull`"),
    (b"/annex/objects", "a git-annex pointer, not the file itself", "Fetch the file with `git annex get`"),
    (b"%%matrixmarket", "a Matrix Market file", _MATRIX),
    (b"<", "a web page or XML, not a study", _SAVED_PAGE),
    (b"{", "JSON, perhaps a server's error message", _SAVED_PAGE),
    (b"par1", "a Parquet table", _PANDAS.format("read_parquet").replace(", index_col=0", "")),
    (b"arrow1", "a Feather table", _PANDAS.format("read_feather").replace(", index_col=0", "")),
    (b"\xd0\xcf\x11\xe0", "an Excel table", _PANDAS.format("read_excel")),
    (b"rdx2\n", "an R file (.rda)", _IN_R),
    (b"rdx3\n", "an R file (.rda)", _IN_R),
    (b"x\n\0\0\0", "an R object (.rds)", _IN_R),
    (b"bzh", "compressed with bzip2", _UNPACK.format("bunzip2")),
    (b"\xfd7zxz", "compressed with xz", _UNPACK.format("unxz")),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "Unpack it with `unzstd`"),
    *((bytes([128, n]), "a Python pickle, which could run any code", "Where it was made, write it with write_h5ad")
      for n in (2, 3, 4, 5)),
    (b"\x93numpy", "a NumPy array without genes and cells", "In Python: write it as AnnData with write_h5ad"),
    (b"\0\0\0\0", "zeros, as a download has that was not finished", _AGAIN),
)  # fmt: skip
# Names of files in a zip archive, what it is, and what to do
_ZIPPED = (
    (b"xl/", "an Excel table", _PANDAS.format("read_excel")),
    (b"[Content_Types].xml", "an Excel table", _PANDAS.format("read_excel")),
    (b".zgroup", "a zipped Zarr folder", "Unpack it with `unzip`"),
    (b"zarr.json", "a zipped Zarr folder", "Unpack it with `unzip`"),
    (b".npy", "NumPy arrays (.npz) without genes and cells", "In Python: write them as AnnData with write_h5ad"),
    (b"", "a zip archive", "Unpack it with `unzip` and give the study in it"),
)
_UNFINISHED = (".part", ".partial", ".crdownload", ".download", ".filepart", ".aria2", ".unfinished")
_MUDATA = "In Python: mudata.read(file)['rna'].write_h5ad(new), with the name of the modality that holds the counts"
# Keys of an HDF5 file or Zarr folder, what it is, and what to do
_KEYS = (
    ({"mod"}, "MuData, several modalities in one file", _MUDATA),
    ({"row_attrs", "col_attrs"}, "a Loom file", "In Python: scanpy.read_loom(file).write_h5ad(new)"),
    ({"assays", "cell.names"}, "an h5Seurat file", "In R: SeuratDisk::Convert(file, dest = 'h5ad')"),
    ({"barcode_idx"}, "Cell Ranger's molecules (molecule_info.h5), not its matrix", _TENX),
    ({"feature_slices"}, "Cell Ranger's feature slices, not its matrix", _TENX),
    ({"tables"}, "SpatialData, with images and shapes", "Give one of its tables: the folder tables/NAME in it"),
    ({"images"}, "SpatialData without a table of counts", "Give data with a table of counts"),
    ({"assay001"}, "an HDF5SummarizedExperiment", _IN_R),
    ({"#refs#"}, "a MATLAB file", "Write its counts as h5ad or as a 10x folder"),
)
_PARSE = "In Python: scanpy.read_mtx(file), with the cells as obs and the genes as var, and write_h5ad(new)"
_SOMA = "In Python: tiledbsoma.io.to_anndata(experiment, 'RNA').write_h5ad(new)"
# Parts of a folder, what it is, and what to do
_PARTS = (
    ("filtered_feature_bc_matrix*", "Cell Ranger's output folder", "Give filtered_feature_bc_matrix in it"),
    ("filtered_gene_bc_matrices", "Cell Ranger's output folder", "Give the folder of the genome in it"),
    ("GeneFull", "STARsolo's output folder", "Give GeneFull/filtered or Gene/filtered in it"),
    ("Gene", "STARsolo's output folder", "Give Gene/filtered in it"),
    ("filtered", "a folder of STARsolo", "Give the folder filtered in it"),
    ("spliced.mtx*", "STARsolo's Velocyto folder, with several counts per gene",
     "Give the folder Gene or GeneFull beside it, or a folder with spliced.mtx named matrix.mtx"),
    ("cells_x_genes*.mtx*", "output of kallisto and bustools", "Run kb count with --h5ad, or with --cellranger"),
    ("quants_mat*", "output of alevin", "Convert it with alevinQC, tximport or pyroe, and write h5ad"),
    ("DGE.mtx*", "output of Parse Biosciences", _PARSE),
    ("count_matrix.mtx*", "output of Parse Biosciences", _PARSE),
    ("__tiledb_group.tdb", "a SOMA experiment", _SOMA),
    ("__group", "a SOMA experiment", _SOMA),
    ("se.rds", "a saved SummarizedExperiment", _IN_R),
    ("*.h5ad", "a folder of h5ad files", "Give each file in its own row of the sheet"),
    ("*.h5", "a folder of HDF5 files", "Give each file in its own row of the sheet"),
    ("*.zarr", "a folder of Zarr folders", "Give each of them in its own row of the sheet"),
)  # fmt: skip
_SHEET = "Correct the column `source` of the datasets sheet"
_FAILURES = {
    errno.ENOENT: ("no such file", _SHEET),
    errno.ENOTDIR: ("no such file: a part of the path is no folder", _SHEET),
    errno.ELOOP: ("a link that leads back to itself", _SHEET),
    errno.ENAMETOOLONG: ("the path is too long", _SHEET),
    errno.EACCES: ("permission denied", "Ask its owner for permission to read it and the folders above it"),
    errno.EPERM: ("permission denied", "Ask its owner for permission to read it and the folders above it"),
    errno.EAGAIN: ("open for writing in another process", "Close it there, for example in a notebook, then run again"),
    errno.ENOLCK: ("its disk cannot lock files", "Set HDF5_USE_FILE_LOCKING=FALSE in the environment"),
    errno.ENOSYS: ("its disk cannot lock files", "Set HDF5_USE_FILE_LOCKING=FALSE in the environment"),
    errno.ENOTSUP: ("its disk cannot lock files", "Set HDF5_USE_FILE_LOCKING=FALSE in the environment"),
    errno.EIO: ("its disk reports a read error", "Check the disk or the network, then run again"),
    errno.ESTALE: ("its disk is no longer there", "Check the network, then run again"),
    errno.EMFILE: ("too many open files", "Raise the limit with `ulimit -n`, then run again"),
    errno.ENOMEM: ("not enough memory to read it", "Run with more memory"),
}


def find_kind(path: Path) -> str:
    """Return how to open a source: ``hdf5``, ``zarr`` or ``10x folder``.

    Raises
    ------
    InputError
        If it cannot be read; says what it is and what to do.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            zarr = any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zattrs", ".zarray"))
            return "zarr" if zarr else "10x folder"
        if not stat.S_ISREG(mode):
            raise InputError(path, "not a file, but a pipe, a socket or a device", f"Give {KINDS}")
        with path.open("rb") as file:
            start = file.read(1 << 16)
    except OSError as error:
        if error.errno == errno.ENOENT and path.is_symlink():
            raise InputError(path, f"a link to {path.readlink()}, which does not exist", _SHEET) from error
        raise explain_failure(error, path, "file") from error
    if path.suffix in _UNFINISHED or path.with_name(f"{path.name}.aria2").exists():
        raise InputError(path, "its download is not finished", "Wait for its end, or download it again")
    if h5py.is_hdf5(path):
        return "hdf5"
    raise InputError(path, *_recognise(path, start))


def _recognise(path: Path, start: bytes) -> tuple[str, str]:
    """Return what a file is that is not HDF5, and what to do."""
    if not start:
        return "an empty file", _AGAIN
    if start.startswith(b"\x1f\x8b"):
        return _recognise_gzipped(path, start)
    if start.startswith(b"PK\x03\x04"):
        return next(found for name, *found in _ZIPPED if name in start)
    if start[257:262] == b"ustar":
        return "a tar archive", "Unpack it with `tar -xf` and give the study in it"
    head = start.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n").lower()
    for known, problem, fix in _STARTS:
        if head.startswith(known):
            return problem, fix
    if b"\0" not in start and head[:1].isascii() and re.search(rb"[\t,;]", start.split(b"\n")[0]):
        return "a table of text", _TABLE
    return "not a complete h5ad file, nor any other supported format", f"Give {KINDS}"


def _recognise_gzipped(path: Path, start: bytes) -> tuple[str, str]:
    try:
        inner = zlib.decompressobj(wbits=31).decompress(start, 4096)
    except zlib.error:
        return "a damaged gzip file", _AGAIN
    if inner.startswith(_HDF5):
        return "a gzipped HDF5 file", f"Unpack it with `gunzip < {path.name} > new.h5ad`"
    problem, fix = _recognise(path, inner)
    if "tar archive" in problem:
        fix = "Unpack it with `tar -xzf` and give the study in it"
    if "complete" in problem:
        return "a gzip file of unknown content", f"Unpack it with `gunzip`. Give {KINDS}"
    return f"gzipped: {problem}", fix


def explain_keys(keys: Collection[str], source: str, kind: str) -> InputError:
    """Return the error for an HDF5 file or a Zarr folder that is no study."""
    for known, problem, fix in _KEYS:
        if known <= set(keys):
            return InputError(source, problem, fix)
    listed = ", ".join(sorted(keys)[:10]) or "nothing"
    return InputError(source, f"not a complete {kind}: contains {listed}", f"Give {KINDS}")


def explain_folder(folder: Path) -> InputError | None:
    """Return the error for a folder of a known kind that is no 10x folder, if it is one."""
    for pattern, problem, fix in _PARTS:
        if any(folder.glob(pattern)):
            return InputError(folder, problem, fix)
    return None


def explain_failure(error: Exception, source: object, kind: str) -> InputError:
    """Return the error for a failure of h5py, zarr, anndata or the system, with its true reason.

    Parameters
    ----------
    error
        What was raised.
    source
        The file or a part of it.
    kind
        What it should be, for a failure of unknown reason.
    """
    text = " ".join(str(error).split())
    if stopped := re.search(r"truncated file: eof = (\d+).*stored_eof = (\d+)", text):
        cut = f"cut off: {stopped[1]} of {stopped[2]} bytes"
        return InputError(source, cut, "Its download or copy stopped early, or goes on: fetch it again")
    if "already open for write" in text:
        problem = "open for writing, or its writer was killed"
        return InputError(source, problem, "Close it there; if nothing writes it, write it again (or run `h5clear -s`)")
    number = getattr(error, "errno", None) or next(iter(re.findall(r"errno = (\d+)", text)), 0)
    if int(number) in _FAILURES:
        return InputError(source, *_FAILURES[int(number)])
    if int(number):
        return InputError(source, f"cannot be read: {os.strerror(int(number))}", "Check the disk, then run again")
    if isinstance(error, RecursionError):
        return InputError(source, "a group that contains itself", _AGAIN)
    if isinstance(error, MemoryError):
        return InputError(source, *_FAILURES[errno.ENOMEM])
    return InputError(source, f"not a complete {kind} ({type(error).__name__}: {text[:200]})", _AGAIN)
