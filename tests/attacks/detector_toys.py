"""Detecting classifiers small enough that it is known what can be wrong and undetected."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

SIZE = 4
GREY = torch.full((1, 3, SIZE, SIZE), 0.5)


def rows_mask(first: int, last: int) -> Tensor:
    """1 on these rows of pixels, 0 elsewhere, [3,SIZE,SIZE]."""
    mask = torch.zeros(3, SIZE, SIZE)
    mask[:, first:last] = 1
    return mask


class Guarded(nn.Module):
    """Class 0 has margin ``w.(x - 1/2) + bias``; the alarm's log-odds are ``odds(x)``. Counts the images it has seen."""

    def __init__(self, w: Tensor, bias: float, odds: Callable[[Tensor], Tensor], threshold: float | None = 0.5) -> None:
        super().__init__()
        self.w, self.bias, self.odds, self.seen = w, bias, odds, 0
        if threshold is not None:
            self.detection_threshold = threshold
        self.limit = 0.5 if threshold is None else threshold
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        score = ((x - 0.5) * self.w).sum((1, 2, 3)) + self.bias
        return torch.stack([score, torch.zeros_like(score), torch.full_like(score, -50.0)], 1)

    def analyze(self, x: Tensor) -> SimpleNamespace:
        logit = self.odds(x)
        score = logit.sigmoid()
        return SimpleNamespace(logits=self(x), anomaly_score=score, anomaly_logit=logit, detected=score > self.limit, anomaly_map=x[:, :1])


def linear_odds(v: Tensor, offset: float) -> Callable[[Tensor], Tensor]:
    return lambda x: ((x - 0.5) * v).sum((1, 2, 3)) + offset


def conflicting(bias: float = 1.0, slope: float = 1.0) -> Guarded:
    """The classifier falls along every pixel; darkening the upper half also raises the alarm.

    Each half moves the margin by at most 24 eps. The alarm starts 0.5 below its threshold, so with eps = 0.1 darkening
    both halves is caught (2.4 slope > 0.5) and darkening the lower half alone moves the margin by 2.4.
    """
    return Guarded(torch.ones(3, SIZE, SIZE), bias, linear_odds(-slope * rows_mask(0, 2), -0.5))


def hump(steepness: float) -> Guarded:
    """Darkening by more than 0.1 fools; between 0.02 and 0.08 the alarm rings, steeply so, and beyond it is silent."""
    pixels = 3 * SIZE * SIZE

    def odds(x: Tensor) -> Tensor:
        return steepness * (0.03 - (0.5 - x.mean((1, 2, 3)) - 0.05).abs())

    return Guarded(torch.ones(3, SIZE, SIZE), 0.1 * pixels, odds)


class WatchedNet(nn.Module):
    """A network beside an alarm for images that are not of medium brightness."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.detection_threshold, self.seen = net, 0.3, 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        out: Tensor = self.net(x)
        return out

    def analyze(self, x: Tensor) -> SimpleNamespace:
        score = (600 * ((x.mean((1, 2, 3)) - 0.5).abs() - 0.03)).sigmoid()
        return SimpleNamespace(logits=self(x), anomaly_score=score, detected=score > self.detection_threshold, anomaly_map=x[:, :1])
