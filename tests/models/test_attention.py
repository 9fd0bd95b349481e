"""Attention starts as the identity, mixes with true softmax weights, and lets gradients through from the first step."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amsdn.models.attention.adaptive_attention import AdaptiveAttention, ChannelAttention, PyramidAttention, SpatialAttention, resize
from amsdn.models.layout import channel_max, channel_mean, space_mean


def pyramid(batch: int, channels: int, finest: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, finest // 2**i, finest // 2**i, generator=generator) for i in range(4)]


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))


@settings(max_examples=12, deadline=None)
@given(channels=st.sampled_from([8, 24, 64]), finest=st.sampled_from([8, 16, 32, 56]), batch=st.integers(1, 2))
def test_attention_starts_as_the_identity_at_every_shape(channels: int, finest: int, batch: int) -> None:
    levels = pyramid(batch, channels, finest)
    out = AdaptiveAttention(channels)(levels)
    for before, after, gate, weights in zip(levels, out.levels, out.spatial, out.pyramid, strict=True):
        assert torch.equal(before, after)
        assert torch.equal(gate, torch.ones(batch, 1, *before.shape[2:]))
        assert weights.shape == (batch, 4, *before.shape[2:])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_pyramid_weights_are_a_distribution_over_levels_at_every_location(seed: int) -> None:
    module = PyramidAttention(8)
    randomise(module, seed)
    levels = pyramid(2, 8, 16, seed)
    mixed, weights = module(levels)
    for level, weight in zip(mixed, weights, strict=True):
        assert (weight >= 0).all()
        torch.testing.assert_close(weight.sum(1), torch.ones_like(weight[:, 0]))
        assert level.isfinite().all()


def test_a_score_that_favours_one_level_carries_that_levels_value() -> None:
    module = PyramidAttention(8, reduction=1)
    levels = [torch.full((1, 8, s, s), float(k)) for k, s in enumerate((8, 4, 2, 1), start=1)]
    with torch.no_grad():
        for k, source in enumerate(module.sources):
            source.weight.zero_()
            source.bias.zero_()
            source.weight[:8, :, 0, 0] = torch.eye(8)  # the value carried is the feature itself
            source.bias[8:] = 50.0 if k == 2 else 0.0  # every target prefers the third level
        for out in module.outs:
            out.weight[:, :, 0, 0] = torch.eye(8)
    mixed, _ = module(levels)
    for before, after in zip(levels, mixed, strict=True):
        torch.testing.assert_close(after, before + 3.0)


def test_gates_stay_between_zero_and_two() -> None:
    f = pyramid(2, 16, 16)[0]
    for module, shape in ((SpatialAttention(), (2, 1, 16, 16)), (ChannelAttention(16), (2, 16, 1, 1))):
        randomise(module)
        gate = module(f)
        assert gate.shape == shape
        assert ((gate >= 0) & (gate <= 2)).all()
        assert gate.unique().numel() > 1


def test_gradients_reach_the_zero_started_layers() -> None:
    module = AdaptiveAttention(8)
    levels = pyramid(2, 8, 8)
    sum(((f - 1) ** 2).sum() for f in module(levels).levels).backward()  # type: ignore[union-attr]
    for attention in (*module.where, *module.what):
        last = attention.score if isinstance(attention, SpatialAttention) else attention.excite
        assert last.weight.grad.abs().sum() > 0
    assert all(out.weight.grad.abs().sum() > 0 for out in module.scale.outs)


def test_resize_means_when_shrinking_and_repeats_when_growing() -> None:
    f = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert resize(f, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(resize(f, (8, 8)), f.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert resize(f, (4, 4)) is f


def test_reductions_equal_their_plain_forms_with_gradients() -> None:
    for ours, plain in (
        (space_mean, lambda f: f.mean((2, 3))),
        (channel_mean, lambda f: f.mean(1, keepdim=True)),
        (channel_max, lambda f: f.amax(1, keepdim=True)),
    ):
        a, b = (pyramid(2, 8, 8)[0].requires_grad_() for _ in range(2))
        left, right = ours(a), plain(b)
        torch.testing.assert_close(left, right)
        (left**2).sum().backward()
        (right**2).sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
