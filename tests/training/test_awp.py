"""Adversarial weight perturbation: the step has the paper's length and direction, and everything is put back, bit for bit."""

import pytest
import torch
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.training.awp import WeightPerturbation

GAMMA = 0.05


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(4 * 16, 3)).train()


def batch() -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    return torch.rand(8, 3, 6, 6, generator=gen), torch.arange(8) % 3


def loss_of(model: nn.Module) -> Tensor:
    x, y = batch()
    return nn.functional.cross_entropy(model(x).float(), y)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_each_layer_moves_by_gamma_of_its_norm_along_its_gradient() -> None:
    model = network()
    before = values(model)
    reference = network()
    loss_of(reference).backward()
    gradients = {k: p.grad for k, p in reference.named_parameters() if p.grad is not None}
    restore = WeightPerturbation(GAMMA).ascend(model, lambda: loss_of(model))
    assert restore is not None
    for name, p in model.named_parameters():
        moved = p.detach() - before[name]
        if p.ndim < 2:
            assert not moved.any(), f"{name} is a norm or a bias"
            continue
        g = gradients[name]
        torch.testing.assert_close(moved, GAMMA * before[name].norm() * g / g.norm(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(moved.norm(), GAMMA * before[name].norm(), rtol=1e-4, atol=0)
    assert all(torch.equal(b, before[k]) for k, b in model.named_buffers()), "the ascent's pass must not move batch statistics"
    assert all(p.grad is None for p in model.parameters())
    restore()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_loss_at_the_perturbed_weights_is_greater_and_on_a_linear_model_by_what_the_first_order_says() -> None:
    model = network()
    clean = float(loss_of(model).detach())
    assert WeightPerturbation(GAMMA).ascend(model, lambda: loss_of(model)) is not None
    assert float(loss_of(model).detach()) > clean + 0.01
    linear = nn.Linear(5, 1, bias=False)
    x = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    rise = GAMMA * float(linear.weight.detach().norm() * x.norm())  # the most that a step of that length can give
    before = float(linear(x).detach().sum())
    WeightPerturbation(GAMMA).ascend(linear, lambda: linear(x).sum())
    assert float(linear(x).detach().sum()) == pytest.approx(before + rise, rel=1e-5)


@pytest.mark.parametrize("mixed", [False, True])
def test_the_second_pass_and_the_gradient_are_those_of_the_perturbed_weights(mixed: bool) -> None:
    """Also under autocast, which would go on with the bfloat16 copies of the old weights."""
    model, fresh = network(), network()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        restore = WeightPerturbation(GAMMA).ascend(model, lambda: loss_of(model))
        loss = loss_of(model)
    perturbed = {k: p.detach().clone() for k, p in model.named_parameters()}
    loss.backward()
    assert restore is not None
    restore()
    with torch.no_grad():
        for name, p in fresh.named_parameters():
            p.copy_(perturbed[name])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        expected = loss_of(fresh)
    expected.backward()
    assert torch.equal(loss, expected)
    for mine, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad)
    original = network()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        assert torch.equal(model.eval()(batch()[0]), _with_buffers(original, model).eval()(batch()[0]))


def _with_buffers(model: nn.Module, like: nn.Module) -> nn.Module:
    model.load_state_dict(like.state_dict())
    return model


def test_restoring_inside_the_same_autocast_forgets_the_perturbed_casts() -> None:
    model = network().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = loss_of(model)
        restore = WeightPerturbation(GAMMA).ascend(model, lambda: loss_of(model))
        between = loss_of(model)
        assert restore is not None
        restore()
        after = loss_of(model)
    assert not torch.equal(before, between)
    assert torch.equal(before, after)


def test_a_failure_in_the_ascent_leaves_everything_as_it_was() -> None:
    model = network()
    before = values(model)

    def failing() -> Tensor:
        loss_of(model)
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        WeightPerturbation(GAMMA).ascend(model, failing)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_off_it_costs_nothing_and_frozen_unused_or_flat_weights_stay() -> None:
    model = network()
    assert WeightPerturbation().ascend(model, lambda: pytest.fail("no pass is wanted")) is None
    model[0].requires_grad_(False)
    spare = nn.ModuleDict({"net": model, "unused": nn.Linear(2, 2)})
    before = values(spare)
    WeightPerturbation(GAMMA).ascend(spare, lambda: loss_of(model))
    moved = {k for k, v in spare.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"net.4.weight"}
    flat = nn.Linear(3, 2)
    kept = values(flat)
    WeightPerturbation(GAMMA).ascend(flat, lambda: 0 * flat.weight.sum())
    assert torch.equal(flat.weight, kept["weight"]), "a gradient of zero points nowhere"


@pytest.mark.parametrize("gamma", [-0.1, 1.0, float("nan")])
def test_settings_that_mean_nothing_are_refused(gamma: float) -> None:
    with pytest.raises(InputError, match="awp: "):
        WeightPerturbation(gamma)
