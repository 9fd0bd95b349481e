"""Self-adaptive labels: the recursion and the weights by hand, every image its own row, and nothing before the start."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from amsdn.errors import InputError
from amsdn.training.self_adaptive import LabelMemory, SelfAdaptiveLabels, Targets

LABELS = SelfAdaptiveLabels(start=0.5, momentum=0.9)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_labels_follow_the_recursion_of_the_paper_image_by_image() -> None:
    """Against Algorithm 1 written out for single images, over epochs of shuffled batches, in one part and in two."""
    images, classes = 11, 3
    y = torch.randint(classes, (images,), generator=seeded())
    table = {i: F.one_hot(y[i], classes).double() for i in range(images)}
    memory = LabelMemory(LABELS, images)
    for epoch in range(4):
        order = torch.randperm(images, generator=seeded(epoch + 1))
        for batch in order.split(5):
            answers = torch.randn(len(batch), classes, generator=seeded(int(batch[0])))
            pieces = []
            for part, logits in zip(batch.tensor_split(2), answers.tensor_split(2), strict=True):
                targets = memory.recall(part, y[part], classes, 0.5).following(logits, 0)
                for row, image in enumerate(part.tolist()):
                    table[image] = 0.9 * table[image] + 0.1 * logits[row].double().softmax(0)
                    torch.testing.assert_close(targets.soft[row].double(), table[image], atol=1e-6, rtol=0)
                pieces.append(targets.memory())
            memory.remember(pieces)
    assert memory.table is not None
    torch.testing.assert_close(memory.table.double(), torch.stack([table[i] for i in range(images)]), atol=1e-6, rtol=0)
    torch.testing.assert_close(memory.table.sum(1), torch.ones(images))


def test_the_loss_is_weighed_by_how_sure_the_labels_are() -> None:
    soft = torch.tensor([[0.5, 0.3, 0.2], [0.0, 1.0, 0.0], [0.2, 0.2, 0.6]])
    logits = torch.randn(2, 3, generator=seeded())
    targets = Targets(torch.arange(3), soft, 0.9)
    costs = targets.cross_entropy(logits, 1, 0.1)
    smooth = 0.9 * soft[1:] + 0.1 / 3
    torch.testing.assert_close(costs, -(smooth * logits.log_softmax(1)).sum(1))
    torch.testing.assert_close(targets.mean(costs, 1), (1.0 * costs[0] + 0.6 * costs[1]) / 1.6)


def test_given_labels_weigh_the_same_and_cost_what_cross_entropy_says() -> None:
    y, logits = torch.tensor([2, 0, 1]), torch.randn(3, 3, generator=seeded())
    targets = LabelMemory(LABELS, 3).recall(torch.arange(3), y, 3, 0.2)
    costs = targets.cross_entropy(logits, 0, 0.1)
    torch.testing.assert_close(costs, F.cross_entropy(logits, y, label_smoothing=0.1, reduction="none"))
    torch.testing.assert_close(targets.mean(costs, 0), costs.mean())


def test_before_the_start_nothing_moves_and_nothing_is_remembered() -> None:
    memory = LabelMemory(LABELS, 4)
    early = memory.recall(torch.tensor([3, 1]), torch.tensor([1, 0]), 2, 0.499)
    assert early.following(torch.randn(2, 2), 0) is early
    assert early.memory() == {}
    memory.remember([early.memory()])
    assert memory.state() == {}
    assert memory.recall(torch.tensor([3]), torch.tensor([1]), 2, 0.5).memory() != {}
    assert LabelMemory(SelfAdaptiveLabels()).recall(torch.tensor([0]), torch.tensor([1]), 2, 0.999).memory() == {}


def test_only_images_from_the_first_on_move_and_gradients_do_not_flow_into_labels() -> None:
    y = torch.tensor([0, 1, 0, 1])
    targets = LabelMemory(LABELS, 4).recall(torch.arange(4), y, 2, 0.7)
    logits = torch.randn(2, 2, generator=seeded(), requires_grad=True)
    moved = targets.following(logits, 2)
    assert torch.equal(moved.soft[:2], targets.soft[:2])
    assert (moved.soft[2:] != targets.soft[2:]).all()
    assert not moved.soft.requires_grad
    assert torch.equal(targets.soft, F.one_hot(y, 2).float()), "the labels of the start must not change under the reader"


def test_a_state_brings_the_labels_back() -> None:
    memory = LabelMemory(LABELS, 5)
    targets = memory.recall(torch.tensor([4, 0]), torch.tensor([1, 1]), 2, 0.6).following(torch.zeros(2, 2), 0)
    memory.remember([targets.memory()])
    again = LabelMemory(LABELS, 5)
    again.load(copy.deepcopy(memory.state()))
    index, y = torch.arange(5), torch.tensor([1, 0, 0, 0, 1])
    assert torch.equal(again.recall(index, y, 2, 0.9).soft, memory.recall(index, y, 2, 0.9).soft)
    torch.testing.assert_close(again.recall(index, y, 2, 0.9).soft[[0, 4, 1]], torch.tensor([[0.05, 0.95], [0.05, 0.95], [1, 0]]))
    fresh = LabelMemory(LABELS, 5)
    fresh.load({})
    assert fresh.state() == {}


@pytest.mark.parametrize("wrong", [{"start": -0.1}, {"start": 1.1}, {"start": 0.5, "momentum": 1.0}, {"momentum": -0.1}])
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="labels: "):
        SelfAdaptiveLabels(**wrong)


def test_learning_labels_needs_to_know_how_many_images_there_are() -> None:
    with pytest.raises(InputError, match="labels: learning them needs"):
        LabelMemory(LABELS)
