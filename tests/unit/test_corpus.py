"""Sampling and splitting are independent of file order and hash seed; the audit is correct."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from cell2text.cells.labels import CELLXGENE
from cell2text.contracts import CELLS, SAMPLED_CELLS, SPLITS, TERM_SLOTS
from cell2text.contracts import table as table_contracts
from cell2text.corpus.audit import audit_split
from cell2text.corpus.sample_cells import sample_cells
from cell2text.corpus.split_donors import split_donors
from cell2text.errors import InputError
from cell2text.files import read_json
from cell2text.settings import SampleSettings

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
NATURAL = {"natural": 1}


def write_cells(path, dataset, counts, donors="d1", order=None, **obs):
    """Write cells like filter_cells; ``order`` permutes cells and genes."""
    counts = np.asarray(counts, dtype=np.float32)
    genes = [f"g{i}" for i in range(counts.shape[1])]
    table = pd.DataFrame(
        {"dataset_id": dataset, "donor_id": donors, "assay_ontology_term_id": "EFO:0009922"},
        index=[f"{dataset}|{i:04d}" for i in range(len(counts))],
    )
    for slot, column in CELLXGENE.items():
        table[f"{column}_ontology_term_id"] = "CL:0000236" if slot == "cell_type" else "unknown"
        table[column] = "B cell" if slot == "cell_type" else "unknown"
    cells = ad.AnnData(
        sparse.csr_matrix(counts), obs=table.assign(**obs), var=pd.DataFrame({"symbol": genes}, index=genes)
    )
    if order is not None:
        cells = cells[order].copy()[:, genes[::-1]].copy()
    cells.write_h5ad(path)
    return path


def sample(tmp_path, files, cells=1000, seed=0, shares=NATURAL, caps=None):
    drawn = SampleSettings(cells, shares, caps or {})
    sample_cells(files, drawn, seed, tmp_path / "sampled.parquet", tmp_path / "diversity.json")
    return SAMPLED_CELLS.read(tmp_path / "sampled.parquet")


def make_table(cell_types, donors="s|d", studies="s", hashes=None):
    """Return a table in the format of sample_cells."""
    table = pd.DataFrame({"cell_type_id": cell_types, "donor": donors, "dataset_id": studies})
    table["cell_id"] = [f"c{i:05d}" for i in range(len(table))]
    table["counts_hash"] = table["cell_id"] if hashes is None else hashes
    table["cell_type"] = table["cell_type_id"]
    for column in SAMPLED_CELLS.columns:
        table[column] = table.get(column)
    return table[list(SAMPLED_CELLS.columns)]


def split(tmp_path, cells, how="donors", seed=0, shares=SHARES, **options):
    SAMPLED_CELLS.write(cells, tmp_path / "in.parquet")
    split_donors(
        tmp_path / "in.parquet", how, shares, seed, tmp_path / "out.parquet", tmp_path / "audit.json", **options
    )
    return CELLS.read(tmp_path / "out.parquet"), read_json(tmp_path / "audit.json")


def held(audit):
    return {guarantee["claim"]: guarantee["holds"] for guarantee in audit["guarantees"]}


def test_sampling_is_independent_of_the_order_of_files_cells_and_genes(tmp_path):
    rng = np.random.default_rng(1)
    one, two = rng.poisson(1, (30, 5)), rng.poisson(1, (20, 5))
    tissue = {"tissue_ontology_term_id": rng.choice(["UBERON:0000178", "UBERON:0000955"], 20)}
    types = np.array(["CL:0000623", "CL:0000236", "CL:0000576"])
    tissue["cell_type_ontology_term_id"] = types[np.arange(20) % 3]
    a = [write_cells(tmp_path / "a1.h5ad", "a", one), write_cells(tmp_path / "a2.h5ad", "b", two, **tissue)]
    b = [
        write_cells(tmp_path / "b2.h5ad", "b", two, order=rng.permutation(20), **tissue),
        write_cells(tmp_path / "b1.h5ad", "a", one, order=rng.permutation(30)),
    ]
    for shares in (NATURAL, {"natural": 0.5, "donor": 0.25, "rare_tissue": 0.25}):
        first = sample(tmp_path, a, cells=25, seed=7, shares=shares)
        again = sample(tmp_path, b, cells=25, seed=7, shares=shares)
        by_id = [cells.sort_values("cell_id", ignore_index=True) for cells in (first, again)]
        pd.testing.assert_frame_equal(*by_id)
        assert split(tmp_path, first, "cells")[0].equals(split(tmp_path, again, "cells")[0])
        assert len(first) == first["cell_id"].nunique() == 25
        assert set(first["cell_id"]) != set(sample(tmp_path, a, cells=25, seed=8, shares=shares)["cell_id"])
    assert len(sample(tmp_path, a, cells=50)) == len(sample(tmp_path, a, cells=51)) == 50


def test_unknown_labels_are_none_and_donors_are_prefixed_with_their_dataset(tmp_path):
    files = [
        write_cells(tmp_path / "in.h5ad", "s", np.ones((3, 2)), donors=["1", "2", "1"]),
        write_cells(tmp_path / "also.h5ad", "t", np.ones((1, 2)), donors=["1"], sex=["female"]),
    ]
    table = sample(tmp_path, files)
    assert list(table["donor"]) == ["s|1", "s|2", "s|1", "t|1"]
    assert set(table["cell_type_id"]) == {"CL:0000236"}
    assert table[[f"{slot}_id" for slot in TERM_SLOTS[1:]]].isna().all().all()
    assert table["tissue"][0] is None and list(table["sex"]) == [None, None, None, "female"]
    assert list(table["n_counts"]) == [2, 2, 2, 2] and len(set(table["counts_hash"])) == 1


def test_a_donor_called_unknown_is_a_donor(tmp_path):
    files = [
        write_cells(tmp_path / "in.h5ad", "s", np.ones((2, 2)), donors=["unknown", "d"]),
        write_cells(tmp_path / "also.h5ad", "unknown", np.ones((1, 2)), donors=["unknown"]),
    ]
    table = sample(tmp_path, files)
    assert list(table["donor"]) == ["s|unknown", "s|d", "unknown|unknown"]
    assert list(table["dataset_id"]) == ["s", "s", "unknown"]


def test_a_file_may_contain_several_studies(tmp_path):
    cells = write_cells(tmp_path / "in.h5ad", ["s", "t", "s"], np.ones((3, 2)), donors=["1", "1", "2"])
    assert set(sample(tmp_path, [cells])["donor"]) == {"s|1", "t|1", "s|2"}


def test_sampling_groups_tissues_by_organ(tmp_path):
    # frontal cortex and cerebellum are brain, so blood is the rarest of two organs but not of three tissues
    tissues = np.repeat(["UBERON:0001870", "UBERON:0002037", "UBERON:0000178"], [40, 10, 20])
    cells = write_cells(tmp_path / "in.h5ad", "s", np.ones((70, 2)), tissue_ontology_term_id=tissues)
    drawn = sample(tmp_path, [cells], cells=20, shares={"rare_tissue": 1})
    assert set(drawn["tissue_id"]) == {"UBERON:0000178"}
    drawn = sample(tmp_path, [cells], cells=20, caps={"natural": {"UBERON:0000955": 0.25}})
    assert (drawn["tissue_id"] == "UBERON:0000178").sum() == 15


def test_diversity_is_written(tmp_path):
    cells = write_cells(tmp_path / "in.h5ad", "s", np.ones((8, 2)), donors=["1", "2", "2", "2"] * 2)
    sample(tmp_path, [cells], cells=4, shares={"donor": 1})
    table = pd.DataFrame(read_json(tmp_path / "diversity.json")).set_index("slot")
    columns = ["values_before", "values_after", "diversity_before", "diversity_after"]
    assert table.loc["donor", columns].tolist() == [2, 2, 0.8113, 1.0]


def test_the_table_does_not_depend_on_the_size_of_row_groups(tmp_path, monkeypatch):
    cells = make_table([f"CL:{i % 3}" for i in range(50)], [f"s|{i // 5}" for i in range(50)])
    whole, _ = split(tmp_path, cells)
    monkeypatch.setattr(table_contracts, "ROWS_AT_ONCE", 7)
    pieces, _ = split(tmp_path, cells)
    pd.testing.assert_frame_equal(whole, pieces)


def test_a_split_does_not_depend_on_the_hash_seed(tmp_path):
    cells = make_table([f"CL:{i % 7}" for i in range(300)], [f"s|{i // 15}" for i in range(300)])
    cells["counts_hash"] = [f"h{i % 299}" for i in range(300)]
    SAMPLED_CELLS.write(cells, tmp_path / "sampled.parquet")
    code = (
        "import sys; from cell2text.corpus.split_donors import split_donors\n"
        "for how in ('donors', 'cells'): split_donors(sys.argv[1], how, "
        f"{SHARES}, 3, sys.argv[2] + how + '.parquet', sys.argv[2] + how + '.json', held_out=['CL:3', 'CL:5'])"
    )

    def run(hash_seed):
        environment = os.environ | {"PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": os.pathsep.join(sys.path)}
        folder = tmp_path / str(hash_seed)
        command = [sys.executable, "-c", code, tmp_path / "sampled.parquet", f"{folder}/"]
        subprocess.run(command, env=environment, check=True)
        return [(file.name, file.read_bytes()) for file in sorted(folder.iterdir())]

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(run, range(10)))
    assert len(made[0]) == 4 and all(files == made[0] for files in made)


def test_the_claims_of_the_audit_follow_the_table(tmp_path):
    cells = make_table(["CL:1", "CL:1", "CL:2"] * 10, [f"s|{i // 3}" for i in range(30)])
    cells["counts_hash"] = [f"h{i // 3}" for i in range(30)]
    cells["n_counts"] = 500.0
    cells.loc[[0, 29], "dataset_id"] = ["t", "u"]
    found, audit = split(tmp_path, cells)
    assert audit["split"] == "donors" and audit["shares"] == SHARES
    assert audit["cells"] == found["split"].value_counts().to_dict()
    assert sum(audit["donors"].values()) == 10
    assert audit["classes"] == {"train": 2, "validation": 2, "test": 2}
    assert list(held(audit).values()) == [True, False, True, True, True]

    # Corrupt the table: every claim must fail.
    train, test = found.index[found["split"] == "train"][0], found.index[found["split"] == "test"][0]
    found.loc[test, ["cell_type_id", "cell_type"]] = "CL:9"
    found.loc[train, "donor"] = found.loc[test, "donor"]
    found.loc[train, "counts_hash"] = found.loc[test, "counts_hash"]
    others = found.index[found["counts_hash"] != found.loc[test, "counts_hash"]]
    train = next(i for i in others if found.loc[i, "split"] == "train")
    test = next(i for i in others if found.loc[i, "split"] == "test")
    found.loc[[train, test], "cell_id"] = ["a|AAACATTGAGCTAC", "b|AAACATTGAGCTAC"]
    found.loc[[train, test], "dataset_id"] = ["a", "b"]
    corrupted = audit_split(found, "donors", SHARES)
    assert not any(guarantee["holds"] for guarantee in corrupted["guarantees"])
    assert "CL:9" in corrupted["guarantees"][4]["detail"]
    assert any("CL:9" in limit for limit in corrupted["limits"])


@st.composite
def any_corpus(draw):
    cells = draw(st.integers(3, 60))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    table = make_table([f"CL:{i}" for i in rng.integers(0, 5, cells)])
    table["dataset_id"] = [f"s{i}" for i in rng.integers(0, 3, cells)]
    table["donor"] = table["dataset_id"] + "|" + rng.integers(0, 4, cells).astype(str)
    # All have the same barcode, so cells of two studies with the same total are duplicates.
    table["cell_id"] = [f"{study}|lane{i}_ACGTACGTACGT" for i, study in enumerate(table["dataset_id"])]
    table["counts_hash"] = [f"h{i}" for i in rng.integers(0, 100, cells)]
    table["n_counts"] = rng.integers(0, 60, cells).astype(float)
    return table.assign(split=rng.choice(SPLITS, cells))


@settings(deadline=None, max_examples=60)
@given(cells=any_corpus(), held_out=st.sets(st.sampled_from(["CL:0", "CL:1"])))
def test_the_guarantees_of_the_audit_equal_those_of_a_loop_over_cells(cells, held_out):
    rows = list(cells.itertuples())
    rest = [row for row in rows if row.cell_type_id not in held_out]
    trained = {row.cell_type_id for row in rows if row.split == "train"}
    of_total = [[row for row in rows if row.n_counts == total] for total in {row.n_counts for row in rows}]
    published_twice = [same for same in of_total if len({row.dataset_id for row in same}) > 1]
    expected = [
        all(a.split == b.split for a in rest for b in rest if a.donor == b.donor),
        all(a.split == b.split for a in rest for b in rest if a.dataset_id == b.dataset_id),
        all(a.split == b.split for a in rows for b in rows if a.counts_hash == b.counts_hash),
        all(len({row.split for row in same}) == 1 for same in published_twice),
        {row.cell_type_id for row in rest} <= trained,
        *([all(row.split == "test" for row in rows if row.cell_type_id in held_out)] if held_out else []),
    ]
    categories = {"donor": "category", "cell_type": "category", "split": "category"}
    audit = audit_split(cells.astype(categories), "cells", SHARES, sorted(held_out))
    assert [guarantee["holds"] for guarantee in audit["guarantees"]] == expected
    assert sum(audit["cells"].values()) == len(cells)


def test_the_audit_lists_the_limits_of_one_donor():
    cells = make_table(["CL:1"] * 10).assign(split="train", tissue_id="UBERON:0000178")
    limits = audit_split(cells, "cells", SHARES)["limits"]
    assert any(limit.startswith("One donor:") for limit in limits)
    assert any(limit.startswith("One study:") for limit in limits)
    assert any("known tissue" in limit for limit in limits)
    assert any("sex is unknown" in limit for limit in limits)
    assert any("train 100.0% (configured: 70.0%)" in limit for limit in limits)


def test_the_audit_says_which_names_do_not_tell_people_apart():
    donors = ["s|p1", "t|p1", "s|p2", "s|s", "t|unknown", "t|pool_2"]
    cells = make_table(["CL:1"] * 6, donors, ["s", "t", "s", "s", "t", "t"]).assign(split="train")
    limits = "\n".join(audit_split(cells, "donors", SHARES)["limits"])
    assert "A person in two datasets counts as two donors" in limits
    assert "These names occur in several datasets: p1." in limits
    assert "No donor is given for some or all cells of s, t." in limits
    assert "pools of people, who may also be donors by themselves: t|pool_2." in limits
    # one dataset whose donors all have names
    limits = "\n".join(audit_split(cells.iloc[[0, 2]], "donors", SHARES)["limits"])
    assert "A person" not in limits and "No donor" not in limits and "pools" not in limits


def test_the_audit_names_studies_with_one_donor_and_donors_that_share_cells(tmp_path):
    cells = make_table(["CL:1"] * 60, [f"s|{i // 10}" for i in range(60)], ["s"] * 50 + ["t"] * 10)
    cells.loc[[0, 10], "counts_hash"] = "same"
    found, audit = split(tmp_path, cells)
    assert audit["joined"] == [["s|0", "s|1"]]
    assert len(set(found["split"][:20])) == 1 and held(audit)["No two cells with identical counts are in two splits"]
    limits = "\n".join(audit["limits"])
    assert "Donors that share cells are treated as one: s|0 and s|1." in limits
    assert (
        f"These studies have one donor each, so all their cells are in one split: t ({found['split'][55]})." in limits
    )


def test_a_cell_type_of_one_donor_is_in_training_and_reported(tmp_path):
    cells = make_table(["CL:1"] * 59 + ["CL:2"], [f"s|{i // 10}" for i in range(60)])
    found, audit = split(tmp_path, cells)
    assert found["split"][59] == "train"
    assert "Cell types without test cells are not evaluated: CL:2." in audit["limits"]


@pytest.mark.parametrize("how", ["donors", "studies", "cells"])
def test_held_out_types_are_only_in_the_test_split(tmp_path, how):
    rng = np.random.default_rng(0)
    cells = make_table(rng.choice(["CL:1", "CL:2", "CL:3"], 200), [f"d{i // 10}" for i in range(200)])
    cells["dataset_id"] = [f"s{i // 20}" for i in range(200)]
    unseen = cells["cell_type_id"] == "CL:2"
    cells.loc[[cells.index[unseen][0], cells.index[~unseen][0]], "counts_hash"] = "same"
    found, audit = split(tmp_path, cells, how, held_out=["CL:2"])
    assert set(found["split"][unseen]) == {"test"}
    assert set(found["cell_type_id"][found["split"] == "train"]) == {"CL:1", "CL:3"}
    # A cell with the counts of a held-out cell is held out, too.
    assert found["split"][cells.index[~unseen][0]] == "test"
    rest = found["split"][~unseen].value_counts(normalize=True)
    assert rest.to_dict() == pytest.approx(SHARES, abs=0.08)
    assert audit["held_out"] == [{"id": "CL:2", "name": "CL:2", "cells": int(unseen.sum())}]
    claims = held(audit)
    assert claims["Cells of held-out types are only in the test split"]
    assert claims["Every cell type in validation and test is also in training, except for cells of held-out types"]
    assert any(limit.startswith("Cell types held out of training") and "CL:2" in limit for limit in audit["limits"])


def test_a_held_out_type_must_be_in_the_corpus(tmp_path):
    with pytest.raises(InputError, match="held_out_cell_types: no cell of CL:7 in the corpus"):
        split(tmp_path, make_table(["CL:1"] * 9), "cells", held_out=["CL:7", "CL:1"])


def test_a_user_defined_split_is_audited(tmp_path):
    cells = make_table(["CL:1"] * 3 + ["CL:2"], ["s|1", "s|2", "s|3", "s|3"])
    table = tmp_path / "mine.tsv"
    table.write_text("donor\tsplit\ns|1\ttrain\ns|2\tvalidation\ns|3\ttest\n")
    found, audit = split(tmp_path, cells, str(table))
    assert list(found["split"]) == ["train", "validation", "test", "test"]
    assert held(audit)["No donor is in two splits"] and audit["shares"] == {}
    assert not held(audit)["Every cell type in validation and test is also in training"]


def test_the_audit_includes_the_diversity(tmp_path):
    cells = write_cells(tmp_path / "in.h5ad", "s", np.eye(20), donors=[str(i // 2) for i in range(20)])
    sampled = sample(tmp_path, [cells])
    _, audit = split(tmp_path, sampled, diversity_file=tmp_path / "diversity.json")
    donors = next(row for row in audit["diversity"] if row["slot"] == "donor")
    assert donors == {
        "slot": "donor", "values_before": 10, "values_after": 10, "diversity_before": 1.0, "diversity_after": 1.0
    }  # fmt: skip


def test_an_empty_split_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no cell is left for"):
        split(tmp_path, make_table(["CL:1"] * 2), "cells")
    assert not (tmp_path / "out.parquet").exists()
