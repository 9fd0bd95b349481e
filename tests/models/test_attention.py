"""Attention starts as the identity, its shares are true softmax weights, and gradients pass from the first step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amsdn.models.attention.adaptive_attention import AdaptiveAttention, ChannelAttention, PyramidAttention, SpatialAttention, resize
from amsdn.models.layout import space_mean, weighted_space_means


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
    levels, module = pyramid(batch, channels, finest), AdaptiveAttention(channels)
    out = module(levels)
    for level, weight, gate in zip(levels, out.weights, out.spatial, strict=True):
        assert torch.equal(weight, torch.ones(batch, 1, *level.shape[2:]))
        assert torch.equal(gate, weight)
    assert out.pyramid.shape == (batch, 4, finest // 2, finest // 2)
    pooled = torch.rand(batch, 4 * channels)
    assert torch.equal(module.select(pooled), pooled)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_weights_are_spatial_gates_times_shares_that_sum_to_the_number_of_levels(seed: int) -> None:
    module, levels = AdaptiveAttention(8), pyramid(2, 8, 16, seed)
    randomise(module, seed)
    out = module(levels)
    assert (out.pyramid >= 0).all()
    torch.testing.assert_close(out.pyramid.sum(1), torch.ones(2, 8, 8))
    for k, (level, weight, gate) in enumerate(zip(levels, out.weights, out.spatial, strict=True)):
        share = resize(out.pyramid[:, k : k + 1], (level.shape[2], level.shape[3]))
        torch.testing.assert_close(weight, gate * 4 * share)
        assert ((gate >= 0) & (gate <= 2)).all()
        assert gate.unique().numel() > 1


def test_shares_compare_the_levels_at_each_place_on_the_second_levels_grid() -> None:
    scores = [torch.zeros(1, 1, s, s) for s in (4, 2, 1)]
    scores[0][0, 0, 0, 0] = 4.0  # its mean over the 2x2 cells that share a place is 1
    scores[2] += 0.5
    shares = PyramidAttention()(scores)
    corner = torch.tensor([1.0, 0.0, 0.5]).softmax(0)
    elsewhere = torch.tensor([0.0, 0.0, 0.5]).softmax(0)
    torch.testing.assert_close(shares[0, :, 0, 0], corner)
    torch.testing.assert_close(shares[0, :, 1, 1], elsewhere)
    assert PyramidAttention()([torch.zeros(1, 1, 4, 4)]).shape == (1, 1, 4, 4)


def test_channel_gates_stay_between_zero_and_two() -> None:
    module, pooled = ChannelAttention(16), torch.rand(5, 16) + 0.1
    randomise(module)
    gate = module(pooled) / pooled
    assert ((gate >= 0) & (gate <= 2)).all()
    assert gate.unique().numel() > 1
    torch.testing.assert_close(SpatialAttention()(torch.tensor([-50.0, 0.0, 50.0])), torch.tensor([0.0, 1.0, 2.0]))


def test_gradients_reach_the_zero_started_layers() -> None:
    module, levels = AdaptiveAttention(8), pyramid(2, 8, 8)
    out = module(levels)
    pooled = torch.cat([weighted_space_means(f, w).squeeze(1) for f, w in zip(levels, out.weights, strict=True)], 1)
    ((module.select(pooled) - 1) ** 2).sum().backward()
    assert all(score.weight.grad[k].abs().sum() > 0 for score in module.scores for k in (0, 1))
    assert module.select.excite.weight.grad.abs().sum() > 0


def test_resize_means_when_shrinking_and_repeats_when_growing() -> None:
    f = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert resize(f, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(resize(f, (8, 8)), f.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert resize(f, (4, 4)) is f


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_reductions_equal_their_plain_forms_with_gradients(layout: torch.memory_format) -> None:
    weights = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for ours, plain in (
        (space_mean, lambda f: f.mean((2, 3))),
        (lambda f: weighted_space_means(f, weights), lambda f: (f[:, None] * weights[:, :, None]).mean((3, 4))),
    ):
        a, b = (pyramid(2, 8, 8)[0].contiguous(memory_format=layout).requires_grad_() for _ in range(2))
        left, right = ours(a), plain(b)
        torch.testing.assert_close(left, right)
        (left**2).sum().backward()
        (right**2).sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
