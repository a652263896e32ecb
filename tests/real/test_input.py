"""Real studies in other formats that users have: log1p values, genes by symbol, compressed by gene."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse

from cell2text.cells import matrices
from cell2text.cells.fetch_dataset import fetch_dataset
from cell2text.cells.genes import map_genes, read_gene_table


@pytest.fixture
def shared(request):
    folder = request.config.rootpath.parent / "shared/data"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    return folder


def fetch(cells, folder, *tables, **row):
    cells.write_h5ad(folder / "in.h5ad")
    fetch_dataset({"dataset": "s", "source": str(folder / "in.h5ad")} | row, folder / "out.h5ad", *tables)
    return ad.read_h5ad(folder / "out.h5ad")


@pytest.mark.parametrize("target", [1e4, 1e6, None], ids=["ten thousand", "million", "median"])
@pytest.mark.parametrize(
    "name",
    ["brain_darmanis", "pbmc3k", "pancreas_baron", "lung_lines_mixology", "tnbc_wu", "nsclc_zilionis", "pdac_moncada"],
)
def test_counts_are_recovered_from_logs_exactly(tmp_path, shared, name, target):
    given = ad.read_h5ad(shared / f"studies/{name}.h5ad")
    logs = given.copy()
    logs.X = logs.X.astype(np.float32)
    sc.pp.normalize_total(logs, target_sum=target)
    sc.pp.log1p(logs)
    provable = given.X.getnnz(axis=1) >= 20
    assert provable.mean() > 0.99
    assert (given.X.multiply(provable[:, None]) != fetch(logs, tmp_path).X).nnz == 0


def test_a_study_compressed_by_gene_is_sorted_on_disk(tmp_path, shared, monkeypatch):
    monkeypatch.setattr(matrices, "VALUES_AT_ONCE", 100_000)
    given = ad.read_h5ad(shared / "studies/tnbc_wu.h5ad")
    by_gene = given.copy()
    by_gene.X = sparse.csc_matrix(by_gene.X)
    assert (fetch(by_gene, tmp_path).X != given.X).nnz == 0


@pytest.mark.parametrize("with_table", [False, True], ids=["no table", "table"])
@pytest.mark.parametrize("name", ["pbmc3k", "tnbc_wu"])
def test_symbols_written_by_r_are_found_again(shared, name, with_table):
    symbols = ad.read_h5ad(shared / f"studies/{name}.h5ad", backed="r").var["feature_name"].astype(str)
    symbols = symbols[~symbols.str.match("ENSG")].drop_duplicates()
    by_r = symbols.str.replace("[^A-Za-z0-9._]", ".", regex=True)
    table = read_gene_table(shared / "genes/genes_homo_sapiens.csv.gz") if with_table else None
    lost = set(symbols) - set(map_genes(pd.DataFrame(index=by_r), name, table).genes["symbol"])
    # clones, snoRNAs and the like
    assert len(lost) <= 3 and not any(symbol.startswith(("MT-", "HLA-", "RP", "NKX")) for symbol in lost)


@pytest.mark.parametrize("name", ["pbmc3k", "pancreas_baron", "tnbc_wu"])
def test_symbols_are_mapped_to_ids(tmp_path, shared, name):
    given = ad.read_h5ad(shared / f"studies/{name}.h5ad")
    by_symbol = ad.AnnData(given.X, given.obs)
    by_symbol.var_names = given.var["feature_name"].astype(str).to_numpy()
    by_symbol.var_names_make_unique()
    written = fetch(by_symbol, tmp_path, shared / "genes/genes_homo_sapiens.csv.gz")
    assert written.uns["counts_kept"] > 0.98
    common = written.var_names.intersection(given.var_names)
    assert len(common) > 0.98 * given.n_vars
    same = (written[:, common].X != given[:, common].X).getnnz(axis=0) == 0
    assert same.mean() > 0.99  # symbols of two genes were summed
