"""Threat models: the sets of images an attacker may choose from, given a clean image.

Every threat model also confines images to the unit box. ``project`` is the Euclidean projection onto
the set (exact, hence idempotent; for an l2 ball the intersection with the box is approached by a
ball projection followed by a clamp, which stays in both), ``contains`` is the test that every attack's
output must pass, ``sample`` draws a random member, for initialisation and as a noise baseline.

Budgets may be numbers or, for the balls and for pixel counts, tensors [B] with one budget per image;
``select`` keeps them aligned when finished images leave a batch.
"""

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
        return str(int(budget))
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
        return self.project(x + self.steepest(direction) * radius * _per_image(self.eps, x), x)

    def steepest(self, gradient: Tensor) -> Tensor:
        return unit_length(gradient)


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
        return replace(self, k=budget if isinstance(budget, Tensor) else int(budget))

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


def unit_length(direction: Tensor) -> Tensor:
    """Each sample of direction [B,...] scaled to Euclidean length 1; zero stays zero.

    The largest entry is scaled to 1 first: the gradients of a confident model are so small that their squares vanish.
    """
    flat = direction.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    return (flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)).reshape(direction.shape)


def changed_pixels(x_adv: Tensor, x: Tensor) -> Tensor:
    """Where any channel differs, [B,1,H,W] bool; NaN counts as a change."""
    return (x_adv != x).any(1, keepdim=True)


def square_mask(rows: Tensor, columns: Tensor, size: int, like: Tensor) -> Tensor:
    """True inside the size x size square whose top-left corner is (rows, columns) [B] -> [B,1,H,W] bool."""
    i = torch.arange(like.shape[2], device=like.device).reshape(1, -1, 1)
    j = torch.arange(like.shape[3], device=like.device).reshape(1, 1, -1)
    top, left = rows.reshape(-1, 1, 1), columns.reshape(-1, 1, 1)
    return ((i >= top) & (i < top + size) & (j >= left) & (j < left + size)).unsqueeze(1)


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
