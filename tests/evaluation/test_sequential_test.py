"""Exact oracles: the supermartingale identity, dynamic programming over (n, hits), quadrature, brute force over verdicts."""

import csv
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc, logsumexp, ndtr, ndtri
from scipy.stats import binom

from amsdn.errors import InputError
from amsdn.evaluation.sequential_test import (
    CERTIFIED,
    GIVEN_UP,
    OPEN,
    LargestRadius,
    RadiusTests,
    SequentialTest,
    Verdicts,
    exceeds,
    least_hits,
    log_evidence,
    lower_bound,
)

COHEN = Path(__file__).parents[3] / "shared/data/third_party/cohen_cifar10_resnet110_sigma_0.25.tsv"
BOUNDARIES = [0.5, float(ndtr(1)), float(ndtr(2)), 0.99]
Array = NDArray[np.float64]


def crossing(p: float, least: ArrayLike) -> float:
    """The exact chance that hits reach ``least[n - 1]`` after some n = 1, 2, ... samples (an entry above n: not looked at)."""
    least = np.asarray(least)
    law, total = np.zeros(len(least) + 2), 0.0
    law[0] = 1  # of the hits so far, on the paths that have not crossed
    for bound in least.astype(int):
        law[1:] = law[1:] * (1 - p) + law[:-1] * p
        law[0] *= 1 - p
        total += float(law[bound:].sum())
        law[bound:] = 0
    assert total + law.sum() == pytest.approx(1)
    return total


def looked_at(least: Array, times: list[int]) -> Array:
    """The bounds with all other times out of reach."""
    kept = np.arange(1, len(least) + 1) + 1.0
    kept[np.array(times) - 1] = least[np.array(times) - 1]
    return kept


def own_times(test: SequentialTest) -> list[int]:
    times = [0]
    while times[-1] < test.max_samples:
        times.append(int(test.next_check(times[-1])))
    return times[1:]


def by_quadrature(hits: int, n: int, p0: float) -> float:
    """log M with q = sin(t)^2, under which the Jeffreys prior is uniform in t: Gauss-Legendre on 4000 panels."""
    nodes, weights = np.polynomial.legendre.leggauss(10)
    edges = np.linspace(math.asin(math.sqrt(p0)), math.pi / 2, 4001)
    t = (edges[:-1, None] + np.diff(edges)[:, None] * (nodes + 1) / 2).ravel()
    with np.errstate(divide="ignore", invalid="ignore"):
        log_ratio = 2 * hits * np.log(np.sin(t)) + 2 * (n - hits) * np.log(np.cos(t)) - hits * math.log(p0) - (n - hits) * math.log1p(-p0)
    return float(logsumexp(log_ratio, b=np.tile(weights / 2, 4000)) - math.log(4000))


# --- the martingale ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p0", [0.1, *BOUNDARIES, 0.99999])
@pytest.mark.parametrize("n", [0, 1, 7, 100, 5000, 1_000_000])
def test_evidence_is_the_integral(n: int, p0: float) -> None:
    spread = math.sqrt(n * p0 * (1 - p0))
    for hits in {0, n, *(min(max(round(n * p0 + z * spread), 0), n) for z in (-5, -1, 0, 2, 4, 8))}:
        found = float(log_evidence(hits, n, p0))
        expected = by_quadrature(hits, n, p0)
        if hits >= n * p0 - 5 * spread - 1:
            assert found == pytest.approx(expected, abs=2e-8)
        else:  # far below p0 the integral may underflow, to no evidence at all
            assert found <= expected + 2e-8 * max(1, abs(expected))
            assert expected < 0


