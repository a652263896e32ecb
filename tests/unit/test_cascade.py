"""Which cells the projector describes alone, and what is then said of them."""

import numpy as np
import pytest
from scipy.special import log_softmax

from cell2text.confidence.calibration import SlotCalibration
from cell2text.confidence.cascade import choose_least_lead, find_leads
from cell2text.confidence.decisions import Confidence
from scored_cells import LABELS, ROWS, draw, run_calibrate, write_run

ANCESTORS = {"cell_type": {row[1]: row[4] for row in ROWS if row[0] == "cell_type"}, "tissue": {}}
NAMED = ["cell_type_id", "tissue_id", "pathway_ids"]


def test_leads_by_hand():
    scores = {
        "projector_cell_type": np.log([[0.8, 0.1, 0.1], [0.5, 0.4, 0.1]]),
        "projector_tissue": np.zeros((2, 1)),
        "projector_pathway": np.log([[0.2, 0.6, 0.1, 0.1], [0.9, 0.06, 0.03, 0.01]]),
    }
    slots = {"cell_type": SlotCalibration(weights=(0.5, 2.0)), "tissue": SlotCalibration()}
    ranking = SlotCalibration(weights=(1.0, 3.0))
    # 4 log(8) and 3 log(2) for the second programme; 4 log(5 / 4) and 3 log(2)
    assert find_leads(scores, slots, ranking) == pytest.approx([3 * np.log(2), 4 * np.log(1.25)])
    # a language model without weight changes nothing, and a projector without weight decides nothing
    assert np.isposinf(
        find_leads(scores, {"cell_type": SlotCalibration(weights=(0.0, 1.0))}, SlotCalibration(weights=(0, 1)))
    ).all()
    assert find_leads(scores, {"cell_type": SlotCalibration()}, ranking).tolist() == [0, 0]
    # shares of 1/4 and 1/16 with a weight of -1/2 double and quadruple: 2 log(0.8 * 2 / (0.1 * 4)) for the first cell
    rare = SlotCalibration(weights=(0.5, 1.0), share_weight=-0.5, log_shares=tuple(np.log([1 / 4, 1 / 16, 1 / 16])))
    assert find_leads({"projector_cell_type": scores["projector_cell_type"]}, {"cell_type": rare}, ranking) == (
        pytest.approx([2 * np.log(4), 2 * np.log(1.6)])
    )
    # fewer programmes than a text names two of, and names that are impossible
    few = {"projector_pathway": np.log([[0.7, 0.3]]), "projector_cell_type": np.array([[0, -np.inf, -np.inf]])}
    assert find_leads(few, {"cell_type": SlotCalibration(weights=(1.0, 1.0))}, ranking) == pytest.approx(
        [3 * np.log(7 / 3)]
    )


def test_the_least_lead_by_hand():
    leads = np.array([5.0, 1.0, 4.0, 3.0, 2.0, 2.0])
    same = np.array([True, False, True, False, True, False])
    # of 6 cells, (differing + 1) / 7 may be 0.2, 0.3, 0.5 or 0.6: none, one, two or three may differ
    found = [choose_least_lead(leads, same, agreement) for agreement in (0.8, 0.7, 0.5, 0.4)]
    assert found[:3] == pytest.approx([3, 2, 1]) and found[3] == 0
    assert [int((~same & (leads >= least)).sum()) for least in found] == [0, 1, 2, 3]
    assert choose_least_lead(leads, np.ones(6, bool), 0.8) == 0
    assert choose_least_lead(leads, same, 0.9) is None and choose_least_lead(leads[:0], same[:0], 0.5) is None
    assert choose_least_lead(np.full(6, np.inf), same, 0.8) is None


def with_a_projector_that_knows(cells, seed):
    """Scores of a language model and a projector that each know the probabilities up to some noise."""
    scores, true, named = draw(cells, seed)
    random = np.random.default_rng(seed + 1000)
    scores["projector_cell_type"], scores["projector_pathway"] = scores["cell_type"], scores["pathway"][:, 0].copy()
    for name in ("cell_type", "projector_cell_type", "pathway", "projector_pathway"):
        noise = random.normal(0, 1, (cells, 1, 8) if name == "pathway" else scores[name].shape)
        scores[name] = log_softmax(scores[name] + noise, axis=-1).astype(np.float32)
    return scores, true, named


def test_cells_with_a_great_lead_are_described_by_the_projector_alone(tmp_path):
    folder = write_run(tmp_path, *with_a_projector_that_knows(2000, 1))
    cascade = Confidence.load(run_calibrate(folder, by="cascade", agreement=0.9)[0])
    both = Confidence.load(run_calibrate(folder)[0])
    assert both.least_lead is None and both.projector_alone is None
    scores, _, _ = with_a_projector_that_knows(2000, 2)
    needed = cascade.needs_language_model(scores)
    assert 0.02 < needed.mean() < 0.98 and both.needs_language_model(scores).all()
    unread = {name: tensor.copy() for name, tensor in scores.items()}
    for name in LABELS:
        unread[name][~needed] = -np.log(unread[name].shape[-1])
    found, expected = cascade.describe(unread, LABELS, ANCESTORS), both.describe(scores, LABELS, ANCESTORS)
    assert found[needed].equals(expected[needed])
    same = (found[NAMED] == expected[NAMED]).all(axis=1)
    assert same.mean() == pytest.approx(0.9, abs=0.02)
    alone = cascade.projector_alone.describe(scores, LABELS, ANCESTORS)
    assert found[~needed].equals(alone[~needed]) and not alone[needed].equals(expected[needed])


def test_with_few_cells_the_language_model_reads_all(tmp_path):
    folder = write_run(tmp_path, *with_a_projector_that_knows(18, 1))
    assert Confidence.load(run_calibrate(folder, by="cascade", agreement=0.95)[0]).projector_alone is None


def test_a_projector_alone_needs_no_language_model(tmp_path):
    folder = write_run(tmp_path, *with_a_projector_that_knows(40, 1))
    cascade = Confidence.load(run_calibrate(folder, by="cascade", agreement=0.5)[0])
    assert not Confidence.load(run_calibrate(folder, by="projector")[0]).needs_language_model(draw(3, 2)[0]).any()
    assert not cascade.projector_alone.needs_language_model(draw(3, 2)[0]).any()
