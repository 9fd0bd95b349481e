"""Gradient attacks within norm balls: FGSM, and projected gradient descent for Linf and L2 by one loop."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from amsdn.attacks.base import Attack, Victim, require
from amsdn.attacks.losses import CROSS_ENTROPY, Goal, Loss
from amsdn.threats import L2Ball, LinfBall, NormBall


@dataclass(frozen=True)
class FGSM(Attack):
    """One signed gradient step of the whole budget from the clean image (Goodfellow et al., ICLR 2015)."""

    epsilon: float = 8 / 255  # Linf, in [0,1] pixel units; a tensor [B] gives one budget per image
    loss: Loss = CROSS_ENTROPY

    @property
    def threat(self) -> LinfBall:
        return LinfBall(self.epsilon)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        gradient, _, _ = victim.gradient(x, lambda logits: self.loss(logits, goal))
        budget = torch.as_tensor(self.threat_on(victim).budget, device=x.device, dtype=x.dtype).reshape(-1, 1, 1, 1)
        return self.threat_on(victim).project(x + budget * gradient.sign(), x)


@dataclass(frozen=True)
class _PGD(Attack):
    """The loop that both balls share: step along the ball's steepest direction, project, repeat."""

    epsilon: float
    alpha: float
    num_steps: int
    random_start: bool = True
    loss: Loss = CROSS_ENTROPY

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha > 0, self, "alpha must be positive", self.alpha)
        require(self.num_steps >= 1, self, "num_steps must be at least 1", self.num_steps)

    @property
    @abstractmethod
    def threat(self) -> NormBall: ...

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        active = self.active(victim, x, goal)
        threat = self.threat
        x_adv = threat.select(victim.rows).sample(x, generator) if self.random_start else x
        for _ in range(self.num_steps):
            gradient, loss, logits = active.gradient(x_adv, self.loss)
            stay = active.record(x_adv, loss, logits) if active.drop else None
            if stay is not None:
                if not len(active):
                    break
                x_adv, gradient = x_adv[stay], gradient[stay]
            here = threat.select(active.victim.rows)
            x_adv = here.project(x_adv + self.alpha * here.steepest(gradient), active.x)
        return active.conclude(x_adv, self.loss)


@dataclass(frozen=True)
class PGDAttack(_PGD):
    """Projected gradient descent in the Linf ball (Madry et al., ICLR 2018).

    A sample costs at most ``num_steps`` forward and backward passes, plus one forward that scores the last image
    unless ``stop_when_fooled`` is off.
    """

    epsilon: float = 8 / 255  # in [0,1] pixel units; a tensor [B] gives one budget per image
    alpha: float = 2 / 255
    num_steps: int = 10

    @property
    def threat(self) -> LinfBall:
        return LinfBall(self.epsilon)


@dataclass(frozen=True)
class PGDL2Attack(_PGD):
    """Projected gradient descent in the L2 ball: steps of length ``alpha`` along the normalised gradient."""

    epsilon: float = 0.5  # Euclidean length over all pixels and channels; a tensor [B] gives one budget per image
    alpha: float = 0.1
    num_steps: int = 10

    @property
    def threat(self) -> L2Ball:
        return L2Ball(self.epsilon)
