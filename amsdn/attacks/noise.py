"""Random noise: what an attack must beat to be called one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from amsdn.attacks.base import Attack, Victim, require
from amsdn.attacks.losses import MARGIN, Goal
from amsdn.threats import LinfBall, ThreatModel


@dataclass(frozen=True)
class RandomNoise(Attack):
    """The best, by margin, of ``tries`` random members of the threat model ``within``."""

    within: ThreatModel = LinfBall(8 / 255)
    tries: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tries >= 1, self, "tries must be at least 1", self.tries)

    @property
    def threat(self) -> ThreatModel:
        return self.within

    @property
    def needs_gradients(self) -> bool:
        return False

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        active = self.active(victim, x, goal)
        active.poll_every = 1  # tries are few: each on images that are fooled already costs more than a look
        for _ in range(self.tries):
            x_adv = active.threat.sample(active.x, generator)
            active.record(x_adv, *active.query(x_adv, MARGIN))
            if not len(active):
                break
        return active.result()
