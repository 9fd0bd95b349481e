"""Sigma-zero: the fewest pixels by gradient descent on a smooth count of them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from amsdn.attacks.base import Victim, require
from amsdn.attacks.losses import MARGIN, Goal, Loss
from amsdn.attacks.minimal_norm import MinimalNorm
from amsdn.threats import SparsePixels


@dataclass(frozen=True)
class SigmaZero(MinimalNorm):
    """Sigma-zero (Cina et al., ICLR 2025), counting pixels: their channels are grouped.

    Descends max(margin, 0) + sum_i s_i^2 / (s_i^2 + ``sigma``) / HW, where s_i is the Euclidean length of pixel i's change,
    by steps along the gradient divided by its largest entry, of a length that falls by a cosine from ``lr`` to ``lr`` / 10
    (Algorithm 1); after each step the change is confined to the box and pixels with s_i below a threshold tau go back to
    clean. tau starts at ``threshold`` and moves by ``threshold_step`` times the step length within [0,1]: up while the image
    is adversarial, else down.

    The smallest adversarial image found is kept. With ``stop_when_fooled`` an image leaves at ``k`` pixels; without, all
    ``num_steps`` are spent and ``AttackResult.spent`` is the smallest number of pixels found. An image costs at most
    ``num_steps`` forward and backward passes and one more forward.

    Deviations: the paper counts channel values, so its s_i is the size of one value and three of them may make one pixel.
    Its published code takes Adam steps on the same gradient; the plain step found fewer pixels here (docs/attacks/sparse.md).
    """

    k: int = 20  # pixels; a tensor [B] gives one budget per image
    num_steps: int = 1000
    lr: float = 1.0
    sigma: float = 1e-3
    threshold: float = 0.3
    threshold_step: float = 0.01
    loss: Loss = MARGIN

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_steps >= 1, self, "num_steps must be at least 1", self.num_steps)
        require(0 <= self.threshold <= 1, self, "threshold must lie in [0, 1]", self.threshold)
        for name in ("lr", "sigma", "threshold_step"):
            require(getattr(self, name) > 0, self, f"{name} must be positive", getattr(self, name))

    @property
    def threat(self) -> SparsePixels:
        return SparsePixels(self.k)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        active = self.active(victim, x, goal)
        delta = torch.zeros_like(x)
        tau = torch.full((len(x), 1, 1, 1), self.threshold, device=x.device)
        for step in range(1, self.num_steps + 1):
            x_adv = (active.x + delta).clamp(0, 1)
            ascent, score, logits = active.gradient(x_adv, self.loss)
            reached = active.goal.reached(logits).reshape(-1, 1, 1, 1)
            stay = active.record(x_adv, score, logits)
            if stay is not None:
                if not len(active):
                    return active.result()
                delta, tau, ascent, reached = (t[stay] for t in (delta, tau, ascent, reached))
            gradient = _largest_is_one(self._count_slope(delta) - ascent.masked_fill(reached, 0.0))
            delta = delta - self._rate(step - 1) * gradient
            delta = torch.minimum(torch.maximum(delta, -active.x), 1 - active.x)
            tau = (tau + self.threshold_step * self._rate(step) * torch.where(reached, 1.0, -1.0)).clamp(0, 1)
            delta = torch.where(self._length(delta) < tau, 0.0, delta)
        return active.conclude((active.x + delta).clamp(0, 1), self.loss)

    def _rate(self, step: int) -> float:
        """The learning rate after ``step`` steps: a cosine from ``lr`` to a tenth of it."""
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * step / self.num_steps))

    def _length(self, delta: Tensor) -> Tensor:
        """How far each pixel has moved, [B,1,H,W]."""
        return delta.norm(dim=1, keepdim=True)

    def _count_slope(self, delta: Tensor) -> Tensor:
        """The gradient of the smooth number of changed pixels over HW, [B,3,H,W]."""
        length = self._length(delta)
        return 2 * self.sigma * delta / (length.square() + self.sigma).square() / length[0].numel()


def _largest_is_one(direction: Tensor) -> Tensor:
    """Each sample scaled so that its largest entry is 1 in size; zero stays zero."""
    size = direction.flatten(1).abs().amax(1).reshape(-1, 1, 1, 1)
    return direction / size.clamp_min(torch.finfo(direction.dtype).tiny)
