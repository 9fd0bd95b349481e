"""Occlusion masks that cover every place a patch can be, and views of images under pairs of them.

A defence by double masking, its certificate and an attack that knows it must mean the same masks and views; all take them from here.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

UNUSABLE = -1  # in place of the class of a view: no class, and never an answer


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
    height: int, width: int, patch: int | tuple[int, int], masks_per_axis: int | tuple[int, int], device: torch.device | None = None
) -> Tensor:
    """True where a mask covers, [M,1,H,W] bool, row by row; every patch lies inside at least one mask.

    ``patch`` is the side of a square or (height, width) of a rectangle, in pixels; so is ``masks_per_axis``, one number for both
    axes or (down, across). Fewer masks are larger masks: n^2 (n^2 + 1) / 2 views for n masks an axis.
    """
    rows, columns = _spans(height, width, patch, masks_per_axis)
    return rectangles(height, width, rows, columns, device)


def rectangles(
    height: int, width: int, rows: list[tuple[int, int]], columns: list[tuple[int, int]], device: torch.device | None = None
) -> Tensor:
    """One mask for every span of ``rows`` and of ``columns``, row by row, [M,1,H,W] bool."""
    masks = []
    for top, bottom in rows:
        for left, right in columns:
            mask = torch.zeros(1, height, width, dtype=torch.bool, device=device)
            mask[:, top:bottom, left:right] = True
            masks.append(mask)
    return torch.stack(masks)


@dataclass(frozen=True)
class MaskTree:
    """Masks of several sizes, each with the smaller ones inside it that may be asked in its place. Nodes are numbered coarsest first."""

    masks: Tensor  # [T,1,H,W] bool, of all levels
    children: tuple[tuple[int, ...], ...]  # of each node; none for the finest
    ancestors: Tensor  # [levels,M] int64: the node above each of the M finest masks at each level, in the end the mask itself

    @property
    def finest(self) -> Tensor:
        """The masks that vote, [M,1,H,W] bool."""
        return self.masks[len(self.masks) - self.ancestors.shape[1] :]

    @property
    def roots(self) -> range:
        """The nodes of the coarsest level."""
        return range(int(self.ancestors[0].max()) + 1)

    def below(self, first: int, second: int) -> list[tuple[int, int]]:
        """The pairs of the next level that together stand for the pair of nodes ``first`` and ``second``, each once."""
        if first == second:
            own = self.children[first]
            return [(a, b) for n, a in enumerate(own) for b in own[n:]]
        return [(a, b) for a in self.children[first] for b in self.children[second]]


def mask_tree(
    height: int,
    width: int,
    patch: int | tuple[int, int],
    masks_per_axis: int | tuple[int, int],
    coarser: tuple[int, ...] = (),
    device: torch.device | None = None,
) -> MaskTree:
    """``covering_masks`` as the finest level, and above it for each number g in ``coarser`` a level of their hulls, g along each axis.

    ``coarser=(2,)`` makes nine masks of 14 pixels out of the 36 of 9 pixels for a 5x5 patch at 32 pixels; the last are smaller.
    """
    levels = [_spans(height, width, patch, masks_per_axis)]
    for group in coarser:
        levels.insert(0, (_hulls(levels[0][0], group), _hulls(levels[0][1], group)))
    masks = torch.cat([rectangles(height, width, rows, columns, device) for rows, columns in levels])
    counts = [len(rows) * len(columns) for rows, columns in levels]
    parents: list[int] = []  # of each node below the coarsest level
    children: list[list[int]] = [[] for _ in range(sum(counts))]
    for level, group in enumerate(reversed(coarser), start=1):
        above, start, columns = sum(counts[: level - 1]), sum(counts[:level]), len(levels[level][1])
        for node in range(counts[level]):
            parent = above + node // columns // group * len(levels[level - 1][1]) + node % columns // group
            parents.append(parent)
            children[parent].append(start + node)
    chain = [list(range(sum(counts[:-1]), sum(counts)))]
    for _ in coarser:
        chain.insert(0, [parents[node - counts[0]] for node in chain[0]])
    return MaskTree(masks, tuple(map(tuple, children)), torch.tensor(chain, device=device))


def _spans(
    height: int, width: int, patch: int | tuple[int, int], masks_per_axis: int | tuple[int, int]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The spans of the masks down and across the image."""
    down, across = (masks_per_axis, masks_per_axis) if isinstance(masks_per_axis, int) else masks_per_axis
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    return axis_spans(height, patch_height, down), axis_spans(width, patch_width, across)


def _hulls(spans: list[tuple[int, int]], group: int) -> list[tuple[int, int]]:
    return [(spans[i][0], spans[min(i + group, len(spans)) - 1][1]) for i in range(0, len(spans), group)]


def covered_places(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Which masks [M,1,H,W] bool hide a whole (height, width) window at each top-left corner, [M,H-h+1,W-w+1] bool."""
    return F.max_pool2d((~masks).float(), size, stride=1).squeeze(1) == 0


def mask_pairs(count: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """(first, second) [count (count+1) / 2] of all unordered pairs of masks, the ``count`` pairs of a mask with itself first."""
    own = torch.arange(count, device=device)
    upper = torch.triu_indices(count, count, offset=1, device=device)
    return torch.cat([own, upper[0]]), torch.cat([own, upper[1]])


def pair_table(labels: Tensor, masks: int) -> Tensor:
    """What holds of the pairs of ``mask_pairs(masks)``, [B,N], as symmetric tables [B,M,M]."""
    first, second = mask_pairs(masks, labels.device)
    table = labels.new_empty(len(labels), masks, masks)
    table[:, first, second] = labels
    table[:, second, first] = labels
    return table


def masked_views(x: Tensor, masks: Tensor, first: Tensor, second: Tensor, fill: Tensor) -> Tensor:
    """x [B,3,H,W] with masks ``first`` and ``second`` [B] of ``masks`` [M,1,H,W] both applied, in the colour ``fill`` [1,3,1,1]."""
    return torch.where(masks[first] | masks[second], fill, x)


def view_labels(logits: Tensor, tolerance: float = 0.0) -> Tensor:
    """The classes [...] that logits [...,K] stand for, or ``UNUSABLE`` where the largest is not finite.

    With a ``tolerance``, also where the two largest differ by no more than that share of the largest magnitude: the same view
    may round otherwise beside other views, and a certificate must not hang on that. A class alone has no rival.
    """
    top, label = logits.max(-1)  # NaN comes out as the maximum
    usable = top.isfinite()
    if tolerance > 0 and logits.shape[-1] > 1:
        best, second = logits.topk(2, dim=-1).values.unbind(-1)
        scale = torch.maximum(best.abs(), torch.where(second.isfinite(), second.abs(), 0.0))
        usable = usable & (best - second > tolerance * scale)
    return torch.where(usable, label, UNUSABLE)


def confidence_of(logits: Tensor) -> Tensor:
    """The largest probability of logits [...,K], [...]; NaN, which is not at least anything, where there is none."""
    return logits.float().softmax(-1).amax(-1)
