"""Confidence on new studies: scores of studies left out of alignment, and what is fitted to them."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.special import log_softmax

from cell2text.confidence.decisions import Confidence, read_ancestors
from cell2text.contracts import DESCRIPTIONS, SCORES
from cell2text.embedding.vectors import Embeddings
from cell2text.finetuning.left_out import score_left_out_studies
from default_settings import finetune_settings, projector_settings
from finetune_run import PROJECTOR, SETTINGS, TYPES, write_files
from scored_cells import LABELS, draw, run_calibrate, write_embeddings, write_run

NAMES = ["cell_type", "disease", "tissue"]


def score(files, tiny_model, **changes):
    score_left_out_studies(
        str(tiny_model),
        str(files / "descriptions.parquet"),
        str(files / "terms.parquet"),
        Embeddings([str(files / "embeddings.safetensors")]),
        str(files / "left_out.safetensors"),
        projector=projector_settings(**PROJECTOR),
        settings=finetune_settings(**SETTINGS | {"align_steps": 120} | changes),
        seed=3,
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


def write_left_out(folder, scores, true, named):
    """Let some training cells be scored by projectors that have not seen their study, and write their descriptions."""
    table = DESCRIPTIONS.read(folder / "descriptions.parquet")
    chosen = np.flatnonzero(table["split"] == "train")[: len(true)]
    table.loc[chosen, "cell_type_id"] = true
    table.loc[chosen, "pathway_ids"] = pd.Series([list(one) for one in named], index=chosen)
    DESCRIPTIONS.write(table, folder / "descriptions.parquet")
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
