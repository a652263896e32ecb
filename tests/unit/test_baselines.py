from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from cell2text.cells.h5ad import write_cells
from cell2text.contracts import DESCRIPTIONS, PREDICTIONS
from cell2text.embedding.measure_genes import measure_genes
from cell2text.embedding.rank_genes import rank_genes
from cell2text.errors import InputError
from cell2text.evaluation.baselines import pca_logistic
from cell2text.evaluation.baselines.knn import predict_knn
from cell2text.evaluation.baselines.majority import predict_majority
from cell2text.evaluation.baselines.nearest_text import predict_nearest_text
from cell2text.evaluation.baselines.pca_logistic import predict_pca_logistic
from cell2text.evaluation.baselines.slots import read_pooled
from cell2text.grammar import parse
from described_cells import ADULT, B_CELL, BLOOD, FEMALE, LUNG, NK_CELL, NORMAL, write_corpus, write_embeddings
from ranked_files import write_corpus as write_ranked_corpus

LABELS = Path(__file__).parents[2] / "config/labels/pbmc68k.tsv"


def write_counts(path, counts, cell_ids, genes):
    var = pd.DataFrame({"symbol": list(genes)}, index=pd.Index(list(genes), name="gene_id"))
    counts = scipy.sparse.csr_matrix(counts, dtype=np.float32)
    write_cells(path, [counts], [np.asarray(cell_ids, dtype=object)], pd.DataFrame(index=range(len(cell_ids))), var, {})


@pytest.fixture(scope="module")
def blood(tmp_path_factory):
    """Real blood cells: counts in two files with different genes, and principal components as embeddings."""
    folder = tmp_path_factory.mktemp("blood")
    cells = sc.datasets.pbmc68k_reduced()
    log_counts = cells.raw.X.toarray()
    counts = np.rint(np.expm1(log_counts) * cells.obs["n_counts"].to_numpy()[:, None] / 1e4).astype(np.int32)
    ids = pd.read_csv(LABELS, sep="\t", index_col=0).iloc[:, 0]
    rng = np.random.default_rng(0)
    table, names = write_corpus(
        folder,
        cells.obs["bulk_labels"].astype(str).map(ids).to_list(),
        rng.choice(["train", "validation", "test"], p=[0.7, 0.1, 0.2], size=700),
        [["P1", "P2"] if total > np.median(counts.sum(axis=1)) else ["P3"] for total in counts.sum(axis=1)],
        tissue=[BLOOD] * 700,
        disease=[NORMAL] * 700,
    )
    for name, rows, genes in (("a", slice(0, 400), slice(0, 700)), ("b", slice(400, 700), slice(50, 765))):
        write_counts(folder / f"{name}.h5ad", counts[rows, genes], table["cell_id"][rows], cells.raw.var_names[genes])
    cells_of_files = [folder / "a.h5ad", folder / "b.h5ad"]
    corpus = write_ranked_corpus(folder / "cells.parquet", table["cell_id"], table["split"])
    measure_genes(corpus, cells_of_files, folder / "genes.parquet")
    for path in cells_of_files:
        rank_genes(corpus, path, folder / "genes.parquet", folder / f"tokens/{path.stem}.parquet")
    pooled = sc.pp.pca(log_counts, n_comps=32, random_state=0)
    write_embeddings(folder / "b.safetensors", table["cell_id"][400:], pooled[400:])
    write_embeddings(folder / "a.safetensors", table["cell_id"][:400], pooled[:400])
    return folder, table, names


def predict(name, folder):
    corpus = [folder / "descriptions.parquet", folder / "terms.parquet"]
    out = folder / f"{name}.parquet"
    embeddings = [folder / "a.safetensors", folder / "b.safetensors"]
    if name == "majority":
        predict_majority(*corpus, out)
    elif name == "pca_logistic":
        tokens = [folder / "tokens/b.parquet", folder / "tokens/a.parquet"]
        predict_pca_logistic(*corpus, folder / "cells.parquet", folder / "genes.parquet", tokens, out, seed=0)
    elif name == "knn":
        predict_knn(*corpus, embeddings, out)
    else:
        predict_nearest_text(corpus[0], embeddings, out)
    return PREDICTIONS.read(out).set_index("cell_id")


