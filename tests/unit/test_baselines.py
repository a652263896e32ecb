from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse
from sklearn.neighbors import KNeighborsClassifier

from cell2text.contracts import DESCRIPTIONS, EMBEDDINGS, PREDICTIONS, TERMS
from cell2text.errors import InputError
from cell2text.evaluation.baselines.knn import predict_knn
from cell2text.evaluation.baselines.majority import predict_majority
from cell2text.evaluation.baselines.nearest_text import predict_nearest_text
from cell2text.evaluation.baselines.pca_logistic import predict_pca_logistic, read_raw_counts
from cell2text.evaluation.baselines.slots import read_pooled
from cell2text.grammar import Slots, Terms, parse, render, with_definition
from cell2text.ontology import slot_terms

LABELS = Path(__file__).parents[2] / "config/labels/pbmc68k.tsv"
SLOTS = ("cell_type", "tissue", "disease", "sex", "stage")
BLOOD, LUNG, NORMAL, FEMALE, ADULT = (
    "UBERON:0000178",
    "UBERON:0002048",
    "PATO:0000461",
    "PATO:0000383",
    "HsapDv:0000258",
)
B_CELL, NK_CELL = "CL:0000236", "CL:0000623"


def write_corpus(folder, cell_types, splits, pathways, **slots):
    """Write descriptions and terms; slots that are not passed are unknown."""
    terms = pd.concat(
        [slot_terms(slot) for slot in SLOTS]
        + [
            pd.DataFrame(
                [("pathway", key, f"programme {key}", f"It does {key}.") for key in ("P1", "P2", "P3")],
                columns=["slot", "id", "name", "definition"],
            )
        ],
        ignore_index=True,
    )
    TERMS.write(terms, folder / "terms.parquet")
    n, names = len(cell_types), Terms(terms)
    table = pd.DataFrame({"cell_id": [f"study|{i}" for i in range(n)], "split": splits})
    for slot in SLOTS:
        table[f"{slot}_id"] = pd.Series(slots.get(slot, [None] * n), dtype=object)
    table["cell_type_id"], table["pathway_ids"] = pd.Series(cell_types, dtype=object), pathways
    filled = [
        with_definition(Slots(*row[2:3], None, *row[3:7], tuple(row.pathway_ids)), names)
        for row in table.itertuples(index=False)
    ]
    table["definition"] = [one.definition for one in filled]
    table["text"] = [render(one, names) for one in filled]
    DESCRIPTIONS.write(table[list(DESCRIPTIONS.columns)], folder / "descriptions.parquet")
    return table, names


def write_embeddings(path, cell_ids, pooled):
    n = len(cell_ids)
    tensors = {
        "gene_vectors": np.zeros((n, 1, 1), np.float16),
        "lengths": np.ones(n, np.int32),
        "pooled": np.ascontiguousarray(pooled, dtype=np.float32),
    }
    EMBEDDINGS.write(tensors, list(cell_ids), path)


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
        ad.AnnData(
            scipy.sparse.csr_matrix(counts[rows, genes]),
            obs=pd.DataFrame(index=table["cell_id"][rows].to_numpy()),
            var=pd.DataFrame(index=cells.raw.var_names[genes]),
        ).write_h5ad(folder / f"{name}.h5ad")
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
        predict_pca_logistic(*corpus, [folder / "a.h5ad", folder / "b.h5ad"], out, seed=0)
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
    for file in ("terms.parquet", "a.h5ad", "b.h5ad", "a.safetensors", "b.safetensors"):
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


def test_counts_of_studies_with_different_genes(tmp_path):
    one = ad.AnnData(scipy.sparse.csr_matrix([[1, 2], [3, 4]]))
    one.obs_names, one.var_names = ["x", "y"], ["GENE2", "GENE1"]
    two = ad.AnnData(scipy.sparse.csr_matrix([[5, 6]]))
    two.obs_names, two.var_names = ["z"], ["GENE3", "GENE2"]
    one.write_h5ad(tmp_path / "one.h5ad")
    two.write_h5ad(tmp_path / "two.h5ad")
    files = [tmp_path / "two.h5ad", tmp_path / "one.h5ad"]
    counts = read_raw_counts(files, pd.Series(["z", "y"]))
    assert scipy.sparse.issparse(counts.X)
    found = counts.to_df().loc[["y", "z"], ["GENE1", "GENE2", "GENE3"]]
    assert found.to_numpy().tolist() == [[4, 3, 0], [0, 6, 5]]
    with pytest.raises(InputError, match=r"cells with a description are missing \(1, such as w\)"):
        read_raw_counts(files, pd.Series(["z", "w"]))


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
