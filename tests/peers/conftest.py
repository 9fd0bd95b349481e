"""Victims on which our attacks are compared with the peer libraries'. One command installs those and runs this: make peers."""

from collections.abc import Callable
from dataclasses import dataclass

import peer_attacks
import pytest
import torch
import torch.nn.functional as F
import victims
from torch import Tensor, nn

from amsdn.data import load_dataset
from amsdn.models.amsdn import AMSDN


@dataclass(frozen=True, eq=False)
class Target:
    """A classifier and images that it gets right."""

    model: nn.Module
    x: Tensor  # [N,3,H,W]
    y: Tensor  # [N]

    def first(self, n: int) -> "Target":
        return Target(self.model, self.x[:n], self.y[:n])


@pytest.fixture
def peer() -> Callable[..., Tensor]:
    """run_peer, which skips the test where the library is not installed."""

    def run(family: str, library: str, target: Target, **settings: float | str) -> Tensor:
        if not peer_attacks.installed(library):
            pytest.skip(f"{library} is not installed; make peers installs it")
        return peer_attacks.run_peer(family, library, target.model, target.x, target.y, **settings)

    return run


@pytest.fixture(scope="session")
def resnet() -> Target:
    """The public ResNet-20 and 183 test images."""
    why = victims.missing()
    if why:
        pytest.skip(f"public ResNet-20: {why}")
    model = victims.load_resnet20()
    return correct(model, *victims.load_cifar10(200))


@pytest.fixture(scope="session")
def amsdn() -> Target:
    """A small AMSDN taught digits for a few seconds: gates that pass no gradient, which only we are told about."""
    torch.manual_seed(0)
    digits = load_dataset("digits", image_size=16)
    x, y = digits.train.fetch(torch.arange(len(digits.train)))
    model = AMSDN(variant="compact", width=8, fpn_channels=16, mean=(0.3,) * 3, std=(0.35,) * 3)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    batches = [order for _ in range(3) for order in torch.randperm(len(x)).split(64)]
    for step, rows in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / len(batches))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    return correct(model, *digits.test.fetch(torch.arange(120)))


def correct(model: nn.Module, x: Tensor, y: Tensor) -> Target:
    with torch.no_grad():
        right = model(x).argmax(1) == y
    assert right.float().mean() > 0.85, f"accuracy {right.float().mean():.3f}: not the victim that is meant"
    return Target(model, x[right], y[right])
