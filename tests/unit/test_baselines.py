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
    """Write descriptions and terms; slots that are not given are unknown."""
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
    """Real blood cells with their counts in two files of differing genes, and PCA as embeddings."""
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


def accuracy(told, table):
    truth = table.set_index("cell_id").loc[told.index]
    return (truth["cell_type_id"] == told["cell_type_id"]).mean()


def test_every_baseline_describes_the_validation_and_test_cells(blood, predictions):
    _, table, _ = blood
    wanted = table[table["split"] != "train"].set_index("cell_id")["split"]
    for told in predictions.values():
        assert told["split"].to_dict() == wanted.to_dict()
        assert (told["status"] == "parsed").all()
        assert (told["tissue_id"] == BLOOD).all() and (told["disease_id"] == NORMAL).all()
        assert told["stage_id"].isna().all() and told["stage_confidence"].isna().all()


def test_texts_say_what_the_slots_hold(blood, predictions):
    _, _, names = blood
    for told in predictions.values():
        for row in told.sample(20, random_state=0).itertuples():
            read = parse(row.text, names)
            assert read.status == "parsed"
            assert read.slots.cell_type == row.cell_type_id
            assert read.slots.tissue == BLOOD
            assert read.slots.pathways == tuple(row.pathway_ids)


def test_logistic_regression_beats_the_majority_by_far(blood, predictions):
    _, table, _ = blood
    scores = {name: accuracy(told, table) for name, told in predictions.items()}
    assert scores["majority"] < 0.45
    assert scores["pca_logistic"] > 0.7
    assert scores["knn"] > 0.65
    assert scores["nearest_text"] > 0.6


def test_majority_is_the_most_frequent_training_label(blood, predictions):
    _, table, _ = blood
    shares = table.loc[table["split"] == "train", "cell_type_id"].value_counts(normalize=True)
    told = predictions["majority"]
    assert (told["cell_type_id"] == shares.index[0]).all()
    assert told["cell_type_confidence"].to_numpy() == pytest.approx(shares.iloc[0], abs=1e-6)
    assert (told["tissue_confidence"] == 1).all()


def test_logistic_confidence_is_higher_where_it_is_right(blood, predictions):
    _, table, _ = blood
    told = predictions["pca_logistic"]
    right = table.set_index("cell_id").loc[told.index, "cell_type_id"] == told["cell_type_id"]
    confidence = told["cell_type_confidence"]
    assert confidence.between(0.1, 1).all()
    assert confidence[right].mean() > confidence[~right].mean() + 0.1
    assert (told["tissue_confidence"] == 1).all()


def test_baselines_are_deterministic(blood, predictions):
    folder, _, _ = blood
    for name, told in predictions.items():
        pd.testing.assert_frame_equal(predict(name, folder), told)


def test_no_test_label_reaches_a_baseline(blood, predictions, tmp_path):
    folder, table, _ = blood
    blind = DESCRIPTIONS.read(folder / "descriptions.parquet")
    blind.loc[blind["split"] != "train", "cell_type_id"] = NK_CELL
    DESCRIPTIONS.write(blind, tmp_path / "descriptions.parquet")
    for file in ("terms.parquet", "a.h5ad", "b.h5ad", "a.safetensors", "b.safetensors"):
        (tmp_path / file).symlink_to(folder / file)
    for name, told in predictions.items():
        pd.testing.assert_frame_equal(predict(name, tmp_path), told)


def test_knn_votes_as_scikit_learn_does(blood, predictions):
    folder, table, _ = blood
    pooled = read_pooled([folder / "a.safetensors", folder / "b.safetensors"], table["cell_id"])
    train = (table["split"] == "train").to_numpy()
    vote = KNeighborsClassifier(15).fit(pooled[train], table.loc[train, "cell_type_id"])
    told = predictions["knn"]
    assert (told["cell_type_id"] == vote.predict(pooled[~train])).all()
    expected = vote.predict_proba(pooled[~train]).max(axis=1)
    assert told["cell_type_confidence"].to_numpy() == pytest.approx(expected)


def test_counts_of_studies_with_differing_genes(tmp_path):
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
    with pytest.raises(InputError, match="1 described cells are missing, such as w"):
        read_raw_counts(files, pd.Series(["z", "w"]))


def test_nearest_text_is_the_whole_row_of_the_nearest_by_cosine(tmp_path):
    table, _ = write_corpus(
        tmp_path,
        [B_CELL, NK_CELL, NK_CELL, B_CELL],
        ["train", "train", "test", "validation"],
        [["P1", "P2"], ["P3"], ["P1"], ["P2"]],
        tissue=[BLOOD, LUNG, BLOOD, BLOOD],
        sex=[FEMALE, None, None, None],
    )
    # The first cell is nearer by distance to the second training cell, by angle to the first.
    write_embeddings(tmp_path / "a.safetensors", table["cell_id"][:2], [[10, 0], [0, 1]])
    write_embeddings(tmp_path / "b.safetensors", table["cell_id"][2:], [[1, 0.5], [0.1, 5]])
    told = predict("nearest_text", tmp_path)
    assert told["cell_type_id"].to_list() == [B_CELL, NK_CELL]
    assert told["tissue_id"].to_list() == [BLOOD, LUNG]
    assert told["sex_id"].to_list() == [FEMALE, None]
    assert [list(sets) for sets in told["pathway_ids"]] == [["P1", "P2"], ["P3"]]
    assert told["text"].to_list() == table["text"][:2].to_list()
    assert told["cell_type_confidence"].isna().all()


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
    told = predict("knn", tmp_path).iloc[0]
    assert told["cell_type_id"] == B_CELL
    assert told["cell_type_confidence"] == pytest.approx(2 / 3)
    assert (told["stage_id"], told["stage_confidence"]) == (ADULT, 1)
    assert told["tissue_id"] is None and np.isnan(told["tissue_confidence"])
    assert list(told["pathway_ids"]) == ["P1", "P2"]


def test_majority_of_sets_and_ties_by_id(tmp_path):
    write_corpus(
        tmp_path,
        [NK_CELL, B_CELL, None, B_CELL],
        ["train", "train", "train", "test"],
        [["P2", "P1"], ["P1", "P2"], ["P3"], ["P3"]],
    )
    table = pd.read_parquet(tmp_path / "descriptions.parquet")
    assert table["cell_type_id"].isna().sum() == 1
    told = predict("majority", tmp_path).iloc[0]
    assert told["cell_type_id"] == B_CELL
    assert told["cell_type_confidence"] == 0.5
    assert list(told["pathway_ids"]) == ["P1", "P2"]
