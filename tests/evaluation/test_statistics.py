import math
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtri

from amsdn.evaluation.statistics import (
    clopper_pearson,
    clopper_pearson_lower,
    holm,
    mcnemar,
    mean_interval,
    newcombe_paired,
    proportion,
    share,
    wilson,
)


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int]:
    n = draw(st.integers(1, 60))
    return draw(st.integers(0, n)), n


def upper_tail(k: int, n: int, p: float) -> float:
    """P(at least k successes), summed term by term."""
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


@given(counts(), st.sampled_from([0.8, 0.95, 0.999]))
def test_clopper_pearson_ends_are_where_the_binomial_tails_say(count: tuple[int, int], confidence: float) -> None:
    k, n = count
    low, high = clopper_pearson(k, n, confidence)
    tail = (1 - confidence) / 2
    assert low == 0 if k == 0 else upper_tail(k, n, low) == pytest.approx(tail, rel=1e-6)
    assert high == 1 if k == n else 1 - upper_tail(k + 1, n, high) == pytest.approx(tail, rel=1e-6)


@given(counts(), st.sampled_from([0.05, 0.001]))
def test_one_sided_bound_is_where_the_tail_is_alpha(count: tuple[int, int], alpha: float) -> None:
    k, n = count
    low = clopper_pearson_lower(k, n, alpha)
    assert low == 0 if k == 0 else upper_tail(k, n, low) == pytest.approx(alpha, rel=1e-6)


@pytest.mark.parametrize("p", [0.03, 0.5, 0.84, 0.99])
def test_one_sided_bound_exceeds_the_truth_with_probability_at_most_alpha(p: float) -> None:
    n, alpha = 80, 0.05
    wrong = math.fsum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1) if clopper_pearson_lower(k, n, alpha) > p)
    assert wrong <= alpha


@given(counts())
def test_wilson_ends_solve_the_score_equation(count: tuple[int, int]) -> None:
    k, n = count
    z = ndtri(0.975)
    for p in wilson(k, n):
        assert n * (k / n - p) ** 2 == pytest.approx(z * z * p * (1 - p), abs=1e-9)
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1


def test_no_samples_give_no_value_and_no_nan() -> None:
    nothing = proportion(0, 0)
    assert (nothing.value, nothing.low, nothing.high, str(nothing)) == (None, None, None, "no samples")
    assert wilson(0, 0) == clopper_pearson(0, 0) == (0.0, 1.0)


def test_text_form() -> None:
    assert str(proportion(143, 200)) == "71.5 % [64.9, 77.3]"
    assert share([True, False]).as_dict()["n"] == 2
    assert proportion(5, 5).as_dict()["high"] == 1.0


def test_impossible_counts_are_a_bug_in_the_caller() -> None:
    with pytest.raises(AssertionError, match="6 successes in 5"):
        proportion(6, 5)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30))
