"""Defences that only hide their gradients: left standing by the attack that ignores it, at 0 % under the adaptive one.

Every defence sits in front of (or behind) a linear model that a step of ``EPS`` fools on every image, so each percent of
accuracy that is left is the work of a masked gradient.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attack_toys import Linear, images
from torch import Tensor, nn

from amsdn.attacks import DLR, APGDAttack, Attack, CrossEntropy, Margin, PGDAttack, PGDL2Attack, Victim
from amsdn.attacks.adaptive import reproducible

EPS = 0.2
PGD = PGDAttack(EPS, 0.04, 20, random_start=False)


def data(model: nn.Module, count: int = 16) -> tuple[Tensor, Tensor]:
    """Images that the model classifies as its own answer says: it is right on all of them before the attack."""
    x = images(count, 8, low=0.3, high=0.7)
    return x, model(x).detach().argmax(1)


def accuracy(attack: Attack, model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((attack(model, x, y).prediction == y).float().mean())


# --- shattered: the forward rounds, so the gradient is zero or undefined; BPDA goes through a stand-in ---


def quantise(x: Tensor) -> Tensor:
    return (x * 16).round() / 16


def dct_rounding(x: Tensor) -> Tensor:
    """As JPEG does: the coefficients of each 8 x 8 block of a cosine transform, rounded."""
    i = torch.arange(8.0)
    basis = (torch.pi / 8 * (i + 0.5) * i.unsqueeze(1)).cos() * 0.5
    basis[0] /= 2**0.5
    coefficients = basis @ x @ basis.T
    return basis.T @ ((coefficients * 8).round() / 8) @ basis


def binarise(x: Tensor) -> Tensor:
    return (x > 0.5).float()


def not_a_number(x: Tensor) -> Tensor:
    """Adds zero, whose derivative is infinity times zero."""
    return x + (x - x.detach()).square().sqrt()


def stop(x: Tensor) -> Tensor:
    return x.detach()


def as_it_is(x: Tensor) -> Tensor:
    return x


def soft_binarise(x: Tensor) -> Tensor:
    return (10 * (x - 0.5)).sigmoid()


class Behind(nn.Module):
    """A linear model behind a transformation, which may declare what to differentiate instead."""

    def __init__(self, transform: Callable[[Tensor], Tensor], stand_in: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.net, self.transform, self.stand_in = Linear(bias=0.0), transform, stand_in
        self.net.w.data -= self.net.w.data.mean()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.transform(x))

    def differentiable_surrogate(self) -> nn.Module | None:
        return None if self.stand_in is None else Behind(self.stand_in, None)


@pytest.mark.parametrize(
    ("transform", "stand_in"),
    [
        (quantise, as_it_is),
        (dct_rounding, as_it_is),
        (binarise, soft_binarise),
        (not_a_number, as_it_is),
        (stop, as_it_is),
    ],
)
@pytest.mark.parametrize(
    "attack", [PGD, PGDL2Attack(EPS * 192**0.5, 0.5, 20, random_start=False), APGDAttack(EPS, 20)], ids=lambda a: type(a).__name__
)
def test_bpda_breaks_shattered_gradients(
    transform: Callable[[Tensor], Tensor], stand_in: Callable[[Tensor], Tensor], attack: Attack
) -> None:
    hidden, declared = Behind(transform, None), Behind(transform, stand_in)
    x, y = data(hidden)
    assert accuracy(attack, hidden, x, y) >= 0.8  # what is lost here falls to a random start, not to a gradient
    assert accuracy(attack, declared, x, y) == 0.0


# --- saturated: the gradient underflows; a loss that is free of the scale sees it ---


class Scaled(nn.Module):
    def __init__(self, scale: float, outputs: int = 3) -> None:
        super().__init__()
        self.net, self.scale, self.outputs = Linear(bias=0.0), scale, outputs
        self.net.w.data -= self.net.w.data.mean()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return self.scale * torch.cat([logits, logits[:, :1] - 100], 1)


@pytest.mark.parametrize("scale", [1e-20, 1e-4, 1e4, 1e20])
def test_a_loss_free_of_scale_breaks_saturated_logits(scale: float) -> None:
    model = Scaled(scale)
    x, y = data(model)
    for loss in (Margin(), DLR()):
        assert accuracy(PGDAttack(EPS, 0.04, 20, random_start=False, loss=loss), model, x, y) == 0.0
    kept = accuracy(PGDAttack(EPS, 0.04, 20, random_start=False, loss=CrossEntropy()), model, x, y)
    assert kept >= 0.8 if scale > 1 else kept == 0.0  # the cross-entropy of a margin beyond 100 has no gradient in float32


class Probabilities(Scaled):
    """Answers with rounded probabilities, whose gradient is exactly zero; its stand-in answers with logits."""

    def __init__(self, declared: bool) -> None:
        super().__init__(1e3)
        self.declared = declared

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)

    def differentiable_surrogate(self) -> nn.Module | None:
        return Scaled(1.0) if self.declared else None


def test_bpda_breaks_saturated_probabilities() -> None:
    x, y = data(Probabilities(False))
    for loss in (CrossEntropy(), Margin()):
        attack = PGDAttack(EPS, 0.04, 20, random_start=False, loss=loss)
        assert accuracy(attack, Probabilities(False), x, y) >= 0.8
        assert accuracy(attack, Probabilities(True), x, y) == 0.0


# --- random: one draw's gradient is another model's; EOT sees the expectation ---


class RandomResize(nn.Module):
    """Shrinks the image by up to a half and puts it at a random place on grey, anew for each call (Xie et al., ICLR 2018)."""

    def __init__(self, declared: bool) -> None:
        super().__init__()
        self.net, self.stochastic = Linear(size=16, bias=0.0), declared
        self.net.w.data = self.net.w.data[:, ::2, ::2].sign().repeat_interleave(2, 1).repeat_interleave(2, 2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        side = int(torch.randint(8, 17, ()))
        top, left = (int(torch.randint(0, 17 - side, ())) for _ in range(2))
        small = F.interpolate(x - 0.5, size=(side, side), mode="nearest")
        return self.net(0.5 + F.pad(small, (left, 16 - side - left, top, 16 - side - top)))


def test_eot_breaks_random_resizing() -> None:
    model, hidden = RandomResize(declared=True), RandomResize(declared=False)
    x = images(12, 16, low=0.3, high=0.7)

    def judged(x: Tensor) -> Tensor:
        """What most calls answer, by the same draws for all."""
        with reproducible(x, torch.Generator().manual_seed(2)):
            return Victim.of(model, 12, x.device).vote(x).argmax(1)

    y = judged(x)

    def left(draws: int, attacked: nn.Module) -> float:
        attack = PGDAttack(0.4, 0.04, 20, random_start=False, eot_samples=draws)
        with reproducible(x, torch.Generator().manual_seed(0)):  # the attack cannot seed what it is not told of
            x_adv = attack(attacked, x, y).x_adv
        return float((judged(x_adv) == y).float().mean())

    assert left(1, hidden) >= 0.8  # it does not say that it is random, so each step is another model's
    assert left(48, model) == 0.0
