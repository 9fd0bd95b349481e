"""A GPU is asked only now and then whether all is finite; the step and the cause are named all the same."""

import pytest
import torch

from amsdn.training.divergence import FiniteWatch, TrainingDiverged
from amsdn.training.ranks import ALONE


def test_the_first_step_that_broke_is_named_however_late_somebody_looks() -> None:
    watch = FiniteWatch("train", 100, ALONE)
    fine, broken = torch.tensor(1.0), torch.tensor(torch.nan)
    watch.note(5, fine, fine, {"a": fine})
    watch.note(6, broken, fine, {"a": fine, "b": torch.tensor(torch.inf)})
    watch.note(7, broken, broken, {"a": broken, "b": broken})
    with pytest.raises(TrainingDiverged, match=r"^train: not finite at step 6 of 100: b \(loss nan, gradient norm 1\); lower"):
        watch.check()


@pytest.mark.parametrize(("loss", "norm", "culprit"), [(1.0, torch.inf, "the gradient"), (torch.nan, 1.0, "the loss")])
def test_without_a_metric_to_blame_it_is_the_loss_or_the_gradient(loss: float, norm: float, culprit: str) -> None:
    watch = FiniteWatch("train", 9, ALONE)
    watch.note(1, torch.tensor(loss), torch.tensor(norm), {})
    with pytest.raises(TrainingDiverged, match=f"step 1 of 9: {culprit} "):
        watch.check()


def test_what_was_found_finite_is_forgotten() -> None:
    watch = FiniteWatch("train", 9, ALONE)
    watch.check()
    watch.note(1, torch.tensor(1.0), torch.tensor(1.0), {})
    watch.check()
    assert not watch.unchecked
