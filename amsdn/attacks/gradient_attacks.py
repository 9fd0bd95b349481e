"""Gradient attacks within norm balls: single steps, and projected gradient descent for Linf, L2 and L1 by one loop."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from amsdn.attacks.base import Attack, Victim, require
from amsdn.attacks.losses import CROSS_ENTROPY, Goal, Loss
from amsdn.threats import L1Ball, L2Ball, LinfBall, NormBall, budget_on


@dataclass(frozen=True)
class FGSM(Attack):
    """One signed gradient step of the whole budget from the clean image (Goodfellow et al., ICLR 2015)."""

    epsilon: float = 8 / 255  # Linf, in [0,1] pixel units; a tensor [B] gives one budget per image
    loss: Loss = CROSS_ENTROPY

    @property
    def threat(self) -> LinfBall:
        return LinfBall(self.epsilon)

    @property
    def randomised(self) -> bool:
        return False

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        gradient, _, _ = victim.gradient(x, lambda logits: self.loss(logits, goal))
        budget = budget_on(self.threat_on(victim).budget, x.device).to(x.dtype).reshape(-1, 1, 1, 1)
        return self.threat_on(victim).project(x + budget * gradient.sign(), x)


@dataclass(frozen=True)
class NFGSM(Attack):
    """One signed step from a point with strong uniform noise (de Jorge et al., NeurIPS 2022, Algorithm 1): for training.

    The noise is uniform in [-k epsilon, k epsilon], the step ``step`` x epsilon, both then kept in the box. The paper
    does not project onto the ball, on purpose: with ``projected=False`` its images may be (k + step) epsilon away, and
    that is the threat declared. With ``projected=True`` the result is brought back to epsilon, to compare budgets; as an
    attack it is then weaker than FGSM, because the noise uses up part of the ball.
    """

    epsilon: float = 8 / 255  # Linf, in [0,1] pixel units; a tensor [B] gives one budget per image
    k: float = 2.0  # radius of the noise, in multiples of epsilon
    step: float = 1.0  # the paper's alpha, in multiples of epsilon
    projected: bool = True
    loss: Loss = CROSS_ENTROPY

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.k >= 0, self, "k must not be negative", self.k)
        require(self.step > 0, self, "step must be positive", self.step)

    @property
    def threat(self) -> LinfBall:
        return LinfBall(self.epsilon if self.projected else (self.k + self.step) * self.epsilon)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        epsilon = budget_on(LinfBall(self.epsilon).select(victim.rows).budget, x.device).to(x.dtype).reshape(-1, 1, 1, 1)
        noise = 2 * torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) - 1
        noisy = (x + self.k * epsilon * noise).clamp(0, 1)
        gradient, _, _ = victim.gradient(noisy, lambda logits: self.loss(logits, goal))
        return self.threat_on(victim).project(noisy + self.step * epsilon * gradient.sign(), x)


@dataclass(frozen=True)
class _PGD(Attack):
    """The loop that the balls share: step along the ball's steepest direction, project, repeat."""

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

    @property
    def randomised(self) -> bool:
        return self.random_start

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        active = self.active(victim, x, goal)
        threat = self.threat
        x_adv = threat.select(victim.rows).sample(x, generator) if self.random_start else x
        ascent = torch.zeros_like(x)
        for _ in range(self.num_steps):
            gradient, loss, logits = active.gradient(x_adv, self.loss)
            ascent = self._ascent(gradient, ascent)
            stay = active.record(x_adv, loss, logits) if active.drop else None
            if stay is not None:
                if not len(active):
                    break
                x_adv, ascent = x_adv[stay], ascent[stay]
            here = threat.select(active.victim.rows)
            x_adv = here.project(x_adv + self.alpha * self._step(ascent, here), active.x)
        return active.conclude(x_adv, self.loss)

    def _ascent(self, gradient: Tensor, previous: Tensor) -> Tensor:
        """The direction to climb, given the loss's gradient and the direction of the step before (zero at first)."""
        return gradient

    def _step(self, ascent: Tensor, threat: NormBall) -> Tensor:
        """The step of unit length in the ball's norm."""
        return threat.steepest(ascent)


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


@dataclass(frozen=True)
class MIFGSM(_PGD):
    """Momentum iterative FGSM in the Linf ball (Dong et al., CVPR 2018, Algorithm 1, eqs. 6-7), known for its transfer.

    Steps follow the sign of g <- decay g + gradient / |gradient|_1, from the clean image. The paper's alpha is
    epsilon / num_steps; ours is fixed, so that a larger epsilon or fewer steps still reach the border of the ball.
    """

    epsilon: float = 8 / 255  # in [0,1] pixel units; a tensor [B] gives one budget per image
    alpha: float = 2 / 255
    num_steps: int = 10
    random_start: bool = False
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.decay >= 0, self, "decay must not be negative", self.decay)

    @property
    def threat(self) -> LinfBall:
        return LinfBall(self.epsilon)

    def _ascent(self, gradient: Tensor, previous: Tensor) -> Tensor:
        return self.decay * previous + _unit_sum(gradient)


@dataclass(frozen=True)
class PGDL1Attack(_PGD):
    """Projected gradient descent in the L1 ball by sparse steps, after SLIDE (Tramer & Boneh, NeurIPS 2019).

    A step of L1 length ``alpha`` goes to the ``density`` share of channel values with the largest gradients. Deviations:
    it is divided among them in proportion to the gradient, where SLIDE shares it evenly, because even steps end in a
    tie with the projection, before the budget is on the best values; the projection is the exact one onto ball and box
    together (Croce & Hein, ICML 2021), where SLIDE projects onto the ball, then clips; so values that stand at a wall
    keep their part of the step, which the projection would else take away. APGDL1Attack is stronger.
    """

    epsilon: float = 12.0  # sum of absolute changes over all pixels and channels; a tensor [B] gives one budget per image
    alpha: float = 3.0
    num_steps: int = 20
    density: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.density <= 1, self, "density must be in (0, 1]", self.density)

    @property
    def threat(self) -> L1Ball:
        return L1Ball(self.epsilon)

    def _step(self, ascent: Tensor, threat: NormBall) -> Tensor:
        flat = ascent.flatten(1)
        top = flat.abs().topk(max(1, round(self.density * flat.shape[1])), dim=1).indices
        return _unit_sum(torch.zeros_like(flat).scatter(1, top, flat.gather(1, top)).reshape(ascent.shape))


def _unit_sum(direction: Tensor) -> Tensor:
    """Each sample of direction [B,...] scaled to an L1 norm of 1; zero stays zero, tiny gradients do not vanish."""
    flat = direction.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    return (flat / flat.abs().sum(1, keepdim=True).clamp_min(1e-12)).reshape(direction.shape)
