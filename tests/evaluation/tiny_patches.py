"""Images of a few grey pixels, classifiers with random rules on them, and every patch there is."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from amsdn.models.double_masking import ChallengerMasking, DoubleMasking
from amsdn.utils.masking import MaskTree

FILL = (0.5, 0.5, 0.5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class RandomRules(nn.Module):
    """A random linear score of all pixels plus random tables of pairs of pixels: some images bear masks and patches, others neither.

    ``poison``: a pixel of this grey makes the logits NaN.
    """

    def __init__(self, side: int, classes: int = 3, seed: int = 0, poison: float | None = None, pixels: int | None = None) -> None:
        super().__init__()
        g = seeded(seed)
        count = pixels or side * side
        self.linear = torch.randn(count, classes, generator=g)
        self.pairs = torch.randint(count, (2, 6), generator=g)
        self.tables = torch.randn(6, 9, classes, generator=g)
        self.bias = 2 * torch.randn(classes, generator=g)
        self.poison = poison
        self.views, self.largest = 0, 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.views, self.largest = self.views + len(x), max(self.largest, len(x))
        grey = x[:, 0].flatten(1)
        digit = (2 * grey).round().long().clamp(0, 2)
        cells = digit[:, self.pairs[0]] * 3 + digit[:, self.pairs[1]]  # [B,6]
        logits = 0.6 * (2 * grey - 1) @ self.linear + self.tables[torch.arange(6), cells].sum(1) + self.bias
        if self.poison is not None:
            logits = logits.masked_fill((grey == self.poison).any(1, keepdim=True), torch.nan)
        return logits


def shortened(tree: MaskTree, keep_finest: bool = False) -> MaskTree:
    """The tree with masks, all or only the coarser ones, that lack their last row and column."""
    masks = torch.stack([shrunk(mask[0])[None] for mask in tree.masks])
    if keep_finest:
        masks[len(masks) - len(tree.finest) :] = tree.finest
    return MaskTree(masks, tree.children, tree.ancestors)


class ShortChallenger(ChallengerMasking):
    def tree(self, height: int, width: int, /) -> MaskTree:
        return shortened(super().tree(height, width))


class ShortDouble(DoubleMasking):
    def tree(self, height: int, width: int, /) -> MaskTree:
        return shortened(super().tree(height, width))


class ShortAbove(ChallengerMasking):
    def tree(self, height: int, width: int, /) -> MaskTree:
        return shortened(super().tree(height, width), keep_finest=True)


def shrunk(mask: Tensor) -> Tensor:
    """mask [H,W] without the last row and column that it covers."""
    rows, columns = mask.any(1).nonzero().squeeze(1), mask.any(0).nonzero().squeeze(1)
    smaller = torch.zeros_like(mask)
    smaller[rows[0] : rows[-1], columns[0] : columns[-1]] = True
    return smaller


def pictures(count: int, side: int, seed: int, greys: tuple[float, ...] = (0.0, 1.0)) -> Tensor:
    """Random images [count,3,side,side] of these greys."""
    chosen = torch.tensor(greys)[torch.randint(len(greys), (count, 1, side, side), generator=seeded(seed))]
    return chosen.expand(-1, 3, -1, -1).contiguous()


def all_patched(x: Tensor, patch: tuple[int, int], greys: tuple[float, ...] = (0.0, 1.0)) -> Tensor:
    """Every image that differs from x [3,H,W] in one patch of these greys, [N,3,H,W]."""
    return torch.cat(list(_patched(x, patch, greys)))


def _patched(x: Tensor, patch: tuple[int, int], greys: tuple[float, ...]) -> Iterator[Tensor]:
    height, width = patch
    contents = torch.tensor(list(itertools.product(greys, repeat=height * width))).reshape(-1, 1, height, width)
    for row, column in itertools.product(range(x.shape[1] - height + 1), range(x.shape[2] - width + 1)):
        images = x.expand(len(contents), -1, -1, -1).clone()
        images[:, :, row : row + height, column : column + width] = contents
        yield images
