"""Cell types of a new file refined among similar cells: weights and thresholds from known labels, values by hand."""

import json

import numpy as np
import pandas as pd
import pytest

from cell2text.annotation.describe_query import describe_query
from cell2text.annotation.find_queries import check_refinement
from cell2text.annotation.refine_query import refine_query
from cell2text.confidence.back_off import Threshold
from cell2text.confidence.decisions import Confidence
from cell2text.confidence.refinement import Refinement, fit_refinement, score
from cell2text.contracts import DESCRIPTIONS, EMBEDDINGS, REFINED, SCORES
from cell2text.errors import InputError
from cell2text.files import read_jsonl, write_json
from scored_cells import LABELS, draw, run_calibrate, write_run

CELLS = 600
NEIGHBOURS = 10


def write_vectors(path, cell_ids, pooled, lengths=None):
    count = len(cell_ids)
    tensors = {"gene_vectors": np.zeros((count, 0, 1), np.float16), "pooled": pooled.astype(np.float32)}
    tensors["lengths"] = np.ones(count, np.int32) if lengths is None else lengths.astype(np.int32)
    EMBEDDINGS.write(tensors, list(cell_ids), path)


@pytest.fixture
def run(tmp_path):
    """Files of a run whose validation cells of a type are similar, and the true types of these cells."""
    scores, true, named = draw(CELLS, 0)
    folder = write_run(tmp_path, scores, true, named)
    cells = DESCRIPTIONS.read(folder / "descriptions.parquet")
    places = pd.Index(LABELS["cell_type"]).get_indexer(cells["cell_type_id"])
    pooled = np.eye(4)[places] * 5 + np.random.default_rng(1).normal(size=(len(cells), 4))
    write_vectors(folder / "embeddings.safetensors", cells["cell_id"], pooled)
    run_calibrate(folder)
    return folder, true


def fit(folder, left_out=None, embeddings="embeddings", seed=0):
    fit_refinement(
        str(folder / "calibration.json"),
        str(folder / "model"),
        [str(folder / f"scores{n}.safetensors") for n in (0, 1)],
        left_out,
        str(folder / "descriptions.parquet"),
        str(folder / "terms.parquet"),
        [str(folder / f"{embeddings}.safetensors")],
        str(folder / "vectors.safetensors"),
        str(folder / "refinement.json"),
        confidence=0.8,
        neighbours=NEIGHBOURS,
        seed=seed,
    )
    return Refinement.load(folder / "refinement.json")


def test_similar_cells_of_a_type_get_a_weight_and_more_right_types(run):
    found = fit(run[0])
    assert found.weight > 0 and found.cells == CELLS and found.studies is None
    before, after, shuffled = found.accuracy
    assert after > before + 0.1 and after > 0.9 and shuffled < before
    assert found.brier[1] < found.brier[0] < found.brier[2]
    assert found.threshold.guaranteed and found.threshold.value < 1


def test_cells_without_structure_keep_their_types(run):
    folder, _ = run
    cells = DESCRIPTIONS.read(folder / "descriptions.parquet")
    noise = np.random.default_rng(2).normal(size=(len(cells), 4))
    write_vectors(folder / "noise.safetensors", cells["cell_id"], noise)
    found = fit(folder, embeddings="noise")
    assert found.weight == 0 and found.accuracy[0] == found.accuracy[1] and found.brier[0] == found.brier[1]
    own = json.loads((folder / "confidence.json").read_text())["thresholds"]["cell_type"]
    assert found.threshold.value == own["value"]
    probabilities = np.random.default_rng(3).dirichlet(np.ones(4), size=5)
    assert np.array_equal(found.refine(probabilities, noise[:5], np.ones(5, dtype=bool)), probabilities)


def test_the_reported_terms_of_further_cells_are_right_as_often_as_requested(run):
    """400 further cells of the same types in a file of their own: at most a fifth of the reported terms is wrong."""
    found = fit(run[0])
    scores, true, _ = draw(400, 5)
    confidence = Confidence.load(run[0] / "confidence.json")
    probabilities = confidence.probabilities("cell_type", scores)
    places = pd.Index(LABELS["cell_type"]).get_indexer(true)
    vectors = np.eye(4)[places] * 5 + np.random.default_rng(6).normal(size=(400, 4))
    refined = found.refine(probabilities, vectors, np.ones(400, dtype=bool))
    sure = refined.max(axis=1) >= found.threshold.value
    right = np.array(LABELS["cell_type"])[refined.argmax(axis=1)] == true
    assert sure.mean() > 0.5 and right[sure].mean() >= 0.8


def test_scores_by_hand():
    """Brier: (0.3^2 + 0.3^2), (0.8^2 + 0.8^2), and 0.5^2 + 0.5^2 + 1 for a type that is no label."""
    probabilities = np.array([[0.7, 0.3], [0.8, 0.2], [0.5, 0.5]])
    accuracy, brier = score(probabilities, np.array([0, 1, -1]))
    assert accuracy == pytest.approx(1 / 3)
    assert brier == pytest.approx((0.18 + 1.28 + 1.5) / 3)


def test_two_cells_refined_by_hand_and_a_cell_without_genes_left_alone():
    """Joined by exp(-1) = w: (1 + w) p1 - w p2 = 1 and (1 + w) p2 - w p1 = 0, so p1 = (1 + w) / (1 + 2 w)."""
    start = np.array([[1.0, 0], [0, 1], [0.6, 0.4]])
    refinement = Refinement(1, 1.0, None, 0, None)
    vectors = np.array([[0.0], [1], [0.5]])  # the third would be the nearest of both
    found = refinement.refine(start, vectors, np.array([True, True, False]))
    w = np.exp(-1)
    assert found[:, 0] == pytest.approx([(1 + w) / (1 + 2 * w), w / (1 + 2 * w), 0.6])
    assert np.array_equal(start, [[1, 0], [0, 1], [0.6, 0.4]])


