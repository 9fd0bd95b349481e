"""Which attack a batch meets: all equally often, or those under which the model fails more often.

The choice is made on the host, by the step's own generator, and must not wait for the device. So the running errors live where
the losses are computed, and draws use a copy of them that is fetched every ``refresh`` steps. Both belong to the state: a run that
was cut short and resumed draws what the undisturbed run draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amsdn.attacks import Attack
from amsdn.errors import InputError
from amsdn.training.attack_ranges import AttackRange, TrainingAttack

FIRST_ERROR = 0.5  # of an attack that no batch has met yet


@dataclass(frozen=True)
class UniformMix:
    """Every attack equally often. The running errors are kept all the same."""

    momentum: float = 0.95  # of the running errors, a step in which the attack was met
    refresh: int = 10  # steps between two looks at the running errors; each waits for the device once

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1 or self.refresh < 1:
            raise InputError(f"mix: momentum must lie in [0, 1) and refresh be at least 1, got {self.momentum} and {self.refresh}")

    def weights(self, errors: Sequence[float]) -> list[float]:
        """How often each attack is to be met, by the running error under each; in any unit."""
        return [1.0 for _ in errors]


@dataclass(frozen=True)
class ErrorProportional(UniformMix):
    """In proportion to the running errors, so that effort goes where the model fails; after E-AT and its kin.

    Madaan, Shin & Hwang (ICML 2021) draw one attack a batch, uniformly; Croce & Hein (ICML 2022, E-AT) draw between the two
    extreme norms in proportion to the running robust errors. Ours takes any attacks, and no weight falls below ``floor``, so
    that none is forgotten.
    """

    floor: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.floor <= 1:
            raise InputError(f"mix: floor must lie in (0, 1], got {self.floor}; an attack with no weight would never come back")

    def weights(self, errors: Sequence[float]) -> list[float]:
        return [max(error, self.floor) for error in errors]


class AttackSampler:
    """Draws an attack for every batch and remembers the running error under each."""

    def __init__(self, attacks: Sequence[TrainingAttack], mix: UniformMix) -> None:
        self.attacks, self.mix, self.steps = tuple(attacks), mix, 0
        self.errors = torch.full((len(self.attacks),), FIRST_ERROR)  # float32 [A], moves to the device with the first memory
        self.fetched = self.errors.tolist()

    def draw(self, host: torch.Generator) -> tuple[int, Attack]:
        """The number of one attack and the attack itself, its size or budget drawn where it has a range."""
        chosen = draw(self.mix.weights(self.fetched), host)
        return chosen, attack_of(self.attacks[chosen], host)

    def memory(self, chosen: int, error: Tensor) -> dict[str, Tensor]:
        """What a part that met attack number ``chosen`` with this share of errors [] gives to remember."""
        errors, met = error.new_zeros(2, len(self.attacks))
        errors[chosen], met[chosen] = error.detach(), 1.0
        return {"attack_errors": errors, "attacks_met": met}

    def remember(self, memories: Sequence[dict[str, Tensor]]) -> None:
        """One step of the running errors, by the mean error of the parts that met each attack. Memories without attacks change nothing."""
        found = [m for m in memories if "attacks_met" in m]
        if not found:
            return
        met = torch.stack([m["attacks_met"] for m in found]).sum(0)
        mean = torch.stack([m["attack_errors"] for m in found]).sum(0) / met.clamp_min(1)
        self.errors = self.errors.to(mean)
        self.errors = torch.where(met > 0, self.mix.momentum * self.errors + (1 - self.mix.momentum) * mean, self.errors)
        self.steps += 1
        if self.steps % self.mix.refresh == 0:
            self.fetched = self.errors.tolist()

    def state(self) -> dict[str, Any]:
        """The running errors, the copy that draws use, and how far the next look at them is."""
        return {"errors": self.errors, "fetched": list(self.fetched), "steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` returned."""
        self.errors, self.fetched, self.steps = state["errors"], list(state["fetched"]), state["steps"]


def attack_of(entry: TrainingAttack, host: torch.Generator) -> Attack:
    """The attack itself, or one drawn from a range of them."""
    return entry.draw(host) if isinstance(entry, AttackRange) else entry


def draw(weights: Sequence[float], host: torch.Generator) -> int:
    """One index, in proportion to the weights, by a generator on the CPU."""
    return int(torch.multinomial(torch.tensor(weights, dtype=torch.float64), 1, generator=host))