@pytest.mark.parametrize("p0", [0.3, *BOUNDARIES])
def test_evidence_is_a_supermartingale_that_starts_at_1(p0: float) -> None:
    """The exact one-step identity: a martingale at p0, and below p0 it only falls. With Ville's inequality this is the proof."""
    assert float(log_evidence(0, 0, p0)) == pytest.approx(0, abs=1e-12)
    n, hits = np.meshgrid(np.arange(80), np.arange(80))
    n, hits = n[hits <= n], hits[hits <= n]
    now, hit, miss = (np.exp(log_evidence(a, m, p0)) for a, m in ((hits, n), (hits + 1, n + 1), (hits, n + 1)))
    np.testing.assert_allclose(p0 * hit + (1 - p0) * miss, now, rtol=1e-9)
    for p in (0.99 * p0, 0.5 * p0, 0.0):
        assert (p * hit + (1 - p) * miss <= now * (1 + 1e-12)).all()


def test_evidence_where_nothing_can_be_shown() -> None:
    assert log_evidence([0, 5, 10], 10, 1.0).tolist() == [-np.inf] * 3
    assert log_evidence(0, 1_000_000, 0.9999) < -1000
    assert not exceeds([0, 5, 10, 10**6], [10, 10, 10, 10**6], 1.0, 0.4).any()
    assert not exceeds(0, 0, 0.5, 0.4)


