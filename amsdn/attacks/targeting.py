"""Targeted attacks that choose their own targets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from amsdn.attacks.base import Victim, require
from amsdn.attacks.losses import Goal
from amsdn.attacks.wrapper import Wrapper
from amsdn.errors import InputError

Choice = Literal["next", "random", "least-likely", "runner-up"]


def next_class(y: Tensor, logits: Tensor, generator: torch.Generator) -> Tensor:
    """The class after the label, the first after the last."""
    return (y + 1) % logits.shape[1]


def random_class(y: Tensor, logits: Tensor, generator: torch.Generator) -> Tensor:
    """Any class but the label, all alike."""
    return (y + torch.randint(1, logits.shape[1], y.shape, generator=generator, device=y.device)) % logits.shape[1]


def least_likely(y: Tensor, logits: Tensor, generator: torch.Generator) -> Tensor:
    """The class of the smallest logit on the clean image, the label aside (Kurakin et al., ICLR-W 2017)."""
    return logits.scatter(1, y.unsqueeze(1), torch.inf).argmin(1)


def runner_up(y: Tensor, logits: Tensor, generator: torch.Generator) -> Tensor:
    """The class of the largest logit on the clean image, the label aside: the nearest by the model's own account."""
    return logits.scatter(1, y.unsqueeze(1), -torch.inf).argmax(1)


CHOICES: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "next": next_class,
    "random": random_class,
    "least-likely": least_likely,
    "runner-up": runner_up,
}


@dataclass(frozen=True)
class Targeted(Wrapper):
    """``attack``, towards a class chosen for each sample; success means that exactly this class is predicted.

    ``towards`` names the choice: the ``next`` class, a ``random`` one, the ``least-likely`` or the ``runner-up`` on the clean
    image, or one class by its number for all samples. A sample whose label is that one class is not attacked: its
    image stays as it is and it is no success. Choosing costs no query beside the one on the clean image.
    """

    towards: Choice | int = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.towards >= 0 if isinstance(self.towards, int) else self.towards in CHOICES
        require(known, self, f"towards must be a class number or one of {', '.join(CHOICES)}", self.towards)

    def goal_of(self, y: Tensor, targets: Tensor | None, clean: Callable[[], Tensor], generator: torch.Generator) -> Goal:
        if targets is not None:
            raise InputError("Targeted: chooses its own targets; drop targets=, or run the attack inside it with them")
        logits = clean()
        if not isinstance(self.towards, int):
            return Goal(CHOICES[self.towards](y, logits, generator), targeted=True)
        if self.towards >= logits.shape[1]:
            raise InputError(f"Targeted: class {self.towards} is outside the {logits.shape[1]} classes; choose a smaller number")
        return Goal(torch.full_like(y, self.towards).masked_fill(y == self.towards, -1), targeted=True)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        if not goal.targeted:
            raise InputError("Targeted: must stand outside of other attacks; write Targeted(Restarts(...)), not Restarts(Targeted(...))")
        return super().perturb(victim, x, goal, generator)
