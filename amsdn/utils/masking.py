"""Occlusion masks that cover every place a patch can be, and views of images under pairs of them.

A defence by double masking and an attack that knows it must mean the same masks and the same views; both take them from here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def axis_spans(length: int, patch: int, masks: int) -> list[tuple[int, int]]:
    """(start, end) of masks along one axis such that every window of ``patch`` pixels lies inside at least one.

    Mask side m = patch + stride - 1 with stride = ceil((length - patch + 1) / masks), the last mask flush with the border
    (PatchCleanser, section 3.2). There may be fewer than ``masks`` of them in a small image.
    """
    stride = -(-(length - patch + 1) // masks)
    side = patch + stride - 1
    starts = sorted({min(i * stride, length - side) for i in range(masks)})
    return [(start, start + side) for start in starts]


def covering_masks(
    height: int, width: int, patch: int | tuple[int, int], masks_per_axis: int, device: torch.device | None = None
) -> Tensor:
    """True where a mask covers, [M,1,H,W] bool, row by row; every patch lies inside at least one mask.

    ``patch`` is the side of a square or (height, width) of a rectangle, in pixels.
    """
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    masks = []
    for top, bottom in axis_spans(height, patch_height, masks_per_axis):
        for left, right in axis_spans(width, patch_width, masks_per_axis):
            mask = torch.zeros(1, height, width, dtype=torch.bool, device=device)
            mask[:, top:bottom, left:right] = True
            masks.append(mask)
    return torch.stack(masks)


def covered_places(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Which masks [M,1,H,W] bool hide a whole (height, width) window at each top-left corner, [M,H-h+1,W-w+1] bool."""
    return F.max_pool2d((~masks).float(), size, stride=1).squeeze(1) == 0


def mask_pairs(count: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """(first, second) [count (count+1) / 2] of all unordered pairs of masks, the ``count`` pairs of a mask with itself first."""
    own = torch.arange(count, device=device)
    upper = torch.triu_indices(count, count, offset=1, device=device)
    return torch.cat([own, upper[0]]), torch.cat([own, upper[1]])


def masked_views(x: Tensor, masks: Tensor, first: Tensor, second: Tensor, fill: Tensor) -> Tensor:
    """x [B,3,H,W] with masks ``first`` and ``second`` [B] of ``masks`` [M,1,H,W] both applied, in the colour ``fill`` [1,3,1,1]."""
    return torch.where(masks[first] | masks[second], fill, x)