def test_studies_held_out_of_alignment_decide_if_there_are_any(run):
    """Half of the training cells are of another study, and in the same places: no cell is joined with one of them."""
    folder, _ = run
    table = DESCRIPTIONS.read(folder / "descriptions.parquet")
    training = np.flatnonzero(table["split"] == "train")
    ids = table["cell_id"].to_numpy(dtype=object)
    ids[training[::2]] = [f"other|{i}" for i in training[::2]]
    table["cell_id"] = ids
    types = np.where(np.arange(len(table)) % 2, "BM", "T8")
    table["cell_type_id"] = table["cell_type_id"].where(table["split"] != "train", pd.Series(types))
    DESCRIPTIONS.write(table, folder / "descriptions.parquet")
    pooled = np.random.default_rng(4).normal(size=(len(training), 4))
    write_vectors(folder / "vectors.safetensors", ids[training], pooled)
    write_vectors(folder / "embeddings.safetensors", ids, np.zeros((len(table), 4)))
    scores, _, _ = draw(len(training), 7)
    alone = {name: tensor for name, tensor in scores.items() if name.startswith("projector_")}
    alone["novelty"] = np.ones(len(training), np.float32)
    left_out = str(folder / "left_out.safetensors")
    SCORES.write(alone, ids[training].tolist(), left_out)
    run_calibrate(folder, left_out=left_out)
    found = fit(folder, left_out)
    assert found.studies == found.threshold.studies == 2 and found.cells == len(training)
    assert not found.threshold.guaranteed


def test_a_model_without_cell_types_has_nothing_to_refine(run):
    folder, _ = run
    labels = {slot: ids for slot, ids in LABELS.items() if slot != "cell_type"}
    write_json({"labels": labels, "programmes_per_cell": 2}, folder / "model/cell2text.json")
    found = fit(folder)
    assert found.weight == 0 and found.threshold is None and found.cells == 0


def make_query(folder, refinement):
    """Write a packed model, as far as these steps read it, and the scores and vectors of a file in two shards."""
    write_json(
        {"labels": LABELS, "programmes_per_cell": 2, "sha256": {"refinement.json": ""}}, folder / "cell2text.json"
    )
    refinement.save(folder / "refinement.json")
    scores, _, _ = draw(60, 8)
    ids, vectors = [f"query|{i}" for i in range(60)], np.random.default_rng(9).normal(size=(60, 4))
    lengths = np.arange(60) % 10 > 0
    files = {}
    for name, rows in {"whole": slice(0, 60), "0": slice(0, 25), "1": slice(25, 60)}.items():
        files[name] = [str(folder / f"{kind}_{name}.safetensors") for kind in ("scores", "vectors", "refined")]
        SCORES.write({slot: tensor[rows] for slot, tensor in scores.items()}, ids[rows], files[name][0])
        write_vectors(files[name][1], ids[rows], vectors[rows], lengths[rows])
    return files


def test_shards_of_a_file_are_refined_together_and_the_texts_follow(run):
    folder, _ = run
    threshold = Threshold(0.6, 0.8, 100, True)
    files = make_query(folder, Refinement(5, 10.0, threshold, 100, None))
    refine_query(str(folder), [files["whole"][0]], [files["whole"][1]], [files["whole"][2]])
    refine_query(str(folder), *([files[one][kind] for one in ("0", "1")] for kind in range(3)))
    whole = REFINED.read(files["whole"][2])[0]["cell_type"]
    parts = np.concatenate([REFINED.read(files[one][2])[0]["cell_type"] for one in ("0", "1")])
    assert np.allclose(whole, parts, atol=1e-6)
    described = {}
    for name, refined in (("before", None), ("after", files["whole"][2])):
        out = str(folder / f"{name}.jsonl")
        describe_query(str(folder), *files["whole"][:2], out, refined=refined)
        described[name] = list(read_jsonl(out))
    names = np.array(LABELS["cell_type"])[whole.argmax(axis=1)]
    changed = 0
    for before, after, name, row in zip(described["before"], described["after"], names, whole, strict=True):
        assert after["cell_type_id"] == name and after["cell_type_confidence"] == pytest.approx(row.max(), abs=1e-6)
        assert {key: before[key] for key in ("pathway_ids", "tissue_id", "novelty")} == {
            key: after[key] for key in ("pathway_ids", "tissue_id", "novelty")
        }
        reported = after["cell_type_reported_confidence"]
        assert reported is None or reported >= 0.6
        changed += before["cell_type_id"] != name
        assert (before["text"] != after["text"]) == (before["cell_type_id"] != name)
    assert changed


def test_a_model_that_cannot_refine_is_refused_with_the_remedy(tmp_path):
    write_json({"labels": LABELS, "sha256": {}}, tmp_path / "cell2text.json")
    with pytest.raises(InputError, match=r"cannot refine cell types. Train it with `graph: \{refine: true\}`"):
        check_refinement(tmp_path)
    write_json({"labels": {}, "sha256": {"refinement.json": ""}}, tmp_path / "cell2text.json")
    with pytest.raises(InputError, match=r"names no cell types. Do not set annotate.graph or --graph"):
        check_refinement(tmp_path)


def test_a_damaged_file_is_reported_in_one_line(tmp_path):
    for content in ("{", "{}", '{"threshold": null}'):
        (tmp_path / "refinement.json").write_text(content)
        with pytest.raises(InputError, match=r"refinement\.json") as error:
            Refinement.load(tmp_path / "refinement.json")
        assert "\n" not in str(error.value)
