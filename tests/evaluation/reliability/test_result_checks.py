"""Results beside one another: what is consistent passes, what is not fails by the amount that it should."""

import pytest
import torch

from amsdn.evaluation.reliability.result_checks import (
    effort_is_enough,
    falls_with_budget,
    falls_without_limit,
    standing,
    stronger_wins,
    transfers,
)


def first(count: int, of: int = 100) -> torch.Tensor:
    return torch.arange(of) < count


def test_nothing_may_stand_without_limit() -> None:
    assert falls_without_limit(first(2)).passed
    assert not falls_without_limit(first(3)).passed


def test_a_curve_may_not_rise() -> None:
    assert falls_with_budget({8: first(10), 4: first(40), 2: first(80)}).passed
    revived = falls_with_budget({2: first(80), 4: first(40), 8: torch.arange(100) >= 90})
    assert not revived.passed
    assert revived.measured == pytest.approx(0.10)
    assert "8 and not under 4" in revived.told


def test_the_weaker_may_win_by_chance_alone() -> None:
    white = first(50)
    assert stronger_wins("search", white, first(60), "told").passed
    assert stronger_wins("search", white, first(45), "told").passed  # five of five: p = .03
    found = stronger_wins("search", white, first(40), "told")
    assert not found.passed
    assert found.measured == pytest.approx(0.5**10)
    assert "by the weaker 10, by the stronger 0" in found.told
    assert stronger_wins("search", white, white, "told").passed


def test_more_effort_may_break_half_a_point_or_one_image() -> None:
    assert effort_is_enough(first(50), first(49)).passed
    assert not effort_is_enough(first(50), first(48)).passed
    assert effort_is_enough(first(500, 1000), first(495, 1000)).passed
    assert not effort_is_enough(first(500, 1000), first(494, 1000)).passed


def test_what_fools_the_surrogate_fools_the_model() -> None:
    assert transfers(first(10), first(5)).passed
    assert not transfers(first(10), first(4)).passed
    assert transfers(first(0), first(0)).passed


def test_standing() -> None:
    assert standing([True, False]).tolist() == [True, False]
