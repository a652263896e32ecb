"""Cells of a Census are chosen by their labels and fetched in shards; a small Census on disk replaces the real one."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from scipy import sparse

from cell2text.cells import census
from cell2text.cells import fetch_census_shard as shard_module
from cell2text.cells.choose_census_cells import (
    choose_census_cells,
    find_collections,
    find_exclusions,
    group_cells,
    with_descendants,
)
from cell2text.cells.fetch_census_shard import fetch_census_shard, label_census_cells
from cell2text.cells.fetch_dataset import fetch_dataset
from cell2text.cells.filter_cells import filter_cells
from cell2text.config import check_config
from cell2text.contracts import CELLS, CENSUS_CELLS
from cell2text.corpus.sample_cells import read_labels, sample_cells
from cell2text.corpus.split_donors import split_donors
from cell2text.errors import InputError
from cell2text.files import read_json
from cell2text.settings import CensusSettings, QcSettings, SampleSettings

ROOT = Path(__file__).parents[2]
B_CELL, T_CELL, BLOOD, LUNG, NORMAL = "CL:0000236", "CL:0000084", "UBERON:0000178", "UBERON:0002048", "PATO:0000461"
SMART_SEQ2, TENX, FLEX, FLEX_V1 = "EFO:0008931", "EFO:0009922", "EFO:0022606", "EFO:0920086"
WANTED = CensusSettings(datasets=[], tissues=[], leave_out_datasets=["held-out"], leave_out_assays=[SMART_SEQ2, FLEX])
LIMITS = QcSettings(1, 1, 100, mads=None, score_doublets=False, max_doublet_score=None)
ALL = SampleSettings(cells=1000, shares={"natural": 1.0}, caps={})
GENES = ["ENSG00000010610", "ENSG00000156738", "ENSG00000198804", "ENSG00000090382"]
SYMBOLS = ["CD4", "MS4A1", "MT-CO1", "LYZ"]


def cells_of_the_census(**columns):
    """Twelve cells of two studies; the first ten pass unless changed by ``columns``."""
    base = {
        "dataset_id": ["study-1"] * 6 + ["study-2"] * 6,
        "donor_id": ["d1", "d1", "d2", "d2", "d2", "unknown", "d1", "d1", "d3", "d3", "d3", "d3"],
        "assay_ontology_term_id": TENX,
        "cell_type_ontology_term_id": [B_CELL, T_CELL] * 6,
        "tissue_ontology_term_id": [BLOOD] * 6 + [LUNG] * 6,
        "tissue_general_ontology_term_id": [BLOOD] * 6 + [LUNG] * 6,
        "disease_ontology_term_id": NORMAL,
        "sex_ontology_term_id": ["PATO:0000383"] * 6 + ["unknown"] * 6,
        "development_stage_ontology_term_id": ["HsapDv:0000136"] * 11 + ["unknown"],
        "is_primary_data": [True] * 10 + [False] * 2,
        "cell_type": "not read",
    }
    return pd.DataFrame(base | columns, index=[str(i) for i in range(12)])


COUNTS = np.random.default_rng(0).poisson(2, (12, 4)).astype(np.float32)
COUNTS[3] = 0  # a cell without counts keeps its row


COLLECTIONS = {"study-1": "collection", "study-2": "collection", "elsewhere": "another"}


def write_census(path, obs=None, counts=COUNTS, categories=True, collections=COLLECTIONS, measured=None):
    """Write a Census and return its source; ``measured`` has 0 or 1 for each gene of each study in ``collections``."""
    soma = pytest.importorskip("tiledbsoma", reason="cellxgene-census is not installed (envs/census.yaml)")
    import tiledbsoma.io

    pytest.importorskip("cellxgene_census", reason="cellxgene-census is not installed (envs/census.yaml)")
    obs = cells_of_the_census() if obs is None else obs
    if categories:
        texts = [column for column in obs if column != "is_primary_data"]
        obs = obs.astype(dict.fromkeys(texts, "category"))
    var = pd.DataFrame({"feature_id": GENES, "feature_name": SYMBOLS}, index=["a", "b", "c", "d"])
    with soma.Collection.create(str(path)) as top:
        top.add_new_collection("census_data")
    place = f"{path}/census_data/homo_sapiens"
    human = ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=var)
    tiledbsoma.io.from_anndata(place, human, measurement_name="RNA", X_layer_name="raw")
    with soma.open(f"{path}/census_data", "w") as data, soma.open(place) as experiment:
        data.set("homo_sapiens", experiment)
    if measured:
        presence = sparse.coo_matrix(np.array([measured.get(name, [0] * 4) for name in collections], dtype=np.uint8))
        with soma.open(f"{place}/ms/RNA", "w") as rna:
            matrix = rna.add_new_sparse_ndarray(
                "feature_dataset_presence_matrix", type=pa.uint8(), shape=presence.shape
            )
            matrix.write(pa.SparseCOOTensor.from_scipy(presence))
    if collections:
        with soma.Collection.open(str(path), "w") as top:
            top.add_new_collection("census_info")
        datasets = pa.table(
            {
                "soma_joinid": range(len(collections)),
                "dataset_id": collections,
                "collection_id": [*collections.values()],
            }
        )
        with soma.DataFrame.create(f"{path}/census_info/datasets", schema=datasets.schema, domain=[(0, 9)]) as table:
            table.write(datasets)
        with soma.open(f"{path}/census_info", "w") as info, soma.open(f"{path}/census_info/datasets") as table:
            info.set("datasets", table)
    return f"census://{path}"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_census(tmp_path_factory.mktemp("census") / "soma")


def choose(source, tmp_path, wanted=WANTED, sample=ALL, seed=0):
    choose_census_cells(source, wanted, sample, seed, tmp_path / "chosen.parquet")
    return CENSUS_CELLS.read(tmp_path / "chosen.parquet")


def fetch(source, tmp_path, shard, shards):
    path = tmp_path / f"{shard}.h5ad"
    fetch_census_shard(tmp_path / "chosen.parquet", source, shard, shards, path)
    return ad.read_h5ad(path)


def test_primary_cells_are_chosen_with_their_ids(source, tmp_path):
    chosen = choose(source, tmp_path)
    expected = cells_of_the_census(collection_id="collection").iloc[:10].reset_index(names="soma_joinid")
    expected = expected.astype({"soma_joinid": "int64"})
    pd.testing.assert_frame_equal(chosen, expected[list(CENSUS_CELLS.columns)])


def test_plain_text_columns_and_many_batches_give_the_same(source, tmp_path, monkeypatch):
    chosen = choose(source, tmp_path)
    other = write_census(tmp_path / "soma", categories=False)
    pd.testing.assert_frame_equal(choose(other, tmp_path), chosen)
    monkeypatch.setattr(census, "BUFFER", 64)
    with census.open_census(other) as opened:
        assert sum(1 for _ in census.human_cells(opened).obs.read(column_names=["soma_joinid", "donor_id"])) > 1
    pd.testing.assert_frame_equal(choose(other, tmp_path), chosen)


EXCLUSIONS = {
    "study not selected": {"dataset_id": "held-out"},
    "assay not selected": {"assay_ontology_term_id": SMART_SEQ2},
    "no cell type": {"cell_type_ontology_term_id": "unknown"},
    "no tissue": {"tissue_ontology_term_id": "CL:0000236 (cell culture)"},
    "no disease": {"disease_ontology_term_id": "unknown"},
}


@pytest.mark.parametrize("reason", EXCLUSIONS)
def test_an_unsuitable_cell_is_excluded_and_reported(reason, tmp_path, caplog):
    obs = cells_of_the_census()
    for column, value in EXCLUSIONS[reason].items():
        obs.loc["4", column] = value
    with caplog.at_level("INFO"):
        chosen = choose(write_census(tmp_path / "soma", obs), tmp_path)
    assert list(chosen["soma_joinid"]) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert f"9 primary cells pass; excluded: {reason}: 1" in caplog.text


def test_only_the_first_reason_is_reported():
    cells = cells_of_the_census(cell_type_ontology_term_id="unknown").astype("category")
    cells["assay_ontology_term_id"] = pd.Categorical([SMART_SEQ2, FLEX_V1, TENX] * 4)
    assays = with_descendants(WANTED.leave_out_assays)
    assert {SMART_SEQ2, FLEX, FLEX_V1} <= assays and TENX not in assays
    reasons = find_exclusions(cells, replace(WANTED, datasets=["study-1"]), assays)
    expected = ["assay not selected", "assay not selected", "no cell type"] * 2 + ["study not selected"] * 6
    assert list(reasons) == expected


def test_only_named_studies_are_included(source, tmp_path):
    chosen = choose(source, tmp_path, replace(WANTED, datasets=["study-2"]))
    assert set(chosen["dataset_id"]) == {"study-2"} and len(chosen) == 4


def test_only_named_organs_are_included(tmp_path, caplog):
    veins = cells_of_the_census(tissue_ontology_term_id=["UBERON:0013756"] * 6 + [LUNG] * 6)  # venous blood
    with caplog.at_level("INFO"):
        chosen = choose(write_census(tmp_path / "soma", veins), tmp_path, replace(WANTED, tissues=[BLOOD]))
    assert list(chosen["soma_joinid"]) == [0, 1, 2, 3, 4, 5]
    assert "excluded: tissue not selected: 4" in caplog.text


def test_the_sample_depends_on_organs_and_seed(source, tmp_path):
    sample = SampleSettings(cells=4, shares={"rare_tissue": 1.0}, caps={})
    # lung has four cells, blood six: the rarest organ fills the sample
    assert list(choose(source, tmp_path, sample=sample)["soma_joinid"]) == [6, 7, 8, 9]
    five = SampleSettings(cells=5, shares={"natural": 1.0}, caps={})
    draws = [tuple(choose(source, tmp_path, sample=five, seed=seed)["soma_joinid"]) for seed in (1, 1, 2, 3)]
    assert draws[0] == draws[1] and len(set(draws)) > 1 and all(len(draw) == 5 for draw in draws)


def test_donors_are_named_by_collection():
    cells = cells_of_the_census(tissue_general_ontology_term_id="unknown")
    cells.loc["11", "donor_id"] = None
    cells = cells.astype("category")
    cells["collection_id"] = find_collections(cells["dataset_id"], {"study-1": "c", "study-2": "c"})
    groups = group_cells(cells)
    assert list(groups["donor"]) == ["c|d1"] * 2 + ["c|d2"] * 3 + ["c|c"] + ["c|d1"] * 2 + ["c|d3"] * 3 + ["c|c"]
    assert groups["tissue_id"].isna().all()
    # a dataset without collection, or of another one
    cells["collection_id"] = find_collections(cells["dataset_id"], {"study-1": "c"})
    expected = ["study-2|d1"] * 2 + ["study-2|d3"] * 3 + ["study-2|study-2"]
    assert list(group_cells(cells)["donor"])[6:] == expected


def test_a_person_in_two_datasets_of_a_collection_is_one_donor_in_one_split(tmp_path):
    """Twelve people, each in two datasets of a collection, and two of the same name in another collection."""
    names = [f"p{i}" for i in range(12)] + ["p0", "p1", "pooled", "unknown"]
    people = np.repeat([*names[:12], *names], 20)
    datasets = np.repeat(["study-1"] * 12 + ["study-2"] * 12 + ["elsewhere"] * 2 + ["study-1", "study-2"], 20)
    obs = pd.concat([cells_of_the_census().iloc[:1]] * len(people)).assign(dataset_id=datasets, donor_id=people)
    obs.index = [str(i) for i in range(len(obs))]
    counts = np.random.default_rng(0).poisson(9, (len(obs), 4)).astype(np.float32)
    source = write_census(tmp_path / "soma", obs, counts)
    choose(source, tmp_path, replace(WANTED, leave_out_datasets=[]))
    files = []
    for shard in range(3):
        fetch(source, tmp_path, shard, 3)
        files.append(tmp_path / f"{shard}.h5ad")
    sampled, corpus = tmp_path / "sampled.parquet", tmp_path / "cells.parquet"
    sample_cells(files, ALL, 0, sampled, tmp_path / "diversity.tsv")
    for seed in range(5):
        split_donors(
            sampled, "donors", {"train": 0.6, "validation": 0.2, "test": 0.2}, seed, corpus, tmp_path / "audit"
        )
        cells = CELLS.read(corpus)
        assert cells["donor"].nunique() == 16 and "another|p0" in set(cells["donor"])
        person = cells["dataset_id"].isin(["study-1", "study-2"]).astype(str) + cells["donor"].str.split("|").str[1]
        assert len(cells.assign(person=person)[["person", "split"]].drop_duplicates()) == len(set(person))
    limits = "\n".join(read_json(tmp_path / "audit")["limits"])
    assert "A person in two collections counts as two donors" in limits
    assert "These names occur in several collections: p0, p1." in limits
    assert "No donor is given for some or all cells of collection." in limits
    assert "Donors that are pools of people, who may also be donors by themselves: collection|pooled." in limits


def test_a_copy_without_its_table_of_datasets_names_donors_by_dataset(tmp_path, caplog):
    source = write_census(tmp_path / "soma", collections=None)
    chosen = choose(source, tmp_path)
    assert (chosen["collection_id"] == chosen["dataset_id"]).all()
    assert "a person in two of its datasets will count as two donors" in caplog.text


@pytest.mark.parametrize("shards", [1, 3])
def test_shards_hold_the_counts_of_the_chosen_cells(source, tmp_path, shards, monkeypatch):
    monkeypatch.setattr(shard_module, "CELLS_AT_ONCE", 2)
    sample = SampleSettings(cells=8, shares={"natural": 1}, caps={})
    chosen = choose(source, tmp_path, replace(WANTED, leave_out_datasets=[]), sample)
    assert 3 in set(chosen["soma_joinid"])  # with this seed, the cell without counts is in the sample
    parts = [fetch(source, tmp_path, shard, shards) for shard in range(shards)]
    cells = ad.concat(parts)
    assert list(cells.obs_names) == [f"{cell.dataset_id}|{cell.soma_joinid}" for cell in chosen.itertuples()]
    assert cells.X.dtype == np.float32 and (cells.X.toarray() == COUNTS[chosen["soma_joinid"]]).all()
    assert all(list(part.var_names) == GENES and list(part.var["symbol"]) == SYMBOLS for part in parts)
    assert max(part.n_obs for part in parts) - min(part.n_obs for part in parts) <= 1


def test_a_shard_has_the_format_of_every_other_dataset(source, tmp_path):
    choose(source, tmp_path)
    shard = fetch(source, tmp_path, 0, 1)
    study = ad.AnnData(sparse.csr_matrix(COUNTS), cells_of_the_census(), pd.DataFrame({"feature_name": SYMBOLS}, GENES))
    study.write_h5ad(tmp_path / "study.h5ad")
    fetch_dataset({"dataset": "study", "source": str(tmp_path / "study.h5ad")}, tmp_path / "fetched.h5ad")
    fetched = ad.read_h5ad(tmp_path / "fetched.h5ad")
    assert list(shard.obs.drop(columns="collection_id")) == list(fetched.obs) and set(map(str, shard.obs.dtypes)) == {
        "category"
    }
    assert shard.obs.index.name == fetched.obs.index.name and shard.var.index.name == fetched.var.index.name
    names = ["cell_type", "tissue", "disease", "sex", "development_stage"]
    assert (shard.obs[names].astype(str).to_numpy() == fetched.obs[names].astype(str).to_numpy()[:10]).all()
    assert list(shard.var) == list(fetched.var) and set(shard.uns) == {"source", "measured"}

    assert shard.uns["source"] == source and not shard.uns["measured"]  # this Census has no presence matrix

    outputs = [tmp_path / name for name in ("kept.h5ad", "qc.parquet", "qc.json", "qc.svg")]
    filter_cells(tmp_path / "0.h5ad", *outputs, limits=LIMITS)
    corpus = read_labels(tmp_path / "kept.h5ad")
    assert set(corpus["donor"]) == {f"collection|{name}" for name in ("d1", "d2", "d3", "collection")}
    assert len(corpus) == 9  # all cells except the one without counts


def test_the_limits_of_a_study_in_the_census_follow_the_genes_that_it_measures(tmp_path):
    source = write_census(tmp_path / "soma", measured={"study-2": [1, 1, 0, 1], "study-1": [1, 0, 1, 1]})
    choose(source, tmp_path)
    shard = fetch(source, tmp_path, 0, 1)
    assert {name: list(genes) for name, genes in shard.uns["measured"].items()} == {
        "study-1": [True, False, True, True], "study-2": [True, True, False, True],
    }  # fmt: skip
    outputs = [tmp_path / name for name in ("kept.h5ad", "qc.parquet", "qc.json", "qc.svg")]
    limits = replace(LIMITS, min_genes=10_000, max_mitochondrial_percent=10)
    filter_cells(tmp_path / "0.h5ad", *outputs, limits=limits)
    samples = {sample["donor"]: sample for sample in json.loads(outputs[2].read_text())["samples"]}
    assert samples["study-1|d1"]["max_mitochondrial_percent"] == 50
    assert "max_mitochondrial_percent" not in samples["study-2|d1"]  # only study-1 measures MT-CO1
    assert {sample["min_genes"] for sample in samples.values()} == {2}


def test_deprecated_and_unknown_ids_are_resolved():
    chosen = cells_of_the_census(
        disease_ontology_term_id="MONDO:0100096 || MONDO:0005015",
        development_stage_ontology_term_id="HsapDv:9999999",
        donor_id=None,
        collection_id="collection",
    )
    cells = label_census_cells(chosen.reset_index(names="soma_joinid")[list(CENSUS_CELLS.columns)])
    assert set(cells["disease_ontology_term_id"]) == {"MONDO:0100096"} and set(cells["disease"]) == {"COVID-19"}
    assert set(cells["development_stage_ontology_term_id"]) == set(cells["development_stage"]) == {"unknown"}
    assert set(cells["donor_id"]) == {"collection"}


def test_a_fraction_is_rejected_as_count(tmp_path, source):
    counts = COUNTS.copy()
    counts[8, 2] = 1.5
    other = write_census(tmp_path / "soma", counts=counts)
    choose(other, tmp_path)
    with pytest.raises(InputError, match=r"not a whole number: 1\.5 in cell study-2\|8.*Exclude the study"):
        fetch_census_shard(tmp_path / "chosen.parquet", other, 1, 2, tmp_path / "1.h5ad")
    assert not (tmp_path / "1.h5ad").exists()


@pytest.mark.parametrize("part", ["homo_sapiens/ms/RNA/X/raw/__fragments", "homo_sapiens/ms/RNA/X/raw/__schema"])
def test_a_damaged_copy_is_reported_in_one_line(tmp_path, part):
    source = write_census(tmp_path / "soma")
    choose(source, tmp_path)
    for file in (tmp_path / "soma/census_data" / part).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(InputError, match="census://.*cannot be read.*complete copy"):
        fetch_census_shard(tmp_path / "chosen.parquet", source, 0, 1, tmp_path / "0.h5ad")
    assert not (tmp_path / "0.h5ad").exists()


def test_user_errors_are_reported_in_one_line(source, tmp_path):
    with pytest.raises(InputError, match="census://.*nowhere: cannot be read.*census://2025-01-30, or a complete copy"):
        choose(f"census://{tmp_path}/nowhere", tmp_path)
    with pytest.raises(InputError, match="census://stable.*Give a release as census://2025-01-30"):
        choose("census://stable", tmp_path)
    with pytest.raises(InputError, match=r"obs: no cell passes \(excluded: study not selected: 10\)"):
        choose(source, tmp_path, replace(WANTED, datasets=["study-3"]))
    with pytest.raises(InputError, match="not in EFO: EFO:9999999"):
        choose(source, tmp_path, replace(WANTED, leave_out_assays=["EFO:9999999"]))
    choose(source, tmp_path)
    with pytest.raises(InputError, match="config: shards: 11 shards, but fewer cells"):
        fetch_census_shard(tmp_path / "chosen.parquet", source, 0, 11, tmp_path / "0.h5ad")


def test_a_network_error_is_reported_in_one_line(tmp_path, monkeypatch):
    library = pytest.importorskip("cellxgene_census", reason="cellxgene-census is not installed (envs/census.yaml)")
    import requests

    def fail(**arguments):
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(library, "open_soma", fail)
    with pytest.raises(InputError, match="census://2025-01-30: cannot be read.*no route.*network.*shards are kept"):
        choose("census://2025-01-30", tmp_path)


def snakemake(folder, *arguments):
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--directory", folder]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(ROOT / "config", tmp_path / "config")
    shutil.copytree(ROOT / "resources", tmp_path / "resources", ignore=shutil.ignore_patterns("models"))
    return tmp_path


def test_the_config_at_the_papers_scale_runs_in_shards(folder):
    plan = snakemake(folder, "corpus", "--dry-run", "--configfile", folder / "config/cellxgene.yaml")
    jobs = dict(line.split() for line in plan.split("Job stats:")[1].splitlines()[3:] if len(line.split()) == 2)
    assert jobs["choose_census_cells"] == "1" and "fetch_dataset" not in jobs
    assert {jobs[rule] for rule in ("fetch_census_shard", "filter_cells", "score_pathways")} == {"16"}


def test_the_blood_recipe_plans_a_whole_run_and_takes_blood_alone(source, folder):
    (folder / "config/blood.tsv").write_text(f"dataset\tsource\nblood\t{source}\n")
    plan = snakemake(folder, "--dry-run", "--configfile", folder / "config/blood.yaml")
    jobs = dict(line.split() for line in plan.split("Job stats:")[1].splitlines()[3:] if len(line.split()) == 2)
    shards = {"fetch_census_shard": "4", "rank_genes": "4", "embed_genes": "16"}
    assert shards.items() <= jobs.items() and {"score_left_out_studies", "finetune", "render_report"} <= set(jobs)
    path = folder / "config/blood.yaml"
    config = check_config(yaml.safe_load(path.read_text()), ROOT / "workflow/schemas/config.schema.yaml", path)
    chosen = choose(source, folder, CensusSettings(**config["census"]), SampleSettings(**config["sample"]))
    assert list(chosen["soma_joinid"]) == [0, 1, 2, 3, 4, 5] and set(chosen["tissue_ontology_term_id"]) == {BLOOD}


def test_finished_shards_are_kept(source, folder):
    (folder / "sheet.tsv").write_text(f"dataset\tsource\nsmall\t{source}\n")
    (folder / "run.yaml").write_text("run: small\ndatasets: sheet.tsv\nshards: 3\n")
    snakemake(folder, "census", "--cores", "2", "--configfile", folder / "run.yaml")
    shards = [folder / f"results/small/raw/small-{shard}.h5ad" for shard in range(3)]
    written = [shard.stat().st_mtime_ns for shard in shards]
    assert [ad.read_h5ad(shard).n_obs for shard in shards] == [3, 3, 4]
    shards[1].unlink()
    snakemake(folder, "census", "--cores", "2", "--configfile", folder / "run.yaml")
    again = [shard.stat().st_mtime_ns for shard in shards]
    assert again[0] == written[0] and again[1] > written[1] and again[2] == written[2]
