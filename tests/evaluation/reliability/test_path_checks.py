"""An attack that stops too early or forgets its best is found out; one that has settled and keeps its best is not."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from toys import Honest, images

from amsdn.attacks import PatchPGD, PGDAttack
from amsdn.attacks.base import Attack, Victim
from amsdn.attacks.losses import CROSS_ENTROPY, Goal
from amsdn.evaluation.reliability.path_checks import Log, Recorder, has_settled, keeps_success, path_findings, transfer_finding
from amsdn.models.amsdn import AMSDN, AMSDNConfig
from amsdn.threats import LinfBall


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def findings(attack: Attack) -> dict[str, bool]:
    model, x = Honest().eval(), images(24)
    return {f.check: f.passed for f in path_findings(model, attack, x, model(x).argmax(1), generator())}


@dataclass(frozen=True)
class Forgetful(Attack):
    """Walks to an adversarial example and back to the clean image."""

    epsilon: float = 0.2

    @property
    def threat(self) -> LinfBall:
        return LinfBall(self.epsilon)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        gradient, _, _ = victim.gradient(x, lambda logits: CROSS_ENTROPY(logits, goal))
        for share in (1.0, 0.5, 0.0):
            victim.logits((x + share * self.epsilon * gradient.sign()).clamp(0, 1))
        return x


def test_a_settled_attack_passes() -> None:
    assert findings(PGDAttack(epsilon=2 / 255, alpha=1 / 255, num_steps=60)) == {"has settled": True, "keeps success": True}


def test_too_few_small_steps_are_found_out() -> None:
    assert findings(PGDAttack(epsilon=8 / 255, alpha=0.02 / 255, num_steps=40, random_start=False))["has settled"] is False


def test_an_attack_that_forgets_its_best_is_found_out() -> None:
    assert findings(Forgetful())["keeps success"] is False


def test_only_standing_images_and_late_calls_count() -> None:
    falling = torch.linspace(5, 1, 40).unsqueeze(1).repeat(1, 3)
    found = has_settled(falling)
    assert not found.passed
    assert found.measured == pytest.approx(10 / 39, rel=1e-4)
    assert has_settled(falling - 3).passed, "they fall below zero: nothing stands"
    early = torch.cat([torch.linspace(5, 1, 20), torch.ones(20)]).unsqueeze(1)
    assert has_settled(early).passed
    assert has_settled(falling[:20]).passed, "too short to tell"


def test_an_attack_that_returns_its_last_image_in_training_is_not_blamed_for_it() -> None:
    assert findings(PatchPGD(3, 20, alpha=0.5))["keeps success"] is True


def test_success_is_per_image() -> None:
    path = torch.tensor([[1.0, 1.0, -1.0], [-1.0, 1.0, 1.0]])
    assert keeps_success(path, torch.tensor([True, False, True])).passed
    assert keeps_success(path, torch.tensor([True, False, False])).measured == pytest.approx(1 / 3)


def test_recording_changes_nothing_and_reaches_the_surrogate() -> None:
    torch.manual_seed(0)
    model = AMSDN.from_config(AMSDNConfig(num_classes=4, variant="compact", width=4, fpn_channels=8)).eval()
    x, log = torch.rand(6, 3, 16, 16), Log(torch.zeros(6, dtype=torch.int64))
    recorder = Recorder(model, log).eval()
    attack = replace(PatchPGD(4, num_steps=5), stop_when_fooled=False)
    y = model(x).argmax(1)
    ours, plain = (attack(m, x, y, generator=generator()) for m in (recorder, model))
    assert torch.equal(ours.x_adv, plain.x_adv)
    assert torch.equal(ours.forwards, plain.forwards)
    assert len(log.margins) >= 5


class Behind(nn.Module):
    """A network that declares another one as its surrogate."""

    def __init__(self, inner: nn.Module, surrogate: nn.Module | None) -> None:
        super().__init__()
        self.inner, self.surrogate = inner, surrogate

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.inner(x)
        return answer

    def differentiable_surrogate(self) -> nn.Module | None:
        return self.surrogate


def test_a_surrogate_must_stand_for_the_model() -> None:
    model, stranger = Honest(0), Honest(1)
    x = images(24)
    y = model(x).argmax(1)
    attack = PGDAttack(epsilon=0.1, alpha=0.02, num_steps=20)
    same, other = (transfer_finding(Behind(model, s).eval(), attack, x, y, generator()) for s in (Honest(0), stranger))
    assert transfer_finding(Behind(model, None).eval(), attack, x, y, generator()) is None
    assert same is not None
    assert other is not None
    assert (same.passed, same.measured) == (True, 1.0)
    assert not other.passed
