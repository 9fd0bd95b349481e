"""SmoothAdv: the objective by hand, the exact optimum on a linear model, the same noise in attack and training, the warm-up."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.models.amsdn import AMSDN
from amsdn.training.smooth_adversary import MeanOverNoise, SmoothAdversary
from amsdn.training.view_kinds import GaussianViews
from amsdn.training.views import CertifiableViews


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Linear(nn.Module):
    """Logits of ``classes``, linear in the pixels; remembers what it was shown."""

    def __init__(self, classes: int = 3, side: int = 6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, 3 * side * side, generator=seeded(5)) / 3)
        self.shown: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shown.append(x.detach())
        return x.flatten(1) @ self.weight.T


def middle(count: int, side: int = 6) -> tuple[Tensor, Tensor]:
    """Images far from the walls of the box."""
    return 0.4 + 0.2 * torch.rand(count, 3, side, side, generator=seeded(1)), torch.arange(count) % 3


def mean_probability_loss(model: nn.Module, x: Tensor, noise: Tensor, y: Tensor) -> Tensor:
    """-log of the mean probability of y over the noisy copies, each of its own, [B]."""
    probabilities = torch.stack([model(x + n).softmax(1) for n in noise]).mean(0)
    return -probabilities.gather(1, y.unsqueeze(1)).squeeze(1).log()


def test_the_smoothed_answer_is_the_log_of_the_mean_probability_under_each_images_own_noise() -> None:
    model, (x, y) = Linear(), middle(5)
    noise = torch.randn(4, 5, 3, 6, 6, generator=seeded(2))
    found = F.cross_entropy(MeanOverNoise(model, noise)(x), y, reduction="none")
    torch.testing.assert_close(found, mean_probability_loss(model, x, noise, y))


@pytest.mark.parametrize("copies", [1, 4])
def test_on_two_classes_of_a_linear_model_the_optimum_is_found_and_lies_on_the_sphere(copies: int) -> None:
    """Every copy's gradient points along w_other - w_y, so the best image is x plus epsilon in that direction, whatever the noise."""
    model = Linear(classes=2)
    x, y = middle(6)
    y = y % 2
    noise = 0.12 * torch.randn(copies * 6, 3, 6, 6, generator=seeded(2))
    found = SmoothAdversary(0.3, num_steps=4, warmup=0)(model.eval(), x, y, noise, seeded())
    away = (model.weight.detach()[1 - y] - model.weight.detach()[y]).reshape(x.shape)
    expected = x + 0.3 * away / away.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_adversary_raises_the_loss_of_its_own_noise_more_than_that_of_other_noise() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(32, 3)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # curved enough for noise to matter
    x, y = middle(60)
    own, other = (torch.randn(4, 60, 3, 6, 6, generator=seeded(s)) * 0.25 for s in (2, 3))
    x_adv = SmoothAdversary(0.25, num_steps=10, warmup=0)(model, x, y, own.flatten(0, 1), seeded())
    assert float((x_adv - x).flatten(1).norm(dim=1).max()) <= 0.25 + 1e-6
    with torch.no_grad():
        rise = [float((mean_probability_loss(model, x_adv, n, y) - mean_probability_loss(model, x, n, y)).mean()) for n in (own, other)]
    assert rise[0] > 1.2 * rise[1] > 0


def test_training_sees_the_attacked_image_under_the_very_noise_of_the_attack() -> None:
    model, (x, y) = Linear(), middle(7)
    adversary = SmoothAdversary(0.2, num_steps=3, warmup=0)
    views = GaussianViews((0.12, 0.3), copies=4, adversary=adversary)(model, x, y, seeded(9))
    first = model.shown[0]
    noise = first - x.repeat(4, 1, 1, 1)  # the first pass of the attack is at the image itself
    moved = views - noise
    assert float((moved - moved[:7].repeat(4, 1, 1, 1)).abs().max()) < 1e-5, "one image, four noises"
    torch.testing.assert_close(moved[:7], adversary(model, x, y, noise, seeded()), atol=1e-5, rtol=0)
    plain = GaussianViews((0.12, 0.3), copies=4)(model, x, y, seeded(9))
    torch.testing.assert_close(plain, first)
    assert len(model.shown) == 3 + 3  # a forward a step, here and above; none without an adversary


def test_epsilon_grows_linearly_over_the_warm_up() -> None:
    adversary = SmoothAdversary(0.4, warmup=0.2)
    assert [adversary.at(p).epsilon for p in (0.0, 0.05, 0.1, 0.2, 0.9)] == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])
    assert SmoothAdversary(0.4, warmup=0).at(0).epsilon == 0.4
    views = CertifiableViews(noised=0.5, copies=4, smooth_adversary=adversary)
    (noised, *_) = views.at(0.1).kinds()
    (found,) = noised.views
    assert isinstance(found, GaussianViews)
    assert (found.copies, found.adversary.epsilon) == (4, pytest.approx(0.2))


def test_at_no_strength_the_model_is_not_asked() -> None:
    model, (x, y) = Linear(), middle(3)
    assert SmoothAdversary(0.4).at(0.0)(model, x, y, torch.zeros_like(x), seeded()) is x
    assert not model.shown


def test_gradients_pass_through_the_gates_of_the_purifier_and_the_model_is_left_as_it_was(tiny_model: AMSDN) -> None:
    x, y = torch.rand(4, 3, 16, 16, generator=seeded()), torch.arange(4) % 2
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    noise = torch.zeros(2, 4, 3, 16, 16)
    surrogate = MeanOverNoise(tiny_model.eval(), noise).differentiable_surrogate()
    assert surrogate is not None
    assert surrogate.matches_forward, "else the attack would pay two passes a step"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = GaussianViews((0.1,), copies=2, adversary=SmoothAdversary(0.2, 2, warmup=0))(tiny_model.train(), x, y, seeded())
    assert views.dtype == torch.float32
    assert tiny_model.training
    assert all(torch.equal(v, before[k]) for k, v in tiny_model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in tiny_model.parameters())


@pytest.mark.parametrize("wrong", [{"epsilon": -1}, {"epsilon": 0.1, "num_steps": 0}, {"warmup": 1.5}, {"epsilon": float("nan")}])
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="views: the smooth adversary"):
        SmoothAdversary(**wrong)
