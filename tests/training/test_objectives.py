"""The mathematics of the losses, against values worked out by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from amsdn.training.objectives import (
    anomaly_map_loss,
    detector_losses,
    divergence,
    feature_pull,
    instance_logits,
    level_targets,
    mean_answer_entropy,
    noise_consistency,
)


def test_level_targets_mark_a_pixel_on_the_finest_level_and_its_share_above() -> None:
    changed = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    changed[0, 0, 5, 2] = True
    fine, coarse = level_targets(changed, [(4, 4), (2, 2)])
    assert fine.nonzero().tolist() == [[0, 0, 2, 1]]
    assert fine.max() == 1
    assert coarse.tolist() == [[[[0.0, 0.0], [0.25, 0.0]]]]


def test_level_targets_of_a_whole_quadrant_are_one_there() -> None:
    changed = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    changed[..., :4, 4:] = True
    assert level_targets(changed, [(4, 4), (2, 2)])[1].tolist() == [[[[0.0, 1.0], [0.0, 0.0]]]]


def test_anomaly_map_loss_by_hand() -> None:
    changed = torch.tensor([[[[True, False]]]])
    logits = torch.tensor([[[[0.3, -0.2]]]])
    positive, negative = math.log1p(math.exp(-0.3)), math.log1p(math.exp(-0.2))
    assert math.isclose(float(anomaly_map_loss([logits], changed, positive_weight=4.0)), (4 * positive + negative) / 2, rel_tol=1e-5)


def test_detector_losses_label_an_image_by_whether_any_pixel_changed() -> None:
    changed = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    changed[1, 0, 3, 3] = True
    logit = torch.tensor([-1.0, 2.0])
    level, whole = torch.zeros(2, 1, 2, 2), torch.full((2, 1, 4, 4), 0.5)
    found = detector_losses([level], whole, logit, changed)
    assert torch.allclose(found["anomaly_map"], (anomaly_map_loss([level], changed) + anomaly_map_loss([whole], changed)) / 2)
    assert torch.allclose(found["detection"], F.binary_cross_entropy_with_logits(logit, torch.tensor([0.0, 1.0])))


def test_feature_pull_is_zero_on_scaled_copies_two_on_opposites_and_passes_no_gradient_to_the_teacher() -> None:
    f = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    teacher = f.detach().clone().requires_grad_(True)
    assert feature_pull([2 * f], [teacher]).detach().abs() < 1e-6
    assert torch.isclose(feature_pull([-f], [teacher]).detach(), torch.tensor(2.0))
    feature_pull([f + 1], [teacher]).backward()
    assert teacher.grad is None
    assert f.grad is not None


def test_noise_consistency_is_the_mean_divergence_of_the_average_from_each() -> None:
    a, b = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[0.0, 0.5, 0.2]])
    p, q = a.softmax(1), b.softmax(1)
    m = (p + q) / 2
    entropy = -(m * m.log()).sum()
    # KL(m || p) + KL(m || q), halved: cross-entropies minus the entropy of the mean.
    expected = -0.5 * ((m * p.log()).sum() + (m * q.log()).sum()) - entropy
    assert torch.allclose(noise_consistency(a, b), expected, atol=1e-6)
    assert abs(float(noise_consistency(a, a))) < 1e-6


def test_noise_consistency_of_several_copies_and_the_entropy_of_their_mean_by_hand() -> None:
    """Jeong and Shin's loss for m = 3, from probabilities: mean over copies of KL(mean || copy), and H(mean)."""
    copies = [torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).double() for seed in range(3)]
    probabilities = [c.softmax(1) for c in copies]
    mean = sum(probabilities) / 3
    divergences = [(mean * (mean / p).log()).sum(1).mean() for p in probabilities]
    found = noise_consistency(*copies), mean_answer_entropy(*copies)
    torch.testing.assert_close(found[0].double(), sum(divergences) / 3, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[1].double(), -(mean * mean.log()).sum(1).mean(), atol=1e-6, rtol=1e-5)
    assert float(mean_answer_entropy(torch.zeros(2, 4), torch.zeros(2, 4))) == pytest.approx(math.log(4))


def test_divergence_is_that_of_the_first_from_the_second_and_survives_certain_answers() -> None:
    a, b = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[0.0, 0.5, 0.2]])
    expected = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=a), torch.distributions.Categorical(logits=b))
    torch.testing.assert_close(divergence(a, b), expected)
    sure = torch.tensor([[200.0, 0.0]], requires_grad=True)
    worst = divergence(sure, -sure)
    (gradient,) = torch.autograd.grad(worst.sum(), sure)
    assert float(worst.detach()) == pytest.approx(200.0)
    assert bool(gradient.isfinite().all())


def test_instance_logits_single_out_the_matching_image_whatever_the_scale() -> None:
    bank = torch.eye(4)
    logits = instance_logits(3 * bank, 5 * bank, temperature=0.5)
    assert torch.allclose(logits, torch.eye(4) * 2)
