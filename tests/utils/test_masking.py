"""The masks cover what they promise, and views show what they say."""

import itertools

import pytest
import torch

from amsdn.utils.masking import (
    UNUSABLE,
    MaskTree,
    _hulls,
    axis_spans,
    confidence_of,
    covered_places,
    covering_masks,
    mask_pairs,
    mask_tree,
    masked_views,
    view_labels,
)


def covers(spans: list[tuple[int, int]], length: int, patch: int) -> bool:
    """Whether every window of ``patch`` pixels lies inside one of the spans, which come in order."""
    reach = 0  # windows that start before this are covered
    for start, end in spans:
        if start > reach:
            return False
        reach = max(reach, end - patch + 1)
    return reach >= length - patch + 1


@pytest.mark.parametrize("masks", range(1, 9))
def test_every_window_lies_inside_some_mask_for_all_lengths_and_patches(masks: int) -> None:
    short = 0
    for length in range(8, 65):
        for patch in range(1, length // 2 + 1):
            spans = axis_spans(length, patch, masks)
            assert len(spans) <= masks
            assert all(0 <= a < b <= length for a, b in spans)
            assert covers(spans, length, patch)
            assert covers(_hulls(spans, 2), length, patch)
            short += covers([(a, b - 1) for a, b in spans], length, patch)
    assert short == 0  # a pixel less would not do


def test_the_test_of_coverage_is_right() -> None:
    for spans in ([(0, 4), (3, 7)], [(0, 4), (2, 6)], [(0, 3), (4, 7)], [(1, 7)], [(0, 7)]):
        for patch in (1, 2, 3):
            assert covers(spans, 7, patch) == all(any(a <= i and i + patch <= b for a, b in spans) for i in range(7 - patch + 1))


@pytest.mark.parametrize(("patch", "masks"), [((1, 7), (2, 3)), ((3, 2), (6, 1)), ((5, 5), (4, 6)), ((8, 1), 5)])
def test_rectangles_are_covered_with_as_many_masks_as_asked_for_on_each_axis(patch: tuple[int, int], masks: int | tuple[int, int]) -> None:
    for height, width in ((16, 16), (9, 31), (24, 10)):
        assert covered_places(covering_masks(height, width, patch, masks), patch).any(0).all()


@pytest.mark.parametrize(
    ("side", "patch", "masks", "coarser"),
    [(32, 5, 6, (2,)), (32, 5, 12, (2, 2)), (17, (2, 4), (5, 3), (2,)), (9, 2, 7, (3, 2)), (8, 3, 2, ())],
)
def test_a_tree_covers_each_mask_by_those_above_and_each_pair_once(
    side: int, patch: int | tuple[int, int], masks: int | tuple[int, int], coarser: tuple[int, ...]
) -> None:
    tree = mask_tree(side, side, patch, masks, coarser)
    assert torch.equal(tree.finest, covering_masks(side, side, patch, masks))
    assert tree.ancestors.shape == (1 + len(coarser), len(tree.finest))
    for chain in tree.ancestors.T.tolist():
        assert chain[0] in tree.roots
        for upper, lower in itertools.pairwise(chain):
            assert lower in tree.children[upper]
            assert not (tree.masks[lower] & ~tree.masks[upper]).any()
    leaves = [pair for a in tree.roots for b in tree.roots if a <= b for pair in descend(tree, a, b)]
    start = len(tree.masks) - len(tree.finest)
    assert sorted(tuple(sorted(pair)) for pair in leaves) == list(itertools.combinations_with_replacement(range(start, len(tree.masks)), 2))


def descend(tree: MaskTree, first: int, second: int) -> list[tuple[int, int]]:
    if not tree.children[first]:
        return [(first, second)]
    return [leaf for pair in tree.below(first, second) for leaf in descend(tree, *pair)]


def test_coarser_masks_of_the_published_set() -> None:
    tree = mask_tree(32, 32, 5, 6, (2,))
    assert sorted(set(tree.masks[:9].flatten(1).sum(1).tolist())) == [144, 168, 196]  # 14 pixels, 12 at the far border


def test_classes_of_views_that_are_unusable_or_too_close() -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [[1.0, 2.0], [nan, 9.0], [9.0, nan], [inf, 0.0], [-inf, -inf], [0.0, -inf], [5.0, 5.0], [1.0, 1.00005], [0.0, 0.0]]
    )
    assert view_labels(logits)[[0, 1, 2, 3, 4, 5, 7]].tolist() == [1, UNUSABLE, UNUSABLE, UNUSABLE, UNUSABLE, 0, 1]
    assert view_labels(logits, 1e-4).tolist() == [1, UNUSABLE, UNUSABLE, UNUSABLE, UNUSABLE, 0, UNUSABLE, UNUSABLE, UNUSABLE]
    assert view_labels(torch.ones(2, 1), 0.1).tolist() == [0, 0]
    assert torch.equal(confidence_of(logits) >= 0.4, torch.tensor([True, False, False, False, False, True, True, True, True]))


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
