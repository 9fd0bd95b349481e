"""Threat models: the sets of images an attacker may choose from, given a clean image.

Every threat model also confines images to the unit box. ``project`` is the Euclidean projection onto
the set (exact, hence idempotent; for an l2 ball the intersection with the box is approached by a
ball projection followed by a clamp, which stays in both), ``contains`` is the test that every attack's
output must pass, ``sample`` draws a random member, for initialisation and as a noise baseline.

Budgets may be numbers or, for the balls and for pixel counts, tensors [B] with one budget per image;
``select`` keeps them aligned when finished images leave a batch. A budget may be ``math.inf``: any image at all.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from amsdn.errors import InputError

TOLERANCE = 1e-5  # slack for float32 rounding in ball membership, in units of pixel value


def _per_image(budget: float | Tensor, like: Tensor) -> Tensor:
    """A budget as [B,1,1,1] (or [1,1,1,1]), ready to broadcast against images."""
    return torch.as_tensor(budget, device=like.device, dtype=like.dtype).reshape(-1, 1, 1, 1)


class ThreatModel(ABC):
    """A set of images around each clean image. Subclasses are frozen dataclasses with one budget."""

    family: ClassVar[str]

    @property
    @abstractmethod
    def budget(self) -> float | Tensor:
        """The size of the set, in the family's unit (pixel value, pixels, or patch side in pixels)."""

    @abstractmethod
    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """x_adv, x [B,3,H,W] -> the nearest member of the set around x, [B,3,H,W]."""

    @abstractmethod
    def spent(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The budget that x_adv really uses around x, [B] float."""

    @abstractmethod
    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random member for each image, [B,3,H,W]."""

    @abstractmethod
    def with_budget(self, budget: float) -> Self:
        """The same kind of threat with another budget."""

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Whether each x_adv is an allowed choice around x, [B] bool. NaN is never allowed."""
        limit = torch.as_tensor(self.budget, device=x.device, dtype=torch.float32).reshape(-1)
        slack = 0.0 if self.counts else TOLERANCE
        in_box = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
        return in_box & (self.spent(x_adv, x) <= limit + slack)

    def includes(self, other: "ThreatModel") -> bool:
        """Whether every choice allowed by ``other`` is allowed here (same family, no larger budget)."""
        mine, theirs = torch.as_tensor(self.budget).float(), torch.as_tensor(other.budget).float()
        return self.family == other.family and bool((theirs <= mine).all())

    def select(self, keep: Tensor) -> Self:
        """The threat restricted to the images that the index or mask ``keep`` [.] chooses."""
        return self if not isinstance(self.budget, Tensor) else self.with_budget(self.budget[keep])  # type: ignore[arg-type]

    @property
    def counts(self) -> bool:
        """Whether the budget is a whole number of pixels (then membership has no tolerance)."""
        return False

    def describe(self) -> str:
        """The family and budget as a person writes them, for instance ``linf 8/255``."""
        return f"{self.family} {_show(self.budget, self.counts)}"


def _show(budget: float | Tensor, counts: bool) -> str:
    if isinstance(budget, Tensor):
        return "per-image"
    if counts:
        return f"{budget:.0f}"
    over_255 = budget * 255
    return f"{round(over_255)}/255" if budget < 0.5 and abs(over_255 - round(over_255)) < 1e-6 else f"{budget:g}"


@dataclass(frozen=True)
class NormBall(ThreatModel):
    """A ball of radius ``eps`` (in [0,1] pixel units) around the image, which gradient attacks can step through."""

    eps: float | Tensor

    def __post_init__(self) -> None:
        _require_positive(self.eps, f"{type(self).__name__}(eps)")

    @property
    def budget(self) -> float | Tensor:
        return self.eps

    def with_budget(self, budget: float) -> Self:
        return replace(self, eps=budget)

    @abstractmethod
    def steepest(self, gradient: Tensor) -> Tensor:
        """The unit-length step that raises a linear loss most, [B,3,H,W]."""


@dataclass(frozen=True)
class LinfBall(NormBall):
    """Every channel value may change by at most ``eps``."""

    family: ClassVar[str] = "linf"

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        eps = _per_image(self.eps, x)
        return torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)

    def spent(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return (x_adv - x).abs().flatten(1).amax(1)

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) * 2 - 1
        return self.project(x + _per_image(self.eps, x) * noise, x)

    def steepest(self, gradient: Tensor) -> Tensor:
        return gradient.sign()


@dataclass(frozen=True)
class L2Ball(NormBall):
    """The Euclidean length of the change, over all pixels and channels, is at most ``eps``."""

    family: ClassVar[str] = "l2"

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        delta = x_adv - x
        length = delta.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        return (x + delta * (_per_image(self.eps, x) / length.clamp_min(1e-12)).clamp(max=1)).clamp(0, 1)

    def spent(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return (x_adv - x).flatten(1).norm(dim=1)

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        direction = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        radius = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device, dtype=x.dtype) ** (1 / x[0].numel())
        reach = _per_image(self.eps, x).clamp(max=x[0].numel() ** 0.5)  # no image is farther away than the box's diagonal
        return self.project(x + self.steepest(direction) * radius * reach, x)

    def steepest(self, gradient: Tensor) -> Tensor:
        return unit_length(gradient)


@dataclass(frozen=True)
class L1Ball(NormBall):
    """The absolute changes of all channel values sum to at most ``eps``.

    Projections and samples aim at (1 - 1e-6) eps, so that the float32 sum over many changes does not round above eps.
    """

    family: ClassVar[str] = "l1"

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The exact nearest member of ball and box (Croce & Hein, "Mind the box", ICML 2021, Prop. 2.1).

        It is delta_i = sign(d_i) clip(|d_i| - lambda, 0, room_i) for d = x_adv - x, with room_i what the box leaves in
        the direction of d_i. The sum of |delta| is piecewise linear in lambda: sorted break points give lambda exactly.
        """
        d, eps = (x_adv - x).flatten(1), _per_image(self.eps, x).reshape(-1, 1)
        length, room = d.abs().double(), torch.where(d > 0, 1 - x.flatten(1), x.flatten(1))  # thousands of terms are summed
        threshold = _l1_threshold(length, room, (1 - 1e-6) * eps)
        delta = (d.sign() * (length - threshold).clamp_min(0)).to(x.dtype).reshape(x.shape)
        nearest = x + delta  # beyond the room: the clamp cuts it
        nearest = torch.where((nearest - x).abs() > delta.abs(), nearest.nextafter(x), nearest)  # rounded towards x, else it adds up
        boxed = x_adv.clamp(0, 1)
        inside = self.spent(boxed, x) <= eps.squeeze(1)
        return torch.where(inside.reshape(-1, 1, 1, 1), boxed, nearest.clamp(0, 1))

    def spent(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return (x_adv - x).flatten(1).abs().sum(1)

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Uniform in the ball (Laplace directions), then projected into the box."""
        uniform = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) - 0.5
        laplace = -uniform.sign() * torch.log1p((-2 * uniform.abs()).clamp_min(-1 + 1e-7))
        radius = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device, dtype=x.dtype) ** (1 / x[0].numel())
        direction = laplace / laplace.flatten(1).abs().sum(1).clamp_min(1e-12).reshape(-1, 1, 1, 1)
        return self.project(x + direction * radius * _per_image(self.eps, x), x)

    def steepest(self, gradient: Tensor) -> Tensor:
        """One channel value takes the whole step. It climbs slowly; the L1 attacks spread their steps over several."""
        flat = gradient.flatten(1)
        top = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign()).reshape(gradient.shape)


@dataclass(frozen=True)
class SparsePixels(ThreatModel):
    """At most ``k`` pixels may take any colour. All channels of a pixel count once."""

    k: int | Tensor
    family: ClassVar[str] = "sparse"

    def __post_init__(self) -> None:
        _require_positive(self.k, "SparsePixels(k)")

    @property
    def budget(self) -> float | Tensor:
        return self.k

    @property
    def counts(self) -> bool:
        return True

    def with_budget(self, budget: float) -> Self:
        return replace(self, k=budget if isinstance(budget, Tensor) or budget == math.inf else int(budget))  # type: ignore[arg-type]

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        boxed = x_adv.clamp(0, 1)
        gain = _gain(x_adv, boxed, x).flatten(1)
        rank = gain.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        keep = rank < torch.as_tensor(self.k, device=x.device).reshape(-1, 1)
        return torch.where(keep.reshape(len(x), 1, *x.shape[2:]), boxed, x)

    def spent(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return changed_pixels(x_adv, x).flatten(1).sum(1).float()

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        priority = torch.rand(len(x), x[0, 0].numel(), generator=generator, device=x.device)
        rank = priority.argsort(dim=1).argsort(dim=1)
        keep = rank < torch.as_tensor(self.k, device=x.device).reshape(-1, 1)
        colour = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return torch.where(keep.reshape(len(x), 1, *x.shape[2:]), colour, x)


@dataclass(frozen=True)
class PatchRegion(ThreatModel):
    """One ``size`` x ``size`` square, anywhere in the image, may be replaced by any content."""

    size: int
    family: ClassVar[str] = "patch"

    def __post_init__(self) -> None:
        _require_positive(self.size, "PatchRegion(size)")

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
        windows = F.avg_pool2d(_gain(x_adv, boxed, x).double(), self.size, stride=1)  # [B,1,H-s+1,W-s+1]
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
            _require_positive(getattr(self, name), f"PatchRectangles({name})")

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
        fits &= torch.tensor(self.height <= x.shape[2] and self.width <= x.shape[3], device=x.device)
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
        gain, mask = _gain(x_adv, boxed, x).double(), torch.zeros_like(x[:, :1], dtype=torch.bool)
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


def unit_length(direction: Tensor) -> Tensor:
    """Each sample of direction [B,...] scaled to Euclidean length 1; zero stays zero.

    The largest entry is scaled to 1 first: the gradients of a confident model are so small that their squares vanish.
    """
    flat = direction.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    return (flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)).reshape(direction.shape)


def _l1_threshold(length: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """The least lambda >= 0 with sum_i clip(length_i - lambda, 0, room_i) <= eps: [B,N], [B,N], [B,1] -> [B,1]; float64.

    Term i falls with slope -1 from its entry max(length_i - room_i, 0) to its exit length_i and is flat elsewhere, so
    between two sorted break points the sum falls with the number of terms that have entered and not left.
    """
    points = torch.cat([(length - room).clamp_min(0), length], 1)
    order = points.float().argsort(1)  # float32 sorts twice as fast; what it swaps is as good as equal
    points = points.gather(1, order)
    falling = torch.where(order < length.shape[1], 1, -1).cumsum(1)[:, :-1]
    total = torch.minimum(length, room).sum(1, keepdim=True)
    excess = torch.cat([total, total - (falling * points.diff(dim=1)).cumsum(1)], 1) - eps
    last = ((excess > 0).sum(1, keepdim=True) - 1).clamp_min(0)  # the segment on which the excess becomes zero
    slope = falling.gather(1, last.clamp_max(falling.shape[1] - 1)).clamp_min(1)
    return (points.gather(1, last) + excess.gather(1, last) / slope).clamp_min(0)


def changed_pixels(x_adv: Tensor, x: Tensor) -> Tensor:
    """Where any channel differs, [B,1,H,W] bool; NaN counts as a change."""
    return (x_adv != x).any(1, keepdim=True)


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


def coverable(changed: Tensor, height: int, width: int, count: int) -> bool:
    """Whether ``count`` rectangles of height x width, inside the image and possibly overlapping, cover every True.

    changed [H,W] bool, on the CPU. Exact: the search tries every choice that could matter.
    """
    rows, columns = changed.shape
    if height > rows or width > columns:
        return False
    # One integer is one image: bit i * columns + j is pixel (i, j).
    flat = changed.flatten().to(torch.uint8)
    packed = (F.pad(flat, (0, -len(flat) % 8)).reshape(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1)
    return _Cover((rows, columns), (height, width)).search(int.from_bytes(bytes(packed.tolist()), "little"), count)


class _Cover:
    def __init__(self, image: tuple[int, int], rectangle: tuple[int, int]) -> None:
        (self.rows, self.columns), (self.height, self.width) = image, rectangle
        self.line = (1 << self.columns) - 1
        self.stamp = sum(((1 << self.width) - 1) << (i * self.columns) for i in range(self.height))
        self.hopeless: set[tuple[int, int]] = set()  # (pixels left, rectangles left) known not to work

    def search(self, left: int, count: int) -> bool:
        """Whether ``count`` rectangles cover the pixels of the bit set ``left``.

        Some rectangle must cover the leftmost pixel of the topmost row. Nothing lies above that row, so the rectangle may
        start in it (or as low as the image allows); and it may be pushed right until its left edge meets a pixel.
        """
        if not left:
            return True
        if not count or left.bit_count() > count * self.height * self.width or (left, count) in self.hopeless:
            return False
        row, column = divmod((left & -left).bit_length() - 1, self.columns)
        top = min(row, self.rows - self.height)
        for edge in self._left_edges(left, top, column):
            if self.search(left & ~(self.stamp << (top * self.columns + edge)), count - 1):
                return True
        self.hopeless.add((left, count))
        return False

    def _left_edges(self, left: int, top: int, column: int) -> list[int]:
        """The left edges worth trying for a rectangle whose first row is ``top`` and that covers ``column``."""
        occupied = 0
        for i in range(top, top + self.height):
            occupied |= (left >> (i * self.columns)) & self.line
        reach = range(column, max(column - self.width, -1), -1)
        return sorted({min(j, self.columns - self.width) for j in reach if occupied >> j & 1}, reverse=True)


def _gain(x_adv: Tensor, boxed: Tensor, x: Tensor) -> Tensor:
    """How much nearer to x_adv each pixel gets by taking the boxed change instead of staying clean, [B,1,H,W]."""
    return ((x - x_adv).square() - (boxed - x_adv).square()).sum(1, keepdim=True)


def _extent(hit: Tensor) -> Tensor:
    """hit [B,N] bool -> length of the shortest run of indices that covers every True, [B] int."""
    n = hit.shape[1]
    first = hit.int().argmax(1)
    last = n - 1 - hit.flip(1).int().argmax(1)
    return torch.where(hit.any(1), last - first + 1, 0)


def _require_positive(budget: float | Tensor, where: str) -> None:
    if not bool((torch.as_tensor(budget) > 0).all()):
        raise InputError(f"{where} must be positive, got {budget}")
