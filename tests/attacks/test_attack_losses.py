"""Losses against hand calculation, and the goal."""

import pytest
import torch
import torch.nn.functional as F

from amsdn.attacks import DLR, CrossEntropy, Goal, Margin
from amsdn.attacks.losses import margin
from amsdn.errors import InputError

LOGITS = torch.tensor([[3.0, 1.0, 0.0, -2.0], [0.0, 5.0, 2.0, 4.0]])
AWAY, TOWARDS = Goal(torch.tensor([0, 3])), Goal(torch.tensor([1, 1]), targeted=True)


def test_goal() -> None:
    assert AWAY.reached(LOGITS).tolist() == [False, True]
    assert TOWARDS.reached(LOGITS).tolist() == [False, True]
    assert TOWARDS.select(torch.tensor([1])).reached(LOGITS[1:]).tolist() == [True]
    assert AWAY.select(torch.tensor([True, False])).labels.tolist() == [0]


def test_margin_by_hand() -> None:
    assert margin(LOGITS, AWAY.labels).tolist() == [2.0, -1.0]
    assert Margin()(LOGITS, AWAY).tolist() == [-2.0, 1.0]
    assert Margin()(LOGITS, TOWARDS).tolist() == [-2.0, 1.0]


def test_cross_entropy_is_the_textbook_value() -> None:
    torch.testing.assert_close(CrossEntropy()(LOGITS, AWAY), F.cross_entropy(LOGITS, AWAY.labels, reduction="none"))
    torch.testing.assert_close(CrossEntropy()(LOGITS, TOWARDS), LOGITS.log_softmax(1).gather(1, TOWARDS.labels[:, None]).squeeze(1))


@pytest.mark.parametrize("confidence", [0.0, 30.0, 80.0])
def test_cross_entropy_keeps_the_gradient_of_a_confident_model(confidence: float) -> None:
    logits = torch.tensor([[confidence, 0.0, -1.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(CrossEntropy()(logits, Goal(torch.tensor([0]))).sum(), logits)
    double = logits.detach().double()
    exact = torch.cat([-double[:, 1:].softmax(1).sum(1, keepdim=True), double[:, 1:].softmax(1)], 1)
    torch.testing.assert_close(gradient.double() / gradient.abs().max(), exact / exact.abs().max(), atol=1e-6, rtol=1e-5)


def test_dlr_by_hand_and_free_of_scale_and_shift() -> None:
    torch.testing.assert_close(DLR()(LOGITS, AWAY), torch.tensor([-2 / 3, 1 / 3]))
    torch.testing.assert_close(DLR()(LOGITS, TOWARDS), torch.tensor([-2 / 4, 1 / 4]))
    for goal in (AWAY, TOWARDS):
        torch.testing.assert_close(DLR()(100 * LOGITS - 7, goal), DLR()(LOGITS, goal))


def test_dlr_needs_classes() -> None:
    with pytest.raises(InputError, match="3 classes are needed, the classifier has 2"):
        DLR()(LOGITS[:, :2], Goal(torch.tensor([0, 1])))
    with pytest.raises(InputError, match="4 classes are needed, the classifier has 3"):
        DLR()(LOGITS[:, :3], TOWARDS)


@pytest.mark.parametrize("loss", [CrossEntropy(), Margin(), DLR()])
def test_samples_do_not_influence_one_another(loss: Margin) -> None:
    torch.testing.assert_close(loss(LOGITS, AWAY)[:1], loss(LOGITS[:1], AWAY.select(torch.tensor([0]))))
