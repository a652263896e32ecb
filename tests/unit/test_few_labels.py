"""Baselines for few labels: the loss by hand, no look at other cells' labels, chance without labels, and bad input."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from torch import nn

from cell2text.contracts import DESCRIPTIONS, FEW_SHOT, PREDICTIONS
from cell2text.errors import InputError
from cell2text.evaluation import few_shot as module
from cell2text.evaluation.baselines import contrast
from cell2text.evaluation.baselines.contrast import by_lda, contrast_loss, fit_head, predict_contrast
from cell2text.evaluation.few_shot import draw_cells, few_shot
from cell2text.grammar import parse
from described_cells import B_CELL, BLOOD, LUNG, NK_CELL, write_corpus, write_embeddings

T_CELL, RARE = "CL:0000084", "CL:0000576"
HEAD = {"dimensions": 8, "temperature": 0.1, "steps": 60, "seed": 3}


def test_the_loss_of_three_points_by_hand():
    """Points 1 and 2 share a label. Similarities: 1 and 2 0, 1 and 3 -1, 2 and 3 0; point 3 has no pair."""
    points = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    first, second = np.log(1 + np.exp(-1)), np.log(2)
    loss = contrast_loss(points, torch.tensor([0, 0, 1]), 1)
    assert float(loss) == pytest.approx((first + second) / 2, abs=1e-6)
    # at temperature 0.5, similarities are doubled
    loss = contrast_loss(points, torch.tensor([0, 0, 1]), 0.5)
    assert float(loss) == pytest.approx((np.log(1 + np.exp(-2)) + second) / 2, abs=1e-6)


def test_several_pairs_of_a_cell_are_averaged_outside_the_logarithm():
    points = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    each = [np.log(1 + np.e**-1) / 2 + (1 + np.log(1 + np.e**-1)) / 2, np.log(2), 0]
    each[2] = each[0]
    assert float(contrast_loss(points, torch.tensor([0, 0, 0]), 1)) == pytest.approx(np.mean(each), abs=1e-6)


def test_without_any_pair_the_loss_is_zero_and_so_are_its_gradients():
    points = torch.eye(3, requires_grad=True)
    loss = contrast_loss(points, torch.arange(3), 0.1)
    loss.backward()
    assert float(loss.detach()) == 0 and (points.grad == 0).all()


def test_lda_with_one_cell_per_type_takes_the_nearest():
    known, new = np.array([[0.0, 0], [9, 9], [4, 0]]), np.array([[8.0, 8], [1, 0], [4, 1]])
    rows, codes = np.array([0, 1, 2]), np.array([2, 0, 1])
    assert by_lda(known, new)(rows, codes).argmax(axis=1).tolist() == [0, 2, 1]
    assert by_lda(known, new)(rows, np.zeros(3, int)).tolist() == [[1]] * 3


def test_a_type_with_one_cell_gives_no_missing_values():
    rng = np.random.default_rng(0)
    known = rng.normal(size=(21, 4)) + np.repeat([[0], [8]], [20, 1], axis=0)
    codes = np.repeat([0, 1], [20, 1])
    new = np.array([[8.0] * 4, [0.0] * 4])
    head = fit_head(known, codes, **HEAD)
    for found in (head.probabilities(new), by_lda(known, new)(np.arange(21), codes)):
        assert np.isfinite(found).all() and found.sum(axis=1) == pytest.approx([1, 1])
        assert found.argmax(axis=1).tolist() == [1, 0]
    assert all(tensor.isfinite().all() for tensor in head.network.state_dict().values())


@pytest.mark.parametrize("labelled", [0, 1])
def test_a_head_of_no_cell_or_a_single_type_is_not_trained(labelled):
    codes = np.array([0, 0, 0] if labelled else [-1, -1, -1])
    assert fit_head(np.eye(3), codes, **HEAD).probabilities(np.eye(3)).shape == (3, labelled)


def test_drawn_cells_are_at_most_as_many_as_asked_for_of_each_type():
    codes = np.array([0] * 9 + [1] * 2 + [-1] * 5)
    rng = np.random.default_rng(0)
    draws = [draw_cells(codes, 3, rng) for _ in range(20)]
    assert all(np.bincount(codes[rows]).tolist() == [3, 2] for rows in draws)
    assert len({tuple(rows) for rows in draws}) > 10


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Files of four groups of cells in 4 dimensions; of the last there is a single training cell."""
    monkeypatch.setattr(module, "DRAWS", 3)
    rng = np.random.default_rng(0)
    types = np.array([*np.repeat([B_CELL, NK_CELL, T_CELL], 100), RARE, RARE])
    splits = np.array([*np.tile(["train", "train", "validation", "test", "test"], 60), "train", "test"])
    tissues = [BLOOD, LUNG] * 151
    table, names = write_corpus(tmp_path, types, splits, [["P1", "P2"], ["P3"]] * 151, tissue=tissues)
    centres = {B_CELL: (0, 0), NK_CELL: (8, 0), T_CELL: (0, 8), RARE: (8, 8)}
    vectors = rng.normal(size=(302, 4))
    vectors[:, :2] += [centres[one] for one in types]
    vectors[:, 2] += [8 * (tissue == LUNG) for tissue in tissues]  # as programmes, which alternate like tissues
    write_embeddings(tmp_path / "embeddings.safetensors", table["cell_id"], vectors)
    return tmp_path, table.set_index("cell_id"), names


