"""Sampling until it is decided: any-time valid tests of a hit probability, and how randomized smoothing uses them.

Cohen's certificate (ICML 2019) draws the same n = 100,000 samples for every image, though most are decided after a hundred. Here the
evidence is looked at as it comes in, as often as one likes, and the level alpha still holds. Let A of N independent samples be hits,
each with probability p. The evidence against "p <= p0" is the likelihood ratio of p0 against a whole prior of larger values,

    M = integral over q in (p0, 1] of  w(q) (q/p0)^A ((1-q)/(1-p0))^(N-A)  dq,

with w the Jeffreys prior Beta(1/2, 1/2) restricted to (p0, 1]. One more sample multiplies the integrand for each q by a factor of mean
1 + (p - p0)(q - p0) / (p0 (1 - p0)), at most 1 where p <= p0. So M is then a nonnegative supermartingale that starts at 1, and by Ville's
inequality (1939) the chance that it *ever* reaches 1/alpha is at most alpha. Stopping at any time, for any reason, giving up included, cannot raise that
chance. The mixture over a beta prior is Robbins' (Annals of Mathematical Statistics, 1970), as confidence sequences Howard et al.
(Annals of Statistics, 2021). Restricting it to (p0, 1] makes it one-sided and divides by the prior mass there, a gain of a factor 2 at p0 = 1/2
and of more above. Nothing is left to gain by a laxer bound: with 1/(2 alpha) the error exceeds alpha at every p0 where it was computed
exactly, from 0.5 to 0.99 (tests/evaluation/test_sequential_test.py).

What must hold: the samples are independent given the image, and the class whose hits are counted was chosen without looking at them.
A vote that no class may claim (logits that are not finite) must be counted as a miss.

Everything works on arrays of counts (images, or images by targets) in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincc, betaincinv, betaln, ndtri, xlog1py, xlogy

from amsdn.errors import InputError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Verdicts = NDArray[np.int8]

CERTIFIED, OPEN, GIVEN_UP = 1, 0, -1

SLACK = 1e-6  # log M must pass its bound by this much; its rounding error was 3e-9 at N = 1e6, so rounding never decides for us
HALVINGS = 36  # of an interval within [1/2, 1]: to a width below 1e-11
FIRST_BLOCK, GROWTH = 32, 20  # a block is a twentieth of what came before it, in multiples of 32


def log_evidence(hits: ArrayLike, n: ArrayLike, p0: ArrayLike) -> Floats:
    """log M, the evidence of ``hits`` in ``n`` samples that the hit probability exceeds ``p0`` in (0, 1]; shapes broadcast.

    In closed form M = B(A+1/2, N-A+1/2) (1 - I_p0(A+1/2, N-A+1/2)) / (B(1/2, 1/2) (1 - I_p0(1/2, 1/2)) p0^A (1-p0)^(N-A)).
    It grows with A. An underflow, and p0 = 1, give -inf: no evidence.
    """
    hits, n, p0 = _counts(hits, n, p0)
    misses = n - hits
    prior_mass = 2 / np.pi * np.arcsin(np.sqrt(1 - p0))  # 1 - I_p0(1/2, 1/2), without cancellation near 1
    with np.errstate(divide="ignore", invalid="ignore"):
        mixture = betaln(hits + 0.5, misses + 0.5) + np.log(betaincc(hits + 0.5, misses + 0.5, p0)) - np.log(np.pi * prior_mass)
        log_m = mixture - xlogy(hits, p0) - xlog1py(misses, -p0)
    return np.where(np.isnan(log_m) | (p0 >= 1), -np.inf, log_m)


def exceeds(hits: ArrayLike, n: ArrayLike, p0: ArrayLike, alpha: float) -> Bools:
    """Whether M >= 1/alpha and A/N > p0. On a stream with p <= p0 this is *ever* true with probability at most alpha."""
    hits, n, p0 = _counts(hits, n, p0)
    return (log_evidence(hits, n, p0) >= SLACK - np.log(alpha)) & (hits > n * p0)


def least_hits(n: ArrayLike, p0: ArrayLike, alpha: float) -> Floats:
    """The fewest hits in n samples for which ``exceeds`` holds; n + 1 where not even n hits would do."""
    _, n, p0 = _counts(0, n, p0)
    low, high = np.zeros(n.shape), n + 1  # fails, passes (or is out of reach): M grows with the hits
    while (high - low > 1).any():
        middle = np.floor((low + high) / 2)
        passes = exceeds(middle, n, p0, alpha)
        low, high = np.where(passes, low, middle), np.where(passes, middle, high)
    return high


def lower_bound(hits: ArrayLike, n: ArrayLike, alpha: float) -> Floats:
    """A lower bound for p, or 0 where p > 1/2 is not shown; it *ever* exceeds p with probability at most ``alpha``.

    It is L = inf{p0 >= 1/2: M(p0) < 1/alpha}, rounded down. Since L_N > p means M_N(p) >= 1/alpha, all checks hold together, so the
    largest bound found so far may be used at any time. (p < 1/2: L > 0 means M(1/2) >= 1/alpha, the null of which is true.)

    Why halving finds the infimum and never something above it: wherever M(p0) >= 1/alpha > 1, M falls in p0, so the rejected p0 form one
    interval from 1/2 on. The derivative of log M is h (1 - 1/M) - s, with h = w(p0) / w((p0, 1]) the hazard of the Jeffreys
    prior and s = (A - N p0) / (p0 (1 - p0)) the score. M >= 1/alpha needs p0 < A/N and N KL(A/N, p0) >= ln 1/alpha, and the
    divergence KL is at most (A/N - p0)^2 / (p0 (1 - p0)), so s >= ln(1/alpha) / (A/N - p0) >= ln(1/alpha) / (1 - p0). For p0 >= 1/2 the
    hazard is at most 1 / (2 sqrt(p0) (1 - p0)) <= 0.71 / (1 - p0), which is less for alpha < 0.49.
    """
    assert 0 < alpha < 0.49, alpha
    hits, n, _ = _counts(hits, n, 0.5)
    low, high = np.full(n.shape, 0.5), np.maximum(hits / np.maximum(n, 1), 0.5)
    shown = exceeds(hits, n, low, alpha)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        rejected = exceeds(hits, n, middle, alpha)
        low, high = np.where(rejected, middle, low), np.where(rejected, high, middle)
    return np.where(shown, low, 0.0)


@dataclass(frozen=True)
class SequentialTest:
    """When to stop sampling: certified at level ``alpha``, given up as hopeless, or out of samples.

    Giving up bears no risk of a wrong certificate, so it may be guided by a plain forecast: what is the chance that the test passes at
    ``max_samples``, if p is what the samples so far suggest? Below ``beta``, the image is given up. That is what makes a large
    ``max_samples`` cheap. Simulated on the images of Cohen's published sigma-0.25 log, at r = 0.25, these defaults take a mean of 930 samples
    (with 100 to choose the class) and certify 0.10 points less than 100,000 samples for every image do. Giving up by the
    mirrored martingale at level 0.05 instead takes 1,780 and loses 0.06; this forecast with a cap of 10,000 takes 400 and loses 1.4.
    """

    alpha: float = 0.001  # chance that an image is ever certified wrongly
    beta: float = 0.01  # forecast chance of certification below which an image is given up
    max_samples: int = 100_000

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 0.49 or not 0 < self.beta < 0.5:
            raise InputError(f"sequential test: alpha must lie in (0, 0.49) and beta in (0, 0.5), got {self.alpha} and {self.beta}")
        if self.max_samples < 1:
            raise InputError(f"sequential test: max_samples must be at least 1, got {self.max_samples}")

    def verdict(self, hits: ArrayLike, n: ArrayLike, p0: ArrayLike, *, needed: Floats | None = None) -> Verdicts:
        """1 certified (p > p0), -1 given up, 0 go on sampling, for each of the counts; the first verdict that is not 0 stands.

        ``needed`` may hold ``least_hits(max_samples, p0, alpha)``, which does not change from check to check.
        """
        hits, n, p0 = _counts(hits, n, p0)
        needed = least_hits(self.max_samples, p0, self.alpha) if needed is None else needed
        hopeless = (n >= self.max_samples) | self._hopeless(hits, n, np.maximum(n, self.max_samples), needed)
        return np.where(exceeds(hits, n, p0, self.alpha), CERTIFIED, np.where(hopeless, GIVEN_UP, OPEN)).astype(np.int8)

    def prediction_verdict(self, hits: ArrayLike, runner_up: ArrayLike, n: ArrayLike) -> Verdicts:
        """Is the guessed class the most probable one? 1 yes, -1 abstain, 0 go on; error at most alpha, whatever the number of classes.

        Of n samples ``hits`` went to the guess, which was chosen on other samples, and ``runner_up`` to the most frequent other class.

        "Class c is at least as probable as the guess" is tested on the samples that fall on one of the two, each the guess
        with probability at most 1/2 under that null, so that its M at p0 = 1/2 is a supermartingale. A wrong answer needs the null of the truly most probable
        class to be rejected among all others, and that single null is rejected with probability at most alpha: no union bound. At 1/2,
        M falls in the rival's count, so the runner-up's is the least of all M, and passing it passes all. Testing "p > 1/2" instead
        has all misses in the place of the runner-up, so it never decides sooner. Cohen's PREDICT is the version for a fixed n.
        """
        hits, runner_up, n = np.broadcast_arrays(*(np.asarray(v, dtype=np.float64) for v in (hits, runner_up, n)))
        pairs = hits + runner_up
        assert (pairs <= n).all(), "the guess and the runner-up have more votes than there are samples"
        left = np.floor(np.maximum(self.max_samples - n, 0) * (pairs + 1) / (n + 1))  # pairs still to come at the rate so far
        hopeless = self._hopeless(hits, pairs, pairs + left, least_hits(pairs + left, 0.5, self.alpha))
        sure = exceeds(hits, pairs, 0.5, self.alpha)
        return np.where(sure, CERTIFIED, np.where(hopeless | (n >= self.max_samples), GIVEN_UP, OPEN)).astype(np.int8)

    def next_check(self, n: ArrayLike) -> NDArray[np.int64]:
        """When to look again after n samples: a twentieth more, in blocks of 32, and at max_samples.

        A function of the image's own n, so that the verdict depends on nothing beside it.
        """
        n = np.asarray(n, dtype=np.int64)
        block = np.maximum(FIRST_BLOCK, n // GROWTH // FIRST_BLOCK * FIRST_BLOCK)
        return np.minimum(n + block, self.max_samples)

    def _hopeless(self, hits: Floats, n: Floats, horizon: Floats, needed: Floats) -> Bools:
        """Whether the forecast chance of ``needed`` hits at ``horizon`` samples is below beta.

        The hits to come are beta-binomial given the Jeffreys posterior, here by the normal law of the same mean and variance.
        """
        left = horizon - n
        rate = (hits + 0.5) / (n + 1)
        shortage = needed - hits - left * rate
        spread = np.sqrt(left * rate * (1 - rate) * (n + 1 + left) / (n + 2))
        return (shortage > -ndtri(self.beta) * spread) | (hits + left < needed)


class RadiusTests:
    """The tests of several targets p_1 < p_2 < ... on the same samples, with a gate that keeps the error of all together at alpha.

    Target k counts as certified once it *and all smaller ones* have passed their tests, each at level alpha; once it is given up, so are all larger.
    The chance of *any* false certificate for an image is at most alpha, not alpha times the number of targets: the nulls "p <= p_k" are nested,
    so those that are true are k*, k*+1, ... for some k*. Any false certificate needs k* to have passed, the null of which
    is true, so that happens with probability at most alpha (a fixed sequence of tests, Maurer et al. 1995, here under Ville's inequality
    and so at any stopping time).

    The states of images are rows of an array that the caller keeps, and each row is advanced on its own.
    """

    def __init__(self, test: SequentialTest, targets: Sequence[float]) -> None:
        """``targets``: hit probabilities in (0, 1], growing. For radius r under noise sigma that is Phi(r / sigma)."""
        if not targets or not all(0 < p <= 1 for p in targets) or any(a >= b for a, b in pairwise(targets)):
            raise InputError(f"sequential test: targets must be growing probabilities in (0, 1], got {list(targets)}")
        self.test = test
        self.targets = np.asarray(targets, dtype=np.float64)
        self._needed = least_hits(test.max_samples, self.targets, test.alpha)

    def start(self, images: int) -> Verdicts:
        """Fresh states [images, targets]: open, but given up where no number of hits within max_samples would do."""
        states = np.zeros((images, len(self.targets)), dtype=np.int8)
        states[:, self._needed > self.test.max_samples] = GIVEN_UP
        return states

    def advance(self, states: Verdicts, hits: ArrayLike, n: ArrayLike) -> Verdicts:
        """The states [images, targets] after ``hits`` [images] of ``n`` [images] samples in all; decided entries stand."""
        hits, n = (np.asarray(v, dtype=np.float64).reshape(-1, 1) for v in (hits, n))
        states = np.where(states == OPEN, self.test.verdict(hits, n, self.targets, needed=self._needed), states)
        given_up = np.logical_or.accumulate(states == GIVEN_UP, axis=1)
        return np.where(given_up, GIVEN_UP, states).astype(np.int8)

    def certified(self, states: Verdicts) -> NDArray[np.int64]:
        """How many targets are certified, from the smallest on, per image [images]."""
        return np.logical_and.accumulate(states == CERTIFIED, axis=1).sum(axis=1)

    def done(self, states: Verdicts) -> Bools:
        """Whether nothing is open any more, per image [images]."""
        return (states != OPEN).all(axis=1)


@dataclass(frozen=True)
class LargestRadius:
    """When to stop improving the lower bound for one image's largest radius. A matter of cost alone: any stop is sound.

    Stops at ``max_samples``, and as soon as the radius that the same hit rate would give at ``max_samples`` is at most
    ``relative`` or ``absolute`` (in units of sigma) more than what is already shown; that radius is forecast by the
    Clopper-Pearson bound, which holds for one n alone and so is a little larger. Also gives up where p > 1/2 is hopeless.
    On Cohen's sigma-0.25 images these defaults take about 25,000 samples on average; target radii are what makes certificates cheap.
    """

    test: SequentialTest = SequentialTest()
    relative: float = 0.05
    absolute: float = 0.02

    def __post_init__(self) -> None:
        if not (0 <= self.relative < np.inf and 0 <= self.absolute < np.inf):
            raise InputError(f"largest radius: tolerances must not be negative, got {self.relative} and {self.absolute}")

    def improve(self, best: ArrayLike, hits: ArrayLike, n: ArrayLike) -> tuple[Floats, Bools]:
        """The largest lower bound for p so far (0: none above 1/2) and whether to stop, given the ``best`` of earlier checks (at first 0)."""
        hits, n, best = _counts(hits, n, best)
        best = np.maximum(best, lower_bound(hits, n, self.test.alpha))
        cap = np.maximum(n, self.test.max_samples)
        hits_at_cap = np.maximum(cap * hits / np.maximum(n, 1), 1)
        reachable = ndtri(np.maximum(betaincinv(hits_at_cap, cap - hits_at_cap + 1, self.test.alpha), 0.5))
        shown = ndtri(np.maximum(best, 0.5))
        small = (best > 0) & (reachable - shown <= np.maximum(self.absolute, self.relative * shown))
        hopeless = (best == 0) & (self.test.verdict(hits, n, 0.5) == GIVEN_UP)
        return best, (n >= self.test.max_samples) | small | hopeless


def _counts(hits: ArrayLike, n: ArrayLike, p: ArrayLike) -> tuple[Floats, Floats, Floats]:
    hits, n, p = np.broadcast_arrays(*(np.asarray(v, dtype=np.float64) for v in (hits, n, p)))
    assert ((hits >= 0) & (hits <= n)).all(), "hits must lie between 0 and the number of samples"
    assert ((p >= 0) & (p <= 1)).all(), "probabilities must lie in [0, 1]"
    return hits, n, p
