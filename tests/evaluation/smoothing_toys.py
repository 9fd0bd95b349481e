"""Classifiers whose smoothed version is known in closed form, and images at known distances from their boundaries."""

import csv
import math
from pathlib import Path

import torch
from evaluation_toys import HalfSpace
from torch import Tensor, nn

from amsdn.records import CertRecord

SIDE = 4
THIRD_PARTY = Path(__file__).parents[3] / "shared/data/third_party"
COHEN_SIGMAS = (0.12, 0.25, 0.5, 1.0)


def half_space(seed: int = 0, side: int = SIDE) -> HalfSpace:
    direction = torch.randn(3, side, side, generator=seeded(seed))
    return HalfSpace(direction, float(0.5 * direction.sum() / direction.norm())).eval()


class Slabs(HalfSpace):
    """Class 0, 1, 2 as the distance lies below -width, within width, or above: three classes along one direction."""

    width = 0.2

    def forward(self, x: Tensor) -> Tensor:
        d = self.distance(x)
        return torch.stack([-d - self.width, torch.zeros_like(d), d - self.width], 1)


def points(model: HalfSpace, distances: list[float]) -> Tensor:
    """Images [N,3,S,S] at these signed distances from the plane, around mid grey."""
    side = math.isqrt(len(model.direction) // 3)
    grey = torch.full((len(distances), 3, side, side), 0.5)
    step = torch.tensor(distances) - model.distance(grey)
    x = grey + step.reshape(-1, 1, 1, 1) * model.direction.reshape(3, side, side)
    assert x.min() >= 0
    assert x.max() <= 1
    return x


class Watching(nn.Module):
    """Answers class 0 and remembers the batches it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return torch.tensor([1.0, 0.0]).expand(len(x), 2)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chance_of_more(p: float, n: int) -> float:
    """Three standard errors above p: what n trials of probability p stay under."""
    return p + 3 * math.sqrt(p * (1 - p) / n)


def cohens_log(sigma: float) -> Path:
    return THIRD_PARTY / f"cohen_cifar10_resnet110_sigma_{sigma:.2f}.tsv"


def cohens_rows(sigma: float) -> list[CertRecord]:
    """The published certificates of every 20th CIFAR-10 test image, as records of ours."""
    with cohens_log(sigma).open(newline="") as file:
        return [
            CertRecord(
                int(r["idx"]),
                "cohen",
                0,
                "l2",
                int(r["label"]),
                int(r["predict"]),
                float(r["radius"]),
                r["correct"] == "1",
                100_100,
                seconds(r["time"]),
            )
            for r in csv.DictReader(file, delimiter="\t")
        ]


def seconds(text: str) -> float:
    """ "15.4", or "0:00:13.736080" with hours and minutes."""
    return sum(float(part) * 60**i for i, part in enumerate(reversed(text.split(":"))))