@pytest.fixture(scope="module")
def predictions(blood):
    folder, _, _ = blood
    return {name: predict(name, folder) for name in ("majority", "pca_logistic", "knn", "nearest_text")}


def accuracy(predicted, table):
    truth = table.set_index("cell_id").loc[predicted.index]
    return (truth["cell_type_id"] == predicted["cell_type_id"]).mean()


def test_every_baseline_describes_the_validation_and_test_cells(blood, predictions):
    _, table, _ = blood
    expected = table[table["split"] != "train"].set_index("cell_id")["split"]
    for predicted in predictions.values():
        assert predicted["split"].to_dict() == expected.to_dict()
        assert (predicted["status"] == "parsed").all()
        assert (predicted["tissue_id"] == BLOOD).all() and (predicted["disease_id"] == NORMAL).all()
        assert predicted["stage_id"].isna().all() and predicted["stage_confidence"].isna().all()


def test_texts_agree_with_the_slots(blood, predictions):
    _, _, names = blood
    for predicted in predictions.values():
        for row in predicted.sample(20, random_state=0).itertuples():
            read = parse(row.text, names)
            assert read.status == "parsed"
            assert read.slots.cell_type == row.cell_type_id
            assert read.slots.tissue == BLOOD
            assert read.slots.pathways == tuple(row.pathway_ids)


def test_trained_baselines_are_far_better_than_the_majority_label(blood, predictions):
    _, table, _ = blood
    scores = {name: accuracy(predicted, table) for name, predicted in predictions.items()}
    assert scores["majority"] < 0.45
    assert scores["pca_logistic"] > 0.7
    assert scores["knn"] > 0.65
    assert scores["nearest_text"] > 0.6


def test_the_majority_baseline_predicts_the_most_frequent_training_label(blood, predictions):
    _, table, _ = blood
    shares = table.loc[table["split"] == "train", "cell_type_id"].value_counts(normalize=True)
    predicted = predictions["majority"]
    assert (predicted["cell_type_id"] == shares.index[0]).all()
    assert predicted["cell_type_confidence"].to_numpy() == pytest.approx(shares.iloc[0], abs=1e-6)
    assert (predicted["tissue_confidence"] == 1).all()


def test_logistic_confidence_is_higher_for_correct_predictions(blood, predictions):
    _, table, _ = blood
    predicted = predictions["pca_logistic"]
    correct = table.set_index("cell_id").loc[predicted.index, "cell_type_id"] == predicted["cell_type_id"]
    confidence = predicted["cell_type_confidence"]
    assert confidence.between(0.1, 1).all()
    assert confidence[correct].mean() > confidence[~correct].mean() + 0.1
    assert (predicted["tissue_confidence"] == 1).all()


def test_baselines_are_deterministic(blood, predictions):
    folder, _, _ = blood
    for name, predicted in predictions.items():
        pd.testing.assert_frame_equal(predict(name, folder), predicted)


def test_baselines_do_not_use_labels_of_held_out_cells(blood, predictions, tmp_path):
    folder, table, _ = blood
    masked = DESCRIPTIONS.read(folder / "descriptions.parquet")
    masked.loc[masked["split"] != "train", "cell_type_id"] = NK_CELL
    DESCRIPTIONS.write(masked, tmp_path / "descriptions.parquet")
    for file in ("terms.parquet", "cells.parquet", "genes.parquet", "tokens", "a.safetensors", "b.safetensors"):
        (tmp_path / file).symlink_to(folder / file)
    for name, predicted in predictions.items():
        pd.testing.assert_frame_equal(predict(name, tmp_path), predicted)


def test_the_knn_vote_equals_that_of_scikit_learn(blood, predictions):
    folder, table, _ = blood
    pooled = read_pooled([folder / "a.safetensors", folder / "b.safetensors"], table["cell_id"])
    train = (table["split"] == "train").to_numpy()
    vote = KNeighborsClassifier(15).fit(pooled[train], table.loc[train, "cell_type_id"])
    predicted = predictions["knn"]
    assert (predicted["cell_type_id"] == vote.predict(pooled[~train])).all()
    expected = vote.predict_proba(pooled[~train]).max(axis=1)
    assert predicted["cell_type_confidence"].to_numpy() == pytest.approx(expected)


