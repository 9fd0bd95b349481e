"""The binarization test believes an attack that finds what exists, and no other."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from toys import Honest, Quantised, Shattered, images

from amsdn.attacks import PatchPGD, PGDAttack
from amsdn.attacks.base import Attack, Victim
from amsdn.attacks.losses import Goal
from amsdn.evaluation.reliability.binarization import Binarization, binarization_test, binarized
from amsdn.threats import LinfBall

SETTINGS = Binarization(inner=99, tries=20)
PGD = PGDAttack(epsilon=16 / 255, alpha=4 / 255, num_steps=20)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Idle(Attack):
    """Returns the image as it is."""

    @property
    def threat(self) -> LinfBall:
        return LinfBall(16 / 255)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        return x


@pytest.mark.parametrize("seed", range(5))
def test_the_task_holds_what_it_promises(seed: int) -> None:
    model, x = Honest(seed).eval(), images(1, seed)
    task = binarized(model, x, PGD.threat, SETTINGS, generator(seed))
    assert task is not None
    assert task(x).argmax(1).item() == 0
    inside = x + 0.5 * (PGD.threat.sample(x.expand(200, -1, -1, -1), generator(seed + 1)) - x)
    assert (task(inside).argmax(1) == 0).float().mean() > 0.95  # other inner points than those it was made of


@pytest.mark.parametrize("attack", [PGD, PatchPGD(4, 30, alpha=0.2)], ids=["pgd", "patch"])
def test_an_attack_on_an_honest_network_is_believed(attack: Attack) -> None:
    found = binarization_test(Honest().eval(), images(15), attack, generator(), SETTINGS)
    assert found.passed
    assert found.measured >= 0.95


def test_an_attack_that_does_nothing_is_not() -> None:
    found = binarization_test(Honest().eval(), images(15), Idle(), generator(), SETTINGS)
    assert not found.passed
    assert found.measured == 0


@pytest.mark.parametrize("flaw", [Shattered, Quantised])
def test_an_attack_is_not_believed_where_it_cannot_work(flaw: type) -> None:
    found = binarization_test(flaw(Honest()).eval(), images(15), PGD, generator(), SETTINGS)
    assert not found.passed
