"""The calibrated threshold keeps its promise exactly, whatever the scores."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amsdn.errors import InputError
from amsdn.models.amsdn import AMSDN
from amsdn.models.detection import DetectionHead, conformal_threshold

RATES = st.sampled_from([0.01, 0.05, 0.1, 0.29, 0.5])
SCORES = st.one_of(st.sampled_from([0.0, 0.25, 1.0]), st.floats(0, 1, width=32))  # ties are likely


@settings(max_examples=200, deadline=None)
@given(scores=st.lists(SCORES, min_size=1, max_size=120), rate=RATES)
def test_the_threshold_is_the_lowest_that_keeps_the_stated_share(scores: list[float], rate: float) -> None:
    values = torch.tensor(scores)
    threshold = conformal_threshold(values, rate)
    assert int((values > threshold).sum()) <= len(scores) * rate
    allowed = math.floor((len(scores) + 1) * rate + 1e-9)
    if allowed == 0:
        assert threshold == 1.0
    else:  # the next lower score would have let the rank's whole allowance pass
        assert int((values >= threshold).sum()) >= allowed


@settings(max_examples=50, deadline=None)
@given(scores=st.lists(SCORES, min_size=2, max_size=60), rate=RATES)
def test_a_fresh_image_is_flagged_at_most_at_the_rate(scores: list[float], rate: float) -> None:
    """Exchangeability, by enumeration: each of the scores in turn is the fresh one, the others calibrate."""
    values = torch.tensor(scores)
    flagged = [bool(values[i] > conformal_threshold(torch.cat([values[:i], values[i + 1 :]]), rate)) for i in range(len(scores))]
    assert sum(flagged) <= len(scores) * rate + 1e-9


def test_known_ranks() -> None:
    hundred = torch.arange(100) / 100
    assert conformal_threshold(hundred, 0.05) == pytest.approx(0.95)  # rank ceil(101 * 0.95) = 96
    assert conformal_threshold(hundred[:19], 0.05) == pytest.approx(0.18)  # rank 19 of 19
    assert conformal_threshold(hundred[:18], 0.05) == 1.0  # too few: never detect


@pytest.mark.parametrize(
    ("scores", "rate", "message"),
    [([], 0.05, "at least one"), ([0.5], 0.0, "false_positive_rate"), ([0.5], 1.0, "false_positive_rate"),
     ([0.5, math.nan], 0.05, r"in \[0,1\]"), ([-1.0], 0.05, r"in \[0,1\]"), ([3.0], 0.05, "not logits")],
)  # fmt: skip
def test_what_cannot_be_calibrated_is_refused(scores: list[float], rate: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        conformal_threshold(torch.tensor(scores), rate)


def test_calibrate_sets_the_decision_and_remembers_the_rate() -> None:
    model = AMSDN(variant="compact", width=4).eval()
    images = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = model.analyze(images).anomaly_score
        threshold = model.calibrate(scores, 0.1)
        after = model.analyze(images)
    assert torch.equal(after.anomaly_score, scores)
    assert torch.equal(after.detected, scores > threshold)
    assert 0 < int(after.detected.sum()) <= 4
    assert float(model.false_positive_rate) == pytest.approx(0.1)


def test_a_hot_spot_anywhere_in_a_map_reaches_the_head() -> None:
    head = DetectionHead(2)
    maps = [torch.full((1, 1, 8, 8), -4.0), torch.full((1, 1, 4, 4), -4.0)]
    cold = head(maps)
    for level in range(2):
        hot = [m.clone() for m in maps]
        hot[level][0, 0, 1, 2] = 6.0
        assert head(hot).shape == (1,)
        assert not torch.equal(head(hot), cold)
        moved = [m.clone() for m in maps]
        moved[level][0, 0, 3, 3] = 6.0
        torch.testing.assert_close(head(moved), head(hot))  # figures do not depend on the place
