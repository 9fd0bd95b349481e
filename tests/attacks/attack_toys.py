"""Classifiers small enough that what an attack must find on them is known."""

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """Two classes; the margin of class 0 is w.x + bias."""

    def __init__(self, size: int = 8, bias: float = 50.0, seed: int = 0) -> None:
        super().__init__()
        w = torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed))
        self.w, self.bias = nn.Parameter(w), bias
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.w).flatten(1).sum(1) + self.bias
        return torch.stack([score, torch.zeros_like(score)], 1)


class Gate(nn.Module):
    """Dark images sit on the decision boundary, so any push may fool; bright ones cannot be fooled (their margin is
    80, and the widest budget under test moves it by less than 50). Notes batch sizes."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        w = torch.randn(3, size, size, generator=torch.Generator().manual_seed(1))
        self.w = nn.Parameter((w - w.mean()) / 2)
        self.seen: list[int] = []
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        score = (x * self.w).flatten(1).sum(1)
        safe = 80.0 * (x.flatten(1).mean(1) > 0.5)
        return torch.stack([score + safe, -score, torch.full_like(score, -1e3)], 1)


def gate_images(size: int = 16) -> Tensor:
    """Eight dark images, then four bright ones."""
    noise = torch.rand(12, 3, size, size, generator=torch.Generator().manual_seed(2)) * 1e-3
    return noise + torch.tensor([0.2] * 8 + [0.8] * 4).reshape(-1, 1, 1, 1)


def small_net(classes: int = 5, seed: int = 0) -> nn.Module:
    """A random convolutional network that any of the attacks can fool on part of its inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, 8, 3, 2, 1), nn.GELU(), nn.Flatten(), nn.LazyLinear(classes)
        net = nn.Sequential(*layers)
        net(torch.zeros(1, 3, 16, 16))
    return net.eval()


def images(count: int = 6, size: int = 16, seed: int = 0, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
