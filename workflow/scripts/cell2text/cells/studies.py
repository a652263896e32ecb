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

from cell2text.cells.genes import VAR_COLUMNS
from cell2text.cells.matrices import CellMatrix, DenseMatrix, EntryList, GeneMatrix, Matrix
from cell2text.errors import InputError
from cell2text.tables import read_columns

BUNDLED = "scanpy://pbmc68k_reduced"
HUMAN = "NCBITaxon:9606"
KINDS = f"an h5ad file, an AnnData Zarr folder, a 10x HDF5 file, a 10x folder or {BUNDLED}"
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
    path = Path(source)
    wanted = [*columns, "organism_ontology_term_id"]
    if source == BUNDLED:
        yield _from_memory(sc.datasets.pbmc68k_reduced(), source, wanted)
    elif "://" in source:
        raise InputError(f"datasets sheet: source: {source}", "unsupported kind of source", f"Give {KINDS}")
    elif path.is_dir() and any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zattrs")):
        with _report_damage(source, "Zarr folder"):
            study = _from_anndata(zarr.open_group(path, mode="r"), source, wanted)
        yield study
    elif path.is_dir():
        yield _from_10x_folder(path)
    elif not path.is_file():
        raise InputError(source, "no such file", "Correct the column `source` of the datasets sheet")
    elif not h5py.is_hdf5(path):
        raise InputError(source, "not a complete h5ad file, nor any other supported format", f"Give {KINDS}")
    else:
        with _report_damage(source, "h5ad file"):
            file = h5py.File(path, "r")
        with file:
            with _report_damage(source, "h5ad file"):
                study = _from_hdf5(file, source, wanted)
            yield study


