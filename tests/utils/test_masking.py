"""The masks cover what they promise, and views show what they say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amsdn.utils.masking import axis_spans, covered_places, covering_masks, mask_pairs, masked_views


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


def test_a_rectangle_is_covered_axis_by_axis() -> None:
    masks = covering_masks(12, 20, patch=(2, 5), masks_per_axis=3)
    assert covered_places(masks, (2, 5)).any(0).all()
    assert not covered_places(masks, (5, 5)).any(0).all()


@pytest.mark.parametrize("size", [(3, 3), (2, 4)])
def test_covered_places_are_those_whose_window_is_hidden(size: tuple[int, int]) -> None:
    masks = covering_masks(10, 12, patch=3, masks_per_axis=3)
    places = covered_places(masks, size)
    assert places.shape == (len(masks), 10 - size[0] + 1, 12 - size[1] + 1)
    for m in range(len(masks)):
        for row in range(places.shape[1]):
            for column in range(places.shape[2]):
                window = masks[m, 0, row : row + size[0], column : column + size[1]]
                assert places[m, row, column] == window.all()


def test_all_pairs_once_and_single_masks_first() -> None:
    first, second = mask_pairs(5)
    assert first[:5].tolist() == second[:5].tolist() == [0, 1, 2, 3, 4]
    assert len({frozenset(p) for p in zip(first.tolist(), second.tolist(), strict=True)}) == len(first) == 15


def test_a_view_is_filled_where_either_mask_covers() -> None:
    masks = covering_masks(8, 8, patch=2, masks_per_axis=2)
    x, fill = torch.rand(2, 3, 8, 8), torch.tensor([0.1, 0.2, 0.3]).reshape(1, 3, 1, 1)
    views = masked_views(x, masks, torch.tensor([0, 1]), torch.tensor([0, 3]), fill)
    assert torch.equal(views[0], torch.where(masks[0], fill[0], x[0]))
    assert torch.equal(views[1], torch.where(masks[1] | masks[3], fill[0], x[1]))