FILES = ("lda.parquet", "contrast.parquet", "permuted.parquet", "head.safetensors")


def predict(folder, descriptions="descriptions.parquet"):
    out = [folder / name for name in FILES]
    predict_contrast(folder / descriptions, folder / "terms.parquet", [folder / "embeddings.safetensors"], *out, **HEAD)
    return [path.read_bytes() for path in out], [PREDICTIONS.read(path).set_index("cell_id") for path in out[:3]]


def accuracy(predicted, table, slot="cell_type"):
    test = predicted[predicted["split"] == "test"]
    return (test[f"{slot}_id"] == table.loc[test.index, f"{slot}_id"]).mean()


def test_methods_know_planted_groups_and_the_control_does_not(groups):
    folder, table, names = groups
    _, (lda, head, permuted) = predict(folder)
    for predicted in (lda, head):
        assert accuracy(predicted, table) > 0.97 and accuracy(predicted, table, "tissue") > 0.97
        test = predicted[predicted["split"] == "test"]
        first, true = test["pathway_ids"].str[0], table.loc[test.index, "pathway_ids"]
        assert np.mean([one in sets for one, sets in zip(first, true, strict=True)]) > 0.97
    for slot, chance in (("cell_type", 1 / 3), ("tissue", 1 / 2)):
        assert accuracy(permuted, table, slot) < chance + 0.2
    rest = [column for column in lda if not column.startswith("cell_type") and column != "text"]
    pd.testing.assert_frame_equal(lda[rest], head[rest])
    for row in head.sample(20, random_state=0).itertuples():
        read = parse(row.text, names)
        assert (read.status, read.slots.cell_type, read.slots.tissue) == ("parsed", row.cell_type_id, row.tissue_id)
    assert set(lda["split"]) == {"validation", "test"} and head["cell_type_confidence"].between(0.25, 1).all()
    assert lda["sex_id"].isna().all()


def test_labels_of_validation_and_test_cells_are_never_read(groups):
    folder, _, _ = groups
    expected, _ = predict(folder)
    changed, rng = DESCRIPTIONS.read(folder / "descriptions.parquet"), np.random.default_rng(0)
    new = changed.index[changed["split"] != "train"]
    labels = ["cell_type_id", "tissue_id", "pathway_ids"]
    changed.loc[new, labels] = changed.loc[rng.permutation(new), labels].to_numpy()
    DESCRIPTIONS.write(changed, folder / "permuted_labels.parquet")
    assert predict(folder, "permuted_labels.parquet")[0] == expected
    changed.loc[changed["split"] == "train", "cell_type_id"] = T_CELL
    DESCRIPTIONS.write(changed, folder / "permuted_labels.parquet")
    assert predict(folder, "permuted_labels.parquet")[0] != expected


