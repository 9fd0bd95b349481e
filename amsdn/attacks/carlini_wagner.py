"""The Carlini & Wagner L2 attack (S&P 2017): Adam on length and margin together, a binary search for their trade-off."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amsdn.attacks.base import Victim, require, require_at_least_one
from amsdn.attacks.losses import Goal, Loss, margin
from amsdn.attacks.minimal_norm import MinimalNorm
from amsdn.threats import L2Ball

INSIDE = 0.999999  # pixels at 0 and 1 are moved this far inside, in units of half the box, so that atanh is finite
LOOK_EVERY = 100  # steps between looks, at least: looking sooner mistakes Adam's swings for a stall and costs 5 % of the norm
STALLED = 0.9999  # a search ends early if its lowest objective did not fall below this share of what it was at the last look
BETA1, BETA2, ADAM_EPS = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Hinge(Loss):
    """min(margin towards the goal - ``confidence``, 0): the negative of f_6 of the paper."""

    confidence: float = 0.0

    def __call__(self, logits: Tensor, goal: Goal) -> Tensor:
        value = margin(logits, goal.labels)
        return ((value if goal.targeted else -value) - self.confidence).clamp(max=0)

    def demand(self, logits: Tensor, goal: Goal) -> Tensor:
        """Logits [B,K] that reach the goal exactly where the given ones reach it by a margin of ``confidence``."""
        handicap = torch.full_like(goal.labels, -self.confidence if goal.targeted else self.confidence, dtype=logits.dtype)
        return logits.scatter_add(1, goal.labels.unsqueeze(1), handicap.unsqueeze(1))


@dataclass(frozen=True)
class _Search:
    """Where every sample is: its point in tanh space with Adam's moments, and its bracket of the constant c."""

    origin: Tensor  # [B,3,H,W] the point in tanh space that stands for the clean image
    start: Tensor  # [B,3,H,W] its tanh
    point: Tensor  # [B,3,H,W]
    first: Tensor  # [B,3,H,W] Adam's moments
    second: Tensor
    clock: Tensor  # [B] float: steps of the running search
    lowest: Tensor  # [B] lowest objective of the running search, and what it was at the last look
    seen: Tensor
    found: Tensor  # [B] bool: the running search met an adversarial image
    const: Tensor  # [B] c, and the bracket it was taken from
    low: Tensor
    high: Tensor
    rounds: Tensor  # [B] searches finished

    @classmethod
    def begin(cls, x: Tensor, const: float) -> "_Search":
        point = torch.atanh((2 * x - 1) * INSIDE)
        zero = torch.zeros(len(x), device=x.device)
        still = torch.zeros_like(x)
        far = torch.full_like(zero, torch.inf)
        return cls(point, point.tanh(), point, still, still, zero, far, far, zero.bool(), zero + const, zero, far, zero)

    def select(self, rows: Tensor) -> "_Search":
        return _Search(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def images(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The images [B,3,H,W] the points stand for around x, and their derivative by the points.

        The change of the tanh is added to x, so that the start is x to the last bit, at the walls too; the clamp
        removes what INSIDE leaves over there, at most 5e-7.
        """
        tanh = self.point.tanh()
        return (x + (tanh - self.start) / 2).clamp(0, 1), (1 - tanh * tanh) / 2

    def descend(self, gradient: Tensor, learning_rate: float) -> "_Search":
        """One step of Adam along ``gradient`` by the points, each sample at its own clock."""
        clock = self.clock + 1
        first = BETA1 * self.first + (1 - BETA1) * gradient
        second = BETA2 * self.second + (1 - BETA2) * gradient.square()
        rate, unbias = (learning_rate / (1 - BETA1**clock)), (1 - BETA2**clock)
        step = _wide(rate) * first / ((second / _wide(unbias)).sqrt() + ADAM_EPS)
        return replace(self, point=self.point - step, first=first, second=second, clock=clock)

    def restart(self, over: Tensor) -> "_Search":
        """Where ``over`` [B], the next c and everything else from the start."""
        low = torch.where(over & ~self.found, torch.maximum(self.low, self.const), self.low)
        high = torch.where(over & self.found, torch.minimum(self.high, self.const), self.high)
        const = torch.where(over, torch.where(high.isfinite(), (low + high) / 2, self.const * 10), self.const)
        image = _wide(over)
        return _Search(
            origin=self.origin,
            start=self.start,
            point=torch.where(image, self.origin, self.point),
            first=self.first.masked_fill(image, 0),
            second=self.second.masked_fill(image, 0),
            clock=self.clock.masked_fill(over, 0),
            lowest=self.lowest.masked_fill(over, torch.inf),
            seen=self.seen.masked_fill(over, torch.inf),
            found=self.found & ~over,
            const=const,
            low=low,
            high=high,
            rounds=self.rounds + over,
        )


@dataclass(frozen=True)
class CWL2(MinimalNorm):
    """Minimise |delta|^2 + c f_6 over a point in tanh space by Adam, with a binary search for c (Carlini & Wagner, S&P 2017, eq. 7).

    Each of ``binary_search_steps`` searches runs ``num_steps`` steps, or fewer if the objective stalls (looked at ten
    times a search, at most every hundred steps). Samples do not wait for each other: each begins its next search
    as its last one ends, and leaves after its last. The authors' ``num_steps`` is 10,000. A step costs one forward and one
    backward pass. ``confidence`` is the paper's kappa: only images that reach the goal by this margin of logits count.
    """

    epsilon: float = 0.5  # Euclidean length that counts as success, math.inf for any; a tensor [B] gives one per image
    num_steps: int = 1000
    binary_search_steps: int = 9
    learning_rate: float = 0.01
    confidence: float = 0.0
    initial_const: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "num_steps", "binary_search_steps")
        for name in ("learning_rate", "initial_const"):
            require(getattr(self, name) > 0, self, f"{name} must be positive", getattr(self, name))
        require(self.confidence >= 0, self, "confidence must not be negative", self.confidence)

    @property
    def threat(self) -> L2Ball:
        return L2Ball(self.epsilon)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        active = self.active(victim, x, goal)
        hinge = Hinge(self.confidence)
        search = _Search.begin(x, self.initial_const)
        for _ in range(self.num_steps * self.binary_search_steps):
            x_adv, slope = search.images(active.x)
            gradient, loss, logits = active.gradient(x_adv, hinge)
            demanded = hinge.demand(logits, active.goal)
            search = replace(search, found=search.found | active.goal.reached(demanded))
            delta = x_adv - active.x
            search = search.descend((2 * delta - _wide(search.const) * gradient) * slope, self.learning_rate)
            search = self._next(search, delta.flatten(1).square().sum(1) - search.const * loss)
            stay = active.record(x_adv, loss, demanded, finished=search.rounds >= self.binary_search_steps)
            if stay is not None:
                if not len(active):
                    break
                search = search.select(stay)
        return active.result()

    def _next(self, search: _Search, objective: Tensor) -> _Search:
        """The search after a step that met ``objective`` [B]: restarted where it ran out of steps or stalled."""
        look = search.clock.remainder(max(self.num_steps // 10, LOOK_EVERY)) == 0
        lowest = torch.minimum(search.lowest, objective)
        over = (look & (lowest > STALLED * search.seen)) | (search.clock >= self.num_steps)
        return replace(search, lowest=lowest, seen=torch.where(look, lowest, search.seen)).restart(over)


def _wide(value: Tensor) -> Tensor:
    """[B] -> [B,1,1,1]."""
    return value.reshape(-1, 1, 1, 1)
