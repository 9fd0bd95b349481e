import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri

from amsdn.evaluation.detection import auroc, iou, map_auroc, pointing_game, roc_points, threshold_at_fpr, tpr_at_fpr

scores = st.lists(st.integers(0, 8).map(lambda i: i / 8), min_size=1, max_size=25)  # few values, so that ties are common


@given(scores, scores)
def test_auroc_counts_the_pairs(clean: list[float], attacked: list[float]) -> None:
    wins = sum((a > c) + (a == c) / 2 for a in attacked for c in clean)
    found = auroc(clean, attacked)
    assert found is not None
    assert found.value == pytest.approx(wins / (len(clean) * len(attacked)))
    assert 0 <= found.low <= found.value + 1e-9
    assert found.value <= found.high + 1e-9 <= 1 + 2e-9
    mirrored = auroc(attacked, clean)
    assert mirrored is not None
    assert mirrored.value == pytest.approx(1 - found.value)


@given(scores, scores)
def test_auroc_interval_ends_are_z_hanley_mcneil_errors_away(clean: list[float], attacked: list[float]) -> None:
    found = auroc(clean, attacked)
    assert found is not None
    extra = (len(clean) + len(attacked)) / 2 - 1
    for end in {found.low, found.high} - {0.0, 1.0}:
        q1, q2 = end / (2 - end), 2 * end**2 / (1 + end)  # Hanley & McNeil 1982
        variance = (end * (1 - end) + extra * (q1 - end**2) + extra * (q2 - end**2)) / (len(clean) * len(attacked))
        assert abs(found.value - end) == pytest.approx(ndtri(0.975) * math.sqrt(variance), rel=1e-4)
    assert found.low < found.high  # also where separation is perfect


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_auroc_interval_covers_the_truth(shift: float) -> None:
    """Two normal populations, scores of one image correlated 0.5: at least nominal coverage, up to the simulation's error."""
    rng = np.random.default_rng(1)
    truth = ndtr(shift / math.sqrt(2))
    covered = 0
    for _ in range(300):
        shared = rng.normal(size=30)
        clean, attacked = ((shared + rng.normal(size=30)) / math.sqrt(2) for _ in range(2))
        found = auroc(list(clean), list(attacked + shift))
        assert found is not None
        covered += found.low <= truth <= found.high
    assert covered / 300 > 0.95 - 3 * math.sqrt(0.05 * 0.95 / 300)


@given(scores, st.sampled_from([0.0, 0.01, 0.05, 0.2, 0.5]))
def test_threshold_keeps_the_false_positive_rate_and_is_the_lowest_that_does(clean: list[float], fpr: float) -> None:
    threshold = threshold_at_fpr(clean, fpr)
    assert sum(s > threshold for s in clean) <= fpr * len(clean) + 1e-9
    assert sum(s >= threshold for s in clean) > fpr * len(clean) + 1e-9


def test_a_share_that_is_whole_in_exact_arithmetic_is_allowed_in_full() -> None:
    clean = [i / 100 for i in range(100)]
    assert sum(s > threshold_at_fpr(clean, 0.07) for s in clean) == 7  # 0.07 * 100 is 7.000000000000001
    assert sum(s > threshold_at_fpr(clean, 0.29) for s in clean) == 29  # 0.29 * 100 is 28.999999999999996


def test_tpr_at_fpr() -> None:
    found = tpr_at_fpr([i / 20 for i in range(20)], [0.5, 0.9, 0.91, 2.0], 0.05)
    assert found is not None
    rate, threshold = found
    assert threshold == 0.9
    assert (rate.successes, rate.n) == (2, 4)  # a score at the threshold is not flagged
    assert tpr_at_fpr([], [1.0], 0.05) is None
    nobody = tpr_at_fpr([0.1], [], 0.05)
    assert nobody is not None
    assert nobody[0].value is None


@given(scores, scores)
def test_roc_is_a_staircase_of_achievable_rates_with_the_right_area(clean: list[float], attacked: list[float]) -> None:
    points = roc_points(clean, attacked)
    assert points[0] == (0.0, 0.0)
    assert points[-1] == (1.0, 1.0)
    assert points == sorted(points)
    area = sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(points))
    found = auroc(clean, attacked)
    assert found is not None
    assert area == pytest.approx(found.value)
    achievable = {(sum(s >= t for s in clean) / len(clean), sum(s >= t for s in attacked) / len(attacked)) for t in [*clean, *attacked]}
    assert set(points[1:]) <= achievable


def test_nothing_to_compare() -> None:
    assert auroc([], [0.5]) is None
    assert auroc([0.5], []) is None
    assert roc_points([], [0.5]) == []


def maps() -> tuple[torch.Tensor, torch.Tensor]:
    """Three 4x4 maps: one that points right, one constant, one with nothing to find."""
    changed = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    changed[:2, :, :2, :2] = True
    heat = torch.zeros(3, 1, 4, 4)
    heat[0, 0, :2, :3] = 0.6
    heat[0, 0, 0, 0] = 0.9
    heat[1] = 0.5
    return heat, changed


def test_localisation_by_hand() -> None:
    heat, changed = maps()
    first, constant, nothing = map_auroc(heat, changed)
    assert first == pytest.approx(1 - (2 * 3 / 2) / (4 * 12))  # three changed pixels tie with two unchanged ones
    assert (constant, nothing) == (0.5, None)
    assert iou(heat, changed, 0.5) == [4 / 6, 0.0, None]
    assert pointing_game(heat, changed) == [1.0, 0.25, None]


def test_localisation_is_undefined_where_everything_changed() -> None:
    everything = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    assert map_auroc(torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)), everything) == [None]
