"""Small models, data and attacks whose right answers are known."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from amsdn.attacks.base import Attack, Victim
from amsdn.attacks.losses import Goal
from amsdn.evaluation.certifier import ABSTAIN, Certifier, Claim, Sample
from amsdn.records import CertRecord, EvalRecord
from amsdn.threats import SparsePixels, ThreatModel

CLASSES, SIDE = 3, 6


class Images:
    """A split held in two tensors."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


class Linear(nn.Module):
    """Logits that are linear in the pixels. Small whole weights and pixels in 255ths keep the arithmetic exact."""

    def __init__(self, seed: int = 0, classes: int = CLASSES, side: int = SIDE) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("weight", torch.randint(-3, 4, (classes, 3 * side * side), generator=generator).float())

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


class Detecting(Linear):
    """Linear, and calls saturated pixels anomalous: the map is 1 where a pixel is 0 or 1 in every channel."""

    def analyze(self, x: Tensor) -> SimpleNamespace:
        where = ((x == 0) | (x == 1)).all(1, keepdim=True).float()
        score = where.flatten(1).mean(1)
        return SimpleNamespace(logits=self(x), anomaly_score=score, detected=score > 0, anomaly_map=where)


class Noisy(Linear):
    """Linear with noise from the global generator, declared as such."""

    stochastic = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 4 * torch.randn(len(x), CLASSES)

    def analyze(self, x: Tensor) -> SimpleNamespace:
        score = torch.rand(len(x))
        return SimpleNamespace(logits=self(x), anomaly_score=score, detected=score > 0.5, anomaly_map=x[:, :1])


class HalfSpace(nn.Module):
    """Class 1 where direction . x > offset: the smoothed classifier is known exactly.

    Under noise of any sigma the answer is 1 with probability Phi(signed distance / sigma), so the largest radius that is
    true at x is the distance to the plane.
    """

    def __init__(self, direction: Tensor, offset: float) -> None:
        super().__init__()
        self.register_buffer("direction", direction.flatten() / direction.norm())
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        score = self.distance(x)
        return torch.stack([-score, score], 1)

    def distance(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.direction - self.offset


@dataclass(frozen=True)
class PairConfig:
    """Of ``PairCertifier``: what is added to its radii."""

    more: int = 0


class PairCertifier(Certifier):
    """Two deterministic certificates a sample from one forward pass, the second for some samples only; in groups, last sample first."""

    kinds = ("patch", "patch-detection")

    def __init__(self, model: nn.Module, config: PairConfig | None = None, group: int = 3) -> None:
        self.model, self.config, self.group = model, config or PairConfig(), group
        self.pulled: list[Sample] = []

    @torch.no_grad()
    def certify(self, samples: Iterator[Sample]) -> Iterator[tuple[int, Mapping[str, Claim]]]:
        while batch := list(islice(samples, self.group)):
            self.pulled += batch
            for sample in reversed(batch):
                yield sample.sample_id, self.claims(sample)

    def claims(self, sample: Sample) -> dict[str, Claim]:
        logits = self.model(sample.image[None])[0]
        answer, radius = int(logits.argmax()), float(int(10 * sample.image.mean()) % 4 + self.config.more)
        sure = bool(logits.max() > 14)
        return {
            "patch": Claim(answer, radius, 1, 0.01),
            "patch-detection": Claim(answer, radius + 1, 1, 0.02) if sure else Claim(ABSTAIN, 0.0, 1, 0.02),
        }


@dataclass(frozen=True)
class FlipPixels(Attack):
    """Sets k random pixels to black or white: not clever, but random, exact and within its threat."""

    k: int = 2

    @property
    def threat(self) -> ThreatModel:
        return SparsePixels(self.k)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        victim.logits(x)
        side = x.shape[3]
        where = torch.rand(len(x), side * side, generator=generator).argsort(1)[:, : self.k]
        chosen = torch.zeros(len(x), side * side, dtype=torch.bool).scatter(1, where, True).reshape(len(x), 1, side, side)
        colour = torch.randint(0, 2, (len(x), 1, side, side), generator=generator).float()
        return torch.where(chosen, colour.expand_as(x), x)


def images(n: int, model: nn.Module, seed: int = 0, wrong: int = 2, side: int = SIDE) -> Images:
    """n images without pure black or white, labelled by the model except for the first ``wrong``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(16, 240, (n, 3, side, side), generator=generator) / 256
    with torch.no_grad():
        y = model(x).argmax(1)
    y[:wrong] = (y[:wrong] + 1) % CLASSES
    return Images(x, y)


def eval_row(sample_id: int = 0, attack: str = "clean", *, correct: bool = True, **changes: object) -> EvalRecord:
    """A row with unremarkable values except for those given."""
    values: dict[str, object] = {
        "sample_id": sample_id,
        "config_hash": attack,
        "seed": 0,
        "attack": attack,
        "family": "clean" if attack == "clean" else "sparse",
        "budget": 0.0,
        "spent": 0.0,
        "label": 1,
        "prediction": 1 if correct else 2,
        "correct": correct,
        "margin": 1.0 if correct else -1.0,
        "forwards": 1,
        "backwards": 0,
        "anomaly_score": None,
        "detected": None,
        "localisation": None,
    }
    values.update(changes)
    if "budget" in changes and "spent" not in changes:
        values["spent"] = changes["budget"]
    return EvalRecord(**values)  # type: ignore[arg-type]


def cert_row(sample_id: int = 0, radius: float = 0.5, prediction: int = 1, certificate: str = "l2") -> CertRecord:
    """A certificate for label 1."""
    return CertRecord(sample_id, "c", 0, certificate, 1, prediction, radius, prediction == 1, 100, 0.5)


def by_key(rows: Iterable[EvalRecord]) -> list[EvalRecord]:
    """Rows in an order of their own: a file holds them as they were made, a result attack by attack."""
    return sorted(rows, key=lambda row: (row.attack, row.sample_id, row.config_hash, row.seed))
