"""A disk that fills up while counts are filtered, sorted or embedded: one line with the file and its disk."""

import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cell2text.cells.filter_cells import filter_cells
from cell2text.cells.matrices import sort_by_cell
from cell2text.contracts import EMBEDDINGS
from cell2text.errors import InputError
from default_settings import qc_settings
from small_disk import small_files

LINE = r"(.*): cannot be written: File too large \(disk: /.*\)\. Raise the limit on the size of files .*"


def write_counts(path, cells=300, genes=400):
    counts = np.random.default_rng(0).poisson(1.5, (cells, genes)).astype(np.float32)
    columns = {"dataset_id": "study", "donor_id": "a", "cell_type_ontology_term_id": "CL:0000236"}
    obs = pd.DataFrame(columns, index=[f"study|{i}" for i in range(cells)]).astype("category")
    var = pd.DataFrame({"symbol": [f"G{i}" for i in range(genes)]}, index=[f"g{i}" for i in range(genes)])
    ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=var).write_h5ad(path)
    return path


def test_filtering_names_the_file_that_did_not_fit(tmp_path):
    cells = write_counts(tmp_path / "in.h5ad")
    folder = tmp_path / "out"
    outputs = [folder / name for name in ("kept.h5ad", "qc.parquet", "qc.json", "qc.svg")]
    own = {"min_genes": 1, "min_counts": 1, "max_mitochondrial_percent": 100}
    named, sizes = set(), [0, 500, 5_000, 20_000, 50_000, 100_000]
    for doublets, size in [*((False, size) for size in sizes), (True, 100_000), (True, 10_000_000)]:
        try:
            with small_files(size):
                filter_cells(cells, *outputs, limits=qc_settings(score_doublets=doublets), own_limits=own)
        except InputError as error:
            named.add(re.fullmatch(LINE, str(error))[1])
            assert not [path for path in folder.rglob("*") if path not in outputs], "scratch files are left"
    assert all(path.is_file() for path in outputs)  # the last size suffices
    assert named == {str(folder / name) for name in ("kept.h5ad", "qc.parquet", "qc.svg", "qc.parquet.scratch")}


def test_sorting_names_its_scratch_folder(tmp_path):
    entries = np.arange(5000) % 50, np.arange(5000) % 70, np.ones(5000, dtype=np.float32)
    with pytest.raises(InputError, match=LINE) as error, small_files(1000):
        list(sort_by_cell(iter([entries]), 5000, (50, 70), tmp_path / "scratch", "a.h5ad"))
    assert str(error.value).startswith(f"{tmp_path}/scratch: ")
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").write_text("in place of a folder")
    with pytest.raises(InputError, match="scratch: cannot be written: Not a directory"):
        list(sort_by_cell(iter([entries]), 5000, (50, 70), tmp_path / "file/scratch", "a.h5ad"))


def test_vectors_name_their_file(tmp_path):
    vectors = {
        "pooled": np.zeros((100, 64), dtype=np.float32),
        "gene_vectors": np.zeros((100, 8, 64), dtype=np.float16),
        "lengths": np.full(100, 8, dtype=np.int32),
    }
    with pytest.raises(InputError, match=LINE) as error, small_files(20_000):
        EMBEDDINGS.write(vectors, [f"study|{i}" for i in range(100)], tmp_path / "0.safetensors")
    assert str(error.value).startswith(f"{tmp_path}/0.safetensors: ")
    assert not any(tmp_path.iterdir())