@given(st.integers(1, 3000), st.floats(0.01, 0.9999), st.sampled_from([0.4, 0.05, 0.001, 1e-9]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_least_hits_is_the_first_that_passes(n: int, p0: float, alpha: float) -> None:
    passing = exceeds(np.arange(n + 1), n, p0, alpha)
    assert (np.diff(passing.astype(int)) >= 0).all()
    assert least_hits(n, p0, alpha) == (passing.argmax() if passing.any() else n + 1)


# --- soundness: exact, at any stopping time -----------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize("p0", BOUNDARIES)
def test_false_certification_at_any_time(p0: float, alpha: float) -> None:
    """Looking after every sample is the supremum over all ways to stop. The level is used, not wasted: at least a third of it on the boundary."""
    times = np.arange(1, 2001)
    least = least_hits(times, p0, alpha)
    always = crossing(p0, least)
    assert alpha / 3 < always <= alpha
    blocks = crossing(p0, looked_at(least, [*range(25, 2001, 25)]))
    own = crossing(p0, looked_at(least, own_times(SequentialTest(alpha, max_samples=2000))))
    assert 0 < blocks < always
    assert 0 < own < always
    for under in (p0 - 0.002, 0.95 * p0, 0.5 * p0):
        assert crossing(under, least) < always
    assert crossing(0.5 * p0, least) < alpha / 20


@pytest.mark.parametrize("p0", BOUNDARIES)
def test_a_doubled_alpha_is_caught(p0: float) -> None:
    """The same computation with 1/(2 alpha) for the bound exceeds alpha at every boundary tried."""
    assert crossing(p0, least_hits(np.arange(1, 3001), p0, 2 * 0.001)) > 0.001


@pytest.mark.parametrize("p0", BOUNDARIES)
def test_false_certification_in_simulation(p0: float) -> None:
    """1e5 streams judged by ``verdict`` as a scheduler would, on, just under and far under the boundary."""
    test, trials = SequentialTest(alpha=0.01, beta=0.001, max_samples=1000), 100_000
    tables = {n: test.verdict(np.arange(n + 1), n, p0) for n in own_times(test)}
    rng = np.random.default_rng(0)
    shares = []
    for p in (p0, p0 - 0.005, 0.9 * p0):
        live, before, false = np.zeros(trials, dtype=np.int64), 0, 0
        for n, table in tables.items():
            live = live + rng.binomial(n - before, p, len(live))
            verdicts, before = table[live], n
            false += int((verdicts == CERTIFIED).sum())
            live = live[verdicts == OPEN]
        assert len(live) == 0
        shares.append(false / trials)
    assert shares[0] > shares[1] >= shares[2]
    assert 0.001 < shares[0] <= 0.01
    assert shares[2] < 0.001


# --- the lower bound ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.4])
def test_lower_bound_is_the_infimum_from_below(alpha: float) -> None:
    grid = np.linspace(0.5, 1, 501)
    for n in (1, 5, 20, 77, 1000):
        hits = np.unique(np.linspace(0, n, 78).astype(int))
        rejected = exceeds(hits[:, None], n, grid, alpha)
        assert (np.diff(rejected.astype(int), axis=1) <= 0).all(), "the rejected values must form one interval from 1/2 on"
        infimum = np.where(rejected[:, 0], grid[rejected.argmin(1)], 0)
        found = lower_bound(hits, n, alpha)
        assert (found <= infimum).all()
        assert (found >= np.where(infimum > 0, infimum - (grid[1] - grid[0]), 0)).all()
        assert (np.diff(found) >= 0).all()
        assert exceeds(hits, n, np.maximum(found, 0.5), alpha)[found > 0].all()


@pytest.mark.parametrize("p", [0.3, 0.5, 0.6, 0.9, 0.977])
def test_coverage_of_the_running_maximum(p: float) -> None:
    """The exact chance that any of 400 bounds, so also their maximum, exceeds p."""
    alpha, n = 0.05, np.arange(1, 401)
    low, high = np.full(400, -1), n + 1
    while (high - low > 1).any():
        middle = (low + high) // 2
        above = lower_bound(np.maximum(middle, 0), n, alpha) > p
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    false = crossing(p, high)
    assert false <= alpha
    assert false > (alpha / 2 if p >= 0.5 else 0)


@given(st.integers(1, 100_000), st.floats(0, 1), st.floats(0.5, 0.9999))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_lower_bound_agrees_with_the_target_test(n: int, share: float, p0: float) -> None:
    hits = round(n * share)
    bound = float(lower_bound(hits, n, 0.001))
    if abs(bound - p0) > 1e-6:
        assert bool(exceeds(hits, n, p0, 0.001)) == (bound > p0)
    assert bound <= (hits / n if bound else 0)
    exact = betainc(hits, n - hits + 1, bound) if bound else 0
    assert exact <= 0.001, "a bound that holds at all times cannot be above Clopper and Pearson's"


# --- verdicts, giving up, when to look ----------------------------------------------------------------------------------


@given(st.integers(0, 1100), st.floats(0.05, 1), st.sampled_from([0.3, 0.01, 1e-4]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_verdicts_grow_with_hits_and_end_at_the_cap(n: int, p0: float, beta: float) -> None:
    test = SequentialTest(alpha=0.01, beta=beta, max_samples=1000)
    verdicts = test.verdict(np.arange(n + 1), n, p0)
    assert verdicts.dtype == np.int8
    assert (np.diff(verdicts.astype(int)) >= 0).all()
    assert ((verdicts == CERTIFIED) == exceeds(np.arange(n + 1), n, p0, 0.01)).all()
    assert n < 1000 or (verdicts != OPEN).all()
    impossible = np.arange(n + 1) + max(1000 - n, 0) < least_hits(max(n, 1000), p0, 0.01)
    assert (verdicts[impossible] == GIVEN_UP).all()


def certified_exactly(test: SequentialTest, p: float, p0: float) -> tuple[float, float]:
    """The exact chance of certification and the mean number of samples, under the test's own schedule."""
    law, before, certified, mean = np.ones(1), 0, 0.0, 0.0
    for n in own_times(test):
        law = np.convolve(law, binom.pmf(np.arange(n - before + 1), n - before, p))
        likely, before = np.flatnonzero(law > 1e-15), n
        verdicts = np.zeros(n + 1)
        verdicts[likely] = test.verdict(likely, n, p0)
        certified += float(law[verdicts == CERTIFIED].sum())
        mean += n * float(law[verdicts != OPEN].sum())
        law = np.where(verdicts == OPEN, law, 0)
    return certified, mean


def test_giving_up_is_cheap_and_seldom_a_loss() -> None:
    p0, test, never = float(ndtr(1)), SequentialTest(max_samples=2000), SequentialTest(beta=1e-12, max_samples=2000)
    for p, chance, samples in ((0.99, 0.999, 90), (0.9, 0.97, 700)):
        certified, mean = certified_exactly(test, p, p0)
        assert certified > chance
        assert mean < samples
    for p, samples in ((0.3, 33), (0.7, 70), (0.8, 300)):
        certified, mean = certified_exactly(test, p, p0)
        assert certified < 1e-4
        assert mean < samples
    assert 0 <= certified_exactly(never, 0.9, p0)[0] - certified_exactly(test, 0.9, p0)[0] < 0.01


def test_the_forecast_is_about_right() -> None:
    """Against the exact beta-binomial chance of enough hits at the cap: the normal approximation stays within a factor of ten in beta."""
    from scipy.stats import betabinom

    test, p0 = SequentialTest(beta=0.01, max_samples=2000), 0.8
    needed = int(least_hits(2000, p0, test.alpha))
    for n in (50, 200, 1000, 1900):
        hits = np.arange(n + 1)
        chance = betabinom.sf(needed - hits - 1, 2000 - n, hits + 0.5, n - hits + 0.5)
        given_up = test.verdict(hits, n, p0) == GIVEN_UP
        assert (chance[given_up] < 0.1).all()
        assert given_up[chance < 0.0005].all()


def test_next_check() -> None:
    test = SequentialTest(max_samples=5000)
    times = own_times(test)
    assert times[:3] == [32, 64, 96]
    assert times[-1] == 5000
    assert all(0 < b - a <= max(32, a / 20) for a, b in itertools.pairwise(times))
    assert test.next_check([0, 4999, 5000, 6000]).tolist() == [32, 5000, 5000, 5000]


@pytest.mark.skipif(not COHEN.exists(), reason=f"Cohen's published log is not at {COHEN}")
@pytest.mark.parametrize("radius", [0.25, 0.5])
def test_the_defaults_reach_the_goal_on_cohens_images(radius: float) -> None:
    """Mean samples <= 1,600 and at most 0.2 points lost against n = 100,000. Abstentions are given p = 1/2, dearer than anything below."""
    with COHEN.open(newline="") as file:
        rows = [(float(r["radius"]), r["correct"] == "1") for r in csv.DictReader(file, delimiter="\t")]
    published, correct = (np.array(column) for column in zip(*rows, strict=True))
    low, high = np.zeros(len(rows)), np.full(len(rows), 1e5)
    for _ in range(50):  # the hits that give this Clopper-Pearson bound
        middle = (low + high) / 2
        enough = betainc(middle, 1e5 - middle + 1, ndtr(published / 0.25)) <= 0.001
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    repeats, test, p0 = 20, SequentialTest(), float(ndtr(radius / 0.25))
    p = np.repeat(np.where(published > 0, high / 1e5, 0.5), repeats)
    rng, tests = np.random.default_rng(0), RadiusTests(test, [p0])
    states, hits, spent, live, before = tests.start(len(p)), np.zeros(len(p)), np.zeros(len(p)), np.arange(len(p)), 0
    for n in own_times(test):
        hits[live] += rng.binomial(n - before, p[live])
        states[live] = tests.advance(states[live], hits[live], np.full(len(live), n))
        spent[live], before = n, n
        live = live[~tests.done(states[live])]
    certified = (tests.certified(states) == 1) & np.repeat(correct, repeats)
    assert len(live) == 0
    assert 100 + spent.mean() <= 1600
    assert ((published >= radius) & correct).mean() - certified.mean() <= 0.002


# --- several targets ----------------------------------------------------------------------------------------------------


class Scripted(SequentialTest):
    """A test whose verdicts are told beforehand."""

    script: Verdicts

    def verdict(self, hits: ArrayLike, n: ArrayLike, p0: ArrayLike, *, needed: Array | None = None) -> Verdicts:
        return self.script


@pytest.mark.parametrize(("targets", "steps"), [(1, 3), (2, 3), (3, 2)])
def test_the_gate_against_all_orders_of_events(targets: int, steps: int) -> None:
    """Certified are the leading targets the first verdict of each of which was 1, whatever order the verdicts come in."""
    scripts = np.array([*itertools.product((GIVEN_UP, OPEN, CERTIFIED), repeat=steps * targets)], dtype=np.int8)
    scripts = scripts.reshape(-1, steps, targets)
    test = Scripted()
    tests = RadiusTests(test, np.linspace(0.5, 0.9, targets).tolist())
    states, before = tests.start(len(scripts)), np.zeros(len(scripts), dtype=np.int64)
    for step in range(steps):
        object.__setattr__(test, "script", scripts[:, step])
        states = tests.advance(states, np.zeros(len(scripts)), np.zeros(len(scripts)))
        assert (tests.certified(states) >= before).all(), "a certificate stands"
        before = tests.certified(states)
    for script, count, done in zip(scripts, tests.certified(states), tests.done(states), strict=True):
        first = [next((v for v in column if v != OPEN), OPEN) for column in script.T]
        assert count == next((k for k, v in enumerate(first) if v != CERTIFIED), targets)
        decided = next((k for k, v in enumerate(first) if v == GIVEN_UP), targets)
        assert done == all(v != OPEN for v in first[:decided])


def test_any_false_target_is_as_rare_as_alpha() -> None:
    """Ten nested targets above a p that sits on the first false one: the chance that any of them is certified stays at alpha."""
    test, p, trials = SequentialTest(alpha=0.05, beta=0.001, max_samples=320), 0.7, 20_000
    tests = RadiusTests(test, [0.55, 0.65, 0.7, 0.71, 0.72, 0.75, 0.8, 0.85, 0.9, 0.95])
    tables: dict[int, Verdicts] = {}
    rng, before, hits = np.random.default_rng(1), 0, np.zeros(trials, dtype=np.int64)
    states = tests.start(trials)
    for n in own_times(test):
        hits, before = hits + rng.binomial(n - before, p, trials), n
        # every image's row depends on its own counts and state alone, so equal pairs can be advanced once
        keys, back = np.unique(np.column_stack([hits, states]), axis=0, return_inverse=True)
        tables[n] = tests.advance(keys[:, 1:].astype(np.int8), keys[:, 0], np.full(len(keys), n))
        states = tables[n][back.ravel()]
    assert tests.done(states).all()
    false = float((tests.certified(states) > 2).mean())
    assert 0.005 < false <= 0.05
    assert (tests.certified(states) >= 1).mean() > 0.8


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    tests = RadiusTests(SequentialTest(max_samples=500), [0.6, 0.8, 0.95])
    rng = np.random.default_rng(2)
    n = rng.integers(1, 500, 60)
    hits = rng.binomial(n, rng.uniform(0.4, 1, 60))
    together = tests.advance(tests.start(60), hits, n)
    alone = [tests.advance(tests.start(1), hits[i : i + 1], n[i : i + 1])[0] for i in range(60)]
    assert np.array_equal(together, np.stack(alone))
    assert {-1, 0, 1} == set(np.unique(together))


def test_targets_out_of_reach_are_given_up_at_once() -> None:
    tests = RadiusTests(SequentialTest(max_samples=1000), [0.9, 0.9999999, 1.0])
    assert tests.start(2).tolist() == [[0, -1, -1]] * 2
    states = tests.advance(tests.start(1), [1000], [1000])
    assert states.tolist() == [[1, -1, -1]]
    assert tests.certified(states).tolist() == [1]


# --- prediction ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [(0.5, 0.5, 0.0), (0.4, 0.4, 0.2), (1 / 3, 1 / 3, 1 / 3), (0.3, 0.36, 0.34)])
def test_a_prediction_is_wrong_with_probability_alpha_at_most(p: tuple[float, float, float]) -> None:
    """Exact, over all counts of three classes: the guess (the first) is not the only most probable class. Looked at after every sample."""
    test = SequentialTest(alpha=0.05, max_samples=40)
    law, wrong = np.zeros((42, 42, 42)), 0.0
    law[0, 0, 0] = 1
    a, b, c = np.indices(law.shape)
    for n in range(1, 41):
        law = p[0] * np.roll(law, 1, 0) + p[1] * np.roll(law, 1, 1) + p[2] * np.roll(law, 1, 2)
        here = a + b + c == n
        answered = np.zeros(law.shape, dtype=bool)
        answered[here] = test.prediction_verdict(a[here], np.maximum(b[here], c[here]), n) == CERTIFIED
        wrong += float(law[answered].sum())
        law[answered] = 0  # futility is ignored, which can only add errors
    assert wrong + law.sum() == pytest.approx(1)
    assert 0 < wrong <= 0.05


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_prediction_properties(hits: int, runner_up: int, others: int) -> None:
    test, n = SequentialTest(alpha=0.01, max_samples=800), hits + runner_up + others
    verdict = int(test.prediction_verdict(hits, runner_up, n))
    assert (verdict == CERTIFIED) == bool(exceeds(hits, hits + runner_up, 0.5, 0.01))
    assert verdict >= int(test.prediction_verdict(hits, runner_up + others, n)), "more votes for the rival never help"
    if exceeds(hits, n, 0.5, 0.01):
        assert verdict == CERTIFIED
    if n >= 800:
        assert verdict != OPEN
    if hits <= runner_up:
        assert verdict != CERTIFIED


def test_prediction_gives_up_on_a_lost_guess_and_goes_on_while_open() -> None:
    test = SequentialTest(max_samples=10_000)
    assert test.prediction_verdict([0, 0, 20, 200, 60, 5000], [0, 60, 10, 190, 2, 5000], [0, 100, 40, 400, 200, 10_000]).tolist() == [
        OPEN,
        GIVEN_UP,
        OPEN,
        OPEN,
        CERTIFIED,
        GIVEN_UP,
    ]


# --- the largest radius -------------------------------------------------------------------------------------------------


def test_largest_radius_keeps_the_best_and_stops() -> None:
    rule = LargestRadius(SequentialTest(max_samples=20_000), relative=0.05, absolute=0.02)
    p = np.array([0.1, 0.45, 0.505, 0.6, 0.9, 0.999, 1.0])
    rng, hits, best, before = np.random.default_rng(3), np.zeros(7), np.zeros(7), 0
    stops = np.full(7, -1)
    for n in own_times(rule.test):
        hits, before = hits + rng.binomial(n - before, p), n
        improved, stop = rule.improve(best, hits, n)
        assert (improved >= best).all()
        assert (improved == np.maximum(best, lower_bound(hits, n, rule.test.alpha))).all()
        best = improved
        stops = np.where((stops < 0) & stop, n, stops)
    assert (stops > 0).all()
    assert (best <= np.where(p > 0.5, p, 0)).all()
    assert best[:2].tolist() == [0, 0]
    assert stops[0] == 32
    assert stops[4] < 20_000
    assert ndtri(best[4]) > 0.93 * ndtri(0.9)
    everything = LargestRadius(rule.test, relative=0, absolute=0).improve(0, 990, 1000)
    assert not everything[1], "with no tolerance the bound is improved to the end"


def test_bad_settings() -> None:
    for values in ({"alpha": 0.0}, {"alpha": 0.5}, {"alpha": float("nan")}, {"beta": 0.0}, {"beta": 0.5}, {"max_samples": 0}):
        with pytest.raises(InputError, match="sequential test"):
            SequentialTest(**values)  # type: ignore[arg-type]
    for targets in ([], [0.9, 0.8], [0.5, 0.5], [0.0, 0.5], [0.5, 1.1], [float("nan")]):
        with pytest.raises(InputError, match="growing"):
            RadiusTests(SequentialTest(), targets)
    with pytest.raises(InputError, match="tolerances"):
        LargestRadius(relative=float("nan"))
    with pytest.raises(AssertionError, match="hits"):
        exceeds(3, 2, 0.5, 0.01)