def test_pairs_are_made_of_training_cells_alone(groups, monkeypatch):
    folder, table, _ = groups
    pairs = []

    def record(vectors, codes, *settings):
        pairs.append((vectors, codes))
        return fit_head(vectors, codes, *settings)

    monkeypatch.setattr(contrast, "fit_head", record)
    predict(folder)
    assert [len(codes) for _, codes in pairs] == [(table["split"] == "train").sum()] * 2
    assert (pairs[0][0] == pairs[1][0]).all() and (pairs[0][1] != pairs[1][1]).any()
    pairs.clear()
    monkeypatch.setattr(module, "fit_head", record)
    score(folder, shots=[2])
    assert max(len(codes) for _, codes in pairs[:-2]) == 3 * 2 + 1
    assert [len(codes) for _, codes in pairs[-2:]] == [(table["split"] == "train").sum()] * 2


def test_the_head_is_kept_with_its_types(groups):
    folder, table, _ = groups
    _, (_, predicted, _) = predict(folder)
    with safe_open(folder / "head.safetensors", "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["about"])
    types, temperature = about["types"], about["temperature"]
    assert types == sorted([B_CELL, NK_CELL, T_CELL, RARE]) and temperature == HEAD["temperature"]
    network = nn.Sequential(nn.Linear(4, contrast.HIDDEN), nn.GELU(), nn.Linear(contrast.HIDDEN, 8))
    weights = {name.removeprefix("network."): saved[name] for name in saved if name.startswith("network.")}
    network.load_state_dict(weights)
    head = contrast.ContrastHead(network, saved["centroids"], saved["mean"], saved["scale"], temperature)
    new = table.index[table["split"] != "train"]
    pooled = contrast.read_pooled([folder / "embeddings.safetensors"], pd.Series(new))
    found = np.array(types)[head.probabilities(pooled).argmax(axis=1)]
    assert (predicted.loc[new, "cell_type_id"] == found).all()


def score(folder, shots, descriptions="descriptions.parquet"):
    given = HEAD | {"shots": shots}
    few_shot(folder / descriptions, [folder / "embeddings.safetensors"], folder / "few_shot.tsv", **given)
    table = pd.read_csv(folder / "few_shot.tsv", sep="\t")
    assert list(table) == list(FEW_SHOT)
    return (folder / "few_shot.tsv").read_bytes(), table.set_index(["method", "metric", "shots"])


def test_few_labelled_cells_name_planted_groups_and_permuted_ones_do_not(groups):
    folder, _, _ = groups
    written, table = score(folder, [5, 2])
    assert written == score(folder, [5, 2])[0]
    accuracy = table["value"].xs("accuracy", level="metric")
    assert accuracy["lda"].index.to_list() == ["2", "5", "all"]
    assert all(accuracy[method, shots] > 0.8 for method in ("knn", "lda", "contrast") for shots in ("5", "all"))
    assert (accuracy["contrast_permuted"] < 0.6).all()
    few = table.drop("all", level="shots")
    assert (few["low"] <= few["value"]).all() and (few["value"] <= few["high"]).all()
    assert (few["low"] < few["high"]).any() and table.xs("all", level="shots")["low"].isna().all()


def test_one_labelled_cell_of_each_type_is_enough_to_run(groups):
    assert score(groups[0], [1])[1]["value"].between(0, 1).all()


def test_more_shots_than_cells_of_any_type_are_refused_in_one_line(groups):
    folder, _, _ = groups
    line = "config: few_labels.shots: 41 is too many: the most frequent cell type has only 40 training cells. Set lower"
    with pytest.raises(InputError, match=line):
        score(folder, [3, 41])
    assert not (folder / "few_shot.tsv").exists()
    assert score(folder, [40])


def test_test_cells_without_cell_types_are_refused_in_one_line(groups):
    folder, _, _ = groups
    changed = DESCRIPTIONS.read(folder / "descriptions.parquet")
    changed.loc[changed["split"] == "test", "cell_type_id"] = None
    DESCRIPTIONS.write(changed, folder / "unlabelled.parquet")
    with pytest.raises(InputError, match=r"unlabelled\.parquet: no test cell has a cell type"):
        score(folder, [3], "unlabelled.parquet")
