"""White-box sparse attack: which pixels, and which colours, by gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from amsdn.attacks.base import Attack, Victim, require, require_at_least_one, require_bounded
from amsdn.attacks.losses import CROSS_ENTROPY, Goal, Loss
from amsdn.threats import SparsePixels, budget_on, unit_length


@dataclass(frozen=True)
class SparsePGD(Attack):
    """sPGD (Zhong, Huang & Liu, ICML 2024): a magnitude p for every value and a logit u for every pixel.

    The perturbation is p on the ``k`` pixels of largest u. One image gradient g serves both: u climbs along
    sum_c(g p) sigmoid'(u), normalised and scaled by ``beta`` sqrt(HW); p climbs by ``alpha`` along the sign of its
    gradient, which reaches it through the mask itself (``projected``) or through sigmoid(u), so that pixels outside
    the mask learn too. A sample whose pixels have not changed for ``patience`` steps draws its u afresh. The paper
    uses patience 3, and 10 in training.

    Deviations: the unchanged counter is per sample, so that samples in a batch do not influence one another; u moves along a
    gradient of whatever size, where the authors' code stops below 2e-10. Their attack code takes the margin instead of
    cross-entropy within .5 of the boundary; neither that nor the margin throughout fooled more images here (set ``loss``).
    At equal cost the attack often loses to random search; docs/attacks/sparse.md says why, ``GuidedSparseRS`` is the remedy.
    ``num_steps`` of 1 (Fast-LS-l0 takes alpha = beta = 1) is one forward and one backward in training.
    """

    k: int = 20  # pixels; a tensor [B] gives one budget per image
    num_steps: int = 100
    projected: bool = False
    alpha: float = 0.25
    beta: float = 0.25
    patience: int = 3
    loss: Loss = CROSS_ENTROPY

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta"):
            require(getattr(self, name) > 0, self, f"{name} must be positive", getattr(self, name))
        require_at_least_one(self, "num_steps", "patience")
        require_bounded(self)

    @property
    def threat(self) -> SparsePixels:
        return SparsePixels(self.k)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        active = self.active(victim, x, goal)
        k = budget_on(self.threat_on(victim).budget, x.device).expand(len(x))
        top = min(int(self.k.max() if isinstance(self.k, Tensor) else self.k), x[0, 0].numel())
        p = _confine(2 * torch.rand(x.shape, generator=generator, device=x.device) - 1, x)
        u = torch.randn(len(x), x[0, 0].numel(), generator=generator, device=x.device)
        mask = _largest(u, k, top)
        still = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        x_adv = _apply(x, p, mask)
        for step in range(self.num_steps):
            g, loss, logits = active.gradient(x_adv, self.loss)
            stay = active.record(x_adv, loss, logits) if active.drop else None
            if stay is not None:
                if not len(active):
                    break
                g, p, u, mask, still, k = (t[stay] for t in (g, p, u, mask, still, k))
            p, u = self._ascend(g, p, u, mask, active.x)
            new = _largest(u, k, top)
            still = torch.where((new == mask).all(1), still + 1, 0)
            if self.patience <= step + 1 < self.num_steps:  # a redraw after the last step would throw its work away
                stuck = (still >= self.patience).unsqueeze(1)
                u = torch.where(stuck, torch.randn(u.shape, generator=generator, device=u.device), u)
                new, still = torch.where(stuck, _largest(u, k, top), new), still.masked_fill(stuck.squeeze(1), 0)
            mask = new
            x_adv = _apply(active.x, p, mask)
        return active.conclude(x_adv, self.loss)

    def _ascend(self, g: Tensor, p: Tensor, u: Tensor, mask: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One step of p [B,3,H,W] and u [B,HW] along the image gradient g [B,3,H,W]; mask [B,HW]."""
        soft = u.sigmoid()
        slope = (g * p).sum(1).flatten(1) * soft * (1 - soft)
        u = u + self.beta * u.shape[1] ** 0.5 * unit_length(slope)
        # sigmoid(u) is positive, so through it the sign of p's gradient is that of g.
        direction = g.sign() * mask.reshape(-1, 1, *x.shape[2:]) if self.projected else g.sign()
        return _confine(p + self.alpha * direction, x), u


def _confine(p: Tensor, x: Tensor) -> Tensor:
    """Magnitudes that keep x + p in the unit box."""
    return torch.minimum(torch.maximum(p, -x), 1 - x)


def _apply(x: Tensor, p: Tensor, mask: Tensor) -> Tensor:
    """x + p on the masked pixels [B,HW], x itself elsewhere."""
    return torch.where(mask.reshape(-1, 1, *x.shape[2:]), (x + p).clamp(0, 1), x)


def _largest(u: Tensor, k: Tensor, top: int) -> Tensor:
    """The k [B] largest of each row of u [B,N] as a mask [B,N]; no k exceeds ``top`` (unless there are fewer pixels)."""
    order = u.topk(top, dim=1).indices
    wanted = torch.arange(top, device=u.device) < k.unsqueeze(1)
    return torch.zeros(u.shape, dtype=torch.bool, device=u.device).scatter_(1, order, wanted)
