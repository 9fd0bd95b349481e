"""Any change of a few pixels."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from amsdn.threats.threat_model import ThreatModel, box_gain, changed_pixels, require_positive


@dataclass(frozen=True)
class SparsePixels(ThreatModel):
    """At most ``k`` pixels may take any colour. All channels of a pixel count once."""

    k: int | Tensor
    family: ClassVar[str] = "sparse"

    def __post_init__(self) -> None:
        require_positive(self.k, "SparsePixels(k)")

    @property
    def budget(self) -> float | Tensor:
        return self.k

    @property
    def counts(self) -> bool:
        return True

    def with_budget(self, budget: float) -> Self:
        return replace(self, k=budget if isinstance(budget, Tensor) or budget == math.inf else int(budget))  # type: ignore[arg-type]

    def select(self, keep: Tensor) -> Self:
        return self.unchecked(k=self.k[keep]) if isinstance(self.k, Tensor) else self

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        boxed = x_adv.clamp(0, 1)
        gain = box_gain(x_adv, boxed, x).flatten(1)
        rank = gain.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        keep = rank < (self.k.to(x.device).reshape(-1, 1) if isinstance(self.k, Tensor) else self.k)
        return torch.where(keep.reshape(len(x), 1, *x.shape[2:]), boxed, x)

    def spent(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return changed_pixels(x_adv, x).flatten(1).sum(1).float()

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        priority = torch.rand(len(x), x[0, 0].numel(), generator=generator, device=x.device)
        rank = priority.argsort(dim=1).argsort(dim=1)
        keep = rank < (self.k.to(x.device).reshape(-1, 1) if isinstance(self.k, Tensor) else self.k)
        colour = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return torch.where(keep.reshape(len(x), 1, *x.shape[2:]), colour, x)
