"""The base class's guarantees, the victim's accounting and the active set, one by one."""

import re
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from attack_toys import Gate, Linear, gate_images, images, small_net
from torch import Tensor, nn

from amsdn.attacks import ActiveSet, Attack, Goal, Margin, PGDAttack, SparsePGD, SparseRS, Victim, base
from amsdn.errors import ThreatViolation
from amsdn.threats import LinfBall, ThreatModel


@dataclass(frozen=True)
class Shift(Attack):
    """Adds ``by`` to sample 1, inside the ball or not."""

    by: float = 0.1

    @property
    def threat(self) -> ThreatModel:
        return LinfBall(0.1)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        return x + self.by * (torch.arange(len(x)) == 1).reshape(-1, 1, 1, 1)


def test_a_violation_is_raised_not_clipped() -> None:
    net, x = Linear(), images(3, 8, low=0.2, high=0.6)
    y = torch.zeros(3, dtype=torch.int64)
    assert Shift(0.1)(net, x, y).spent[1] == pytest.approx(0.1)
    with pytest.raises(ThreatViolation, match=r"sample 1 of the batch is outside linf 0\.1: it spends 0\.2"):
        Shift(0.2)(net, x, y)
    with pytest.raises(ThreatViolation, match=r"pixels in \[nan, nan\]"):
        Shift(float("nan")).craft(net, x, y, torch.Generator())


def test_a_violation_names_the_sample_of_the_whole_batch() -> None:
    net, x = Linear(), images(4, 8, low=0.2, high=0.6)
    y = torch.tensor([1, 1, 0, 0])  # samples 0 and 1 are wrong already; perturb's sample 1 is the batch's sample 3
    with pytest.raises(ThreatViolation, match="sample 3 of the batch"):
        Shift(0.2)(net, x, y)


def test_weights_want_gradients_again_even_after_an_error() -> None:
    class Broken(Linear):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                assert not self.w.requires_grad
                raise RuntimeError("no memory")
            return super().forward(x)

    net = Broken()
    with pytest.raises(RuntimeError, match="no memory"):
        PGDAttack()(net, images(2, 8), torch.zeros(2, dtype=torch.int64))
    assert net.w.requires_grad
    net.w.requires_grad_(False)
    PGDAttack()(Linear(), images(2, 8), torch.zeros(2, dtype=torch.int64))
    assert not net.w.requires_grad


def test_victim_gradient_is_exact_and_counts_per_sample() -> None:
    net, x = Linear(), images(4, 8)
    victim = Victim.of(net, 4, x.device)
    part = victim.select(torch.tensor([1, 3])).select(torch.tensor([True, False]))  # sample 1
    gradient, loss, logits = part.gradient(x[1:2], lambda z: z[:, 0] * 2)
    torch.testing.assert_close(gradient[0], 2 * net.w.detach())
    torch.testing.assert_close(loss, 2 * logits[:, 0])
    assert not any(t.requires_grad for t in (gradient, loss, logits))
    victim.logits(x)
    assert victim.forwards.tolist() == [1, 2, 1, 1]
    assert victim.backwards.tolist() == [0, 1, 0, 0]


def test_a_model_without_gradients_gives_zeros_and_nan_becomes_zero() -> None:
    class Answer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.eye(2)[(x.flatten(1).mean(1) > 0.5).long()]

    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x[:, :2, 0, 0] - 0.25).square().sqrt()  # infinity times zero: a NaN slope at 0.25

    for net in (Answer().eval(), Root().eval()):
        x = torch.full((2, 3, 8, 8), 0.25)
        gradient, _, _ = Victim.of(net, 2, x.device).gradient(x, lambda z: z.sum(1))
        assert torch.equal(gradient, torch.zeros_like(x))


def test_active_set_keeps_the_first_success_and_the_best_failure() -> None:
    x = torch.zeros(3, 3, 2, 2)
    victim = Victim.of(cast(Any, None), 3, x.device)
    active = ActiveSet(victim, x, Goal(torch.tensor([0, 0, 0])), LinfBall(torch.tensor([0.1, 0.2, 0.3])))
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    assert active.record(x + 0.1, torch.tensor([3.0, 2.0, 1.0]), torch.tensor([right, right, right])) is None
    stay = active.record(x + 0.2, torch.tensor([1.0, 1.0, 2.0]), torch.tensor([right, wrong, right]))
    assert stay is not None
    assert stay.tolist() == [0, 2]
    assert len(active) == 2
    assert active.victim.rows.tolist() == [0, 2]
    assert cast(Tensor, active.threat.budget).tolist() == pytest.approx([0.1, 0.3])
    active.record(x[:2] + 0.3, torch.tensor([4.0, torch.nan]), torch.tensor([right, right]))
    assert active.result()[:, 0, 0, 0].tolist() == pytest.approx([0.3, 0.2, 0.2])


