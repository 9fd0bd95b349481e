"""Attacks made of attacks: restarts, and cascades that take the per-image worst case."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amsdn.attacks.base import ActiveSet, Attack, Victim, require
from amsdn.attacks.losses import MARGIN, Goal
from amsdn.attacks.minimal_norm import MinimalNorm, SmallestSet
from amsdn.threats import ThreatModel


@dataclass(frozen=True)
class Composite(Attack):
    """Runs each part on what still stands and keeps, per image, the result of best margin.

    If all parts are minimal-norm attacks, it keeps the smallest adversarial image instead, and an image stands until one is
    within its budget: with an infinite budget, or ``stop_when_fooled=False``, every part starts from all images. Other
    parts need a finite budget.

    Each part uses its own ``eot_samples``; the composite's own are spent on scoring the parts' results, which costs
    one query per sample and part.
    """

    @property
    @abstractmethod
    def parts(self) -> Sequence[Attack]:
        """The attacks in the order in which they run, all of one threat model; cheap ones belong first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.minimises:
            what = "the budget must be finite, unless all parts are minimal-norm attacks"
            require(self.threat.bounded, self, what, self.threat.describe())

    @property
    def threat(self) -> ThreatModel:
        return self.parts[0].threat

    @property
    def needs_gradients(self) -> bool:
        return any(part.needs_gradients for part in self.parts)

    @property
    def randomised(self) -> bool:
        return any(part.randomised for part in self.parts)

    @property
    def minimises(self) -> bool:
        """Whether all parts look for the smallest change, so that the smallest of their results is what counts."""
        return all(part.minimises if isinstance(part, Composite) else isinstance(part, MinimalNorm) for part in self.parts)

    def active(self, victim: Victim, x: Tensor, goal: Goal) -> ActiveSet:
        kind = SmallestSet if self.minimises else ActiveSet
        return kind(victim, x, goal, self.threat_on(victim), drop=self.stop_when_fooled)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        active = self.active(victim, x, goal)
        active.poll_every = 1  # a part is many steps: waiting for the device once is nothing beside attacking fooled images again
        for part in self.parts:
            part = part if self.stop_when_fooled else replace(part, stop_when_fooled=False)
            x_adv = part.perturb(active.victim.averaging(part.eot_samples), active.x, active.goal, generator)
            active.record(x_adv, *active.query(x_adv, MARGIN))
            if not len(active):
                break
        return active.result()


@dataclass(frozen=True)
class Restarts(Composite):
    """The same attack ``n`` times from fresh randomness; a fooled image is not attacked again."""

    attack: Attack
    n: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.n >= 1, self, "n must be at least 1", self.n)
        what = "the attack draws nothing at random, so all runs are one; use random_start=True (PGD), n_restarts (FAB) or n=1"
        require(self.n == 1 or self.attack.randomised, self, what, f"{type(self.attack).__name__}, n={self.n}")

    @property
    def threat(self) -> ThreatModel:
        return self.attack.threat

    @property
    def parts(self) -> Sequence[Attack]:
        return [self.attack] * self.n


@dataclass(frozen=True)
class Cascade(Composite):
    """Several attacks of one threat model, one after the other on what still stands."""

    attacks: tuple[Attack, ...]

    def __post_init__(self) -> None:
        require(len(self.attacks) >= 1, self, "at least one attack is needed", self.attacks)
        super().__post_init__()
        for other in self.attacks[1:]:
            same = self.threat.includes(other.threat) and other.threat.includes(self.threat)
            require(same, self, f"all parts must share the threat {self.threat.describe()}", other.threat.describe())

    @property
    def parts(self) -> Sequence[Attack]:
        return self.attacks