@contextmanager
def _report_damage(source: str, kind: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a damaged file may fail anywhere in h5py, zarr or anndata
        raise InputError(source, f"not a complete {kind} ({type(error).__name__})", _REWRITE) from error


def _from_hdf5(file: h5py.File, source: str, wanted: list[str]) -> Study:
    if isinstance(file.get("obs"), h5py.Dataset):
        # before anndata 0.7 a table was one compound dataset; such files are small
        return _from_memory(ad.read_h5ad(source), source, wanted)
    if "obs" in file and "var" in file:
        return _from_anndata(file, source, wanted)
    genomes = [name for name, group in file.items() if isinstance(group, h5py.Group) and "barcodes" in group]
    if len(genomes) == 1:
        return _from_10x_hdf5(file[genomes[0]], source)
    if genomes:
        raise InputError(source, f"several genomes: {', '.join(genomes)}", "Give a file with human genes only")
    raise InputError(source, f"not a complete h5ad file: contains {', '.join(file) or 'nothing'}", f"Give {KINDS}")


def _from_anndata(group: Any, source: str, wanted: list[str]) -> Study:
    """Return the study in an HDF5 or Zarr group written by AnnData."""
    obs, names = read_table(group["obs"], wanted, f"{source}: obs")
    var, _ = read_table(group["var"], VAR_COLUMNS, f"{source}: var")
    matrices: dict[str, tuple[Matrix, pd.DataFrame]] = {}
    raw = _entries(group, "raw")
    if "X" in raw and not _is_null(raw["X"]):
        genes, _ = read_table(raw["var"], VAR_COLUMNS, f"{source}: raw.var")
        matrices["raw.X"] = _stored(raw["X"], f"{source}: raw.X"), _add_columns(genes, var)
    for name, layer in _entries(group, "layers").items():
        place = f'layers["{name}"]'
        matrices[place] = _stored(layer, f"{source}: {place}"), var
    if "X" in group and not _is_null(group["X"]):
        matrices["X"] = _stored(group["X"], f"{source}: X"), var
    for place, (matrix, genes) in matrices.items():
        if matrix.shape != (len(obs), len(genes)):
            raise InputError(
                f"{source}: {place}", f"{matrix.shape} values for {len(obs)} cells and {len(genes)} genes", _REWRITE
            )
    uns = _entries(group, "uns")
    species = [_text(ad.io.read_elem(uns["organism_ontology_term_id"]))] if "organism_ontology_term_id" in uns else []
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


def _stored(element: Any, where: str) -> Matrix:
    """Return a matrix written by AnnData."""
    if hasattr(element, "shape"):
        return DenseMatrix(element, where)
    kind = _text(element.attrs.get("encoding-type") or element.attrs.get("h5sparse_format", "absent"))
    shape = tuple(int(size) for size in element.attrs.get("shape", element.attrs.get("h5sparse_shape", ())))
    matrix_class = {"csr": CellMatrix, "csc": GeneMatrix}.get(kind.removesuffix("_matrix"))
    if matrix_class is None or len(shape) != 2:
        raise InputError(where, f"neither dense nor sparse (encoding-type {kind})", _REWRITE)
    return matrix_class(element["data"], element["indices"], element["indptr"], shape, where)


def _is_null(element: Any) -> bool:
    return _text(element.attrs.get("encoding-type", "")) == "null" or getattr(element, "shape", ()) is None


def read_table(group: Any, columns: Iterable[str], where: str) -> tuple[pd.DataFrame, list[str]]:
    """Return selected columns of a table written by AnnData, and the names of all columns.

    Parameters
    ----------
    group
        The table, in HDF5 or Zarr.
    columns
        Columns to read, if they exist.
    where
        The table, for messages.

    Raises
    ------
    InputError
        If row names are missing, or a column cannot be read or does not hold one value per row.
    """
    key = _text(group.attrs.get("_index", "_index"))
    if key not in group:
        raise InputError(where, f"no row names (no column {key})", _REWRITE)
    index = pd.Index(_column(group, key)).astype(str)
    table = {}
    for name in dict.fromkeys(columns):
        if name not in group:
            continue
        fix = "Correct the column or drop it"
        try:
            table[name] = _column(group, name)
        except Exception as error:  # anndata raises many types
            raise InputError(f"{where}: {name}", f"cannot be read ({type(error).__name__})", fix) from error
        if np.ndim(table[name]) != 1 or len(table[name]) != len(index):
            raise InputError(f"{where}: {name}", "does not hold one value per row", fix)
    return pd.DataFrame(table, index=index), [name for name in group if name not in (key, "__categories")]


def _column(group: Any, name: str) -> Any:
    """Return the values of a column, strings as str."""
    element = group[name]
    if "categories" in element.attrs:  # the format of anndata 0.7
        values = pd.Categorical.from_codes(element[:], _decode(group[element.attrs["categories"]][:]))
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


def _from_10x_hdf5(group: h5py.Group, source: str) -> Study:
    """Return the study in an HDF5 file from Cell Ranger: genes by cells, compressed by cell."""
    barcodes = _decode(group["barcodes"][:])
    features = group.get("features", group)
    names = {"gene_ids": "id", "gene_symbols": "name", "feature_types": "feature_type"}
    if features is group:  # Cell Ranger 2
        names = {"gene_ids": "genes", "gene_symbols": "gene_names"}
    genes = pd.DataFrame({column: _decode(features[name][:]) for column, name in names.items()})
    shape = len(barcodes), len(genes)
    if tuple(group["shape"][:]) != shape[::-1]:
        raise InputError(
            source, f"{tuple(group['shape'][:])} values for {shape[1]} genes and {shape[0]} cells", _REWRITE
        )
    matrix = CellMatrix(group["data"], group["indices"], group["indptr"], shape, source)
    return Study(source, pd.DataFrame(index=barcodes), [], {"X": (matrix, genes.set_index("gene_symbols", drop=False))})


def _from_10x_folder(folder: Path) -> Study:
    """Return the study in a folder from Cell Ranger, whose file names may have a prefix."""
    matrix = EntryList.open(_only_file(folder, "matrix.mtx"))
    barcodes = read_columns(_only_file(folder, "barcodes.tsv"))[0]
    genes = read_columns(_only_file(folder, "features.tsv", "genes.tsv"))
    genes = genes.rename(columns={0: "gene_ids", 1: "gene_symbols", 2: "feature_types"})
    if "gene_symbols" not in genes:
        genes["gene_symbols"] = genes["gene_ids"]
    if matrix.shape != (len(barcodes), len(genes)):
        raise InputError(
            matrix.path, f"{matrix.shape} values for {len(barcodes)} cells and {len(genes)} genes", _REWRITE
        )
    var = genes.set_index("gene_symbols", drop=False)
    return Study(str(folder), pd.DataFrame(index=pd.Index(barcodes)), [], {"X": (matrix, var)})


def _only_file(folder: Path, *endings: str) -> Path:
    found = sorted(path for ending in endings for name in (ending, f"{ending}.gz") for path in folder.glob(f"*{name}"))
    if len(found) != 1:
        listed = ", ".join(path.name for path in found) or "none"
        raise InputError(
            folder, f"expected one file {' or '.join(endings)}, found {listed}", "Keep one study per 10x folder"
        )
    return found[0]
