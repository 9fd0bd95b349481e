"""The purifier replaces exactly what is anomalous, from exactly what is not, and is honest about its gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amsdn.errors import InputError
from amsdn.models.purification.selective_purifier import PRIOR, AnomalyHead, Denoiser, SelectivePurifier


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def alerted(channels: int, seed: int = 0) -> tuple[SelectivePurifier, list[Tensor]]:
    """A purifier with random heads, so that some gates are open and some closed, and a pyramid for it."""
    purifier = SelectivePurifier(channels)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for head in purifier.heads:
            head.score.weight.copy_(torch.randn(head.score.weight.shape, generator=generator) * 3)
            head.score.bias.zero_()
    return purifier, [features(2, channels, s, s, seed=seed + s) for s in (8, 4, 2, 1)]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([2, 5, 7, 8, 16]))
def test_a_location_of_anomaly_one_has_exactly_no_influence(seed: int, size: int) -> None:
    denoiser = Denoiser(6)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    f = features(1, 6, size, size, seed=seed)
    anomaly = torch.rand(1, 1, size, size, generator=generator)
    anomaly[torch.rand(1, 1, size, size, generator=generator) < 0.3] = 1.0
    attacked = torch.where(anomaly == 1, f * -50 + 1000, f)
    assert torch.equal(denoiser(f, anomaly), denoiser(attacked, anomaly))


def test_the_untrained_denoiser_fills_a_hole_with_the_mean_of_its_surroundings() -> None:
    f = torch.full((1, 4, 8, 8), 3.0)
    anomaly = torch.zeros(1, 1, 8, 8)
    anomaly[:, :, 2:5, 2:5] = 1
    f[:, :, 2:5, 2:5] = -1000
    torch.testing.assert_close(Denoiser(4)(f, anomaly), torch.full((1, 4, 8, 8), 3.0))


def test_where_everything_is_anomalous_nothing_of_the_input_survives() -> None:
    f = features(1, 4, 8, 8)
    assert torch.equal(Denoiser(4)(f, torch.ones(1, 1, 8, 8)), torch.zeros(1, 4, 8, 8))


def test_only_gated_locations_change_and_they_take_the_rebuilt_value_exactly() -> None:
    purifier, levels = alerted(8)
    out = purifier(levels, straight_through=False)
    opened = 0
    for f, fused, logit, gate, denoiser in zip(levels, out.levels, out.anomaly_logits, out.gates, purifier.denoisers, strict=True):
        anomaly = torch.sigmoid(logit)
        assert torch.equal(gate, (anomaly > 0.5).float())
        assert torch.equal(fused, torch.where(gate.bool(), denoiser(f, anomaly), f))
        opened += int(gate.sum())
    assert 0 < opened < sum(g.numel() for g in out.gates)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_straight_through_changes_no_value(seed: int) -> None:
    purifier, levels = alerted(8, seed)
    hard, soft = (purifier(levels, straight_through=s) for s in (False, True))
    for a, b in zip([*hard.levels, *hard.gates], [*soft.levels, *soft.gates], strict=True):
        assert torch.equal(a, b)


def test_gradient_flows_through_the_gate_only_when_straight_through() -> None:
    anomaly = torch.tensor([0.1, 0.45, 0.5, 0.9]).reshape(1, 1, 2, 2).requires_grad_()
    purifier = SelectivePurifier(8)
    assert not purifier.gate(anomaly, False).requires_grad
    (slope,) = torch.autograd.grad(purifier.gate(anomaly, True).sum(), anomaly)
    soft = torch.sigmoid((anomaly.detach() - 0.5) / 0.1)
    torch.testing.assert_close(slope, soft * (1 - soft) / 0.1)


def test_the_heads_learn_through_closed_gates_only_when_straight_through() -> None:
    purifier = SelectivePurifier(8)  # anomaly about 0.02: every gate is closed
    levels = [features(2, 8, s, s) for s in (8, 4, 2, 1)]
    for straight_through in (False, True):
        purifier.zero_grad()
        out = purifier(levels, straight_through=straight_through)
        assert all(torch.equal(f, fused) for f, fused in zip(levels, out.levels, strict=True))
        sum(f.square().sum() for f in out.levels).backward()  # type: ignore[union-attr]
        slopes = [head.score.bias.grad for head in purifier.heads]
        assert all((g is not None and float(g.abs().sum()) > 0) is straight_through for g in slopes)


def test_untrained_maps_start_near_the_prior() -> None:
    out = torch.sigmoid(AnomalyHead(16)(features(2, 16, 8, 8)))
    assert ((out - PRIOR).abs() < 0.01).all()


def test_the_image_map_is_a_weighted_mean_of_the_levels() -> None:
    purifier = SelectivePurifier(8)
    levels = [torch.full((1, 1, s, s), v) for s, v in ((8, 1.0), (4, 2.0), (2, 3.0), (1, 6.0))]
    torch.testing.assert_close(purifier.combine(levels, (16, 16)), torch.full((1, 1, 16, 16), 3.0))
    with torch.no_grad():
        purifier.level_weights.copy_(torch.tensor([-90.0, 0.0, -90.0, -90.0]))
    torch.testing.assert_close(purifier.combine(levels, (16, 16)), torch.full((1, 1, 16, 16), 2.0))


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.5, float("nan")])
def test_a_threshold_outside_the_open_interval_is_refused(threshold: float) -> None:
    with pytest.raises(InputError, match="purification_threshold must lie"):
        SelectivePurifier(8, threshold)
