"""The occluded views cover what they promise, and their average is the one defined."""

import pytest
import torch
from torch import Tensor

from amsdn.models.consistency import consistent_prediction, occlusion_masks


@pytest.mark.parametrize("samples", [1, 5, 36, 40])
def test_views_are_distinct_and_fixed(samples: int) -> None:
    masks = occlusion_masks(samples, 32, 32)
    assert masks.shape == (samples, 1, 32, 32)
    assert len({m.numpy().tobytes() for m in masks}) == samples
    assert torch.equal(masks, occlusion_masks(samples, 32, 32))


def test_probabilities_are_averaged_and_agreement_is_that_of_the_views() -> None:
    calls: list[Tensor] = []

    def classify(view: Tensor) -> Tensor:
        calls.append(view)
        return torch.tensor([[0.2, 0.8]]).log() if len(calls) == 1 else torch.tensor([[0.5, 0.5]]).log()

    x, fill = torch.rand(1, 3, 32, 32), torch.full((1, 3, 1, 1), 0.25)
    out = consistent_prediction(torch.tensor([[0.9, 0.1]]).log(), x, classify, 2, fill)
    torch.testing.assert_close(out.logits.exp(), torch.tensor([[1.6, 1.4]]) / 3)
    torch.testing.assert_close(out.agreement, torch.tensor([0.35]))
    for view, mask in zip(calls, occlusion_masks(2, 32, 32), strict=True):
        assert torch.equal(view, torch.where(mask, fill, x))