def test_a_finished_sample_that_has_not_left_yet_keeps_its_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_poll_every", lambda device: 3)  # as on an accelerator
    x = torch.zeros(2, 3, 2, 2)
    active = ActiveSet(Victim.of(cast(Any, None), 2, x.device), x, Goal(torch.tensor([0, 0])), LinfBall(1))
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    assert active.record(x + 0.1, torch.tensor([1.0, 1.0]), torch.tensor([wrong, right])) is None
    assert active.record(x + 0.2, torch.tensor([9.0, 9.0]), torch.tensor([right, right])) is None
    stay = active.record(x + 0.3, torch.tensor([9.0, 8.0]), torch.tensor([wrong, right]))
    assert stay is not None
    assert stay.tolist() == [1]
    assert active.result()[:, 0, 0, 0].tolist() == pytest.approx([0.1, 0.2])


def test_active_set_for_training_keeps_everyone() -> None:
    x = torch.zeros(2, 3, 2, 2)
    active = ActiveSet(Victim.of(cast(Any, None), 2, x.device), x, Goal(torch.tensor([0, 0])), LinfBall(1), drop=False)
    wrong = torch.tensor([[0.0, 1.0]] * 2)
    assert active.record(x + 0.1, torch.tensor([1.0, 2.0]), wrong) is None
    assert active.record(x + 0.2, torch.tensor([2.0, 1.0]), wrong) is None
    assert active.result()[:, 0, 0, 0].tolist() == pytest.approx([0.2, 0.1])
    assert torch.equal(active.conclude(x + 0.3, Margin()), x + 0.3)


def test_one_budget_per_image() -> None:
    net, x = Linear(), images(4, 8, low=0.4, high=0.6)
    y = torch.tensor([1, 0, 0, 0])
    eps = torch.tensor([0.3, 0.01, 0.05, 0.1])
    result = PGDAttack(cast(float, eps), alpha=0.05, num_steps=8)(net, x, y)
    torch.testing.assert_close(result.spent, eps * torch.tensor([0.0, 1, 1, 1]), atol=1e-5, rtol=0)
    k = torch.tensor([9, 1, 5, 8])
    result = SparsePGD(cast(int, k), num_steps=8)(net, x, y)
    assert result.spent.tolist() == [0, 1, 5, 8]
    gate, x = Gate(), gate_images()  # samples leave on the way, and budgets with them
    eps = torch.linspace(0.01, 0.1, 12)
    result = PGDAttack(cast(float, eps), alpha=0.02, num_steps=5)(gate, x, gate(x).argmax(1))
    assert result.success.any()
    assert (result.spent <= eps + 1e-5).all()
    torch.testing.assert_close(result.spent[8:], eps[8:], atol=1e-5, rtol=0)


def test_without_a_generator_seed_zero_and_strangers_are_asked_for_a_child() -> None:
    net, x = small_net(), images()
    y = net(x).argmax(1)
    default = PGDAttack(num_steps=2)(net, x, y)
    seeded = PGDAttack(num_steps=2)(net, x, y, generator=torch.Generator().manual_seed(0))
    assert torch.equal(default.x_adv, seeded.x_adv)


def test_half_precision_images_are_attacked_in_float32() -> None:
    net, x = small_net(), images().half()
    result = PGDAttack(num_steps=2)(net, x, net(x.float()).argmax(1))
    assert result.x_adv.dtype == torch.float32
    assert re.fullmatch("linf 8/255", PGDAttack().threat.describe())


class Overflowing(nn.Module):
    """Prefers one class, and answers NaN for an image with a white value."""

    def __init__(self, favourite: int) -> None:
        super().__init__()
        self.favourite = favourite
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.nn.functional.one_hot(torch.full((len(x),), self.favourite), 3).float() + 0 * x.flatten(1)[:, :3]
        return torch.where((x >= 0.999).flatten(1).any(1, keepdim=True), torch.nan, logits)


@pytest.mark.parametrize("label", [0, 1])
def test_no_answer_is_a_wrong_answer_whatever_the_label(label: int) -> None:
    model, x, y = Overflowing(label), images(4, 8, high=0.9), torch.full((4,), label)
    result = SparseRS(6, 20)(model, x, y)
    assert result.success.all()
    assert (result.prediction == -1).all()
    assert (result.margin < 0).all()
    targeted = SparseRS(6, 20)(model, x, y, targets=torch.full((4,), 2))
    assert not targeted.success.any()
