"""FGSM with noise, PGD with momentum and PGD in the L1 ball: each step against its formula, the whole against known optima."""

from typing import Any

import pytest
import torch
from attack_toys import Linear, images, small_net
from ball_optima import best_gain
from torch import nn

from amsdn.attacks import FGSM, MIFGSM, NFGSM, CrossEntropy, Goal, Margin, PGDAttack, PGDL1Attack
from amsdn.attacks.base import Victim
from amsdn.errors import InputError
from amsdn.threats import L1Ball, LinfBall

AWAY = torch.zeros(6, dtype=torch.int64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class InDouble(nn.Module):
    """Float64 within, so that an image has the same gradient in any batch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.double().eval()
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.double()).float()


def gradient_at(net: nn.Module, point: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return Victim.of(net, len(point), point.device).gradient(point, lambda logits: CrossEntropy()(logits, Goal(y)))[0]


@pytest.mark.parametrize("projected", [True, False])
def test_n_fgsm_is_one_step_from_strong_noise(projected: bool) -> None:
    net, x = small_net(), images()
    attack = NFGSM(0.05, k=2.0, step=1.25, projected=projected)
    assert attack.threat == LinfBall(0.05 if projected else 3.25 * 0.05)
    noise = 2 * torch.rand(x.shape, generator=seeded(3)) - 1
    noisy = (x + 2.0 * 0.05 * noise).clamp(0, 1)
    expected = attack.threat.project(noisy + 1.25 * 0.05 * gradient_at(net, noisy, AWAY).sign(), x)
    found = attack.craft(net, x, AWAY, seeded(3))
    torch.testing.assert_close(found, expected)
    far = (found - x).abs().flatten(1).amax(1)
    assert (far > 0.05 + 1e-3).all() != projected
    assert (far > 0.12).all() != projected


def test_n_fgsm_without_noise_is_fgsm_and_budgets_may_be_per_image() -> None:
    net, x = small_net(), images()
    torch.testing.assert_close(NFGSM(0.05, k=0.0).craft(net, x, AWAY, seeded()), FGSM(0.05).craft(net, x, AWAY, seeded()))
    budgets = torch.tensor([0.01, 0.02, 0.03, 0.04, 0.05, 0.06])
    for projected, reach in ((True, 1), (False, 3)):
        attack: Any = NFGSM(budgets, projected=projected)  # type: ignore[arg-type]
        far = (attack.craft(net, x, AWAY, seeded(3)) - x).abs().flatten(1).amax(1)
        torch.testing.assert_close(far, reach * budgets, atol=0, rtol=0.03)


def test_mi_fgsm_accumulates_normalised_gradients() -> None:
    net, x = small_net(), images()
    point, momentum = x, torch.zeros_like(x)
    for _ in range(6):
        gradient = gradient_at(net, point, AWAY)
        momentum = 0.7 * momentum + gradient / gradient.abs().sum((1, 2, 3), keepdim=True)
        point = (x + (point + 0.01 * momentum.sign() - x).clamp(-0.04, 0.04)).clamp(0, 1)
    attack = MIFGSM(0.04, 0.01, 6, decay=0.7, stop_when_fooled=False)
    torch.testing.assert_close(attack.craft(net, x, AWAY, seeded()), point)
    plain = PGDAttack(0.04, 0.01, 6, random_start=False, stop_when_fooled=False).craft(net, x, AWAY, seeded())
    none = MIFGSM(0.04, 0.01, 6, decay=0.0, stop_when_fooled=False).craft(net, x, AWAY, seeded())
    torch.testing.assert_close(none, plain)
    assert not torch.allclose(point, plain)


def test_mi_fgsm_keeps_each_samples_own_momentum_when_others_leave() -> None:
    net, x = InDouble(small_net()), images(24)
    y = net(x).argmax(1)
    attack = MIFGSM(0.01, 0.004, 8)
    together = attack(net, x, y)
    assert 0 < together.success.sum() < len(x)
    for i in range(len(x)):
        alone = attack(net, x[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(together.x_adv[i : i + 1], alone.x_adv)


@pytest.mark.parametrize("budget", [4.0, torch.tensor([2.0, 4, 8, 3, 5, 6])])
@pytest.mark.parametrize("loss", [CrossEntropy(), Margin()])
def test_l1_pgd_near_the_optimum_of_a_linear_model(budget: Any, loss: Any) -> None:
    model, x = Linear(bias=80.0), images(6, 8)
    attack = PGDL1Attack(budget, 1.5, 60, density=0.1, loss=loss)
    result = attack(model, x, AWAY)
    reached = (model(x)[:, 0] - model(result.x_adv)[:, 0]).detach() / best_gain(attack.threat, -model.w.detach(), x)
    assert (reached <= 1 + 1e-5).all()
    assert reached.mean() > 0.98, reached


def test_a_step_of_l1_pgd_is_sparse_and_of_the_given_length() -> None:
    net, x = small_net(), images(low=0.4, high=0.6)
    attack = PGDL1Attack(5.0, 0.5, 1, random_start=False, density=0.02, stop_when_fooled=False)
    change = attack.craft(net, x, AWAY, seeded()) - x
    assert ((change != 0).flatten(1).sum(1) == round(0.02 * 3 * 16 * 16)).all()
    torch.testing.assert_close(change.abs().flatten(1).sum(1), torch.full((6,), 0.5), atol=1e-5, rtol=0)
    gradient = gradient_at(net, x, AWAY)
    assert (gradient * change >= 0).all()
    assert gradient[0].abs()[change[0] != 0].min() > gradient[0].abs()[change[0] == 0].max()


def test_the_l1_balls_own_steepest_step_moves_one_value() -> None:
    g = torch.tensor([1.0, -3.0, 2.0]).reshape(1, 3, 1, 1)
    assert L1Ball(1.0).steepest(g).flatten().tolist() == [0.0, -1.0, 0.0]
    assert not L1Ball(1.0).steepest(torch.zeros_like(g)).any()


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (NFGSM, {"k": -1.0}),
        (NFGSM, {"step": 0.0}),
        (MIFGSM, {"decay": -0.1}),
        (PGDL1Attack, {"density": 0.0}),
        (PGDL1Attack, {"density": 1.1}),
    ],
)
def test_unusable_settings_are_refused(kind: Any, wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        kind(**wrong)
