"""Random search for pixels whose proposals follow the gradient: what a white-box attacker should ask of Sparse-RS."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from amsdn.attacks.base import Attack, Victim, require, require_at_least_one, require_bounded
from amsdn.attacks.losses import MARGIN, Goal, Loss
from amsdn.attacks.pixel_attacks import _largest
from amsdn.attacks.search_attacks import sparse_divisor
from amsdn.threats import SparsePixels


@dataclass(frozen=True)
class GuidedSparseRS(Attack):
    """Sparse-RS (Croce et al., AAAI 2022) with proposals drawn from the gradient at the current image instead of uniformly.

    The state, the schedule and the rule of acceptance are Sparse-RS's: k pixels at corner colours, each query gives up a
    share of them at random for as many new ones, and what is no worse is kept. New are the proposals. With g the gradient
    of the loss at the current image, taken anew every ``refresh`` queries, the best corner colour of pixel i gains
    w_i = sum_c max(g_c (1 - x_c), -g_c x_c) to first order: pixels are drawn without repetition with probability
    proportional to w_i^``power`` (Gumbel top-k), their colour is that corner, each value flipped with probability ``flip``.
    A share ``blind`` of the proposals draws as Sparse-RS does, as all do where the gradient vanishes: every state stays
    within reach, and a masked gradient costs speed, not the attack.

    This attack is ours: projected gradient steps change all pixels at once on the word of a gradient that is true for small
    changes, and rarely beat their own best; here the gradient is advice to a search that only keeps what is no worse.
    docs/attacks/sparse.md has the comparison. An image costs at most ``num_queries`` forward passes plus one forward and one
    backward every ``refresh`` queries.
    """

    k: int = 20  # pixels; a tensor [B] gives one budget per image
    num_queries: int = 1000
    refresh: int = 10
    power: float = 2.0
    flip: float = 0.1
    blind: float = 0.1
    alpha_init: float = 0.8
    loss: Loss = MARGIN

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "num_queries", "refresh")
        for name in ("flip", "blind"):
            require(0 <= getattr(self, name) <= 1, self, f"{name} must lie in [0, 1]", getattr(self, name))
        require(self.power >= 0, self, "power must not be negative", self.power)
        require(0 < self.alpha_init <= 1, self, "alpha_init must lie in (0, 1]", self.alpha_init)
        require_bounded(self)

    @property
    def threat(self) -> SparsePixels:
        return SparsePixels(self.k)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        active = self.active(victim, x, goal)
        k = torch.as_tensor(active.threat.budget, device=x.device).long().clamp(max=x[0, 0].numel()).expand(len(x))
        image, changed = x, torch.zeros(len(x), x[0, 0].numel(), dtype=torch.bool, device=x.device)
        best, slope = torch.full((len(x),), -torch.inf, device=x.device), torch.zeros_like(x)
        for query in range(self.num_queries):
            if query % self.refresh == 0:
                slope, _, _ = active.gradient(image, self.loss)
            blind = torch.rand(len(k), 1, 1, 1, generator=generator, device=x.device) < self.blind
            advice = slope.masked_fill(blind, 0.0)
            given, taken = self._move(advice, changed, k, query, active.x, generator)
            colours = self._colours(advice, generator)
            x_adv = torch.where(_plane(given, x), active.x, image)
            x_adv = torch.where(_plane(taken, x), colours, x_adv)
            loss, logits = active.query(x_adv, self.loss)
            stay = active.record(x_adv, loss, logits)
            accept = loss >= best
            best = torch.where(accept, loss, best)
            image = torch.where(accept.reshape(-1, 1, 1, 1), x_adv, image)
            changed = torch.where(accept.unsqueeze(1), (changed & ~given) | taken, changed)
            if stay is not None:
                if not len(active):
                    break
                best, image, changed, slope, k = (t[stay] for t in (best, image, changed, slope, k))
        return active.result()

    def _move(self, slope: Tensor, changed: Tensor, k: Tensor, query: int, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Which of the ``changed`` pixels [B,HW] go back to clean, and which are taken instead, [B,HW] each."""
        share = self.alpha_init / sparse_divisor(query, self.num_queries) if query else 1.0
        count, width = (share * k.double()).long().clamp(min=1), max(int(share * min(self._most, x[0, 0].numel())), 1)
        gain = torch.maximum(slope * (1 - x), -slope * x).sum(1).flatten(1)
        appeal = self.power * gain.clamp_min(torch.finfo(gain.dtype).tiny).log()
        given = _largest(torch.rand(gain.shape, generator=generator, device=x.device) + changed.float(), count, width) & changed
        taken = _largest((appeal + _gumbel(gain, generator)).masked_fill(changed & ~given, -torch.inf), count, width)
        return given, taken & ~(changed & ~given)  # before the first acceptance nothing can be given up

    def _colours(self, slope: Tensor, generator: torch.Generator) -> Tensor:
        """For every pixel the corner colour of most gain with some values flipped, any corner where there is no slope, [B,3,H,W]."""
        chance = torch.rand(slope.shape, generator=generator, device=slope.device)
        best = (slope > 0).to(slope.dtype)
        return torch.where(chance < torch.where(slope == 0, 0.5, self.flip), 1 - best, best)

    @cached_property
    def _most(self) -> int:
        """The largest budget of the batch; kept, since asking a tensor waits for the device."""
        return int(torch.as_tensor(self.k).max())


def _plane(mask: Tensor, x: Tensor) -> Tensor:
    """mask [B,HW] -> [B,1,H,W]."""
    return mask.unflatten(1, (1, *x.shape[2:]))


def _gumbel(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise: adding it to log weights makes the largest k a draw without repetition in their proportion."""
    uniform = torch.rand(like.shape, generator=generator, device=like.device).clamp(1e-7, 1 - 1e-7)
    return -(-uniform.log()).log()
