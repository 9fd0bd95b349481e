"""Does a classifier know how often it is right? Expected calibration error and the reliability diagram behind it.

Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017): answers are sorted by confidence into 15 bins of equal width; the error is the mean
distance of a bin's accuracy from its mean confidence, weighted by how many answers lie there (their eq. 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from amsdn.evaluation.statistics import CONFIDENCE

BINS = 15
RESAMPLES = 1000


@dataclass(frozen=True)
class Bin:
    """The answers of one range of confidence: how many, their mean confidence and the share that is right."""

    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error with a bootstrap interval (percentiles of resampled images), and the bins that hold any answer.

    The error is biased upwards, the more so the fewer the images, and the interval with it: compare models on the same images.
    """

    error: float
    low: float
    high: float
    n: int
    bins: tuple[Bin, ...]


def calibration(confidences: Sequence[float], correct: Sequence[bool], confidence: float = CONFIDENCE) -> Calibration | None:
    """Of answers given with these probabilities [N] in [0,1], right or not [N]; None without any. The same every time."""
    if not confidences:
        return None
    sure, right = np.asarray(confidences, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    assert sure.shape == right.shape, (sure.shape, right.shape)
    assert sure.min() >= 0, sure.min()
    assert sure.max() <= 1 + 1e-6, sure.max()
    member = np.minimum(np.ceil(sure * BINS).astype(np.int64) - 1, BINS - 1).clip(0)  # bins (a,b], as theirs are
    draws = np.random.default_rng(0).multinomial(len(sure), np.full(len(sure), 1 / len(sure)), RESAMPLES)  # how often each image
    errors = _errors(np.vstack([np.ones(len(sure)), draws]), member, right - sure)
    low, high = np.quantile(errors[1:], [(1 - confidence) / 2, (1 + confidence) / 2])
    filled = [member == i for i in range(BINS) if (member == i).any()]
    bins = tuple(Bin(int(at.sum()), float(sure[at].mean()), float(right[at].mean())) for at in filled)
    return Calibration(float(errors[0]), float(low), float(high), len(sure), bins)


def _errors(weights: np.ndarray, member: np.ndarray, excess: np.ndarray) -> np.ndarray:
    """The calibration error of each weighting [R,N] of answers in bins [N], right minus confident [N]: [R]."""
    one_hot = np.eye(BINS)[member]  # [N,B]
    return np.abs((weights * excess) @ one_hot).sum(1) / weights.sum(1)
