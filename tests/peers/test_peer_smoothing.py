"""Cohen's certificate as ART makes it against ours with a fixed number of samples: equal radii for equal counts."""

import math
import warnings

import numpy as np
import peer_attacks
import pytest
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

from amsdn.evaluation.certifier import ABSTAIN, Claim, Sample
from amsdn.evaluation.smoothing_certifier import SmoothingCertifier, smoothed_predictions
from amsdn.evaluation.smoothing_judges import SmoothingConfig

SIGMA, ALPHA = 0.25, 0.001


class Metronome(nn.Module):
    """Class 1 for ``share`` of every hundred copies, whatever they show: both procedures then see the same counts."""

    def __init__(self, share: int) -> None:
        super().__init__()
        self.share, self.asked = share, 0

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(self.asked, self.asked + len(x)) % 100
        self.asked += len(x)
        return nn.functional.one_hot((37 * place % 100 < self.share).long(), 3).float()


def by_art(model: nn.Module, x: Tensor, n0: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The classes and radii of images x [B,3,H,W]."""
    if not peer_attacks.installed("art"):
        pytest.skip("art is not installed; make peers installs it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

        np.random.seed(0)  # noqa: NPY002 - ART draws from the global generator
        smoothed = PyTorchRandomizedSmoothing(
            model,
            nn.CrossEntropyLoss(),
            tuple(x.shape[1:]),
            3,
            clip_values=None,
            sample_size=n0,
            scale=SIGMA,
            alpha=ALPHA,
            device_type="cpu",
        )
        return smoothed.certify(x.numpy(), n=n, batch_size=1000)


def by_us(model: nn.Module, x: Tensor, n0: int, n: int) -> list[Claim]:
    config = SmoothingConfig(sigma=SIGMA, alpha=ALPHA, n0=n0, n=n, fixed=True, block=100, batch_size=1000)
    claims = dict(SmoothingCertifier(model, config).certify(Sample(i, image) for i, image in enumerate(x)))
    return [claims[i]["l2"] for i in range(len(x))]


@pytest.mark.parametrize("share", [40, 50, 53, 58, 70, 84, 97, 99, 100])
def test_equal_counts_give_equal_radii(share: int) -> None:
    x = torch.full((1, 3, 2, 2), 0.5)
    (prediction,), (radius,) = by_art(Metronome(share).eval(), x, 100, 2000)
    (claim,) = by_us(Metronome(share).eval(), x, 100, 2000)
    assert claim.prediction == prediction
    assert claim.radius == pytest.approx(radius, rel=1e-6)
    assert (claim.prediction == ABSTAIN) == (42 < share < 58)  # 53 of 100 are too few for 2,000 samples, 58 are enough


class Plane(nn.Module):
    """Class 1 where the image is brighter than grey, class 0 where darker, never class 2: the true radius is the distance from grey."""

    def forward(self, x: Tensor) -> Tensor:
        distance = (x.flatten(1) - 0.5).mean(1) * math.sqrt(x[0].numel())
        return torch.stack([-distance, distance, torch.full_like(distance, -1e3)], 1)


def at(distances: list[float]) -> Tensor:
    return torch.stack([torch.full((3, 2, 2), 0.5 + d / math.sqrt(12)) for d in distances])


def test_the_same_half_space_gets_the_same_radii_within_sampling_error() -> None:
    distances = [-0.4, -0.2, -0.1, 0.1, 0.25, 0.5]
    x, model, n = at(distances), Plane().eval(), 20_000
    predictions, radii = by_art(model, x, 100, n)
    for distance, claim, prediction, radius in zip(distances, by_us(model, x, 100, n), predictions, radii, strict=True):
        p = float(ndtr(abs(distance) / SIGMA))
        density = math.exp(-(float(ndtri(p)) ** 2) / 2) / math.sqrt(2 * math.pi)
        error = SIGMA * math.sqrt(p * (1 - p) / n) / density  # of one radius, by the delta method
        assert claim.prediction == prediction == int(distance > 0)
        assert abs(claim.radius - radius) <= 4 * math.sqrt(2) * error
        assert abs(distance) - 8 * error <= claim.radius <= abs(distance)


def test_the_same_predictions() -> None:
    """Ours by the sequential test, ART's by the fixed one: where both answer, they agree with the truth."""
    x, model = at([-0.4, -0.1, 0.15, 0.5]), Plane().eval()
    predictions, _ = by_art(model, x, 100, 5000)
    assert smoothed_predictions(model, x, SmoothingConfig(sigma=SIGMA, alpha=ALPHA)).tolist() == predictions.tolist() == [0, 0, 1, 1]
