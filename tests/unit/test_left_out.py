"""Confidence on new studies: scores of studies left out of alignment, and what is fitted to them."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.special import log_softmax

from cell2text.confidence.decisions import Confidence, read_ancestors
from cell2text.contracts import DESCRIPTIONS, EMBEDDINGS, SCORES, TOKENS
from cell2text.embedding.fit_encoder import EncoderInputs
from cell2text.embedding.refit import refit_without
from cell2text.embedding.vectors import Embeddings
from cell2text.finetuning import left_out
from cell2text.finetuning.left_out import score_left_out_studies
from default_settings import encoder_settings, finetune_settings, projector_settings
from finetune_run import PROJECTOR, SETTINGS, TYPES, write_files
from ranked_files import rank, write_corpus, write_genes
from scored_cells import LABELS, draw, run_calibrate, write_embeddings, write_run

NAMES = ["cell_type", "disease", "tissue"]


def score(files, tiny_model, encoder=None, **changes):
    score_left_out_studies(
        str(tiny_model),
        str(files / "descriptions.parquet"),
        str(files / "terms.parquet"),
        Embeddings([str(files / "embeddings.safetensors")]),
        str(files / "left_out.safetensors"),
        str(files / "left_out_vectors.safetensors"),
        projector=projector_settings(**PROJECTOR),
        settings=finetune_settings(**SETTINGS | {"align_steps": 120} | changes),
        seed=3,
        encoder=encoder,
    )
    return files / "left_out.safetensors"


@pytest.fixture
def files(tmp_path, tiny_model):
    # cells are of the types 0, 1, 2, 0, 1, 2, ...; the third type has training cells only in study c
    return write_files(tmp_path, tiny_model, [("a", "b", "c")[i % 3 if i % 3 == 2 else i // 3 % 2] for i in range(30)])


def test_each_study_is_scored_without_its_own_labels(files, tiny_model):
    found, cells = SCORES.read(score(files, tiny_model), [f"projector_{name}" for name in NAMES])
    table = DESCRIPTIONS.read(files / "descriptions.parquet").set_index("cell_id")
    training = table.index[table["split"] == "train"]
    assert sorted(cells) == sorted(training)
    novelty = SCORES.read(files / "left_out.safetensors", ["novelty"])[0]["novelty"]
    apart = np.array([one.startswith("c") for one in cells])
    assert novelty[apart].min() > novelty[~apart].max()  # no other study has cells of its type
    types, studies = table.loc[cells, "cell_type_id"].to_numpy(), pd.Index(cells).str[0]
    scores = found["projector_cell_type"]
    assert np.allclose(np.exp(scores).sum(axis=1), 1, atol=1e-5)
    known = studies != "c"
    assert (np.array(TYPES)[scores[known].argmax(axis=1)] == types[known]).all()
    # nothing but study c teaches the third type
    assert np.isneginf(scores[~known, 2]).all() and np.isfinite(scores[known]).all()
    assert found["projector_tissue"].tolist() == [[0.0]] * len(cells)
    again = score(files, tiny_model).read_bytes()
    assert again == score(files, tiny_model).read_bytes()


def test_a_label_of_one_study_is_impossible_without_it(files, tiny_model):
    table = DESCRIPTIONS.read(files / "descriptions.parquet")
    table.loc[table["cell_id"].str[0] != "c", "disease_id"] = None
    DESCRIPTIONS.write(table, files / "descriptions.parquet")
    found, cells = SCORES.read(score(files, tiny_model), ["projector_disease"])
    assert found["projector_disease"].tolist() == [[-np.inf if cell[0] == "c" else 0.0] for cell in cells]


@pytest.mark.parametrize(("studies", "changes"), [("ab" * 15, {}), ("abc" * 10, {"align_steps": 0})])
def test_without_studies_to_leave_out_there_are_no_scores(tmp_path, tiny_model, studies, changes):
    path = score(write_files(tmp_path, tiny_model, list(studies)), tiny_model, **changes)
    assert SCORES.read(path, [])[1] == []


def test_the_encoder_is_fitted_without_the_study_that_is_scored(files, tiny_model):
    """Each type has genes of its own; the third type is only in study c."""
    table = DESCRIPTIONS.read(files / "descriptions.parquet")
    studies, types = table["cell_id"].str[0], pd.Index(TYPES).get_indexer(table["cell_type_id"])
    random, paths, measured = np.random.default_rng(0), [], {}
    expression = random.random((30, 24)) + 3 * (np.arange(24) // 8 == types[:, None])
    for study in "abc":
        ranked = rank(expression[studies == study]).assign(cell_id=table["cell_id"][studies == study].to_list())
        paths.append(str(files / f"{study}.parquet"))
        TOKENS.write(ranked, paths[-1])
        measured[study] = np.ones(24, dtype=bool)
    genes = write_genes(files / "genes.parquet", measured)
    corpus = write_corpus(files / "corpus.parquet", table["cell_id"], table["split"], table["cell_type_id"])
    settings = encoder_settings(dimensions=3, views=0)
    inputs = EncoderInputs(str(corpus), str(genes), paths, settings, seed=0)
    found, cells = SCORES.read(score(files, tiny_model, inputs), ["projector_cell_type"])
    known = pd.Index(cells).str[0] != "c"
    right = np.array(TYPES)[found["projector_cell_type"].argmax(axis=1)]
    true = table.set_index("cell_id").loc[cells, "cell_type_id"].to_numpy()
    assert (right[known] == true[known]).mean() > 0.9
    vectors, written = EMBEDDINGS.read(files / "left_out_vectors.safetensors")
    assert written == cells and (vectors["lengths"] > 0).all()
    with refit_without(inputs, ["b"], table["cell_id"][table["split"] == "train"], gene_vectors=False) as without:
        own = [one for one in cells if one[0] == "b"]
        expected = EMBEDDINGS.read_cells(without.files, own, ["pooled"])["pooled"]
    rows = [cells.index(one) for one in own]
    assert np.array_equal(vectors["pooled"][rows][:, : expected.shape[1]], expected)
    assert not vectors["pooled"][rows][:, expected.shape[1] :].any()


def test_of_many_training_cells_some_are_used(files, tiny_model, monkeypatch):
    monkeypatch.setattr(left_out, "MOST_CELLS", 11)
    cells = SCORES.read(score(files, tiny_model), ["projector_cell_type"])[1]
    table = DESCRIPTIONS.read(files / "descriptions.parquet")
    assert sorted(cells) == sorted(table.loc[table["split"] == "train", "cell_id"].iloc[::2])


def write_left_out(folder, scores, true, named):
    """Let some training cells be scored by projectors that have not seen their study, and write their descriptions."""
    table = DESCRIPTIONS.read(folder / "descriptions.parquet")
    chosen = np.flatnonzero(table["split"] == "train")[: len(true)]
    table.loc[chosen, "cell_type_id"] = true
    table.loc[chosen, "pathway_ids"] = pd.Series([list(one) for one in named], index=chosen)
    DESCRIPTIONS.write(table, folder / "descriptions.parquet")
    scores = {"novelty": np.ones(len(true), np.float32)} | scores
    SCORES.write(scores, table["cell_id"].iloc[chosen].to_list(), folder / "left_out.safetensors")
    return str(folder / "left_out.safetensors")


def test_cells_of_new_studies_have_their_own_confidence(tmp_path):
    scores, true, named = draw(3000, seed=1)
    folder = write_run(tmp_path, scores, true, named, training=600)
    random, (other, types, programmes) = np.random.default_rng(2), draw(600, seed=3)
    # On new studies the projector's logits are three times too large, and a third of the cells is of a type that is no
    # candidate, half of them below T.
    projector = log_softmax(3 * other["cell_type"] / 2, axis=1)
    unseen = np.arange(600) % 3 == 0
    types[unseen] = np.where(random.random(unseen.sum()) < 0.5, "T", "L")
    new = {"projector_cell_type": projector, "projector_tissue": other["projector_tissue"]}
    new["projector_pathway"] = other["pathway"][:, 0]
    calibration, _ = run_calibrate(folder, left_out=write_left_out(folder, new, types, programmes))
    fitted = Confidence.load(calibration)
    assert (
        fitted.studies == {"cell_type": ["s"], "tissue": ["s"], "pathway": ["s"]}
        and fitted.new_studies.new_studies is None
    )
    slot = fitted.new_studies.slots["cell_type"]
    assert slot.weights[0] == 0 and slot.weights[1] == pytest.approx(1 / 3, rel=0.15)
    assert slot.none == pytest.approx(1 / 3) and slot.cells == 600
    assert fitted.new_studies.ranking.weights == (0, pytest.approx(1, rel=0.2))
    # the language model's scores tell the two kinds apart: they count only in studies with training cells
    both = scores | {name: scores[name][::-1].copy() for name in ("projector_cell_type", "projector_pathway")}
    ancestors = read_ancestors(str(folder / "terms.parquet"))
    ids = [f"{'s' if cell % 2 else 'new'}|{cell}" for cell in range(3000)]
    table = fitted.describe(both, LABELS, ancestors, ids)
    for study, confidence in ((1, replace(fitted, new_studies=None)), (0, fitted.new_studies)):
        some = {name: tensor[study::2] for name, tensor in both.items()}
        expected = confidence.describe(some, LABELS, ancestors)
        pd.testing.assert_frame_equal(table.iloc[study::2].reset_index(drop=True), expected)
    assert table["cell_type_confidence"].iloc[::2].max() <= 2 / 3 + 1e-6
    assert fitted.describe(both, LABELS, ancestors)["cell_type_confidence"].max() > 0.9
    whole = fitted.describe({name: tensor[:0] for name, tensor in both.items()}, LABELS, ancestors, [])
    assert len(whole) == 0


def test_novel_cells_of_new_studies_are_more_often_of_other_types(tmp_path):
    """In four studies that play the new one, a cell of another type is farther away; in describing, so is the doubt."""
    scores, true, named = draw(300, seed=1)
    folder = write_run(tmp_path, scores, true, named, training=800)
    table = DESCRIPTIONS.read(folder / "descriptions.parquet")
    training = np.flatnonzero(table["split"] == "train")
    ids = table["cell_id"].to_numpy(dtype=object)
    ids[training] = [f"{'abcd'[i % 4]}|{i}" for i in range(800)]
    table["cell_id"] = ids
    DESCRIPTIONS.write(table, folder / "descriptions.parquet")
    vectors = np.random.default_rng(0).normal(size=(len(table), 4))
    write_embeddings(folder / "embeddings.safetensors", table["cell_id"], vectors)
    other, types, programmes = draw(800, seed=3)
    unseen = np.arange(800) % 20 < 8
    types[unseen] = "L"
    new = {name: tensor for name, tensor in other.items() if name.startswith("projector_")}
    new["novelty"] = np.where(unseen, 3, 1).astype(np.float32) * np.random.default_rng(5).lognormal(0, 0.5, 800)
    new["novelty"] = new["novelty"].astype(np.float32)
    fitted = Confidence.load(run_calibrate(folder, left_out=write_left_out(folder, new, types, programmes))[0])
    intercept, slope = fitted.new_studies.slots["cell_type"].none_by_novelty
    assert slope > 1 and fitted.slots["cell_type"].none_by_novelty is None
    assert fitted.new_studies.slots["tissue"].none_by_novelty is None  # all are of the only tissue
    cells = {name: np.repeat(tensor[:1], 3, axis=0) for name, tensor in other.items()}
    cells["novelty"] = np.array([1.0, 4.0, np.nan])
    found = fitted.new_studies.probabilities("cell_type", cells).sum(axis=1)
    assert found[0] > 0.8 > 0.4 > found[1] and found[2] == pytest.approx(0.6)
    assert fitted.novelty_of_new(np.ones(3), ["a|1", "new|2", "s|3"])[1] == 1
    assert np.isnan(fitted.novelty_of_new(np.ones(2), ["a|1", "d|3"])).all()


def test_without_scores_of_left_out_studies_all_cells_are_alike(tmp_path):
    scores, true, named = draw(300, seed=1)
    folder = write_run(tmp_path, scores, true, named)
    SCORES.write({}, [], folder / "left_out.safetensors")
    assert Confidence.load(run_calibrate(folder, left_out=str(folder / "left_out.safetensors"))[0]).new_studies is None
    assert Confidence.load(run_calibrate(folder)[0]).new_studies is None


def test_a_slot_that_a_study_does_not_label_is_not_determined_there(tmp_path):
    """One study labels the tissue of its training cells, and only it can be trusted to be of this tissue."""
    scores, true, named = draw(300, seed=1)
    folder = write_run(tmp_path, scores, true, named)
    table = DESCRIPTIONS.read(folder / "descriptions.parquet")
    unlabelled = table["cell_id"].str.removeprefix("s|t").isin([str(i) for i in range(25)])
    table.loc[unlabelled, "cell_id"] = table["cell_id"].str.replace("s|", "other|")
    table.loc[unlabelled, "tissue_id"] = None
    DESCRIPTIONS.write(table, folder / "descriptions.parquet")
    write_embeddings(
        folder / "embeddings.safetensors", table["cell_id"], np.random.default_rng(0).normal(size=(350, 4))
    )
    ids = ["s|0", "other|1", "new|2"]
    some, ancestors = (
        {name: tensor[:3] for name, tensor in scores.items()},
        read_ancestors(str(folder / "terms.parquet")),
    )

    def describe(left_out):
        fitted = Confidence.load(run_calibrate(folder, left_out=left_out)[0])
        assert fitted.studies == {"cell_type": ["other", "s"], "tissue": ["s"], "pathway": ["other", "s"]}
        return fitted.describe(some, LABELS, ancestors, ids)

    alike = describe(None)
    blood = "UBERON:0000178"
    assert alike["tissue_reported_id"].to_list() == [blood, None, blood]
    assert alike["tissue_reported_confidence"].isna().to_list() == [False, True, False]
    assert alike["tissue_id"].to_list() == [blood] * 3 and alike["cell_type_reported_id"].notna().any()
    # scores of training cells by projectors that have not seen their study: there, no cell can be of the tissue
    other, types, programmes = draw(40, seed=3)
    left_out = {name: other[name] for name in other if name.startswith("projector_")}
    left_out["projector_tissue"] = np.full((40, 1), -np.inf, dtype=np.float32)
    of_new = describe(write_left_out(folder, left_out, types, programmes))
    assert of_new["tissue_reported_id"].to_list() == [blood, None, None]
    assert of_new["tissue_confidence"].to_list() == [pytest.approx(1), 0, 0]
