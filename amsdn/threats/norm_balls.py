"""Balls in the usual norms, each cut to the box [0,1]."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from amsdn.threats.threat_model import ThreatModel, require_positive


def _per_image(budget: float | Tensor, like: Tensor) -> float | Tensor:
    """A budget ready to broadcast against images: a tensor as [B,1,1,1], a number as it is (an upload would wait for the device)."""
    return budget.to(like.device, like.dtype).reshape(-1, 1, 1, 1) if isinstance(budget, Tensor) else float(budget)


@dataclass(frozen=True)
class NormBall(ThreatModel):
    """A ball of radius ``eps`` (in [0,1] pixel units) around the image, which gradient attacks can step through."""

    eps: float | Tensor

    def __post_init__(self) -> None:
        require_positive(self.eps, f"{type(self).__name__}(eps)")

    @property
    def budget(self) -> float | Tensor:
        return self.eps

    def with_budget(self, budget: float) -> Self:
        return replace(self, eps=budget)

    def select(self, keep: Tensor) -> Self:
        return self.unchecked(eps=self.eps[keep]) if isinstance(self.eps, Tensor) else self

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
        reach = (_per_image(self.eps, x) * torch.ones_like(radius)).clamp(max=x[0].numel() ** 0.5)  # the box's diagonal bounds it
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
        d, eps = (x_adv - x).flatten(1), _per_image(self.eps, x)
        eps = eps.reshape(-1, 1) if isinstance(eps, Tensor) else eps
        length, room = d.abs().double(), torch.where(d > 0, 1 - x.flatten(1), x.flatten(1))  # thousands of terms are summed
        threshold = _l1_threshold(length, room, (1 - 1e-6) * eps)
        delta = (d.sign() * (length - threshold).clamp_min(0)).to(x.dtype).reshape(x.shape)
        nearest = x + delta  # beyond the room: the clamp cuts it
        nearest = torch.where((nearest - x).abs() > delta.abs(), nearest.nextafter(x), nearest)  # rounded towards x, else it adds up
        boxed = x_adv.clamp(0, 1)
        inside = self.spent(boxed, x).unsqueeze(1) <= eps
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


def unit_length(direction: Tensor) -> Tensor:
    """Each sample of direction [B,...] scaled to Euclidean length 1; zero stays zero.

    The largest entry is scaled to 1 first: the gradients of a confident model are so small that their squares vanish.
    """
    flat = direction.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    return (flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)).reshape(direction.shape)


def _l1_threshold(length: Tensor, room: Tensor, eps: float | Tensor) -> Tensor:
    """The least lambda >= 0 with sum_i clip(length_i - lambda, 0, room_i) <= eps: [B,N], [B,N], [B,1] or a number -> [B,1]; float64.

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
