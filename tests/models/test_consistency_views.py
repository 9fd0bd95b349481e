"""The occluded views cover what they promise, and their average is the one defined."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amsdn.models.consistency import axis_spans, consistent_prediction, covering_masks, occlusion_masks


@settings(max_examples=200, deadline=None)
@given(length=st.integers(4, 64), share=st.floats(0.02, 0.9), masks=st.integers(1, 8))
def test_every_window_lies_inside_some_mask(length: int, share: float, masks: int) -> None:
    patch = max(int(length * share), 1)
    spans = axis_spans(length, patch, masks)
    assert len(spans) <= masks
    assert all(0 <= a < b <= length for a, b in spans)
    assert all(any(a <= start and start + patch <= b for a, b in spans) for start in range(length - patch + 1))


def test_the_published_mask_set_at_32_pixels() -> None:
    masks = covering_masks(32, 32, patch=5, masks_per_axis=6)
    assert masks.shape == (36, 1, 32, 32)
    assert masks.flatten(1).sum(1).tolist() == [81] * 36  # 9 x 9: stride ceil(28/6) = 5, side 5 + 5 - 1


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