def test_a_cell_without_counts_is_reported(blood, tmp_path):
    folder, _, _ = blood
    corpus = [folder / "descriptions.parquet", folder / "terms.parquet"]
    with pytest.raises(InputError, match="cells with a description are missing"):
        files = folder / "cells.parquet", folder / "genes.parquet", [folder / "tokens/a.parquet"]
        predict_pca_logistic(*corpus, *files, tmp_path / "out.parquet", seed=0)


def test_the_regression_is_fitted_on_a_sample_of_many_training_cells(blood, predictions, tmp_path, monkeypatch):
    folder, table, _ = blood
    fitted = []

    class Recorded(LogisticRegression):
        def fit(self, rows, codes):
            fitted.append(len(rows))
            return super().fit(rows, codes)

    monkeypatch.setattr(pca_logistic, "LogisticRegression", Recorded)
    monkeypatch.setattr(pca_logistic, "MOST_CELLS", 300)
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "pca_logistic.parquet").unlink()
    few = predict("pca_logistic", tmp_path)
    assert max(fitted) == 300 < (table["split"] == "train").sum()
    assert list(few.index) == list(predictions["pca_logistic"].index)
    assert (few["cell_type_id"] == predictions["pca_logistic"]["cell_type_id"]).mean() > 0.8


def test_nearest_text_copies_the_whole_description_of_the_nearest_cell_by_cosine(tmp_path):
    table, _ = write_corpus(
        tmp_path,
        [B_CELL, NK_CELL, NK_CELL, B_CELL],
        ["train", "train", "test", "validation"],
        [["P1", "P2"], ["P3"], ["P1"], ["P2"]],
        tissue=[BLOOD, LUNG, BLOOD, BLOOD],
        sex=[FEMALE, None, None, None],
    )
    # The first cell to describe is closest to the second training cell by distance, and to the first by angle.
    write_embeddings(tmp_path / "a.safetensors", table["cell_id"][:2], [[10, 0], [0, 1]])
    write_embeddings(tmp_path / "b.safetensors", table["cell_id"][2:], [[1, 0.5], [0.1, 5]])
    predicted = predict("nearest_text", tmp_path)
    assert predicted["cell_type_id"].to_list() == [B_CELL, NK_CELL]
    assert predicted["tissue_id"].to_list() == [BLOOD, LUNG]
    assert predicted["sex_id"].to_list() == [FEMALE, None]
    assert [list(sets) for sets in predicted["pathway_ids"]] == [["P1", "P2"], ["P3"]]
    assert predicted["text"].to_list() == table["text"][:2].to_list()
    assert predicted["cell_type_confidence"].isna().all()


def test_slots_with_missing_training_labels(tmp_path):
    table, _ = write_corpus(
        tmp_path,
        [B_CELL, B_CELL, None, NK_CELL, B_CELL],
        ["train", "train", "train", "train", "test"],
        [["P1", "P2"], ["P1"], ["P2"], ["P3"], []],
        stage=[None, None, ADULT, None, None],
    )
    write_embeddings(tmp_path / "a.safetensors", table["cell_id"][:3], [[0, 1], [0, 2], [1, 1]])
    write_embeddings(tmp_path / "b.safetensors", table["cell_id"][3:], [[3, 0], [0, 1]])
    predicted = predict("knn", tmp_path).iloc[0]
    assert predicted["cell_type_id"] == B_CELL
    assert predicted["cell_type_confidence"] == pytest.approx(2 / 3)
    assert (predicted["stage_id"], predicted["stage_confidence"]) == (ADULT, 1)
    assert predicted["tissue_id"] is None and np.isnan(predicted["tissue_confidence"])
    assert list(predicted["pathway_ids"]) == ["P1", "P2"]


def test_the_majority_of_gene_sets_and_ties_by_id(tmp_path):
    write_corpus(
        tmp_path,
        [NK_CELL, B_CELL, None, B_CELL],
        ["train", "train", "train", "test"],
        [["P2", "P1"], ["P1", "P2"], ["P3"], ["P3"]],
    )
    table = pd.read_parquet(tmp_path / "descriptions.parquet")
    assert table["cell_type_id"].isna().sum() == 1
    predicted = predict("majority", tmp_path).iloc[0]
    assert predicted["cell_type_id"] == B_CELL
    assert predicted["cell_type_confidence"] == 0.5
    assert list(predicted["pathway_ids"]) == ["P1", "P2"]
