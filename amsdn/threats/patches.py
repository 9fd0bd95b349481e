"""Any change within a square, or within a few rectangles."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from amsdn.errors import InputError
from amsdn.threats.cover import coverable
from amsdn.threats.threat_model import ThreatModel, box_gain, changed_pixels, require_positive


@dataclass(frozen=True)
class PatchRegion(ThreatModel):
    """One ``size`` x ``size`` square, anywhere in the image, may be replaced by any content."""

    size: int
    family: ClassVar[str] = "patch"

    def __post_init__(self) -> None:
        require_positive(self.size, "PatchRegion(size)")

    @property
    def budget(self) -> float:
        return self.size

    @property
    def counts(self) -> bool:
        return True

    def with_budget(self, budget: float) -> Self:
        return replace(self, size=int(budget))

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        self._check_fits(x)
        boxed = x_adv.clamp(0, 1)
        windows = F.avg_pool2d(box_gain(x_adv, boxed, x).double(), self.size, stride=1)  # [B,1,H-s+1,W-s+1]
        best = windows.flatten(1).argmax(1)
        rows, columns = best // windows.shape[-1], best % windows.shape[-1]
        return torch.where(square_mask(rows, columns, self.size, x), boxed, x)

    def spent(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The side of the smallest square that covers the bounding box of what changed."""
        changed = changed_pixels(x_adv, x).squeeze(1)
        return torch.maximum(_extent(changed.any(2)), _extent(changed.any(1))).float()

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        rows, columns = self.random_corners(x, generator)
        colour = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return torch.where(square_mask(rows, columns, self.size, x), colour, x)

    def random_corners(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """A uniformly drawn top-left corner for each image: rows [B], columns [B]. Raises InputError if the patch does not fit."""
        self._check_fits(x)
        height, width = x.shape[2:]
        rows = torch.randint(height - self.size + 1, (len(x),), generator=generator, device=x.device)
        columns = torch.randint(width - self.size + 1, (len(x),), generator=generator, device=x.device)
        return rows, columns

    def _check_fits(self, x: Tensor) -> None:
        if self.size > min(x.shape[2:]):
            raise InputError(f"PatchRegion(size={self.size}) does not fit images of {x.shape[2]}x{x.shape[3]}; choose a smaller patch")


@dataclass(frozen=True)
class PatchRectangles(ThreatModel):
    """``count`` rectangles of ``height`` x ``width`` pixels, anywhere in the image and free to overlap, of any content.

    The rectangles are not turned. The budget is the pixels that they cover at most; what is spent is the changed
    pixels. Membership is exact: the changed pixels must be coverable by such rectangles. ``project`` is the nearest
    member for one rectangle; for several it places them greedily, so it returns a member, not always the nearest.
    """

    height: int
    width: int
    count: int = 1
    family: ClassVar[str] = "rectangles"

    def __post_init__(self) -> None:
        for name in ("height", "width", "count"):
            require_positive(getattr(self, name), f"PatchRectangles({name})")

    @property
    def budget(self) -> float:
        return self.height * self.width * self.count

    @property
    def counts(self) -> bool:
        return True

    def with_budget(self, budget: float) -> Self:
        """As many of these rectangles as ``budget`` pixels make; at least one."""
        return replace(self, count=max(int(budget) // (self.height * self.width), 1))

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        inside = super().contains(x_adv, x)  # the pixels are in the box and not too many
        changed = changed_pixels(x_adv, x).squeeze(1)
        fits = (_extent(changed.any(2)) <= self.height) & (_extent(changed.any(1)) <= self.width)
        if self.height > x.shape[2] or self.width > x.shape[3]:
            fits = torch.zeros_like(fits)
        if self.count > 1:
            open_questions = (inside & ~fits).nonzero().squeeze(1)
            masks = changed[open_questions].cpu()
            answers = [coverable(mask, self.height, self.width, self.count) for mask in masks]
            fits[open_questions] = torch.tensor(answers, dtype=torch.bool, device=x.device)
        return inside & fits

    def includes(self, other: ThreatModel) -> bool:
        """Also for another shape: whether tiles of this one over each of the other's rectangles are few enough."""
        if isinstance(other, PatchRegion):
            other = PatchRectangles(other.size, other.size)
        if not isinstance(other, PatchRectangles):
            return False
        tiles = -(-other.height // self.height) * -(-other.width // self.width)
        return other.count * tiles <= self.count

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        self._check_fits(x)
        boxed = x_adv.clamp(0, 1)
        member = self.contains(boxed, x)
        gain, mask = box_gain(x_adv, boxed, x).double(), torch.zeros_like(x[:, :1], dtype=torch.bool)
        for _ in range(self.count):
            windows = F.avg_pool2d(gain.masked_fill(mask, 0), (self.height, self.width), stride=1)
            best = windows.flatten(1).argmax(1)
            corner = torch.stack([best // windows.shape[-1], best % windows.shape[-1]], 1)
            mask = mask | rectangle_mask(corner.unsqueeze(1), self.height, self.width, x)
        return torch.where(mask | member.reshape(-1, 1, 1, 1), boxed, x)

    def spent(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return changed_pixels(x_adv, x).flatten(1).sum(1).float()

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        corner = self.random_corners(x, generator)
        colour = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return torch.where(rectangle_mask(corner, self.height, self.width, x), colour, x)

    def random_corners(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Uniform top-left corners, [B,count,2] as row and column. Raises InputError if a rectangle does not fit."""
        self._check_fits(x)
        ends = (x.shape[2] - self.height + 1, x.shape[3] - self.width + 1)
        drawn = [torch.randint(end, (len(x), self.count), generator=generator, device=x.device) for end in ends]
        return torch.stack(drawn, 2)

    def describe(self) -> str:
        return f"{self.count} patch{'es' if self.count > 1 else ''} of {self.height}x{self.width}"

    def _check_fits(self, x: Tensor) -> None:
        if self.height > x.shape[2] or self.width > x.shape[3]:
            raise InputError(
                f"a patch of {self.height}x{self.width} does not fit images of {x.shape[2]}x{x.shape[3]}; choose a smaller patch"
            )


def square_mask(rows: Tensor, columns: Tensor, size: int, like: Tensor) -> Tensor:
    """True inside the size x size square whose top-left corner is (rows, columns) [B] -> [B,1,H,W] bool."""
    return rectangle_mask(torch.stack([rows, columns], 1).unsqueeze(1), size, size, like)


def rectangle_mask(corner: Tensor, height: int, width: int, like: Tensor) -> Tensor:
    """True inside the height x width rectangles at each corner [B,n,2] (row, column) -> [B,1,H,W] bool."""
    i = torch.arange(like.shape[2], device=like.device)
    j = torch.arange(like.shape[3], device=like.device)
    top, left = corner[..., :1], corner[..., 1:]  # [B,n,1]
    rows, columns = (i >= top) & (i < top + height), (j >= left) & (j < left + width)  # [B,n,H], [B,n,W]
    return (rows.unsqueeze(3) & columns.unsqueeze(2)).any(1, keepdim=True)


def _extent(hit: Tensor) -> Tensor:
    """hit [B,N] bool -> length of the shortest run of indices that covers every True, [B] int."""
    n = hit.shape[1]
    first = hit.int().argmax(1)
    last = n - 1 - hit.flip(1).int().argmax(1)
    return torch.where(hit.any(1), last - first + 1, 0)