def test_mcnemar_is_the_sign_test_on_disagreements(pairs: list[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found = mcnemar(first, second)
    b, c = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    assert (found.only_first, found.only_second) == (b, c)
    expected = min(1.0, 2 * upper_tail(max(b, c), b + c, 0.5)) if b + c else 1.0
    assert found.p_value == pytest.approx(expected)
    assert mcnemar(second, first).p_value == found.p_value


def test_mcnemar_needs_the_same_samples() -> None:
    with pytest.raises(ValueError, match="zip"):
        mcnemar([True], [True, False])


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_a_means_interval_is_wilsons_where_values_are_zero_or_one(hits: list[bool]) -> None:
    found = mean_interval([float(hit) for hit in hits])
    assert (found.low, found.high) == (pytest.approx(wilson(sum(hits), len(hits))[0]), pytest.approx(wilson(sum(hits), len(hits))[1]))
    assert (found.value, found.n) == (pytest.approx(sum(hits) / len(hits)), len(hits))


def test_a_means_interval_covers_the_truth_of_values_in_between() -> None:
    rng = np.random.default_rng(0)
    found = [mean_interval(list(rng.beta(2, 5, 30))) for _ in range(400)]
    covered = sum(mean.low <= 2 / 7 <= mean.high for mean in found) / len(found)
    assert covered >= 0.95


tables = st.tuples(*[st.integers(0, 30)] * 4).filter(any)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [  # Newcombe's own results (1998), as the tests of the R package propint quote them: both, only first, only second, neither
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((18, 12, 2, 18), 0.0562, 0.3290),
        ((53, 0, 0, 1), -0.0729, 0.0729),
        ((0, 30, 0, 0), 0.8395, 1.0),
    ],
)
def test_paired_interval_is_the_published_one(table: tuple[int, int, int, int], low: float, high: float) -> None:
    assert newcombe_paired(*table) == pytest.approx((low, high), abs=6e-5)


@given(tables, st.sampled_from([0.8, 0.95, 0.999]))
def test_paired_interval_holds_the_difference_and_mirrors_it(table: tuple[int, int, int, int], confidence: float) -> None:
    both, first, second, neither = table
    low, high = newcombe_paired(*table, confidence)
    assert -1 <= low <= (first - second) / sum(table) <= high <= 1
    assert newcombe_paired(both, second, first, neither, confidence) == pytest.approx((-high, -low))
    assert newcombe_paired(neither, second, first, both, confidence) == pytest.approx((-high, -low))  # counting errors instead


@given(tables)
def test_without_correlation_it_is_the_interval_of_independent_samples(table: tuple[int, int, int, int]) -> None:
    both, first, second, neither = table
    n, product = sum(table), both * neither - first * second
    if not 0 <= product <= n / 2:  # phi is 0 just there, and where an outcome never varies
        return
    proportions = pytest.importorskip("statsmodels.stats.proportion")
    independent = proportions.confint_proportions_2indep(both + first, n, both + second, n, method="newcomb", compare="diff")
    assert newcombe_paired(*table) == pytest.approx(independent, abs=1e-9)


@cache
def paired_limits(both: int, first: int, second: int, neither: int) -> tuple[float, float]:
    return newcombe_paired(both, first, second, neither)


@pytest.mark.parametrize(
    "truth", [(0.25, 0.25, 0.25, 0.25), (0.7, 0.1, 0.05, 0.15), (0.5, 0.2, 0.1, 0.2), (0.05, 0.6, 0.05, 0.3), (0.9, 0.04, 0.03, 0.03)]
)
def test_paired_interval_covers_the_truth_as_often_as_it_says(truth: tuple[float, float, float, float]) -> None:
    n, covered = 15, 0.0
    for both in range(n + 1):
        for first in range(n + 1 - both):
            for second in range(n + 1 - both - first):
                table = (both, first, second, n - both - first - second)
                low, high = paired_limits(*table)
                if low <= truth[1] - truth[2] <= high:
                    ways = math.factorial(n) / math.prod(map(math.factorial, table))
                    covered += ways * math.prod(p**k for p, k in zip(truth, table, strict=True))
    assert covered >= 0.94


def test_no_pairs_say_nothing() -> None:
    assert newcombe_paired(0, 0, 0, 0) == (-1.0, 1.0)


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_is_the_closed_test_by_bonferroni(p_values: list[float]) -> None:
    """A hypothesis falls with every set of hypotheses it is in, each tested by its smallest p-value times its size."""
    everything = range(len(p_values))
    sets = [chosen for size in everything for chosen in combinations(everything, size + 1)]
    worst = [max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in sets if i in s) for i in everything]
    assert holm(p_values) == pytest.approx(worst)


@pytest.mark.parametrize("n", [1, 7, 40])
def test_holm_is_the_one_of_statsmodels(n: int) -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p_values = [0.03 * (i * 17 % n) / n for i in range(n)]
    assert holm(p_values) == pytest.approx(multitest.multipletests(p_values, method="holm")[1].tolist())


def test_one_test_needs_no_adjustment_and_none_gives_none() -> None:
    assert holm([0.03]) == [0.03]
    assert holm([]) == []
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
