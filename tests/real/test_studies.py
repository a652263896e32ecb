"""Eight real studies pass unchanged: whole counts, known ids, and at least 90% of the labelled cells kept."""

import anndata as ad
import numpy as np
import pytest

from cell2text.cells.fetch_dataset import fetch_dataset
from cell2text.cells.filter_cells import filter_cells
from cell2text.config import check_config
from cell2text.contracts import QC
from cell2text.settings import QcSettings

STUDIES = (
    "brain_darmanis",
    "lung_lines_mixology",
    "nsclc_zilionis",
    "pancreas_baron",
    "pbmc3k",
    "pdac_moncada",
    "telencephalon_culture",
    "tnbc_wu",
)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_passes_unchanged(tmp_path, request, name):
    source = request.config.rootpath.parent / f"shared/data/studies/{name}.h5ad"
    if not source.exists():
        pytest.skip(f"{source} does not exist")
    fetch_dataset({"dataset": name, "source": str(source)}, tmp_path / "raw.h5ad")
    given, cells = ad.read_h5ad(source), ad.read_h5ad(tmp_path / "raw.h5ad")
    assert list(cells.obs_names) == [f"{name}|{barcode}" for barcode in given.obs_names]
    assert list(cells.var_names) == list(given.var_names)
    assert (cells.var["symbol"] == given.var["feature_name"].astype(str)).all()
    assert (cells.X != given.X).nnz == 0
    for column in cells.obs.columns.intersection(given.obs.columns):
        assert (cells.obs[column].astype(str).to_numpy() == given.obs[column].astype(str).to_numpy()).all(), column

    files = [tmp_path / file for file in ("kept.h5ad", "qc.parquet", "qc.json", "qc.svg")]
    schema = request.config.rootpath / "workflow/schemas/config.schema.yaml"
    limits = QcSettings(**check_config({"run": "test"}, schema, "test")["qc"])
    filter_cells(tmp_path / "raw.h5ad", *files, limits=limits)
    table, kept = QC.read(files[1]), ad.read_h5ad(files[0])
    labelled = (given.obs["cell_type_ontology_term_id"] != "unknown").to_numpy()
    assert table["kept"][labelled].mean() >= 0.9
    assert not table["kept"][~labelled].any()
    assert list(kept.obs_names) == list(table["cell_id"][table["kept"]])
    assert (given.X[np.flatnonzero(table["kept"])] != kept.X).nnz == 0
