"""Toy defences, each with one well-known flaw, around an honest little network."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 8


class Honest(nn.Module):
    """A small smooth network with four classes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12 * 16, 4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = 3 * self.layers(x)
        return out


class Flawed(nn.Module):
    """The honest network behind something that breaks attacks, or evaluation."""

    def __init__(self, inner: Honest) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Shattered(Flawed):
    """Adds a fast wave to the image: the gradient is the wave's, the value hardly changes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + 0.004 * torch.sin(3000 * x))


class Quantised(Flawed):
    """Rounds the image: no gradient at all."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x * 15).round() / 15)


class RandomlyMoved(Flawed):
    """Moves the image at random, without saying so."""

    def forward(self, x: Tensor) -> Tensor:
        down, right = torch.randint(-1, 2, (2,)).tolist()
        return self.inner(x.roll((down, right), (2, 3)))


class ScaledUp(Flawed):
    """Logits so large that a float32 softmax is one and zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return 1e6 * self.inner(x)


class DeadPlateau(Flawed):
    """Logits cut off well below their values: a ReLU that is dead almost everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        return F.one_hot(logits.argmax(1), logits.shape[1]).float() + F.relu(logits - 1e3)


class Leaking(Flawed):
    """Centres the logits by the batch's own mean."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        return logits - logits.mean(0)


class Probable(Flawed):
    """Answers with probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).softmax(1)


class LeakyDetector(Flawed):
    """Has a detector whose score is relative to the other images of the batch: who is attacked depends on the company."""

    detection_threshold = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def analyze(self, x: Tensor) -> SimpleNamespace:
        energy = x.var((1, 2, 3))
        score = torch.sigmoid(100 * (energy - energy.mean()))
        return SimpleNamespace(
            logits=self(x), anomaly_score=score, detected=score > 0.5, anomaly_map=score.reshape(-1, 1, 1, 1).expand_as(x[:, :1])
        )


class SecretDetector(LeakyDetector):
    """Raises its alarms by something else than the score that it declares."""

    def analyze(self, x: Tensor) -> SimpleNamespace:
        score = x.mean((1, 2, 3))
        return SimpleNamespace(
            logits=self(x), anomaly_score=score, detected=x[:, 0, 0, 0] > 0.5, anomaly_map=score.reshape(-1, 1, 1, 1).expand_as(x[:, :1])
        )


FLAWS: dict[str, Callable[[Honest], Flawed]] = {
    "leads up": Shattered,
    "has gradients": Quantised,
    "repeats": RandomlyMoved,
    "judges alone": Leaking,
    "gives logits": Probable,
}


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
