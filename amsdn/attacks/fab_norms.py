"""The geometry that FAB needs of each norm: lengths, distances to planes, exact projections onto planes within the unit box."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from amsdn.attacks.minimal_norm import MinimalNorm
from amsdn.threats import L1Ball, L2Ball, LinfBall, NormBall


class PlaneNorm(MinimalNorm):
    """What FAB needs to know of a norm, over flat vectors [B,N]."""

    epsilon: float  # declared for the norms; the field is the leaf classes'
    start_radius: ClassVar[float]  # of a random start where neither budget nor adversarial image bound it; the authors'

    @property
    @abstractmethod
    def threat(self) -> NormBall: ...

    @abstractmethod
    def length(self, change: Tensor) -> Tensor:
        """The norm, over the last dimension."""

    @abstractmethod
    def dual(self, normal: Tensor) -> Tensor:
        """The dual norm, over the last dimension: a plane w.d = v is |v| / dual(w) away."""

    @abstractmethod
    def reach(self, weight: Tensor, room: Tensor, gap: Tensor) -> Tensor:
        """The smallest amounts d [B,N], 0 <= d <= room, with weight.d = gap; d = room where no amounts suffice.

        weight and room [B,N] and gap [B] are not negative.
        """

    def onto_plane(self, points: Tensor, normal: Tensor, gap: Tensor) -> Tensor:
        """The smallest changes d [B,N] of points [B,N] in the unit box with normal.d = gap [B] that stay in the box.

        Where the plane misses the box, the change to the corner nearest to it. Zero where the normal is.
        """
        direction = normal.sign() * gap.sign().unsqueeze(1)
        room = torch.where(direction > 0, 1 - points, points)
        return direction * self.reach(normal.abs(), room, gap.abs())


class LinfNorm(PlaneNorm):
    start_radius = 0.3

    @property
    def threat(self) -> LinfBall:
        return LinfBall(self.epsilon)

    def length(self, change: Tensor) -> Tensor:
        return change.abs().amax(-1)

    def dual(self, normal: Tensor) -> Tensor:
        return normal.abs().sum(-1)

    def reach(self, weight: Tensor, room: Tensor, gap: Tensor) -> Tensor:
        return torch.minimum(_level(weight, room, gap).unsqueeze(1), room)


class L2Norm(PlaneNorm):
    start_radius = 1.0

    @property
    def threat(self) -> L2Ball:
        return L2Ball(self.epsilon)

    def length(self, change: Tensor) -> Tensor:
        return change.norm(dim=-1)

    def dual(self, normal: Tensor) -> Tensor:
        return normal.norm(dim=-1)

    def reach(self, weight: Tensor, room: Tensor, gap: Tensor) -> Tensor:
        full = room / weight.clamp_min(torch.finfo(weight.dtype).tiny)  # the multiple of the weights that fills each room
        return torch.minimum(_level(weight.square(), full, gap).unsqueeze(1) * weight, room)


class L1Norm(PlaneNorm):
    start_radius = 5.0

    @property
    def threat(self) -> L1Ball:
        return L1Ball(self.epsilon)

    def length(self, change: Tensor) -> Tensor:
        return change.abs().sum(-1)

    def dual(self, normal: Tensor) -> Tensor:
        return normal.abs().amax(-1)

    def reach(self, weight: Tensor, room: Tensor, gap: Tensor) -> Tensor:
        heavy, order = weight.sort(dim=1, descending=True, stable=True)  # the heaviest coordinates first, each to its wall
        gain = heavy * room.gather(1, order)
        left = gap.unsqueeze(1) - (gain.double().cumsum(1).to(gain.dtype) - gain)
        amount = (left / heavy.clamp_min(torch.finfo(heavy.dtype).tiny)).clamp_min(0)
        return torch.minimum(torch.zeros_like(room).scatter(1, order, amount), room)


def _level(slope: Tensor, full: Tensor, gap: Tensor) -> Tensor:
    """The t [B] with sum_i slope_i min(t, full_i) = gap [B]; the largest ``full`` where the sum never gets there.

    slope and full [B,N] are not negative. The sum is concave and piecewise linear in t: sort its break points, sum up
    to each, solve on the piece that holds the gap.
    """
    full, order = full.sort(dim=1)
    slope = slope.gather(1, order).double()
    below = (slope * full).cumsum(1) - slope * full  # what the filled coordinates give, at each break point
    rest = slope.flip(1).cumsum(1).flip(1)  # the slope of those that are not
    piece = (below + full * rest < gap.unsqueeze(1)).sum(1, keepdim=True).clamp(max=full.shape[1] - 1)
    level = (gap.unsqueeze(1) - below.gather(1, piece)) / rest.gather(1, piece).clamp_min(torch.finfo(rest.dtype).tiny)
    return torch.minimum(level, full.gather(1, piece)).to(full.dtype).squeeze(1)
