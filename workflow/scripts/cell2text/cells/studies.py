"""Studies in the formats of their authors: h5ad, AnnData Zarr, 10x HDF5, 10x folders, and one bundled with scanpy.

A study is opened, not loaded: only the requested columns of ``obs`` are read, matrices stay on disk.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scanpy as sc
import zarr
from scipy import sparse

from cell2text.cells.formats import BUNDLED, KINDS, explain_failure, explain_folder, explain_keys, find_kind
from cell2text.cells.genes import VAR_COLUMNS
from cell2text.cells.guards import Bounds, check_hdf5, open_zarr
from cell2text.cells.matrices import CellMatrix, DenseMatrix, GeneMatrix, Matrix
from cell2text.cells.matrix_market import EntryList
from cell2text.errors import InputError
from cell2text.tables import read_columns

SPECIES = {"NCBITaxon:9606": "human", "NCBITaxon:10090": "mouse"}
CHUNK_CACHE = 32 * 2**20  # bytes of HDF5 chunks kept unpacked per array, so that reading in batches unpacks each once
_REWRITE = "Download or write the file again"


@dataclass(frozen=True)
class Study:
    """A study on disk.

    Parameters
    ----------
    where
        The file, for messages.
    obs
        The requested columns of ``obs`` that exist, indexed by barcode.
    obs_columns
        Names of all columns of ``obs``.
    matrices
        Each matrix by its place (``X``, ``raw.X``, ``layers["name"]``), with its gene table.
    species
        NCBI taxonomy ids, if the file names them.
    """

    where: str
    obs: pd.DataFrame
    obs_columns: list[str]
    matrices: dict[str, tuple[Matrix, pd.DataFrame]]
    species: list[str] = field(default_factory=list)


@contextmanager
def open_study(source: str, columns: Iterable[str] = ()) -> Iterator[Study]:
    """Open a study; its format is detected from its content.

    Parameters
    ----------
    source
        Path, or ``BUNDLED``.
    columns
        Columns of ``obs`` to read, if they exist.

    Raises
    ------
    InputError
        If the study does not exist, has an unsupported format, or is damaged.
    """
    wanted = [*columns, "organism_ontology_term_id"]
    if source == BUNDLED:
        yield _from_memory(sc.datasets.pbmc68k_reduced(), source, wanted)
        return
    if "://" in source:
        raise InputError(f"datasets sheet: source: {source}", "unsupported kind of source", f"Give {KINDS}")
    path = Path(source)
    kind = find_kind(path)
    if kind == "zarr":
        with _report_failure(source, "Zarr folder"):
            store, bounds = open_zarr(path)
            group = zarr.open(store, mode="r")
            if isinstance(group, zarr.Array):
                raise InputError(source, "a single Zarr array, not a study", f"Give {KINDS}")
            if not {"obs", "var"} <= set(group) or "mod" in group:
                raise explain_keys(set(group), source, "AnnData Zarr folder")
            study = _from_anndata(group, source, wanted, bounds)
        yield study
    elif kind == "10x folder":
        with _report_failure(source, "10x folder"):
            study = _from_10x_folder(path)
        yield study
    else:
        with _report_failure(source, "h5ad file"):
            file = h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE)
        with file:
            with _report_failure(source, "h5ad file"):
                check_hdf5(file, source)
                study = _from_hdf5(file, source, wanted, Bounds(path.stat().st_size))
            yield study


@contextmanager
def _report_failure(source: str, kind: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a damaged file may fail anywhere in h5py, zarr or anndata
        raise explain_failure(error, source, kind) from error


def _from_hdf5(file: h5py.File, source: str, wanted: list[str], bounds: Bounds) -> Study:
    if isinstance(file.get("obs"), h5py.Dataset):
        # before anndata 0.7 a table was one compound dataset; such files are small
        bounds.check_file(file, f"{source}: ")
        return _from_memory(ad.read_h5ad(source), source, wanted)
    if {"obs", "var"} <= set(file) and "mod" not in file:
        return _from_anndata(file, source, wanted, bounds)
    genomes = [name for name, group in file.items() if isinstance(group, h5py.Group) and "barcodes" in group]
    if len(genomes) == 1:
        return _from_10x_hdf5(file[genomes[0]], source, bounds)
    if genomes:
        raise InputError(source, f"several genomes: {', '.join(genomes)}", "Give a file with human genes only")
    raise explain_keys(set(file), source, "h5ad file")


def _from_anndata(group: Any, source: str, wanted: list[str], bounds: Bounds) -> Study:
    """Return the study in an HDF5 or Zarr group written by AnnData."""
    obs, names = read_table(group["obs"], wanted, f"{source}: obs", bounds)
    var, _ = read_table(group["var"], VAR_COLUMNS, f"{source}: var", bounds)
    matrices: dict[str, tuple[Matrix, pd.DataFrame]] = {}
    raw = _entries(group, "raw")
    if "X" in raw and not _is_null(raw["X"]):
        genes, _ = read_table(raw["var"], VAR_COLUMNS, f"{source}: raw.var", bounds)
        matrices["raw.X"] = _stored(raw["X"], f"{source}: raw.X", bounds), _add_columns(genes, var)
    for name, layer in _entries(group, "layers").items():
        place = f'layers["{name}"]'
        matrices[place] = _stored(layer, f"{source}: {place}", bounds), var
    if "X" in group and not _is_null(group["X"]):
        matrices["X"] = _stored(group["X"], f"{source}: X", bounds), var
    for place, (matrix, genes) in matrices.items():
        if matrix.shape != (len(obs), len(genes)):
            raise InputError(
                f"{source}: {place}", f"{matrix.shape} values for {len(obs)} cells and {len(genes)} genes", _REWRITE
            )
    uns, key = _entries(group, "uns"), "organism_ontology_term_id"
    if key in uns:
        bounds.check_whole(uns[key], f"{source}: uns/{key}")
    species = [_text(ad.io.read_elem(uns[key]))] if key in uns else []
    return Study(source, obs, names, matrices, species or _species(obs))


def _entries(group: Any, name: str) -> dict[str, Any]:
    """Return the members of a group of the file; an empty group may be missing or stored as something else."""
    entry = group.get(name)
    return {key: entry[key] for key in entry} if hasattr(entry, "keys") else {}


def _species(obs: pd.DataFrame) -> list[str]:
    column = obs.get("organism_ontology_term_id")
    return [] if column is None else sorted(column.dropna().astype(str).unique())


def _add_columns(genes: pd.DataFrame, var: pd.DataFrame) -> pd.DataFrame:
    """Add the columns that only ``var`` has to the genes of ``raw``."""
    absent = [column for column in var if column not in genes]
    if not absent or var.index.has_duplicates:
        return genes
    return genes.join(var[absent])


def _stored(element: Any, where: str, bounds: Bounds) -> Matrix:
    """Return a matrix written by AnnData."""
    if hasattr(element, "shape"):
        bounds.check_blocks(element, 2, where)
        return DenseMatrix(element, where)
    kind = _text(element.attrs.get("encoding-type") or element.attrs.get("h5sparse_format", "absent"))
    shape = tuple(int(size) for size in element.attrs.get("shape", element.attrs.get("h5sparse_shape", ())))
    matrix_class = {"csr": CellMatrix, "csc": GeneMatrix}.get(kind.removesuffix("_matrix"))
    if matrix_class is None or len(shape) != 2:
        raise InputError(where, f"neither dense nor sparse (encoding-type {kind})", _REWRITE)
    return _sparse(matrix_class, element, shape, where, bounds)


def _sparse(matrix_class: type, group: Any, shape: tuple[int, int], where: str, bounds: Bounds) -> Matrix:
    arrays = [group[name] for name in ("data", "indices", "indptr")]
    for array, name in zip(arrays, ("data", "indices", "indptr"), strict=True):
        bounds.check_blocks(array, 1, f"{where}: {name}")
        if name != "data" and array.dtype.kind not in "iu":
            raise InputError(f"{where}: {name}", f"values of type {array.dtype}, not integers", _REWRITE)
        # Missing chunks of a Zarr folder are read as zeros. Chunks of zeros are not written, but here they are hardly
        # possible unless there is a single short one.
        checked = name != "indptr" and isinstance(array, zarr.Array) and array.size > min(*array.chunks, max(shape))
        if checked and array.nchunks_initialized < array.nchunks:
            raise InputError(f"{where}: {name}", "parts of the folder are missing", "Copy or download it again")
    return matrix_class(*arrays, shape, where)


def _is_null(element: Any) -> bool:
    return _text(element.attrs.get("encoding-type", "")) == "null" or getattr(element, "shape", ()) is None


def read_table(group: Any, columns: Iterable[str], where: str, bounds: Bounds) -> tuple[pd.DataFrame, list[str]]:
    """Return selected columns of a table written by AnnData, and the names of all columns.

    Parameters
    ----------
    group
        The table, in HDF5 or Zarr.
    columns
        Columns to read, if they exist.
    where
        The table, for messages.
    bounds
        How much the file may declare.

    Raises
    ------
    InputError
        If row names are missing, or a column cannot be read or does not hold one value per row.
    """
    key = _text(group.attrs.get("_index", "_index"))
    if key not in group:
        raise InputError(where, f"no row names (no column {key})", _REWRITE)
    index = pd.Index(_column(group, key, f"{where}: {key}", bounds)).astype(str)
    table = {}
    for name in dict.fromkeys(columns):
        if name not in group:
            continue
        fix = "Correct the column or drop it"
        try:
            table[name] = _column(group, name, f"{where}: {name}", bounds)
        except InputError:
            raise
        except Exception as error:  # anndata raises many types
            raise InputError(f"{where}: {name}", f"cannot be read ({type(error).__name__})", fix) from error
        if np.ndim(table[name]) != 1 or len(table[name]) != len(index):
            raise InputError(f"{where}: {name}", "does not hold one value per row", fix)
    return pd.DataFrame(table, index=index), [name for name in group if name not in (key, "__categories")]


def _column(group: Any, name: str, where: str, bounds: Bounds) -> Any:
    """Return the values of a column, strings as str."""
    element = group[name]
    bounds.check_whole(element, where)
    if "categories" in element.attrs:  # the format of anndata 0.7
        names = group[element.attrs["categories"]]
        bounds.check_whole(names, where)
        values = pd.Categorical.from_codes(element[:], _decode(names[:]))
    else:
        values = ad.io.read_elem(element)
    if isinstance(values, pd.Categorical):
        return values.rename_categories(_decode(values.categories.to_numpy()))
    return _decode(values) if isinstance(values, np.ndarray) else values


def _decode(values: np.ndarray) -> np.ndarray:
    """Return strings stored as bytes as str; other values unchanged."""
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8").astype(object)
    if values.dtype == object and len(values) and isinstance(values.flat[0], bytes):
        return np.array([_text(value) for value in values], dtype=object)
    return values


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _from_memory(cells: ad.AnnData, source: str, wanted: list[str]) -> Study:
    obs = cells.obs[[column for column in wanted if column in cells.obs]]
    stored = {f'layers["{name}"]': (layer, cells.var) for name, layer in cells.layers.items()}
    if cells.raw is not None and cells.raw.n_vars:
        stored = {"raw.X": (cells.raw.X, cells.raw.var)} | stored
    if cells.X is not None:
        stored["X"] = cells.X, cells.var
    matrices = {place: (_in_memory(matrix, f"{source}: {place}"), var) for place, (matrix, var) in stored.items()}
    return Study(source, obs, list(cells.obs), matrices, _species(obs))


def _in_memory(matrix: Any, where: str) -> Matrix:
    if isinstance(matrix, np.ndarray):
        return DenseMatrix(matrix, where)
    matrix_class = GeneMatrix if sparse.issparse(matrix) and matrix.format == "csc" else CellMatrix
    return matrix_class(matrix.data, matrix.indices, matrix.indptr, matrix.shape, where)


def _from_10x_hdf5(group: h5py.Group, source: str, bounds: Bounds) -> Study:
    """Return the study in an HDF5 file from Cell Ranger: genes by cells, compressed by cell."""
    features = group.get("features", group)
    names = {"gene_ids": "id", "gene_symbols": "name", "feature_types": "feature_type"}
    if features is group:  # Cell Ranger 2
        names = {"gene_ids": "genes", "gene_symbols": "gene_names"}
    names = {column: name for column, name in names.items() if name in features}
    if "gene_symbols" not in names:
        raise InputError(source, f"no names of genes: contains {', '.join(features)}", _REWRITE)
    for table in (group["barcodes"], group["shape"], *(features[name] for name in names.values())):
        bounds.check_whole(table, f"{source}: {table.name}")
    barcodes = _decode(group["barcodes"][:])
    genes = pd.DataFrame({column: _decode(features[name][:]) for column, name in names.items()})
    shape = len(barcodes), len(genes)
    if tuple(group["shape"][:]) != shape[::-1]:
        raise InputError(
            source, f"{tuple(group['shape'][:])} values for {shape[1]} genes and {shape[0]} cells", _REWRITE
        )
    matrix = _sparse(CellMatrix, group, shape, source, bounds)
    return Study(source, pd.DataFrame(index=barcodes), [], {"X": (matrix, genes.set_index("gene_symbols", drop=False))})


def _from_10x_folder(folder: Path) -> Study:
    """Return the study in a folder from Cell Ranger, whose file names may have a prefix."""
    if not any(folder.glob("*matrix.mtx*")) and (error := explain_folder(folder)):
        raise error
    matrix = EntryList.open(_only_file(folder, "matrix.mtx"))
    barcodes = read_columns(_only_file(folder, "barcodes.tsv"))[0]
    genes = read_columns(_only_file(folder, "features.tsv", "genes.tsv"))
    genes = genes.rename(columns={0: "gene_ids", 1: "gene_symbols", 2: "feature_types"})
    if "gene_symbols" not in genes:
        genes["gene_symbols"] = genes["gene_ids"]
    if matrix.shape == (len(genes), len(barcodes)) != matrix.shape[::-1]:
        problem = f"cells by genes ({matrix.shape[1]} x {matrix.shape[0]}), not genes by cells"
        raise InputError(matrix.path, problem, "In Python: scipy.io.mmwrite(file, scipy.io.mmread(file).T)")
    if matrix.shape != (len(barcodes), len(genes)):
        raise InputError(
            matrix.path, f"{matrix.shape} values for {len(barcodes)} cells and {len(genes)} genes", _REWRITE
        )
    var = genes.set_index("gene_symbols", drop=False)
    return Study(str(folder), pd.DataFrame(index=pd.Index(barcodes)), [], {"X": (matrix, var)})


def _only_file(folder: Path, *endings: str) -> Path:
    found = sorted(
        path
        for ending in endings
        for name in (ending, f"{ending}.gz")
        for path in folder.glob(f"*{name}")
        if not path.name.startswith(".")  # such as ._matrix.mtx, which macOS adds to archives
    )
    if len(found) != 1:
        listed = ", ".join(path.name for path in found) or "none"
        raise InputError(
            folder, f"expected one file {' or '.join(endings)}, found {listed}", "Keep one study per 10x folder"
        )
    return found[0]
