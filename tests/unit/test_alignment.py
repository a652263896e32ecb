"""What the projector is aligned to: label names, gene programmes and descriptions, by hand."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from cell2text.model.alignment import DescriptionTargets, LabelTargets, number_labels, order_slots, terms_above


def test_alignment_scores_are_cosines_over_the_temperature():
    targets = LabelTargets([torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, -1.0]])])
    soft = torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
    present = torch.tensor([[True, False], [True, True]])
    half = 2**-0.5
    first, second = targets.scores(soft, present)
    assert torch.allclose(first, torch.tensor([[1.0, 0.0], [half, half]]) / 0.05)
    assert torch.allclose(second, torch.tensor([[0.0], [-half]]) / 0.05)
    assert float(targets.loss(soft, present, torch.tensor([[-1, -1], [-1, -1]]))) == 0
    # the second cell is equally near to both labels of the first slot; the loss of a slot with one label is zero
    assert float(targets.loss(soft, present, torch.tensor([[-1, 0], [1, -1]]))) == pytest.approx(np.log(2))
    labels = {"cell_type": ["b", None, "a"], "sex": ["x", "x", "y"]}
    numbers = number_labels(labels, {"cell_type": ["a", "b"], "sex": ["x"]})
    assert numbers.tolist() == [[1, 0], [-1, 0], [0, -1]]


def test_each_slot_has_its_own_soft_tokens_if_there_are_enough():
    directions = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0]])]
    soft = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [1.0, 2.0], [9.0, 9.0]]])
    present = torch.tensor([[True, True, True, False]])
    soft = soft * present[..., None]
    first, second = LabelTargets(directions, apart=True).scores(soft, present)  # from tokens 0 and 2, and 1 and 3
    assert torch.allclose(first, torch.tensor([[1.0, 1.0]]) * 2**-0.5 / 0.05)
    assert torch.allclose(second, torch.tensor([[1.0]]) / 0.05)
    shared = LabelTargets(directions).scores(soft, present)
    single = LabelTargets(directions, apart=True).scores(soft[:, 1:2], present[:, 1:2])
    for mean, one in zip(shared, single, strict=True):
        assert mean.shape == one.shape
    assert torch.allclose(shared[0], torch.tensor([[2.0, 4.0]]) / 20**0.5 / 0.05)
    assert torch.allclose(one, torch.tensor([[1.0]]) / 0.05)  # fewer tokens than slots: both slots use the only one


def test_the_programmes_of_a_cell_are_drawn_without_replacement():
    directions = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])]
    targets = LabelTargets(directions, apart=True, programmes=True)
    soft, present = torch.zeros(4, 2, 2), torch.ones(4, 2, dtype=torch.bool)
    soft[:, 0], soft[:, 1] = torch.tensor([1.0, 0.0]), torch.tensor([0.8, 0.6])
    scores = np.array([0.8, 0.96, 0.6]) / 0.05
    drawn = {number: np.exp(scores[number]) for number in range(3)}

    def first(number, among):
        return -np.log(drawn[number] / sum(drawn[one] for one in among))

    # the most active first; a single one; none; and one unknown to the training texts before a known one
    numbers = torch.tensor([[0, 1, 0], [0, 2, -1], [-1, -1, -1], [1, -1, 2]])
    cell_type = (2 * np.log1p(np.exp(-20)) + np.log1p(np.exp(20))) / 3
    most = (first(1, {0, 1, 2}) + first(2, {0, 1, 2})) / 2
    second = (first(0, {0, 2}) + first(2, {0, 1, 2})) / 2
    soft.requires_grad_()
    loss = targets.loss(soft, present, numbers)
    assert float(loss.detach()) == pytest.approx(cell_type + most + second, rel=1e-5)
    loss.backward()
    assert torch.isfinite(soft.grad).all() and not soft.grad[2].any()
    exchanged = targets.loss(soft, present, torch.tensor([[0, 0, 1], *numbers[1:].tolist()]))
    assert float(exchanged.detach()) > float(loss.detach()) + 0.5  # the order matters
    none = targets.loss(soft, present, numbers[:, :1])  # no text names a programme
    assert float(none.detach()) == pytest.approx(cell_type, rel=1e-5)
    both = LabelTargets([directions[1][:2]], programmes=True).loss(soft, present, torch.tensor([[1, 0]] * 4))
    both.backward()  # the last programme is certain
    assert torch.isfinite(soft.grad).all()


def test_a_mistake_within_the_lineage_costs_less():
    labels = ["B", "T4", "T8", "cell"]
    ancestors = [["lymphocyte", "cell"], ["T", "lymphocyte", "cell"], np.array(["T", "lymphocyte", "cell"]), None]
    above = terms_above(labels, ancestors)
    # lymphocyte and T; what all are or only one is tells nothing apart
    assert sorted(above.T.tolist()) == [[0, 1, 1, 0], [1, 1, 1, 0]]
    assert terms_above(["a", "b"], [[], []]).shape == (2, 0)
    directions = [torch.eye(4)]
    soft, present = torch.tensor([[[0.2, 0.1, 0.05, 0.0]]]), torch.ones(1, 1, dtype=torch.bool)
    shares = np.exp(np.array([0.2, 0.1, 0.05, 0.0]) / np.sqrt(0.0525) / 0.05)
    shares /= shares.sum()

    def loss(true, above=above):
        return float(LabelTargets(directions, above=[above]).loss(soft, present, torch.tensor([[true]])))

    assert loss(1) == pytest.approx(-np.log(shares[1]) - np.log([shares[1:3].sum(), shares[:3].sum()]).mean(), rel=1e-4)
    assert loss(0) == pytest.approx(-np.log(shares[0]) - np.log(shares[:3].sum()), rel=1e-3)
    assert loss(3) == pytest.approx(-np.log(shares[3]), rel=1e-4)
    assert loss(-1) == 0


def test_the_soft_tokens_of_programmes_change_no_other_slot():
    random = torch.Generator().manual_seed(0)
    directions = [functional.normalize(torch.randn(n, 8, generator=random), dim=1) for n in (3, 2, 4)]
    targets = LabelTargets(directions, apart=True, programmes=True)
    soft, present = torch.randn(5, 7, 8, generator=random), torch.ones(5, 7, dtype=torch.bool)
    changed = soft.clone()
    changed[:, [2, 5]] += 1
    before, after = targets.scores(soft, present), targets.scores(changed, present)
    assert before[0].equal(after[0]) and before[1].equal(after[1])
    assert float((before[2] - after[2]).abs().amin(1).max()) > 1e-3
    labels = {"pathway": ["P"], "tissue": ["U"], "cell_type": ["A", "B"]}  # as sorted by JSON, or in any order
    assert list(order_slots(labels)) == ["cell_type", "tissue", "pathway"]


def test_the_description_loss_is_contrastive_both_ways_and_accepts_duplicates():
    targets = DescriptionTargets(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    soft = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 3.0]], [[0.6, 0.8], [0.6, 0.8]]])
    present = torch.tensor([[True, False], [True, True], [True, True]])
    # cosines / 0.05 of cells (rows) and their texts (columns); the first and the last text are the same
    scores = np.array([[20, 0, 20], [0, 20, 0], [12, 16, 12]])
    matches = np.array([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])
    to_text = [np.log(np.exp(row).sum()) - match @ row for row, match in zip(scores, matches, strict=True)]
    to_cell = [np.log(np.exp(row).sum()) - match @ row for row, match in zip(scores.T, matches, strict=True)]
    assert to_text == pytest.approx([np.log(2), 0, np.log(2 + np.exp(4))], abs=1e-8)
    assert to_cell == pytest.approx([4 + np.log1p(np.exp(-8)), np.log1p(np.exp(-4)), 4 + np.log1p(np.exp(-8))])
    loss = targets.loss(soft, present, torch.tensor([0, 1, 0]))
    assert float(loss) == pytest.approx((np.mean(to_text) + np.mean(to_cell)) / 2, rel=1e-5)


def test_description_directions_are_centred():
    embeddings = torch.tensor([[3.0, 0.0], [0.0, 5.0], [4.0, -5.0]])
    targets = DescriptionTargets.of([torch.tensor([0]), torch.tensor([1]), torch.tensor([1, 2])], embeddings)
    # unit vectors (1, 0), (0, 1), (1, 0), minus their mean (2/3, 1/3)
    half = 2**-0.5
    assert torch.allclose(targets.directions, half * torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]]))
    only = DescriptionTargets.of([torch.tensor([0])], embeddings)
    soft = torch.ones(4, 1, 2, requires_grad=True)
    loss = only.loss(soft, torch.ones(4, 1, dtype=torch.bool), torch.zeros(4, dtype=torch.long))
    loss.backward()
    assert loss.item() == pytest.approx(np.log(4)) and not soft.grad.any()
