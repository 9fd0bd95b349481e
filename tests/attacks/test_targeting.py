"""Targets chosen by the attack: the right class, only that class, and samples that have none."""

import dataclasses

import pytest
import torch
from attack_toys import images, small_net
from torch import Tensor, nn

from amsdn.attacks import FGSM, PGDAttack, Restarts, SparseRS
from amsdn.attacks.targeting import CHOICES, Targeted, least_likely, next_class, random_class, runner_up
from amsdn.errors import InputError
from amsdn.records import config_hash

LOGITS = torch.tensor([[5.0, 1.0, -2.0, 3.0], [5.0, 1.0, -2.0, 3.0], [5.0, 1.0, -2.0, 3.0], [5.0, 1.0, -2.0, 3.0]])
LABELS = torch.arange(4)
PGD = PGDAttack(0.2, 0.02, 20)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_choices_by_hand() -> None:
    assert next_class(LABELS, LOGITS, seeded()).tolist() == [1, 2, 3, 0]
    assert least_likely(LABELS, LOGITS, seeded()).tolist() == [2, 2, 1, 2]
    assert runner_up(LABELS, LOGITS, seeded()).tolist() == [3, 0, 0, 0]


def test_random_targets_are_uniform_over_the_other_classes() -> None:
    y = torch.full((3000,), 1)
    drawn = random_class(y, LOGITS[:1].expand(3000, -1), seeded())
    counts = drawn.bincount(minlength=4).tolist()
    assert counts[1] == 0
    assert all(900 < counts[i] < 1100 for i in (0, 2, 3))
    assert torch.equal(drawn, random_class(y, LOGITS[:1].expand(3000, -1), seeded()))


@pytest.mark.parametrize("towards", [*CHOICES, 2])
def test_success_is_the_target_and_nothing_else(towards: str | int) -> None:
    net, x = small_net(), images(12)
    clean = net(x).detach()
    y = (clean.argmax(1) + (torch.arange(12) % 4 == 0)) % 5  # every fourth label is wrong
    attack = Targeted(PGD, towards)  # type: ignore[arg-type]
    result = attack(net, x, y, generator=seeded(5))
    again = attack(net, x, y, generator=seeded(5))
    targets = torch.full_like(y, towards) if isinstance(towards, int) else CHOICES[towards](y, clean, seeded(5))
    wanted = targets != y
    assert torch.equal(result.prediction, net(result.x_adv).argmax(1))
    assert torch.equal(result.success, (result.prediction == targets) & wanted)
    assert torch.equal(result.x_adv, again.x_adv)
    assert result.success.any()
    assert attack.threat.contains(result.x_adv, x).all()
    if not isinstance(towards, int) and towards != "random":  # the same attack with the targets given by hand
        by_hand = PGD(net, x, y, targets=targets, generator=seeded(5))
        assert torch.equal(by_hand.x_adv, result.x_adv)
        assert torch.equal(by_hand.forwards, result.forwards)  # choosing costs nothing


def test_samples_of_the_target_class_are_left_alone() -> None:
    net, x = small_net(), images(12)
    y = net(x).argmax(1)
    y[0] = (y[0] + 1) % 5
    for target in (int(y[1]), int(y[0])):  # of the second, one sample is misclassified: neither counts
        result = Targeted(PGD, target)(net, x, y)
        own = y == target
        assert own.any()
        assert not result.success[own].any()
        assert torch.equal(result.x_adv[own], x[own])
        assert (result.forwards[own] == 1).all()
        assert (result.forwards[~own] > 1).any()


def test_training_leaves_samples_without_a_target_alone() -> None:
    net, x = small_net(), images(8)
    y = torch.arange(8) % 4
    attack = Targeted(PGDAttack(0.1, 0.02, 3), 1, stop_when_fooled=False)
    x_adv = attack.craft(net, x, y, seeded())
    assert torch.equal(x_adv[y == 1], x[y == 1])
    assert (x_adv[y != 1] != x[y != 1]).flatten(1).any(1).all()
    only = attack.craft(net, x, torch.ones_like(y), seeded())
    assert torch.equal(only, x)
    least = Targeted(FGSM(0.1), "least-likely", stop_when_fooled=False).craft(net, x, y, seeded())
    column = least_likely(y, net(x), seeded()).unsqueeze(1)
    assert (net(least).log_softmax(1).gather(1, column) > net(x).log_softmax(1).gather(1, column)).all()


def test_any_attack_can_be_inside() -> None:
    net, x = small_net(), images(6)
    y = net(x).argmax(1)
    targets = (y + 1) % 5
    for attack in (Restarts(PGDAttack(0.05, 0.01, 5), 2), SparseRS(20, 60)):
        result = Targeted(attack, "next")(net, x, y)
        assert torch.equal(result.success, net(result.x_adv).argmax(1) == targets)


def test_configuration() -> None:
    attacks = [Targeted(PGD, towards) for towards in (*CHOICES, 0, 1)]  # type: ignore[arg-type]
    assert len({config_hash(a) for a in attacks}) == len(set(attacks)) == 6
    assert config_hash(Targeted(PGD)) == config_hash(dataclasses.replace(Targeted(PGD), towards="random"))


def test_mistakes() -> None:
    net, x = small_net(), images(2)
    y: Tensor = net(x).argmax(1)

    def check(model: nn.Module = net, *, attack: Targeted | Restarts, message: str, targets: Tensor | None = None) -> None:
        with pytest.raises(InputError, match=message) as e:
            attack(model, x, y, targets=targets)
        assert "\n" not in str(e.value)

    check(attack=Targeted(PGD, 5), message="class 5 is outside the 5 classes")
    check(attack=Targeted(PGD), message="chooses its own targets", targets=(y + 1) % 5)
    check(attack=Restarts(Targeted(PGD), 2), message=r"write Targeted\(Restarts")
    for towards in ("nearest", -1):
        with pytest.raises(InputError, match="towards must be a class number or one of next, random"):
            Targeted(PGD, towards)  # type: ignore[arg-type]
