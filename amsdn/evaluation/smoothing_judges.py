"""How many noisy samples an image gets, and what they prove: Cohen's fixed number, or a sequential test that stops early."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from amsdn.errors import InputError
from amsdn.evaluation.sequential_test import CERTIFIED, FIRST_BLOCK, OPEN, LargestRadius, RadiusTests, SequentialTest, least_hits
from amsdn.evaluation.smoothing import fixed_radius

Counts = NDArray[np.int64]


class Tally(NamedTuple):
    """The samples of several images so far, those that chose the class left out; every field is [I]."""

    hits: Counts  # answers that were the chosen class
    runner_up: Counts  # answers that were the most frequent other class
    n: Counts


class Judge(ABC):
    """When an image has had enough samples, and what they prove.

    What it says of an image depends on that image's own tally and state alone: arrays hold several images for speed.
    """

    @abstractmethod
    def start(self) -> Any:
        """The state of an image before its first sample; the judge may change it in place."""

    @abstractmethod
    def next_look(self, n: int) -> int:
        """After how many samples an image that has been looked at after ``n`` (at first 0) is looked at again."""

    @abstractmethod
    def decided(self, states: Sequence[Any], tally: Tally) -> NDArray[np.bool_]:
        """Which images [I] are decided."""

    @abstractmethod
    def radius(self, state: Any, hits: int, n: int) -> float | None:
        """The certified radius of a decided image; None: abstain."""


@dataclass(frozen=True)
class FixedSamples(Judge):
    """Cohen's: n samples for every image, then the exact binomial bound. The reference."""

    n: int
    alpha: float
    sigma: float

    def start(self) -> None:
        return None

    def next_look(self, n: int) -> int:
        return self.n

    def decided(self, states: Sequence[None], tally: Tally) -> NDArray[np.bool_]:
        return tally.n >= self.n

    def radius(self, state: None, hits: int, n: int) -> float | None:
        return fixed_radius(hits, n, self.alpha, self.sigma)


class TargetRadii(Judge):
    """Is the radius at least r, for each of a list? One sequential test per target; see ``sequential_test.RadiusTests``.

    Radii that no number of samples within the test's could certify are left out: their Phi(r / sigma) rounds to 1.
    """

    def __init__(self, test: SequentialTest, radii: Sequence[float], sigma: float) -> None:
        targets = ndtr(np.asarray(radii, dtype=np.float64) / sigma)
        reachable = max(1, int((least_hits(test.max_samples, targets, test.alpha) <= test.max_samples).sum()))
        self.radii = radii[:reachable]
        self.tests = RadiusTests(test, targets[:reachable].tolist())

    def start(self) -> NDArray[np.int8]:
        return self.tests.start(1)[0]

    def next_look(self, n: int) -> int:
        return int(self.tests.test.next_check(n))

    def decided(self, states: Sequence[NDArray[np.int8]], tally: Tally) -> NDArray[np.bool_]:
        advanced = self.tests.advance(np.stack(states), tally.hits, tally.n)
        for state, new in zip(states, advanced, strict=True):
            state[:] = new
        return self.tests.done(advanced)

    def radius(self, state: NDArray[np.int8], hits: int, n: int) -> float | None:
        passed = int(self.tests.certified(state[None])[0])
        return self.radii[passed - 1] if passed else None


class GreatestRadius(Judge):
    """How large is the radius? The lower end of a confidence sequence, sampled until more would add little."""

    def __init__(self, test: SequentialTest, sigma: float) -> None:
        self.stop, self.sigma = LargestRadius(test), sigma

    def start(self) -> NDArray[np.float64]:
        return np.zeros(1)

    def next_look(self, n: int) -> int:
        """After a tenth more: a bound is dearer than a verdict, and with looks twice as often it took a seventh of the time on a CPU."""
        return min(max(n + FIRST_BLOCK, n + n // 10), self.stop.test.max_samples)

    def decided(self, states: Sequence[NDArray[np.float64]], tally: Tally) -> NDArray[np.bool_]:
        best, enough = self.stop.improve(np.concatenate(states), tally.hits, tally.n)
        for state, new in zip(states, best, strict=True):
            state[:] = new
        return enough

    def radius(self, state: NDArray[np.float64], hits: int, n: int) -> float | None:
        return self.sigma * float(ndtri(state[0])) if state[0] > 0.5 else None


class MostProbable(Judge):
    """Is the chosen class the most probable one? For predictions: the claim is about the image itself, radius 0."""

    def __init__(self, test: SequentialTest) -> None:
        self.test = test

    def start(self) -> NDArray[np.int8]:
        return np.zeros(1, dtype=np.int8)

    def next_look(self, n: int) -> int:
        return int(self.test.next_check(n))

    def decided(self, states: Sequence[NDArray[np.int8]], tally: Tally) -> NDArray[np.bool_]:
        verdicts = self.test.prediction_verdict(tally.hits, tally.runner_up, tally.n)
        for state, new in zip(states, verdicts, strict=True):
            state[:] = new
        return verdicts != OPEN

    def radius(self, state: NDArray[np.int8], hits: int, n: int) -> float | None:
        return 0.0 if state[0] == CERTIFIED else None


@dataclass(frozen=True)
class SmoothingConfig:
    """Parameters of randomized smoothing.

    The default asks for each of ``radii`` in turn whether it is certified and stops as soon as all are decided; without ``radii``
    the largest radius is sought; with ``fixed`` every image gets ``n`` samples, as in Cohen et al. 2019. No certificate from n samples
    can exceed sigma * Phi^-1(alpha ** (1 / n)).
    """

    sigma: float = 0.25  # standard deviation of the noise, in pixel units
    radii: tuple[float, ...] = (0.25, 0.5)  # l2, growing; 0 asks for the prediction alone, which is dear where it is close
    fixed: bool = False  # n samples for every image, whether it needs them or not
    n0: int = 64  # samples that choose the class, then are thrown away; rounded up to whole blocks, as n is
    n: int = 100_000  # the most that an image gets to bound the probability of its class
    alpha: float = 0.001  # probability that any of the claims about one image is wrong
    beta: float = 0.01  # an image whose chance of success has fallen below this is given up
    block: int = 32  # samples of one image that are drawn together
    batch_size: int = 1024  # noisy copies in memory at once
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise InputError(f"smoothing: sigma must be positive and finite, got {self.sigma}")
        if min(self.n0, self.n, self.block, self.batch_size) < 1:
            raise InputError(
                f"smoothing: n0, n, block and batch_size must be at least 1, got {self.n0}, {self.n}, {self.block} and {self.batch_size}"
            )
        if self.batch_size < self.block:
            raise InputError(
                f"smoothing: batch_size must be at least block, got {self.batch_size} and {self.block}; a batch is made of blocks"
            )
        if not 0 < self.alpha < 0.49 or not 0 < self.beta < 0.5:
            raise InputError(f"smoothing: alpha must lie between 0 and 0.49 and beta between 0 and 0.5, got {self.alpha} and {self.beta}")
        if not all(0 <= r < math.inf for r in self.radii) or any(a >= b for a, b in pairwise(self.radii)):
            raise InputError(f"smoothing: radii must be at least 0, finite and growing, got {self.radii}; or none, to seek the largest")

    def judge(self) -> Judge:
        """The procedure that these parameters describe."""
        if self.fixed:
            return FixedSamples(self.n, self.alpha, self.sigma)
        return TargetRadii(self.test(), self.radii, self.sigma) if self.radii else GreatestRadius(self.test(), self.sigma)

    def test(self) -> SequentialTest:
        """The sequential test at these levels."""
        return SequentialTest(self.alpha, self.beta, self.n)
