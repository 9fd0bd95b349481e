"""The purifier replaces exactly what is anomalous, from exactly what is not, and is honest about its gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amsdn.errors import InputError
from amsdn.models.pooling import EVIDENCE_EPS, pooled
from amsdn.models.purification.selective_purifier import PRIOR, AnomalyHead, SelectivePurifier


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


def attention_like(levels: list[Tensor]) -> list[Tensor]:
    return [torch.rand(len(f), 1, *f.shape[2:], generator=torch.Generator().manual_seed(f.shape[2])) * 2 for f in levels]


def by_maps(purifier: SelectivePurifier, levels: list[Tensor], attention: list[Tensor], bounded: bool) -> list[Tensor]:
    """The definition, location by location: every gated one replaced by what was rebuilt, then the weighted mean over the map."""
    means = []
    for f, weight, head, denoiser in zip(levels, attention, purifier.heads, purifier.denoisers, strict=True):
        anomaly = torch.sigmoid(head(f))
        gated = anomaly > purifier.threshold
        trust = torch.where(gated, 0.0, (1 - anomaly) * weight)
        unit = (f.square().mean(1, keepdim=True) + EVIDENCE_EPS).rsqrt() if bounded else 1.0
        rebuilt = denoiser((f * unit * trust).sum((2, 3)) / trust.sum((2, 3)).clamp_min(1e-9))
        if bounded:
            rebuilt = rebuilt * (rebuilt.square().mean(1, keepdim=True) + EVIDENCE_EPS).rsqrt()
        whole = torch.where(gated, rebuilt[:, :, None, None], f * unit)
        means.append((whole * weight).mean((2, 3)))
    return means


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_evidence_is_the_mean_of_maps_with_rebuilt_locations(seed: int, bounded: bool) -> None:
    purifier, levels = alerted(8, seed)
    with torch.no_grad():
        for p in purifier.denoisers.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.2)
    attention = attention_like(levels)
    out = purifier(levels, attention, bounded=bounded, straight_through=False)
    assert 0 < sum(int(g.sum()) for g in out.gates) < sum(g.numel() for g in out.gates)
    for ours, plain in zip(out.evidence, by_maps(purifier, levels, attention, bounded), strict=True):
        torch.testing.assert_close(ours, plain)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), bounded=st.booleans())
def test_a_gated_location_has_exactly_no_influence(seed: int, bounded: bool) -> None:
    purifier, levels = alerted(6, seed)
    purifier.heads = torch.nn.ModuleList(Recalled(head(f).detach()) for head, f in zip(purifier.heads, levels, strict=True))
    clean = purifier(levels, bounded=bounded, straight_through=False)
    attacked = [torch.where(g.bool(), f * -50 + 1000, f) for f, g in zip(levels, clean.gates, strict=True)]
    shouted = purifier(attacked, bounded=bounded, straight_through=False)
    assert all(torch.equal(a, b) for a, b in zip(clean.evidence, shouted.evidence, strict=True))


class Recalled(torch.nn.Module):
    """An anomaly head that says what it said before."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, f: Tensor) -> Tensor:
        return self.logits


def test_the_untrained_denoiser_fills_a_hole_with_the_mean_of_the_others() -> None:
    purifier = SelectivePurifier(4, levels=1)
    f, logits = torch.full((1, 4, 8, 8), 3.0), torch.full((1, 1, 8, 8), -20.0)
    f[:, :, 2:5, 2:5] = -1000
    logits[:, :, 2:5, 2:5] = 20.0
    purifier.heads = torch.nn.ModuleList([Recalled(logits)])
    (evidence,) = purifier([f], straight_through=False).evidence
    torch.testing.assert_close(evidence, torch.full((1, 4), 3.0))


@pytest.mark.parametrize("bounded", [False, True])
def test_where_everything_is_gated_nothing_of_the_input_survives(bounded: bool) -> None:
    purifier = SelectivePurifier(4, levels=1)
    purifier.heads = torch.nn.ModuleList([Recalled(torch.full((1, 1, 8, 8), 20.0))])
    (evidence,) = purifier([features(1, 4, 8, 8)], bounded=bounded, straight_through=False).evidence
    assert torch.equal(evidence, torch.zeros(1, 4))


def test_without_gates_the_evidence_is_plain_pooling() -> None:
    purifier, levels = SelectivePurifier(8), alerted(8)[1]
    attention = attention_like(levels)
    for bounded in (False, True):
        found = purifier(levels, attention, bounded=bounded, straight_through=True).evidence
        for ours, f, weight in zip(found, levels, attention, strict=True):
            torch.testing.assert_close(ours, pooled(f, weight, bounded=bounded))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_straight_through_changes_no_value(seed: int) -> None:
    purifier, levels = alerted(8, seed)
    hard, soft = (purifier(levels, straight_through=s) for s in (False, True))
    for a, b in zip([*hard.evidence, *hard.gates], [*soft.evidence, *soft.gates], strict=True):
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
    levels = [features(2, 8, s, s) for s in (16, 8, 4, 2)]  # a lone location has nothing to be rebuilt from
    for straight_through in (False, True):
        purifier.zero_grad()
        out = purifier(levels, straight_through=straight_through)
        sum(e.square().sum() for e in out.evidence).backward()  # type: ignore[union-attr]
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


@pytest.mark.parametrize("size", [(16, 16), (15, 9), (8, 8)])
def test_the_image_map_is_made_by_bilinear_interpolation(size: tuple[int, int]) -> None:
    purifier = SelectivePurifier(8)
    levels = [features(2, 1, s, s, seed=s) for s in (8, 4, 2, 1)]
    plain = torch.stack([F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in levels]).mean(0)
    torch.testing.assert_close(purifier.combine(levels, size), plain)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.5, float("nan")])
def test_a_threshold_outside_the_open_interval_is_refused(threshold: float) -> None:
    with pytest.raises(InputError, match="purification_threshold must lie"):
        SelectivePurifier(8, threshold)
