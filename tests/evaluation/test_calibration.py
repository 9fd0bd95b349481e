"""The calibration error against its definition, and against answers whose error is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amsdn.evaluation.calibration import BINS, calibration

answers = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60)


@given(answers)
def test_the_error_is_its_definition(pairs: list[tuple[float, bool]]) -> None:
    total = 0.0
    for i in range(BINS):
        inside = [(c, r) for c, r in pairs if i / BINS < c <= (i + 1) / BINS or (i == 0 and c == 0)]
        edges = any(abs(c * BINS - round(c * BINS)) < 1e-9 and c not in (0, 1) for c, _ in pairs)
        if edges:
            return  # which side a rounded edge falls on is nobody's business
        if inside:
            total += abs(sum(r for _, r in inside) - sum(c for c, _ in inside)) / len(pairs)
    found = calibration([c for c, _ in pairs], [r for _, r in pairs])
    assert found is not None
    assert found.error == pytest.approx(total, abs=1e-12)
    assert sum(b.n for b in found.bins) == found.n == len(pairs)


def test_known_answers() -> None:
    assert calibration([], []) is None
    perfect = calibration([1.0] * 50 + [0.5] * 10, [True] * 50 + [True, False] * 5)
    assert perfect is not None
    assert perfect.error == 0
    assert [(b.n, b.confidence, b.accuracy) for b in perfect.bins] == [(10, 0.5, 0.5), (50, 1.0, 1.0)]
    boastful = calibration([1.0] * 40, [True] * 10 + [False] * 30)
    assert boastful is not None
    assert boastful.error == 0.75
    assert boastful.low < 0.75 < boastful.high


def test_it_is_the_same_every_time_and_narrows_with_more_images() -> None:
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.4, 1, 2000)
    right = rng.uniform(size=2000) < sure - 0.2
    few, many = (calibration(list(sure[:n]), list(right[:n])) for n in (200, 2000))
    assert few is not None
    assert many is not None
    assert many == calibration(list(sure), list(right))
    assert many.error == pytest.approx(0.2, abs=0.04)
    assert many.high - many.low < few.high - few.low
