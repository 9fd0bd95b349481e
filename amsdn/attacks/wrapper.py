"""What the attacks share that change another attack's goal, not its way of searching."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amsdn.attacks.base import Attack, Victim
from amsdn.attacks.losses import Goal
from amsdn.protocols import Classifier
from amsdn.threats import ThreatModel


@dataclass(frozen=True)
class Wrapper(Attack):
    """Runs ``attack`` for another goal. Wrappers may hold one another, and stand outside of restarts and cascades.

    The part's own ``eot_samples`` and ``stop_when_fooled`` hold, unless the wrapper's differ from the defaults.
    """

    attack: Attack

    @property
    def threat(self) -> ThreatModel:
        return self.attack.threat

    @property
    def evades(self) -> bool:
        return self.attack.evades

    @property
    def needs_gradients(self) -> bool:
        return self.attack.needs_gradients

    @property
    def randomised(self) -> bool:
        return self.attack.randomised

    @property
    def part(self) -> Attack:
        """The attack with the wrapper's settings, where it has any."""
        draws = self.attack.eot_samples if self.eot_samples == Attack.eot_samples else self.eot_samples
        return replace(self.attack, eot_samples=draws, stop_when_fooled=self.attack.stop_when_fooled and self.stop_when_fooled)

    def victim_of(self, model: Classifier, y: Tensor) -> Victim:
        return self.part.victim_of(model, y)

    def goal_of(self, y: Tensor, targets: Tensor | None, clean: Callable[[], Tensor], generator: torch.Generator) -> Goal:
        return self.part.goal_of(y, targets, clean, generator)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        return self.part.perturb(victim, x, goal, generator)
