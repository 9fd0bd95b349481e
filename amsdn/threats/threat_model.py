"""What every threat model offers, and what several of them are made of."""

import copy
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from amsdn.errors import InputError

TOLERANCE = 1e-5  # slack for float32 rounding in ball membership, in units of pixel value


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
        limit = budget_on(self.budget, x.device).float()
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

    def unchecked(self, **fields: Any) -> Self:
        """A copy with other fields. The constructor would check them, and to check a tensor waits for the device."""
        other = copy.copy(self)
        for name, value in fields.items():
            object.__setattr__(other, name, value)
        return other

    @property
    def bounded(self) -> bool:
        """Whether every budget is finite."""
        return bool(self.budget.isfinite().all()) if isinstance(self.budget, Tensor) else math.isfinite(self.budget)

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


def budget_on(budget: float | Tensor, device: torch.device) -> Tensor:
    """A budget as a tensor [1] or [B]. A number is filled in there: an upload would be waited for."""
    return budget.to(device).reshape(-1) if isinstance(budget, Tensor) else torch.full((1,), budget, device=device)


def require_positive(budget: float | Tensor, where: str) -> None:
    if not (bool((budget > 0).all()) if isinstance(budget, Tensor) else budget > 0):
        raise InputError(f"{where} must be positive, got {budget}")


def changed_pixels(x_adv: Tensor, x: Tensor) -> Tensor:
    """Where any channel differs, [B,1,H,W] bool; NaN counts as a change."""
    return (x_adv != x).any(1, keepdim=True)


def box_gain(x_adv: Tensor, boxed: Tensor, x: Tensor) -> Tensor:
    """How much nearer to x_adv each pixel gets by taking the boxed change instead of staying clean, [B,1,H,W]."""
    return ((x - x_adv).square() - (boxed - x_adv).square()).sum(1, keepdim=True)
